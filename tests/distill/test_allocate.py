"""Capacity where it counts: closed forms against the fits they foretell, the knapsack against all combinations."""

import gc
import importlib
import json
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES
from torch import Tensor, nn
from toy import calibration

from hyperfade.algebra import low_rank, moments, rank_errors, ridge_
from hyperfade.distill import Allocation, allocate, answers_only, fit_
from hyperfade.distill.activations import second_moments, sensitivities
from hyperfade.distill.knapsack import cheapest
from hyperfade.errors import FitError, PlanError
from hyperfade.recipe import Fit, Layer, Replace
from hyperfade.surgery import contribution_order, kept_errors, plan, refitted_writer, swap_

Batches = list[dict[str, Tensor]]


# --- sensitivity -----------------------------------------------------------------------------------------------------


class _Toy(nn.Module):
    """Tokens → two hidden layers → logits, with the interface of a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.second = nn.Embedding(12, 6), nn.Linear(6, 10), nn.Linear(10, 8, bias=False)
        self.head = nn.Linear(8, 12)

    def forward(self, input_ids: Tensor) -> Any:
        logits = self.head(torch.tanh(self.second(torch.tanh(self.first(self.embed(input_ids))))))
        return type("Output", (), {"logits": logits})


def _toy() -> tuple[_Toy, Batches]:
    torch.manual_seed(0)
    model = _Toy().double().eval()
    ids = torch.randint(0, 12, (2, 64, 6))
    labels = ids.clone()
    labels[:, :, :2] = -100
    return model, [{"input_ids": i, "labels": own} for i, own in zip(ids, labels, strict=True)]


@pytest.mark.parametrize("name", ["first", "second"])
def test_sensitivity_is_its_definition_sample_by_sample(name: str) -> None:
    """Here a token's loss depends on its own outputs only, so that g is a gradient per token."""
    model, batches = _toy()
    linear = model.get_submodule(name)
    total, answers = 0.0, 0
    for batch in batches:
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            kept: list[Tensor] = []
            handle = linear.register_forward_hook(lambda m, a, y, kept=kept: (y.retain_grad(), kept.append(y))[1])
            logits = model(ids[None]).logits[0, :-1]
            handle.remove()
            F.cross_entropy(logits, labels[1:], reduction="sum").backward()
            (y,), bias = kept, 0 if linear.bias is None else linear.bias
            assert y.grad is not None
            total += (y.grad.square().sum(-1) * (y - bias).square().sum(-1)).sum().item() / 2 / y.shape[-1]
            answers += int((labels[1:] != -100).sum())
    model.zero_grad()
    measured = sensitivities(model, {name: linear}, batches)[name]  # type: ignore[dict-item]
    assert measured == pytest.approx(total / answers, rel=1e-6)  # observed 4e-8: sums are in float32
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_sensitivity_foretells_what_random_errors_cost() -> None:
    """Answers are drawn from the model itself: then the empirical Fisher matrix is the curvature, on average."""
    model, _ = _toy()
    torch.manual_seed(1)
    with torch.no_grad():
        model.head.weight.mul_(3)  # answers that depend on what is asked
        ids = torch.randint(0, 12, (4096, 2))
        ids[:, 1] = torch.distributions.Categorical(logits=model(ids).logits[:, 0]).sample()
    batch = {"input_ids": ids, "labels": torch.cat([torch.full_like(ids[:, :1], -100), ids[:, 1:]], 1)}
    linears = {name: model.get_submodule(name) for name in ("first", "second")}
    foretold = sensitivities(model, linears, [batch])  # type: ignore[arg-type]

    @torch.no_grad()
    def loss() -> float:
        return F.cross_entropy(model(ids).logits[:, 0], ids[:, 1]).item()

    before, measured = loss(), {}
    for name, linear in linears.items():
        changes = []
        for seed in range(8):  # an error and its opposite: what is of first order cancels
            for sign in (0.1, -0.1):
                generator = torch.Generator().manual_seed(seed)

                def err(m: Any, args: Any, y: Tensor, sign: float = sign, by: Any = generator) -> Tensor:
                    direction = torch.randn(y.shape, generator=by, dtype=y.dtype)
                    plain = y if m.bias is None else y - m.bias
                    scale = plain.norm(dim=-1, keepdim=True) / direction.norm(dim=-1, keepdim=True)
                    return y + sign * scale * direction

                handle = linear.register_forward_hook(err)
                changes.append(loss() - before)
                handle.remove()
        measured[name] = sum(changes) / len(changes) / 0.1**2
    for name in linears:
        assert foretold[name] == pytest.approx(measured[name], rel=0.2)  # observed 0.04 and 0.007
    assert sorted(foretold, key=foretold.__getitem__) == sorted(measured, key=measured.__getitem__)


