"""The change itself: nothing computed differs after the swap, nothing is touched before every check has passed."""

import copy
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, logits, num_parameters
from torch import nn

from hyperfade.algebra import Algebra
from hyperfade.errors import FitError, PlanError
from hyperfade.hub import fold_
from hyperfade.nn import BlendLinear, JointReading, LightSpec, LowRankLinear, PHMLinear, light_modules
from hyperfade.recipe import Layer, Recipe, Replace
from hyperfade.surgery import Plan, blends, drop_dense_, install_, plan, set_alpha_, swap_

ALL = pytest.mark.parametrize("name", FAMILIES)
EVERYWHERE = Replace(language=Layer(n=4), vision=Layer(kind="complex"), projector=Layer(kind="low_rank", fraction=0.4))


def _snapshot(model: nn.Module) -> tuple[dict[str, int], dict[str, torch.Tensor], dict[str, bool]]:
    """Modules by identity, weights by value, and what trains."""
    return (
        {k: id(v) for k, v in model.named_modules()},
        {k: v.clone() for k, v in model.state_dict().items()},
        {k: p.requires_grad for k, p in model.named_parameters()},
    )


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality that lets NaN equal itself."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _assert_untouched(
    model: nn.Module, before: tuple[dict[str, int], dict[str, torch.Tensor], dict[str, bool]]
) -> None:
    modules, state, trains = _snapshot(model)
    assert modules == before[0]
    assert trains == before[2]
    assert state.keys() == before[1].keys()
    assert all(_same_bytes(v, before[1][k]) for k, v in state.items())


