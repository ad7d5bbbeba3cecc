"""Fits that mend what lies before: the correction against least squares, landings against the layers' own code."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from test_streamed import batches_of
from tiny_models import FAMILIES
from torch import Tensor, nn
from toy import NARROW, QUARTER, assert_same_weights, batch_of, calibration, swapped, weights

from hyperfade.distill import LayerFit, beside, calibrate, fit_, fit_streamed
from hyperfade.distill.activations import run
from hyperfade.distill.correction import Aim, Corrected, corrected_writer
from hyperfade.distill.landing import landings
from hyperfade.distill.passes import Pass
from hyperfade.errors import FitError
from hyperfade.nn import BlendLinear, NarrowLinear
from hyperfade.recipe import Fit, Layer, Replace
from hyperfade.surgery import find_ffns, set_alpha_

LOW_RANK = Replace(language=Layer(kind="low_rank", fraction=0.4), vision=Layer(kind="low_rank", fraction=0.4))
CORRECTED = Fit(prefix="corrected", sweeps=3, ridge=0)


# --- the correction ---------------------------------------------------------------------------------------------------

K, HIDDEN, TOKENS = 5, 7, 200


class _Reader(nn.Module):
    """A model that is one writer."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        light = NarrowLinear(HIDDEN, K, bias=bias)
        self.writer = BlendLinear(nn.Linear(HIDDEN, K, bias=bias), light)

    def forward(self, h: Tensor) -> Tensor:
        return self.writer(h)