def test_padding_and_left_out_logits_change_no_sensitivity() -> None:
    model = FAMILIES["llava_siglip"].build()
    names = [s.name for s in plan(model, Replace()).swaps]
    linears: Any = {name: model.get_submodule(name) for name in names}
    batches = calibration()
    plain = sensitivities(model, linears, batches)
    kept = sensitivities(model, linears, [answers_only(batch) for batch in batches])
    longer = [
        {
            **batch,
            "input_ids": F.pad(batch["input_ids"], (0, 3)),
            "attention_mask": F.pad(batch["attention_mask"], (0, 3)),
            "labels": F.pad(batch["labels"], (0, 3), value=-100),
        }
        for batch in batches
    ]
    padded = sensitivities(model, linears, longer)
    for name in names:
        assert plain[name] > 0
        assert kept[name] == pytest.approx(plain[name], rel=1e-5)  # observed 0
        assert padded[name] == pytest.approx(plain[name], rel=1e-5)  # observed 3e-7


def test_a_model_stays_as_it_was_and_what_cannot_be_measured_is_said() -> None:
    model = FAMILIES["llava_siglip"].build().train()
    head, tower = model.lm_head, "model.vision_tower.encoder.layers.0.mlp.fc1"
    head.weight.requires_grad_(False)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    text = [{k: v[:, 4:] for k, v in b.items() if k != "pixel_values"} for b in calibration(1)]
    with pytest.raises(FitError, match=r"No calibration batch reaches model\.vision_tower"):
        sensitivities(model, {tower: model.get_submodule(tower)}, text)
    silent = [{**b, "labels": torch.full_like(b["labels"], -100)} for b in calibration(1)]
    with pytest.raises(FitError, match="no answers"):
        sensitivities(model, {tower: model.get_submodule(tower)}, silent)
    assert model.training
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not model.get_submodule(tower)._forward_hooks


def test_measuring_keeps_no_batch_in_memory() -> None:
    model, batches = FAMILIES["llama"].build(), _with_labels("llama")
    linears = {name: module for name, module in model.named_modules() if name.endswith("down_proj")}
    assert len(linears) * len(batches) > 2

    def count() -> int:
        return sum(isinstance(thing, Tensor) for thing in gc.get_objects())

    gc.collect()
    gc.disable()  # what only it would find stays for minutes, at a hundred MB a batch
    try:
        before = count()
        sensitivities(model, linears, batches)
        assert count() == before  # hooks that knew their own tensors kept 7 more
    finally:
        gc.enable()


# --- error curves ----------------------------------------------------------------------------------------------------


