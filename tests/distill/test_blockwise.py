"""FFNs that train by themselves: what is said of them against passes through the model, and what undoes them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_streamed import batches_of
from tiny_models import FAMILIES
from torch import Tensor, nn
from toy import NARROW, QUARTER, assert_same_weights, calibration, swapped, weights

from hyperfade.distill import LayerFit, calibrate, fit_
from hyperfade.distill.activations import real_rows, run
from hyperfade.distill.blockwise import Block, runs_alone, train_block_
from hyperfade.distill.correction import Aim
from hyperfade.errors import FitError
from hyperfade.nn import BlendLinear, NarrowLinear
from hyperfade.recipe import Fit, Layer, Replace
from hyperfade.surgery import FFN, set_alpha_

LOW_RANK = Replace(language=Layer(kind="low_rank", fraction=0.4), vision=Layer(kind="low_rank", fraction=0.4))
BY_BLOCKS = Fit(prefix="corrected", sweeps=3, ridge=0, block_epochs=4, block_learning_rate=3e-3)
PLAINLY = BY_BLOCKS.model_copy(update={"block_epochs": 0})


def _written(model: Any, ffn: FFN, batch: Any, send: Any) -> Tensor:
    """What the FFN's writer writes of a batch, in a pass through the model: (tokens, k)."""
    seen: list[Tensor] = []
    handle = model.get_submodule(ffn.writer).register_forward_hook(lambda _, args, output: seen.append(output))
    send(model, batch)
    handle.remove()
    return real_rows(ffn.name, seen[0], batch["attention_mask"])