def _corrected(
    noise: float, change: float, batches: int = 4, bias: bool = True, scale: Tensor | None = None
) -> tuple[Corrected, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The correction of a writer aimed at γ ⊙ ((W + change · R) h + bias) + noise; W + change · R; and of all tokens
    h, the aim without the bias, and W."""
    model = _Reader(bias).double()
    dense, gamma = model.writer.dense, torch.ones(K) if scale is None else scale
    weight = dense.weight.detach()
    true = weight + change * torch.randn(K, HIDDEN, dtype=torch.float64)
    inputs = [torch.randn(2, TOKENS // 2, HIDDEN, dtype=torch.float64) for _ in range(batches)]
    wanted = [gamma * (h @ true.T) + noise * torch.randn(2, TOKENS // 2, K) for h in inputs]
    offset = gamma * dense.bias.detach() if bias else 0
    added = {id(h): u + offset for h, u in zip(inputs, wanted, strict=True)}
    aim = Aim(lambda batch: added[id(batch["h"])], lambda batch: added[id(batch["h"])], scale)
    found = corrected_writer(model, "writer", model.writer, [{"h": h} for h in inputs], 0, run, aim)
    return found, true, (torch.cat(inputs).reshape(-1, HIDDEN), torch.cat(wanted).reshape(-1, K), weight)


@pytest.mark.parametrize("bias", [True, False])
def test_an_aim_that_can_be_reached_is_reached(bias: bool) -> None:
    found, true, _ = _corrected(noise=0, change=1, bias=bias)
    assert found.share == pytest.approx(1, abs=1e-5)  # observed 1
    torch.testing.assert_close(found.writer, true, rtol=0, atol=2e-2)  # observed 3e-3, by the smallest damping
    assert found.error(found.writer) < 5e-3  # observed 1e-3


def test_noise_is_not_learnt_by_heart() -> None:
    """With 100 tokens to a half and an aim that is W h and noise, least squares would fit 7 % of the noise."""
    found, true, (h, y, _) = _corrected(noise=1, change=0, batches=2)
    lstsq = torch.linalg.lstsq(h, y).solution.T
    assert (found.writer - true).norm() < 0.5 * (lstsq - true).norm()  # observed 0.12
    assert found.share < 0.5  # observed 0.12


@pytest.mark.parametrize("scale", [None, torch.tensor([0.5, 2.0, -1.0, 1e-3, 0.0], dtype=torch.float64)])
def test_errors_are_those_of_what_reaches_the_stream(scale: Tensor | None) -> None:
    found, _, (h, u, w) = _corrected(noise=0.5, change=0.3, scale=scale)
    assert 0.5 < found.share <= 1  # observed 0.98 and 0.99
    gamma = torch.ones(K) if scale is None else scale
    for writer in (found.writer, w, torch.randn(K, HIDDEN, dtype=torch.float64)):
        expected = (u - gamma * (h @ writer.T)).norm() / u.norm()
        assert found.error(writer) == pytest.approx(expected.item(), rel=1e-9)  # observed 1e-15
    assert found.error(found.writer) < found.error(w)
    torch.testing.assert_close(found.moment, h.T @ h / len(h), rtol=1e-12, atol=1e-12)
    assert torch.equal(found.writer[gamma == 0], w[gamma == 0])  # what adds nothing stays as it was


def test_a_unit_that_never_fires_keeps_its_weights() -> None:
    model = _Reader(bias=False).double()
    sent = [{"h": torch.randn(30, HIDDEN, dtype=torch.float64)} for _ in range(2)]
    for batch in sent:
        batch["h"][:, 3] = 0
    aim = Aim(lambda batch: batch["h"][:, :K] * 2, lambda batch: batch["h"])
    found = corrected_writer(model, "writer", model.writer, sent, 0, run, aim)
    assert torch.equal(found.writer[:, 3], model.writer.dense.weight.detach()[:, 3])
    assert found.error(found.writer) < 5e-3  # observed 1e-3


def test_padding_counts_nothing() -> None:
    """Rows that the mask leaves out may hold anything, in what is read and in what is aimed at."""
    model = nn.Module()
    model.language_model = _Reader(bias=True).double()
    model.forward = lambda h, attention_mask: model.language_model(h)  # type: ignore[method-assign]
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    found = []
    for padding in (0.0, 1e6):
        torch.manual_seed(0)
        sent = [{"h": torch.randn(2, 4, HIDDEN, dtype=torch.float64), "attention_mask": mask} for _ in range(9)]
        wanted = {id(batch["h"]): torch.randn(2, 4, K, dtype=torch.float64) for batch in sent}
        for batch in sent:
            batch["h"][mask == 0] = wanted[id(batch["h"])][mask == 0, :1] = padding
        aim = Aim(lambda batch, wanted=wanted: wanted[id(batch["h"])], lambda batch: batch["h"])
        writer = model.language_model.writer
        found.append(corrected_writer(model, "language_model.writer", writer, sent, 0, run, aim))
    assert torch.equal(found[0].writer, found[1].writer)
    assert found[0].error(found[0].writer) == found[1].error(found[1].writer)


def test_the_share_is_what_pays_on_the_other_half() -> None:
    """The damped correction of each half, tried on the other with every share and damping there is."""
    found, _, (h, y, w) = _corrected(noise=3, change=0.3, batches=4)
    x, z = (part.split(TOKENS) for part in (h, y))
    halves = [(torch.cat(x[first::2]), torch.cat(z[first::2])) for first in (0, 1)]
    best = (float("inf"), 0.0)
    for damping in (1e-3, 1e-2, 1e-1, 1.0):
        for share in torch.linspace(0, 1, 201).tolist():
            error = 0.0
            for (h, y), (other_h, other_y) in (halves, halves[::-1]):
                gram = h.T @ h
                change = torch.linalg.solve(gram + damping * gram.diagonal().diag(), h.T @ (y - h @ w.T)).T
                error += (other_y - other_h @ (w + share * change).T).square().sum().item()
            best = min(best, (error, share))
    assert 0.05 < best[1] < 1  # observed 0.49
    assert found.share == pytest.approx(best[1], abs=0.003)


def test_one_batch_shows_nothing_so_nothing_is_corrected() -> None:
    found, _, (_, _, w) = _corrected(noise=0, change=1, batches=1)
    assert found.share == 0
    assert torch.equal(found.writer, w)


def test_numbers_that_are_not_finite_are_named() -> None:
    model = _Reader(bias=False).double()
    sent = [{"h": torch.randn(3, HIDDEN, dtype=torch.float64)}]

    def infinite(_: Any) -> Tensor:
        return torch.full((3, K), torch.inf)

    with pytest.raises(FitError, match=r"^writer: .*not finite"):
        corrected_writer(model, "writer", model.writer, sent, 0, run, Aim(infinite, infinite))


# --- landings ---------------------------------------------------------------------------------------------------------

ENTRIES = {  # the norm in front of the FFN
    "llava_siglip": {"language": "post_attention_layernorm", "vision": "layer_norm2"},
    "qwen2_5_vl": {"language": "post_attention_layernorm", "vision": "norm2"},
    "blip2_opt": {"language": "final_layer_norm", "vision": "layer_norm2"},
    "paligemma": {"language": "post_attention_layernorm", "vision": "layer_norm2"},
    "qwen2": {"language": "post_attention_layernorm"},
}


@pytest.mark.parametrize("family", ENTRIES)
def test_every_layer_of_these_families_is_the_stream_and_what_its_ffn_writes(family: str) -> None:
    model = FAMILIES[family].build().eval()
    ffns = [ffn for ffn in find_ffns(model) if ffn.readers and ffn.region in ENTRIES[family]]
    found = landings(model, ffns, FAMILIES[family].inputs())
    towers = [ffn for ffn in ffns if "layers" in ffn.name or "blocks" in ffn.name]
    assert towers
    for ffn in towers:
        landing = found[ffn.name]
        assert landing.scale is None
        assert landing.entry == f"{landing.layer}.{ENTRIES[family][ffn.region]}"
        assert ffn.name.startswith(landing.layer)


class _Layer(nn.Module):
    """x → x + scale(mlp(norm(x))), or another end."""

    def __init__(self, end: str) -> None:
        super().__init__()
        self.norm, self.mlp, self.end = (
            nn.LayerNorm(6),
            nn.ModuleDict({"fc1": nn.Linear(6, 9), "fc2": nn.Linear(9, 6)}),
            end,
        )
        self.scale, self.after = _Scale(), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp["fc2"](torch.relu(self.mlp["fc1"](self.norm(x))))
        return {
            "scaled": lambda: x + self.scale(y),
            "normed": lambda: x + self.after(y),
            "beside": lambda: x + torch.tanh(x) + y,
            "alone": lambda: y,
        }[self.end]()


class _Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(6))

    def forward(self, y: Tensor) -> Tensor:
        return y * self.gamma


@pytest.mark.parametrize("end", ["scaled", "normed", "beside", "alone"])
def test_scales_are_found_and_other_ends_are_not_taken_for_a_stream(end: str) -> None:
    model = nn.ModuleDict({"language_model": nn.Sequential(_Layer(end), _Layer(end))})
    model.forward = lambda x: model["language_model"](x)  # type: ignore[method-assign]
    found = landings(model, find_ffns(model), {"x": torch.randn(2, 4, 6)})
    if end != "scaled":
        assert found == {}
        return
    assert len(found) == 2
    for number, landing in enumerate(found.values()):
        layer: Any = model["language_model"][number]  # type: ignore[index]
        assert landing.entry == f"language_model.{number}.norm"
        assert landing.scale is not None
        assert torch.equal(landing.scale, layer.scale.gamma)


# --- the fit ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _stream(model: Any) -> Tensor:
    """What the last language layer gives out for examples that no fit has seen, padding left out: (tokens, width)."""
    batch = batch_of(range(100, 140))
    states = model(**{k: v for k, v in batch.items() if k != "labels"}, output_hidden_states=True).hidden_states
    return states[-2][batch["attention_mask"].bool()]


def _fitted(choice: Replace, recipe: Fit, **options: Any) -> tuple[Any, Any, list[LayerFit]]:
    student, teacher, plan = swapped(choice)
    fits = fit_(student, plan, calibration(8), recipe, **options)
    return student, teacher, fits


@pytest.mark.parametrize("choice", [NARROW, LOW_RANK, QUARTER], ids=["narrow", "low-rank", "products"])
def test_a_corrected_fit_leaves_the_stream_nearer_to_the_dense_models(choice: Replace) -> None:
    errors = {}
    for prefix in ("compressed", "corrected"):
        student, teacher, fits = _fitted(choice, CORRECTED.model_copy(update={"prefix": prefix}))
        set_alpha_(student, 1.0)
        errors[prefix] = _relative(_stream(teacher), _stream(student))
        corrections = [fit.correction for fit in fits if fit.correction is not None]
        assert len(corrections) == (0 if prefix == "compressed" else 5)
    # observed 0.3248 for 0.3263 (little is broken there), 0.556 for 0.572, 0.591 for 0.672
    assert errors["corrected"] < errors["compressed"]


def _passes() -> list[threading.Thread]:
    """Passes that wait for ever."""
    return [thread for thread in threading.enumerate() if isinstance(thread, Pass)]


def _relative(wanted: Tensor, given: Tensor) -> float:
    return ((given - wanted).norm() / wanted.norm()).item()


def test_a_writer_is_aimed_at_what_its_layer_gives_out_in_the_dense_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less what enters the norm behind the layers fitted before: which the finished model shows, since it has them."""
    aims: dict[str, list[Tensor]] = {}

    def spy(model: Any, name: str, writer: Any, batches: Any, ridge: float, send: Any, aim: Any) -> Any:
        aims[name.partition(".mlp")[0]] = [aim.added(batch) for batch in batches]
        return corrected_writer(model, name, writer, batches, ridge, send, aim)

    monkeypatch.setattr(calibrate, "corrected_writer", spy)
    student, teacher, plan = swapped(LOW_RANK)
    fit_(student, plan, calibration(2), CORRECTED)
    set_alpha_(student, 1.0)
    assert len(aims) == len(plan.ffns)
    for name, aimed in aims.items():
        norm = "post_attention_layernorm" if "language" in name else "layer_norm2"
        entered = _seen(student, f"{name}.{norm}", lambda args, output: args[0])
        given_out = _seen(teacher, name, lambda args, output: output[0] if isinstance(output, tuple) else output)
        for aim, stream, out in zip(aimed, entered, given_out, strict=True):
            torch.testing.assert_close(aim, out - stream, rtol=0, atol=1e-6)  # observed 0


@torch.no_grad()
def _seen(model: Any, name: str, what: Any) -> list[Tensor]:
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, args, output: seen.append(what(args, output)))
    for batch in calibration(2):
        run(model, batch)
    handle.remove()
    return seen


