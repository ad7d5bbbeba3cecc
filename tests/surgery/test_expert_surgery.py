"""Experts stored as tensors: found, counted, opened, faded; what routes is checked against the original module."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_experts import MODELS, inputs, logits, tiny
from torch import nn

from hyperfade.errors import AllExcludedError, NothingMatchedError, PlanError
from hyperfade.nn import ArrangedExperts, ExpertsLinear, ExpertsLowRank, ExpertsPHM, RoutedExperts
from hyperfade.recipe import Layer, Replace, Rule
from hyperfade.surgery import (
    blends,
    close_experts_,
    dense_matrices,
    drop_dense_,
    find_experts,
    find_ffns,
    plan,
    set_alpha_,
    swap_,
)
from hyperfade.surgery.experts import open_experts_

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "nn"))
from kron_oracle import kron_weight

KINDS = {
    "products": Layer(n=4),
    "learned": Layer(kind="learned", n=4, terms=2),
    "quaternion": Layer(kind="quaternion"),
    "companion": Layer(n=4, companion_rank=2),
}


def only_experts(layer: Layer | None) -> Replace:
    rules = (Rule(match="*.experts.*", layer=layer),)
    return Replace(language=Layer(n=2), vision=None, rules=(Rule(match="*", layer=None), *rules))


@pytest.mark.parametrize("name", MODELS)
def test_the_plan_counts_the_experts_of_every_layout(name: str) -> None:
    model = tiny(name)
    held = find_experts(model)
    tensors = dict(model.named_parameters())
    the_plan = plan(model, only_experts(Layer(n=2)))
    assert {s.name for s in the_plan.swaps} == {f"{e.name}.{key}" for e in held for key in e.tensors}
    for swap in the_plan.swaps:
        weight, bias = tensors[swap.name], tensors.get(f"{swap.name}_bias")
        assert swap.dense_parameters == weight.numel() + (0 if bias is None else bias.numel())
        assert swap.spec.experts == 4
        assert swap.region == ("vision" if "vision_tower" in swap.name else "language")
    ffns = {ffn.name: ffn for ffn in find_ffns(model)}
    for experts in held:
        ffn = ffns[experts.name]
        assert (ffn.experts, ffn.fused) == (4, True)
        assert ffn.linears == (f"{experts.name}.gate_up_proj", f"{experts.name}.down_proj")
    meta = copy.deepcopy(model).to("meta")
    assert plan(meta, only_experts(Layer(n=2))).swaps == the_plan.swaps


@pytest.mark.parametrize("name", MODELS)
def test_swapping_changes_nothing_and_opening_can_be_undone(name: str) -> None:
    model = tiny(name)
    dense, state = logits(model, name), {key: value.clone() for key, value in model.state_dict().items()}
    opened = copy.deepcopy(model)
    open_experts_(opened, {experts.name for experts in find_experts(opened)})
    kind = ArrangedExperts if name == "llama4" else RoutedExperts
    assert sum(type(module) is kind for module in opened.modules()) == len(find_experts(model))
    off = (logits(opened, name) - dense).abs().max()
    assert off <= (1e-5 if name == "llama4" else 0)  # seen 1e-6: Llama 4 runs all tokens through every expert
    close_experts_(opened)
    assert type(opened) is type(model)
    again = opened.state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)
    swap_(model, plan(model, only_experts(Layer(n=2))))
    assert (logits(model, name) - dense).abs().max() <= (1e-5 if name == "llama4" else 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_light_experts_route_like_the_original_with_the_same_matrices(name: str, kind: str) -> None:
    """Its own module, with tensors that torch.kron makes of the light layers' parameters."""
    dtype = torch.float32 if name == "aria" else torch.float64  # whose vision tower makes float32 itself
    model = tiny(name, dtype)
    oracle = copy.deepcopy(model)
    if name != "llama4":  # which has one way only
        oracle.set_experts_implementation("eager")
    dense = logits(oracle, name, dtype)
    swap_(model, plan(model, only_experts(KINDS[kind])))
    set_alpha_(model, 1.0)
    drop_dense_(model)
    for held in find_experts(oracle):
        for key, matrix in held.matrices.items():  # views of the oracle's own tensors, whatever their layout
            light = model.get_submodule(f"{held.name}.{key}")
            assert isinstance(light, ExpertsPHM)
            matrix.weight.data.copy_(torch.stack([kron_weight(light.expert(e)) for e in range(4)]))
    batch = inputs(model, name, dtype)
    with torch.no_grad():
        found = model(**batch).logits
        assert (found - dense).abs().max() > 0.01
        off = (found - oracle(**batch).logits).abs().max()
    assert off < (1e-5 if dtype == torch.float32 else 1e-6)  # seen 1e-6, and 0: norms round to float32


