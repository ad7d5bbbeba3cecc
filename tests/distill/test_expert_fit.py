"""The fit of experts against what hooks on the untouched model's own routers see."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tiny_experts import tiny
from torch import Tensor
from toy import assert_same_weights, train, weights

from hyperfade.algebra import fit, low_rank
from hyperfade.distill import allocate, distill_, fit_, teacher_of
from hyperfade.distill.activations import ExpertMoments, second_moments
from hyperfade.errors import FitError, PlanError
from hyperfade.recipe import Fit, Layer, Replace
from hyperfade.surgery import Plan, blends, matched_low_rank, plan, swap_

FEW = Fit(sweeps=3, ridge=0, expert_prior=0.25)


def batches(name: str = "qwen3_moe") -> list[dict[str, Tensor]]:
    """Four rows in two batches, the last of each padded."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(2):
        ids = torch.randint(3, 64, (2, 15), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 11:] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def swapped(name: str = "qwen3_moe", model: Any = None) -> tuple[Any, Plan]:
    model = model or tiny(name)
    shared = ("*.shared_expert.*",) if name == "llama4" else ()
    the_plan = plan(model, Replace(language=Layer(n=4), vision=None, exclude=shared))
    swap_(model, the_plan)
    return model, the_plan


def routed_inputs(model: Any, block: str) -> list[Tensor]:
    """Of an untouched Qwen3: the real tokens that each expert of this MoE block gets, in float64."""
    tokens: list[list[Tensor]] = [[] for _ in range(4)]
    masks: list[Tensor] = []

    def watch(module: Any, args: Any, output: Any) -> None:
        chosen = output[2][masks[-1]]
        x = args[0].reshape(-1, args[0].shape[-1])[masks[-1]]
        for expert in range(4):
            tokens[expert].append(x[(chosen == expert).any(1)].double())

    handle = model.get_submodule(f"{block}.gate").register_forward_hook(watch)
    with torch.no_grad():
        for batch in batches():
            masks.append(batch["attention_mask"].flatten().bool())
            model(**batch)
    handle.remove()
    return [torch.cat(parts) for parts in tokens]


def test_every_expert_has_the_moment_of_its_tokens_and_leans_on_the_average() -> None:
    model, _ = swapped()
    name, block = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp"
    found = second_moments(model, {name: blends(model)[name]}, batches(), 0, 0.25)[name]
    assert isinstance(found, ExpertMoments)
    own = routed_inputs(tiny("qwen3_moe"), block)
    assert found.num_tokens == [len(x) for x in own]
    assert sum(found.num_tokens) == 2 * sum(int(batch["attention_mask"].sum()) for batch in batches())
    everyone = torch.cat(own)
    average = everyone.T @ everyone / len(everyone)
    assert found.prior_tokens == 0.25 * 32
    for mean, x in zip(found.means, own, strict=True):
        expected = (x.T @ x + 8 * average) / (len(x) + 8)
        torch.testing.assert_close(mean, expected, atol=1e-12, rtol=0)  # seen 4e-16


def test_each_expert_is_fitted_on_its_own_and_the_errors_are_of_all_tokens() -> None:
    model, the_plan = swapped()
    name = "model.layers.0.mlp.experts.gate_up_proj"
    moments = second_moments(model, {name: blends(model)[name]}, batches(), 0, 0.25)[name]
    assert isinstance(moments, ExpertMoments)
    results = {layer.name: layer for layer in fit_(model, the_plan, batches(), FEW)}
    assert list(results) == [swap.name for swap in the_plan.swaps]
    swap = the_plan.swaps[0]
    dense, light = blends(model)[name].dense, cast(Any, blends(model)[name].light)
    assert swap.spec.algebra is not None
    lost = rival = whole = 0.0
    for expert, (count, moment) in enumerate(zip(moments.num_tokens, moments.means, strict=True)):
        weight = dense.weight[expert]
        best = fit(weight, swap.spec.algebra, moment, sweeps=3, ridge=0)
        torch.testing.assert_close(light.expert(expert).weight, best.dense().float(), atol=1e-6, rtol=0)  # seen 1.5e-7
        energy = count * torch.trace(weight.double() @ moment @ weight.double().T).item()
        lost, whole = lost + energy * best.error**2, whole + energy
        rival += energy * low_rank(weight, matched_low_rank(swap), moment, ridge=0).error ** 2
    assert results[name].error == pytest.approx((lost / whole) ** 0.5, rel=1e-9)
    assert results[name].low_rank_error == pytest.approx((rival / whole) ** 0.5, rel=1e-9)


def test_the_writer_is_fitted_on_what_the_compressed_reader_gives() -> None:
    model, the_plan = swapped()
    fit_(model, the_plan, batches(), FEW)
    reader, writer = (blends(model)[f"model.layers.0.mlp.experts.{key}"] for key in ("gate_up_proj", "down_proj"))
    reader.alpha = 1.0
    moments = second_moments(model, {"writer": writer}, batches(), 0, 0.25)["writer"]
    assert isinstance(moments, ExpertMoments)
    algebra = the_plan.swaps[0].spec.algebra
    assert algebra is not None
    for expert, moment in enumerate(moments.means):
        best = fit(writer.dense.weight[expert], algebra, moment, sweeps=3, ridge=0)
        mine = cast(Any, writer.light).expert(expert).weight
        torch.testing.assert_close(mine, best.dense().float(), atol=1e-6, rtol=0)  # seen 9e-8


def _nobody_goes_to_the_third(model: Any) -> Any:
    gate = model.get_submodule("model.layers.0.mlp.gate")
    gate.weight.data[2] = -gate.weight[[0, 1, 3]].sum(0)  # when the others are high, this is low
    gate.weight.data *= torch.tensor([1.0, 1.0, 1e-3, 1.0])[:, None]
    positive = model.model.embed_tokens.weight.data
    positive[:, 0] = 9.0  # and a feature that all tokens share decides it
    gate.weight.data[:, 0] = torch.tensor([1.0, 1.0, -9.0, 1.0])
    return model