@ALL
def test_the_fade_begins_at_the_dense_model_and_ends_at_the_folded_one(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    dense = logits(model, family)
    the_plan = plan(model, EVERYWHERE)
    swap_(model, the_plan)
    assert list(blends(model)) == [s.name for s in the_plan.swaps]
    assert torch.equal(logits(model, family), dense)
    set_alpha_(model, 0.5)
    halfway = logits(model, family)
    set_alpha_(model, 1.0)
    faded = logits(model, family)
    drop_dense_(model)
    assert torch.equal(logits(model, family), faded)
    assert not blends(model)
    # the equalities only mean something where the three differ
    for a, b in ((faded, dense), (halfway, dense), (faded, halfway)):
        assert (a - b).abs().max() > 0.2 * dense.std()  # observed: 0.71 at the least


@ALL
def test_every_swap_of_the_plan_is_carried_out_and_no_other(name: str) -> None:
    model = FAMILIES[name].build()
    before = {k: v for k, v in model.named_modules() if isinstance(v, nn.Linear)}
    the_plan = plan(model, EVERYWHERE)
    swap_(model, the_plan)
    specs = {s.name: s.spec for s in the_plan.swaps}
    for linear_name, linear in before.items():
        now = model.get_submodule(linear_name)
        if linear_name in specs:
            assert isinstance(now, BlendLinear)
            assert now.dense is linear
            assert LightSpec.of(now.light) == specs[linear_name]
        else:
            assert now is linear
    drop_dense_(model)
    assert {k: LightSpec.of(v) for k, v in light_modules(model).items()} == specs


@ALL
def test_biases_are_taken_over_as_copies(name: str) -> None:
    model = FAMILIES[name].build()
    swap_(model, plan(model, EVERYWHERE))
    biased = {k: b for k, b in blends(model).items() if b.dense.bias is not None}
    assert bool(biased) == (name not in ("llama", "qwen2"))
    for blend in biased.values():
        assert blend.light.bias is not None
        assert blend.dense.bias.abs().max() > 0
        assert torch.equal(blend.light.bias, blend.dense.bias)
        assert blend.light.bias.data_ptr() != blend.dense.bias.data_ptr()
    assert all(b.light.bias is None for k, b in blends(model).items() if k not in biased)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("training", [False, True])
def test_new_layers_have_the_old_ones_dtype_and_mode_and_only_they_train(dtype: torch.dtype, training: bool) -> None:
    model = FAMILIES["llava_siglip"].build(dtype=dtype).train(training)
    swap_(model, plan(model, EVERYWHERE))
    for blend in blends(model).values():
        assert {p.dtype for p in blend.light.parameters()} | {b.dtype for b in blend.light.buffers()} == {dtype}
        assert all(m.training == training for m in blend.modules() if m is not blend)
        assert all(p.requires_grad for p in blend.light.parameters())
        assert not any(p.requires_grad for p in blend.dense.parameters())


def test_gradients_reach_every_new_parameter() -> None:
    family = FAMILIES["llava_siglip"]
    model = family.build()
    swap_(model, plan(model, EVERYWHERE))
    set_alpha_(model, 0.5)
    model(**family.inputs()).logits.square().mean().backward()
    for name, blend in blends(model).items():
        for part, parameter in blend.light.named_parameters():
            assert parameter.grad is not None, f"{name}.{part}"
            assert parameter.grad.abs().max() > 0, f"{name}.{part}"


@pytest.mark.parametrize("name", ["qwen2", "paligemma", "blip2_t5"])
def test_tied_embeddings_stay_tied(name: str) -> None:
    model = FAMILIES[name].build()
    language = model.language_model if name == "blip2_t5" else model
    assert language.get_output_embeddings().weight is language.get_input_embeddings().weight
    swap_(model, plan(model, Recipe()))
    drop_dense_(model)
    assert language.get_output_embeddings().weight is language.get_input_embeddings().weight


# ---- validation comes first


def test_a_plan_from_another_model_is_refused_and_nothing_is_touched() -> None:
    model, other = FAMILIES["llama"].build(), FAMILIES["llava_siglip"].meta()
    before = _snapshot(model)
    with pytest.raises(PlanError, match=r"model\.vision_tower.*is missing"):
        swap_(model, plan(other, Recipe()))
    _assert_untouched(model, before)


def _last_linear(model: nn.Module, the_plan: Plan) -> tuple[str, nn.Linear]:
    linear = model.get_submodule(the_plan.swaps[-1].name)
    assert isinstance(linear, nn.Linear)
    return the_plan.swaps[-1].name, linear


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_number_in_the_last_matrix_leaves_the_whole_model_untouched(bad: float) -> None:
    model = FAMILIES["llava_siglip"].build()
    the_plan = plan(model, Recipe())
    name, last = _last_linear(model, the_plan)
    with torch.no_grad():
        last.weight[-1, -1] = bad
    before = _snapshot(model)
    with pytest.raises(FitError, match=name.replace(".", r"\.")):
        swap_(model, the_plan)
    _assert_untouched(model, before)
    assert not blends(model)


@pytest.mark.parametrize("change", ["shape", "bias", "type", "swapped"])
def test_a_last_matrix_that_differs_leaves_the_whole_model_untouched(change: str) -> None:
    model = FAMILIES["llama"].build()
    the_plan = plan(model, Recipe())
    name, last = _last_linear(model, the_plan)
    d, k = last.in_features, last.out_features
    new: dict[str, nn.Module] = {
        "shape": nn.Linear(d, k + 8, bias=False),
        "bias": nn.Linear(d, k, bias=True),
        "type": nn.Conv1d(d, k, 1),
        "swapped": BlendLinear(last, the_plan.swaps[-1].spec.build()),
    }
    model.set_submodule(name, new[change])
    before = _snapshot(model)
    with pytest.raises(PlanError, match=name.replace(".", r"\.")):
        swap_(model, the_plan)
    _assert_untouched(model, before)


def test_a_second_swap_is_refused() -> None:
    model = FAMILIES["llama"].build()
    the_plan = plan(model, Recipe())
    swap_(model, the_plan)
    with pytest.raises(PlanError, match=r"is BlendLinear, the plan expects an nn\.Linear"):
        swap_(model, the_plan)


@pytest.mark.parametrize("alpha", [-0.01, 1.01, float("nan"), float("inf")])
def test_alpha_outside_the_interval_changes_no_layer(alpha: float) -> None:
    model = FAMILIES["llama"].build()
    swap_(model, plan(model, Recipe()))
    set_alpha_(model, 0.25)
    with pytest.raises(PlanError, match=r"outside \[0, 1\]"):
        set_alpha_(model, alpha)
    assert {b.alpha for b in blends(model).values()} == {0.25}


def test_dropping_what_is_not_there_is_an_error() -> None:
    model = FAMILIES["llama"].build()
    for call in (drop_dense_, fold_):
        with pytest.raises(PlanError, match="LlamaForCausalLM has no fading layers"):
            call(model)
    assert getattr(model, "hf_quantizer", None) is None


# ---- the skeleton that a checkpoint fills


def _specs(model: nn.Module) -> dict[str, LightSpec]:
    return {s.name: s.spec for s in plan(model, EVERYWHERE).swaps}


@ALL
def test_install_builds_what_swap_and_drop_build(name: str) -> None:
    swapped, installed = FAMILIES[name].build(), FAMILIES[name].meta()
    the_plan = plan(swapped, EVERYWHERE)
    swap_(swapped, the_plan)
    drop_dense_(swapped)
    install_(installed, {s.name: s.spec for s in the_plan.swaps})
    shapes = {k: v.shape for k, v in installed.state_dict().items()}
    assert shapes == {k: v.shape for k, v in swapped.state_dict().items()}
    assert all(v.is_meta for v in installed.state_dict().values())
    assert num_parameters(installed) == the_plan.parameters_after


@pytest.mark.parametrize("wrong", ["missing", "shape", "bias", "type"])
def test_install_checks_everything_first(wrong: str) -> None:
    model = FAMILIES["llava_siglip"].build()
    specs = _specs(model)
    last, spec = list(specs.items())[-1]
    if wrong == "missing":
        specs["model.nowhere"] = spec
    elif wrong == "type":
        specs["model.language_model.norm"] = spec
    elif wrong == "bias":
        specs[last] = LightSpec(spec.in_features, spec.out_features, not spec.bias, spec.algebra, spec.rank)
    else:
        specs[last] = LightSpec(spec.in_features + 8, spec.out_features, spec.bias, spec.algebra, spec.rank)
    before = _snapshot(model)
    with pytest.raises(PlanError, match="The checkpoint replaces") as caught:
        install_(model, specs)
    assert "architectures" in caught.value.hint
    _assert_untouched(model, before)


def test_plain_modules_can_be_swapped_as_well() -> None:
    model: Any = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Sequential(nn.Linear(16, 8, bias=False)))
    x = torch.randn(3, 8)
    y, twin = model(x), copy.deepcopy(model)
    swap_(model, plan(model, Replace(patterns=("*",), other=Layer(kind="learned", n=2))))
    assert torch.equal(model(x), y)
    fold_(model)  # there is no config to write into
    assert isinstance(model[0], PHMLinear)
    assert isinstance(model[2][0], PHMLinear)
    assert torch.equal(model(x), model[2](model[1](model[0](x))))
    assert torch.equal(twin(x), y)