@pytest.mark.parametrize("choice", [NARROW, LOW_RANK], ids=["narrow", "low-rank"])
def test_an_interrupted_fit_continues_to_the_same_weights(choice: Replace, tmp_path: Path) -> None:
    whole, _, fits = _fitted(choice, CORRECTED)
    seen: list[str] = []

    def stop(layer: LayerFit) -> None:
        seen.append(layer.name)
        if len(seen) == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _fitted(choice, CORRECTED, folder=tmp_path, on_layer=stop)
    assert not _passes()
    continued, _, again = _fitted(choice, CORRECTED, folder=tmp_path)
    assert_same_weights(weights(whole), weights(continued))
    assert [(f.name, f.error, f.correction) for f in fits] == [(f.name, f.error, f.correction) for f in again]


def test_a_fit_that_lies_on_disk_as_a_whole_takes_one_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = list[int]()
    real = calibrate.beside
    monkeypatch.setattr(calibrate, "beside", lambda m, p, batches: (given.append(len(batches)), real(m, p, batches))[1])
    whole, _, fits = _fitted(LOW_RANK, CORRECTED, folder=tmp_path)
    again, _, told = _fitted(LOW_RANK, CORRECTED, folder=tmp_path)
    assert_same_weights(weights(whole), weights(again))
    assert fits == told
    next(tmp_path.glob("*.safetensors")).unlink()
    _fitted(LOW_RANK, CORRECTED, folder=tmp_path)
    assert given == [8, 1, 8]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_corrected(family: str) -> None:
    student, _, plan = swapped(Replace(language=Layer(n=4), vision=Layer(n=4)), family)
    fits = fit_(student, plan, batches_of(family), Fit(prefix="corrected", sweeps=1))
    assert {fit.name for fit in fits} == {swap.name for swap in plan.swaps}
    assert sum(fit.correction is not None for fit in fits) == len(plan.ffns)