@pytest.mark.parametrize("choice", [NARROW, LOW_RANK, QUARTER], ids=["narrow", "low-rank", "products"])
def test_what_is_said_of_a_block_is_what_passes_through_the_model_show(
    choice: Replace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weighted error on the eighth batch, and that of all tokens, without padding."""
    gains: list[float] = []

    def spy(model: Any, ffn: FFN, layers: Any, batches: Any, send: Any, aim: Aim, recipe: Fit) -> Block:
        def errors() -> tuple[float, float, float]:
            held_out, left, wanted = 0.0, 0.0, 0.0
            bias = layers[ffn.writer].dense.bias
            for number, batch in enumerate(batches):
                u, o = (real_rows(ffn.name, part(batch), batch["attention_mask"]) for part in (aim.added, aim.out))
                size = o.square().sum(-1)
                off = ((_written(model, ffn, batch, send) - u).square().sum(-1) / size).sum().item()
                held_out += off if number == 7 else 0.0
                left += off
                wanted += ((u - (0 if bias is None else bias)).square().sum(-1) / size).sum().item()
            return held_out, left, wanted

        before, _, _ = errors()
        start = weights(model)
        block = train_block_(model, ffn, layers, batches, send, aim, recipe)
        after, left, wanted = errors()
        assert block.held_out == pytest.approx(after / before, rel=1e-6)
        assert block.error == pytest.approx((left / wanted) ** 0.5, rel=1e-6)
        light = {f"{name}.light" for name in layers}
        changed = {n for n, w in weights(model).items() if not torch.equal(w, start[n])}
        assert all(any(name.startswith(own) for own in light) for name in changed)
        assert bool(changed) == (block.held_out < 1)
        gains.append(block.held_out)
        return block

    monkeypatch.setattr(calibrate, "train_block_", spy)
    student, _, plan = swapped(choice)
    fits = fit_(student, plan, calibration(9), BY_BLOCKS)
    assert min(gains) < 0.995  # observed 0.985, 0.984, 0.960
    assert [fit.held_out for fit in fits if fit.held_out is not None] == gains
    assert len(gains) == len(plan.ffns)


class _Mlp(nn.Module):
    """An FFN without an activation: what can be reached is known."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        reader, writer = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width)
        self.up = BlendLinear(reader, NarrowLinear(width, hidden, bias=False))
        self.down = BlendLinear(writer, NarrowLinear(hidden, width, bias=True))
        for blend in (self.up, self.down):
            blend.light.load_state_dict({f"core.{k}": v for k, v in blend.dense.state_dict().items()})

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


class _OneFfn:
    """An FFN, and sixteen batches with γ ⊙ (another FFN) and noise to aim at."""

    def __init__(self, scale: Tensor | None = None, noise: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.model = nn.Module()
        self.model.mlp, goal = _Mlp(6, 9).to(dtype), _Mlp(6, 9).to(dtype)
        self.model.forward = lambda x: self.model.mlp(x)  # type: ignore[method-assign]
        set_alpha_(self.model, 1.0)
        self.batches = [{"x": torch.randn(2, 20, 6, dtype=dtype)} for _ in range(16)]
        self.out = {id(b["x"]): torch.ones(2, 20, 6, dtype=dtype) for b in self.batches}
        gamma = 1.0 if scale is None else scale
        with torch.no_grad():
            self.added = {id(b["x"]): gamma * goal(b["x"]) + noise * torch.randn(2, 20, 6) for b in self.batches}
        self.aim = Aim(lambda batch: self.added[id(batch["x"])], lambda batch: self.out[id(batch["x"])], scale)
        self.ffn = FFN("mlp", "language", ("mlp.up",), "mlp.down")
        self.start = weights(self.model)

    def train(self, epochs: int = 100, rate: float = 1e-2) -> Block:
        layers = {"mlp.up": self.model.mlp.up, "mlp.down": self.model.mlp.down}  # type: ignore[union-attr]
        recipe = BY_BLOCKS.model_copy(update={"block_epochs": epochs, "block_learning_rate": rate})
        return train_block_(self.model, self.ffn, layers, self.batches, run, self.aim, recipe)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [None, torch.tensor([0.5, 2.0, -1.0, 0.1, 1.0, 0.0])])
def test_an_aim_that_can_be_reached_is_reached(scale: Tensor | None, dtype: torch.dtype) -> None:
    one = _OneFfn(scale, dtype=dtype)
    block = one.train()
    assert block.held_out < 1e-9  # observed 3e-14
    assert block.error < 1e-4  # observed 3e-7
    assert all(parameter.grad is None for parameter in one.model.parameters())


@pytest.mark.parametrize("noise", [0.0, 3.0], ids=["a plain aim", "a noisy aim"])
def test_what_does_not_pay_on_batches_held_out_is_undone(noise: float) -> None:
    one = _OneFfn(noise=noise)
    assert one.train(epochs=4, rate=30.0).held_out == 1  # steps far too large
    assert_same_weights(one.start, weights(one.model))


def test_a_token_whose_stream_is_next_to_nothing_does_not_outweigh_the_others() -> None:
    one = _OneFfn()
    for number, out in enumerate(one.out.values()):
        out[0, 0] *= 1e-6 if number % 2 else 0
    for added in one.added.values():
        added[0, 0] = torch.randn(6)  # nothing to be learnt here
    block = one.train()
    assert block.held_out < 0.8  # observed 0.60: half of these tokens count tenfold, the others not at all
    (batch, *_) = one.batches
    with torch.no_grad():
        off = (one.model(**batch) - one.added[id(batch["x"])]).flatten(0, 1)[1:]
    assert off.square().mean() < 0.05  # observed 0.022


def test_numbers_that_are_not_finite_are_named_and_change_nothing() -> None:
    one = _OneFfn()
    one.added[id(one.batches[7]["x"])][0, 3] = torch.nan  # a batch held out
    with pytest.raises(FitError, match=r"^mlp: .*not finite"):
        one.train()
    assert_same_weights(one.start, weights(one.model))


def test_an_interruption_leaves_the_weights_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    one, steps = _OneFfn(), iter(range(100))
    real = torch.optim.AdamW.step

    def step(self: Any) -> None:
        real(self)
        if next(steps) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(KeyboardInterrupt):
        one.train()
    assert_same_weights(one.start, weights(one.model))
    assert all(parameter.grad is None for parameter in one.model.parameters())


class _Residual(_Mlp):
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) + residual


class _Pair(_Mlp):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


class _Normed(_Mlp):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(width, hidden)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