def test_light_modules_of_a_mixed_model() -> None:
    model = nn.ModuleDict({"a": PHMLinear(8, 8, Algebra.products(2), companion_rank=1), "b": LowRankLinear(8, 8, 2)})
    assert list(light_modules(model)) == ["a", "b"]  # the companion is part of a


def test_the_gate_and_up_of_every_gated_ffn_run_as_one_after_the_fold() -> None:
    family = FAMILIES["qwen2_5_vl"]
    model = family.build()
    found = plan(model, Replace(language=Layer(n=4), vision=Layer(n=2)))
    swap_(model, found)
    fold_(model)
    gated = [ffn for ffn in found.ffns if len(ffn.readers) == 2]
    assert {ffn.region for ffn in gated} == {"language", "vision"}
    for ffn in gated:
        gate, up = (model.get_submodule(name).joint for name in ffn.readers)
        assert isinstance(gate, JointReading)
        assert gate is up
        assert model.get_submodule(ffn.writer).joint is None


def test_terms_and_unlike_layers_stay_apart() -> None:
    for layer in (Layer(kind="complex"), Layer(kind="low_rank", fraction=0.4)):
        model = FAMILIES["qwen2_5_vl"].build()
        swap_(model, plan(model, Replace(language=layer, vision=None)))
        fold_(model)
        assert all(getattr(module, "joint", None) is None for module in model.modules())