def test_the_model_ends_as_it_began_and_keeps_its_cache() -> None:
    student, teacher, plan = swapped(LOW_RANK)
    student.train()
    run(student, calibration()[0])  # transformers puts hooks of its own on layers when they first run
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in student.modules()]
    fit_(student, plan, calibration(2), CORRECTED)
    assert student.training
    assert student.config.get_text_config().use_cache
    assert not any("forward" in module.__dict__ for module in student.modules())
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in student.modules()] == hooks
    batch = {k: v for k, v in batch_of(range(3)).items() if k != "labels"}
    with torch.no_grad():
        assert torch.equal(student.eval()(**batch).logits, teacher(**batch).logits)


def test_a_fit_from_disk_refuses_it(tmp_path: Path) -> None:
    student, _, plan = swapped(LOW_RANK)
    with pytest.raises(FitError, match="in memory beside") as error:
        fit_streamed(student, plan, calibration(2), CORRECTED, tmp_path, lambda name: torch.empty(0))
    assert "fit.prefix: compressed" in error.value.hint
    assert not list(tmp_path.iterdir())


def test_what_no_batch_reaches_is_named() -> None:
    student, _, plan = swapped(LOW_RANK)
    words = [
        {k: v for k, v in b.items() if k != "pixel_values"} | {"input_ids": b["input_ids"].clamp(max=9)}
        for b in calibration(2)
    ]
    with pytest.raises(FitError, match=r"never reaches .*vision"):
        fit_(student, plan, words, CORRECTED)
    assert not _passes()