def test_an_expert_that_nobody_reached_is_fitted_on_the_average_and_named() -> None:
    model, the_plan = swapped(model=_nobody_goes_to_the_third(tiny("qwen3_moe")))
    results = {layer.name: layer for layer in fit_(model, the_plan, batches(), FEW)}
    untouched = _nobody_goes_to_the_third(tiny("qwen3_moe"))
    own = routed_inputs(untouched, "model.layers.0.mlp")
    assert len(own[2]) == 0
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert results[name].few_tokens == {str(expert): len(x) for expert, x in enumerate(own) if len(x) < 8}
    assert results[name].few_tokens["2"] == 0
    assert results["model.layers.0.mlp.experts.down_proj"].few_tokens["2"] == 0
    everyone = torch.cat(own)
    weight, algebra = untouched.get_parameter(name)[2], the_plan.swaps[0].spec.algebra
    assert algebra is not None
    best = fit(weight, algebra, everyone.T @ everyone / len(everyone), sweeps=3, ridge=0)
    mine = cast(Any, blends(model)[name].light).expert(2).weight
    torch.testing.assert_close(mine, best.dense().float(), atol=1e-5, rtol=0)  # seen 3e-8


def test_the_fit_is_kept_and_taken_up_again_with_the_experts_it_named(tmp_path: Path) -> None:
    model, the_plan = swapped()
    first = fit_(model, the_plan, batches(), Fit(sweeps=2, expert_prior=2), tmp_path)
    again, _ = swapped()
    kept = fit_(again, the_plan, [batches()[0]], Fit(sweeps=2, expert_prior=2), tmp_path)
    assert kept == first
    assert any(layer.few_tokens for layer in first)
    assert_same_weights(weights(model), weights(again))


@pytest.mark.parametrize("name", ["llama4", "gpt_oss"])
def test_without_activations_the_error_is_that_of_all_weights(name: str) -> None:
    model, the_plan = swapped(name)
    for layer in fit_(model, the_plan, [], Fit(method="frobenius", sweeps=3)):
        blend = blends(model)[layer.name]
        off = (blend.light.weight - blend.dense.weight).norm() / blend.dense.weight.norm()
        assert layer.error == pytest.approx(off.item(), rel=1e-5)  # seen 1.3e-7
        assert layer.few_tokens == {}


@pytest.mark.parametrize("name", ["llama4", "gpt_oss"])
def test_experts_are_not_sorted_and_dense_prefixes_move_the_writers_alone(name: str) -> None:
    found = []
    for recipe in (Fit(sweeps=2), Fit(sweeps=2, basis="energy"), Fit(sweeps=2, prefix="dense")):
        model, the_plan = swapped(name)
        fit_(model, the_plan, batches(name), recipe)
        found.append({name: blend.light.weight for name, blend in blends(model).items()})
    first, sorted_, dense = found
    assert all(torch.equal(first[name], sorted_[name]) for name in first if ".experts." in name)
    reader, writer = (
        next(name for name in first if name.endswith(f"experts.{key}_proj")) for key in ("gate_up", "down")
    )
    assert torch.equal(first[reader], dense[reader])
    assert not torch.equal(first[writer], dense[writer])


def test_experts_that_nothing_reaches_and_a_budget_are_refused() -> None:
    model, the_plan = swapped("mixtral")
    broken = batches()
    with pytest.raises(FitError, match="needs calibration batches"):
        fit_(model, the_plan, [], Fit())
    for batch in broken:
        batch["attention_mask"].zero_()
    with pytest.raises(FitError, match=r"No calibration batch reaches model\.layers\.0\.mlp\.experts\.gate_up_proj"):
        fit_(model, the_plan, broken, Fit())
    with pytest.raises(PlanError, match=r"cannot be shared out over experts: model\.layers\.0\.mlp\.experts has 4"):
        allocate(tiny("mixtral"), Replace(budget=0.3, vision=None), batches())


@pytest.mark.parametrize("name", ["qwen3_moe", "llama4"])
def test_a_mixture_is_distilled_until_only_light_experts_are_left(name: str, tmp_path: Path) -> None:
    student = tiny(name)
    teacher = teacher_of(student)
    student, _ = swapped(name, student)
    before = weights(student)

    def batch_of(numbers: Any) -> dict[str, Tensor]:
        rows = [batches(name)[number % 2] for number in numbers]
        batch = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
        return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    losses: list[float] = []
    recipe = train(reconstruction_weight=0.1, fade_steps=3, polish_steps=9, kd_weight=1.0)
    distill_(
        student, teacher, 8, batch_of, recipe, seed=0, folder=tmp_path, on_step=lambda step: losses.append(step.loss)
    )
    assert not blends(student)
    assert losses[-1] < 0.95 * losses[3]  # seen 0.82 and 0.85
    after = weights(student)
    light = [key for key in after if ".experts." in key]
    assert light
    for key in light:
        number = key.index(".experts.") + len(".experts.")
        holder, _, part = key[number:].partition(".")
        assert not torch.equal(after[key], before[f"{key[:number]}{holder}.light.{part}"])


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_a_corrected_fit_takes_experts_as_they_are(name: str) -> None:
    found = []
    for prefix in ("compressed", "corrected"):
        model, the_plan = swapped(name)
        fits = fit_(model, the_plan, batches(name), Fit.model_validate({"sweeps": 2, "prefix": prefix}))
        assert all(layer.correction is None for layer in fits)
        found.append(weights(model))
    assert_same_weights(*found)