class _Doubled(_Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("kind", [_Residual, _Pair, _Normed, _Doubled])
def test_modules_that_are_more_than_the_ffn_do_not_run_alone(kind: type[_Mlp]) -> None:
    one = _OneFfn()
    assert runs_alone(one.model, one.ffn, one.batches, run)
    one.model.mlp = kind(6, 9)
    if kind is _Residual:
        one.model.forward = lambda x: one.model.mlp(x, x)  # type: ignore[method-assign, operator]
    assert not runs_alone(one.model, one.ffn, one.batches, run)


def test_padding_may_hold_anything() -> None:
    one = _OneFfn()
    one.batches[0]["x"][0, -1] = torch.nan
    assert runs_alone(one.model, one.ffn, one.batches, run)


@pytest.mark.parametrize("number", [1, 2])
def test_two_batches_show_too_little_so_the_fit_stays_what_it_is(number: int) -> None:
    student, _, plan = swapped(NARROW)
    fits = fit_(student, plan, calibration(number), BY_BLOCKS)
    plainly, _, _ = swapped(NARROW)
    fit_(plainly, plan, calibration(number), PLAINLY)
    assert {fit.held_out for fit in fits} == {None}
    assert_same_weights(weights(student), weights(plainly))


def test_a_writer_has_not_seen_what_is_held_out() -> None:
    """Nor have the readers, nor what chooses units: the fit before the training is that of the other batches."""
    student, _, plan = swapped(NARROW)
    recipe = BY_BLOCKS.model_copy(update={"block_learning_rate": 1e3})  # all of it is undone
    assert {fit.held_out for fit in fit_(student, plan, calibration(9), recipe) if fit.correction is not None} == {1}
    plainly, _, _ = swapped(NARROW)
    seen = [batch for number, batch in enumerate(calibration(9)) if number != 7]
    fit_(plainly, plan, seen, PLAINLY)
    for name, weight in weights(plainly).items():
        torch.testing.assert_close(weights(student)[name], weight, rtol=1e-5, atol=1e-6)  # observed 0


@pytest.mark.parametrize("family", FAMILIES)
def test_ffns_of_all_families_train_but_those_that_lie_open_in_a_layer(family: str) -> None:
    student, _, plan = swapped(QUARTER, family)
    batches = 2 * batches_of(family)
    fits = fit_(student, plan, batches, Fit(prefix="corrected", sweeps=1, block_epochs=1))
    trained = {fit.name for fit in fits if fit.held_out is not None}
    open_ones = {ffn.writer for ffn in plan.ffns if family == "blip2_opt" and ffn.region == "language"}
    assert trained == {ffn.writer for ffn in plan.ffns} - open_ones


def test_bfloat16_stays_and_so_does_what_trains() -> None:
    student, _, plan = swapped(QUARTER)
    student.bfloat16()
    flags = {name: (p.dtype, p.requires_grad) for name, p in student.named_parameters()}
    batches = [{k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()} for batch in calibration(8)]
    fits = fit_(student, plan, batches, BY_BLOCKS)
    assert min(fit.held_out for fit in fits if fit.held_out is not None) < 0.995  # observed 0.957
    assert {n: (p.dtype, p.requires_grad) for n, p in student.named_parameters()} == {
        name: flags[name] for name in dict(student.named_parameters())
    }


def test_an_interrupted_fit_continues_to_the_same_weights(tmp_path: Path) -> None:
    whole, _, plan = swapped(NARROW)
    fits = fit_(whole, plan, calibration(8), BY_BLOCKS)
    seen: list[str] = []

    def stop(layer: LayerFit) -> None:
        seen.append(layer.name)
        if len(seen) == 7:
            raise KeyboardInterrupt

    stopped, _, plan = swapped(NARROW)
    with pytest.raises(KeyboardInterrupt):
        fit_(stopped, plan, calibration(8), BY_BLOCKS, tmp_path, stop)
    continued, _, plan = swapped(NARROW)
    again = fit_(continued, plan, calibration(8), BY_BLOCKS, tmp_path)
    assert_same_weights(weights(whole), weights(continued))
    assert [(f.name, f.error, f.held_out) for f in fits] == [(f.name, f.error, f.held_out) for f in again]


@pytest.mark.parametrize("changes", [{"prefix": "compressed"}, {"method": "frobenius", "prefix": "corrected"}])
def test_blocks_need_the_dense_models_stream(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="block_epochs needs the dense model's residual stream"):
        Fit(block_epochs=1, **changes)