def test_a_batch_that_fails_leaves_no_pass_behind() -> None:
    student, _, plan = swapped(LOW_RANK)
    batches = calibration(3)
    batches[1] |= {"pixel_values": torch.zeros(1)}
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        fit_(student, plan, batches, CORRECTED)
    assert not _passes()
    assert not any("forward" in module.__dict__ for module in student.modules())


def test_no_batches_are_refused() -> None:
    student, _, plan = swapped(LOW_RANK)
    with pytest.raises(FitError, match="needs calibration batches"):
        fit_(student, plan, [], CORRECTED)


def test_a_model_that_runs_a_tower_twice_is_told_what_to_take() -> None:
    student, _, plan = swapped(LOW_RANK)
    forward = student.forward

    def twice(**inputs: Any) -> Any:
        forward(**inputs)
        return forward(**inputs)

    student.forward = twice
    with pytest.raises(FitError, match="more than once") as error:
        fit_(student, plan, calibration(2), CORRECTED)
    assert "compressed" in error.value.hint
    assert not _passes()


def test_nothing_is_kept_of_layers_that_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    watches: list[Any] = []
    real = beside._Watch.__exit__
    monkeypatch.setattr(beside._Watch, "__exit__", lambda self, *error: (watches.append(self), real(self, *error))[1])
    student, _, plan = swapped(LOW_RANK)
    fit_(student, plan, calibration(2), CORRECTED)
    assert len(watches) == 1
    assert watches[0]._given == watches[0]._made == {}


@pytest.mark.parametrize("which", ["writers", "readers"])
def test_an_ffn_may_be_replaced_in_part(which: str) -> None:
    """With a dense writer there is nothing to aim."""
    left = ["*fc1", "*gate_proj", "*up_proj"] if which == "writers" else ["*fc2", "*down_proj"]
    student, _, plan = swapped(LOW_RANK.model_copy(update={"exclude": tuple(left)}))
    fits = fit_(student, plan, calibration(2), CORRECTED)
    assert len(fits) == len(plan.swaps)
    assert sum(fit.correction is not None for fit in fits) == (len(plan.ffns) if which == "writers" else 0)


def test_sorted_units_and_bfloat16_go_with_it() -> None:
    student, _, plan = swapped(QUARTER)
    batches = [{k: v.bfloat16() if v.is_floating_point() else v for k, v in b.items()} for b in calibration(4)]
    fits = fit_(student.bfloat16(), plan, batches, CORRECTED.model_copy(update={"basis": "energy"}))
    assert sum((fit.correction or 0) > 0 for fit in fits) == len(plan.ffns)
    assert all(0 < (fit.error or 0) < 1 for fit in fits)