def _moment(features: int, tokens: int, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    x = torch.randn(tokens, features).double() @ torch.randn(features, features).double()
    return x.T @ x / tokens


@pytest.mark.parametrize("tokens", [60, 7])
def test_errors_of_all_widths_are_those_of_refitted_writers(tokens: int) -> None:
    """Also where units are dependent (7 tokens, 16 units) and only the ridge keeps the second moment definite."""
    moment, writer = ridge_(_moment(16, tokens), 1e-6), torch.randn(5, 16)
    order = contribution_order(writer, moment)
    errors = kept_errors(writer[:, order], moment[order][:, order])
    assert errors[0] == 1
    assert errors[16] == 0
    for m in range(1, 16):
        expected = refitted_writer(writer, moment, order[:m])[1]
        assert errors[m].item() == pytest.approx(
            expected, rel=1e-8
        )  # observed 3e-11 in the last of 7 tokens, 3e-15 else


def test_a_second_moment_that_is_only_semidefinite_has_finite_errors() -> None:
    errors = kept_errors(torch.randn(5, 16), _moment(16, 7))
    assert torch.isfinite(errors).all()
    assert (errors.diff() <= 0).all()


@pytest.mark.parametrize("shape", [(9, 14), (14, 9)], ids=str)
@pytest.mark.parametrize("calibrated", [True, False])
def test_errors_of_all_ranks_are_those_of_low_rank_layers(shape: tuple[int, int], calibrated: bool) -> None:
    weight, moment = torch.randn(shape), _moment(shape[1], 50) if calibrated else None
    errors = rank_errors(weight, moment)
    assert len(errors) == 10
    assert errors[0] == 1
    for rank in range(1, 9):
        expected = low_rank(weight, rank, moment, ridge=0).error
        assert errors[rank].item() == pytest.approx(expected, rel=1e-10)  # observed 8e-14


# --- knapsack --------------------------------------------------------------------------------------------------------

_options = st.lists(
    st.lists(st.tuples(st.integers(0, 9), st.floats(0, 5)), min_size=1, max_size=4), min_size=1, max_size=5
)


@settings(deadline=None, max_examples=200)
@given(_options, st.integers(0, 30))
def test_the_cheapest_choice_is_that_of_all_combinations(options: list[list[tuple[int, float]]], capacity: int) -> None:
    fitting = [c for c in product(*options) if sum(cost for cost, _ in c) <= capacity]
    if not fitting:
        with pytest.raises(PlanError, match=r"exceed replace\.budget"):
            cheapest(options, capacity)
        return
    chosen = [own[i] for own, i in zip(options, cheapest(options, capacity), strict=True)]
    assert sum(cost for cost, _ in chosen) <= capacity
    value = sum(value for _, value in chosen)
    assert value == pytest.approx(min(sum(v for _, v in c) for c in fitting), abs=1e-12)
    more = sum(own[i][1] for own, i in zip(options, cheapest(options, capacity + 3), strict=True))
    assert more <= value + 1e-12


# --- allocations -----------------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "width": {"kind": "dense"},
    "low_rank": {"kind": "low_rank"},
    "products": {"kind": "products", "n": 4},
    "companion": {"kind": "products", "n": 4, "products": 1, "fraction": 0.3},
    "products on fewer units": {"kind": "products", "n": 2, "width": 0.5},
}


def _replace(kind: str, budget: float, **changes: Any) -> Replace:
    return Replace.model_validate({"budget": budget, "language": KINDS[kind], "vision": KINDS[kind], **changes})


def _with_labels(family: str) -> Batches:
    """One batch of the family's own, in which every token of the text is an answer."""
    if family == "llava_siglip":
        return calibration()
    batch = FAMILIES[family].inputs()
    return [batch | {"labels": batch["input_ids"].masked_fill(batch["input_ids"] == 90, -100)}]