def test_llama_4_runs_an_expert_on_its_own_tokens_alone() -> None:
    model = tiny("llama4")
    swap_(model, plan(model, only_experts(Layer(n=2))))
    rows: list[int] = []
    blend = next(blend for key, blend in blends(model).items() if key.endswith("experts.gate_up_proj"))
    blend.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    batch = inputs(model, "llama4")
    logits(model, "llama4")
    assert rows == [batch["input_ids"].numel()]  # of four times as many


@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_every_light_parameter_and_no_dense_one(name: str) -> None:
    model = tiny(name)
    swap_(model, plan(model, only_experts(Layer(n=2))))
    set_alpha_(model, 0.5)
    model(**inputs(model, name)).logits.square().mean().backward()
    for blend in blends(model).values():
        assert all(p.grad is not None and p.grad.any() for p in blend.light.parameters())
        assert all(p.grad is None for p in blend.dense.parameters())


def test_rules_reach_one_matrix_of_the_experts_and_the_other_stays_dense() -> None:
    for name in ("mixtral", "gpt_oss"):
        model = tiny(name)
        dense = logits(model, name)
        rule = Rule(match="*.experts.gate_up_proj", layer=Layer(kind="low_rank", fraction=0.3))
        the_plan = plan(model, Replace(language=Layer(n=2), vision=None, exclude=("*.1.*down_proj",), rules=(rule,)))
        swap_(model, the_plan)
        assert (logits(model, name) - dense).abs().max() < 1e-5  # seen 0
        set_alpha_(model, 1.0)
        drop_dense_(model)
        first, last = (e for e in model.modules() if isinstance(e, RoutedExperts))
        assert (type(first.gate_up_proj), type(first.down_proj)) == (ExpertsLowRank, ExpertsPHM)
        assert (type(last.gate_up_proj), type(last.down_proj)) == (ExpertsLowRank, ExpertsLinear)
        assert [why for key, why in the_plan.kept if key.endswith("down_proj")] == ["excluded"]
        assert sum(p.numel() for p in model.parameters()) == the_plan.parameters_after


def test_experts_lose_products_or_rank_in_place_of_hidden_units() -> None:
    model = tiny("qwen3_moe")
    for narrow, whole in (
        (Layer(n=4, products=12, width=0.5), Layer(n=4, products=6)),
        (Layer(n=4, width=0.1), Layer(n=4, products=1)),
        (Layer(kind="low_rank", fraction=0.5, width=0.5), Layer(kind="low_rank", fraction=0.25)),
    ):
        found, expected = (
            {s.name: s.spec for s in plan(model, Replace(language=layer, vision=None)).swaps if ".experts." in s.name}
            for layer in (narrow, whole)
        )
        assert found == expected != {}


def test_what_experts_cannot_be_is_said() -> None:
    model = tiny("qwen3_moe")
    with pytest.raises(AllExcludedError, match="keeps all its hidden units"):
        plan(model, Replace(language=Layer(kind="dense", width=0.5), vision=None))
    with pytest.raises(AllExcludedError, match="min_weight_elements"):
        plan(model, Replace(vision=None, min_weight_elements=10**6))
    the_plan = plan(model, Replace(language=Layer(n=2), vision=None))
    swap_(model, the_plan)
    with pytest.raises(PlanError, match="is BlendLinear, the plan expects experts"):
        swap_(model, the_plan)
    with pytest.raises(PlanError, match="is missing, the plan expects experts"):
        swap_(tiny("llama4"), the_plan)
    with pytest.raises(PlanError, match=r"\(32, 96, False, 4\), the plan expects \(32, 48, False, 4\)"):
        swap_(tiny("mixtral"), the_plan)


class _Unknown(nn.Module):
    """Experts, called in a way of their own, beside a plain FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.randn(4, 48, 32))
        self.experts.down_proj = nn.Parameter(torch.randn(4, 32, 24))


def test_experts_of_an_unknown_make_stay_dense_and_are_listed() -> None:
    model: Any = _Unknown()
    (held,) = find_experts(model)
    assert held.matrices == {}
    with pytest.raises(NothingMatchedError, match="but experts, experts of an unknown make"):
        plan(model, Replace(vision=None))
    model.mlp = nn.Module()
    model.mlp.up_proj, model.mlp.down_proj = nn.Linear(8, 16), nn.Linear(16, 8)
    the_plan = plan(model, Replace(language=Layer(n=2), vision=None))
    assert dict(the_plan.kept) == {
        f"experts.{key}": "holding 4 experts in a module of an unknown make" for key in ("gate_up_proj", "down_proj")
    }
    assert list(dense_matrices(model)) == ["mlp.up_proj", "mlp.down_proj"]