@pytest.mark.parametrize("family", ["llava_siglip", "qwen2_5_vl"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_allocation_is_within_its_budget_and_never_worse_than_one_size_for_all(kind: str, family: str) -> None:
    model, batches = FAMILIES[family].build(), _with_labels(family)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    losses = []
    for budget in (0.3, 0.5, 0.7):
        replace = _replace(kind, budget)
        found = allocate(model, replace, batches)
        assert found.params_ratio <= budget
        assert found.params_ratio > budget - 0.06  # observed 0.028: the tiny models' sizes are coarse
        assert found.loss <= found.uniform_loss
        assert found.loss == pytest.approx(sum(s.sensitivity * s.error**2 for s in found.shares), rel=1e-9)
        losses.append(found.loss)

        the_plan = plan(model, found.replace)
        dense = sum(s.dense_parameters for s in found.shares)
        after = sum(s.parameters for s in found.shares)
        assert the_plan.saved_parameters == dense - after
        assert dense == sum(s.dense_parameters for s in plan(model, replace).swaps)
        assert Allocation.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert losses == sorted(losses, reverse=True)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_what_does_not_matter_gets_least() -> None:
    """The last FFN of the language model writes next to nothing; the first layer of the tower is heard by all."""
    model = FAMILIES["llava_siglip"].build()
    with torch.no_grad():
        model.get_submodule("model.language_model.layers.2.mlp.down_proj").weight.mul_(1e-3)
    shares = {s.name: s for s in allocate(model, _replace("width", 0.5), calibration()).shares}
    quiet = shares.pop("model.language_model.layers.2.mlp")
    assert all(s.sensitivity > 1e3 * quiet.sensitivity for s in shares.values())
    assert quiet.parameters / quiet.dense_parameters < min(s.parameters / s.dense_parameters for s in shares.values())


@pytest.mark.parametrize("kind", ["width", "low_rank"])
def test_predicted_errors_are_those_of_the_fit(kind: str) -> None:
    """On the dense model's activations: with the prefix compressed the fit reads other inputs."""
    model, batches = FAMILIES["llava_siglip"].build(), calibration()
    found = allocate(model, _replace(kind, 0.4), batches, ridge=1e-6)
    the_plan = plan(model, found.replace)
    model.requires_grad_(False)
    swap_(model, the_plan)
    fits = {f.name: f for f in fit_(model, the_plan, batches, Fit(prefix="dense", ridge=1e-6))}
    writers = {ffn.name: ffn.writer for ffn in the_plan.ffns}
    compared = [(s.error, fits[writers.get(s.name, s.name)].error) for s in found.shares if s.size != "dense"]
    assert len(compared) >= 4
    for predicted, fitted in compared:
        assert predicted == pytest.approx(fitted, rel=1e-6)  # observed 4e-16; on another kind of processor 3e-8


def test_matrices_on_one_input_share_a_second_moment_and_memory_is_kept_within_a_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, batches = FAMILIES["llama"].build(), _with_labels("llama")
    module = importlib.import_module("hyperfade.distill.allocate")  # the package's attribute is the function
    gathered: list[list[str]] = []
    real = second_moments
    monkeypatch.setattr(
        module, "second_moments", lambda m, linears, *rest: (gathered.append([*linears]), real(m, linears, *rest))[1]
    )
    whole = allocate(model, _replace("low_rank", 0.4, vision=None), batches)
    assert [len(names) for names in gathered] == [6]  # three FFNs: gate and up read one input
    assert not any("up_proj" in name for name in gathered[0])
    gathered.clear()
    monkeypatch.setattr(moments, "_MOMENTS_BYTES", 8 * (32 * 32 + 48 * 48))
    assert allocate(model, _replace("low_rank", 0.4, vision=None), batches) == whole
    assert [len(names) for names in gathered] == [2, 2, 2]


def test_every_batch_of_every_pass_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = FAMILIES["llama"].build(), _with_labels("llama")
    replace, told = _replace("low_rank", 0.4, vision=None), list[tuple[int, int]]()
    whole = allocate(model, replace, batches, on_batch=lambda done, total: told.append((done, total)))
    assert told == [(i + 1, 2 * len(batches)) for i in range(2 * len(batches))]  # gradients, second moments
    told.clear()
    monkeypatch.setattr(moments, "_MOMENTS_BYTES", 8 * (32 * 32 + 48 * 48))
    assert allocate(model, replace, batches, on_batch=lambda done, total: told.append((done, total))) == whole
    assert told[-1] == (4 * len(batches), 4 * len(batches))


def test_excluded_matrices_take_no_part_and_regions_may_differ() -> None:
    model = FAMILIES["llava_siglip"].build()
    replace = _replace("width", 0.3, vision=KINDS["low_rank"], exclude=("*language_model.layers.0.*",))
    found = allocate(model, replace, calibration())
    assert not any(".layers.0." in s.name for s in found.shares if s.region == "language")
    sizes = {s.region: s.size for s in found.shares if s.size != "dense"}
    assert "units" in sizes["language"]
    assert "low-rank" in sizes["vision"]
    assert all(n in " ".join(r.match for r in found.replace.rules) for n in ("layers.1.mlp.gate_proj", "fc2"))


def test_a_budget_below_the_smallest_sizes_is_refused() -> None:
    replace = _replace("companion", 0.05)
    with pytest.raises(PlanError, match="Even the smallest sizes hold"):
        allocate(FAMILIES["llava_siglip"].build(), replace, calibration())
    start = Replace(budget=0.3, language=Layer(n=2, products=4), vision=None)
    with pytest.raises(PlanError, match="would not shrink"):
        allocate(FAMILIES["llava_siglip"].build(), start, calibration())
