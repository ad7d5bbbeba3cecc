"""The fit against what an independent hook sees: each matrix is fitted on the inputs it will really have."""

from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES
from torch import Tensor
from toy import HALF, QUARTER, assert_same_weights, calibration, swapped, weights

from hyperfade.algebra import low_rank
from hyperfade.distill import LayerFit, calibrate, fit_, matrices
from hyperfade.errors import FitError
from hyperfade.recipe import Fit, Layer, Replace
from hyperfade.surgery import Plan, blends, matched_low_rank, set_alpha_

LIGHT = Fit(sweeps=3, ridge=0)


def _padded_batches(family: str) -> list[dict[str, Tensor]]:
    """Two batches with padding. Of another family than LLaVA: its own one row, twice, its last tokens padding."""
    if family == "llava_siglip":
        return calibration()
    batches = []
    for padding in (1, 2):
        batch = FAMILIES[family].inputs()
        batch["attention_mask"][:, -padding:] = 0
        batches.append(batch)
    return batches


def _inputs_of(model: Any, name: str, batches: list[dict[str, Tensor]], padded: bool) -> Tensor:
    """What a layer reads over all batches, padding left out: (tokens, features) in float64."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    tokens = [x.reshape(-1, x.shape[-1]).double() for x in seen]
    if padded:
        masks = [batch["attention_mask"].reshape(-1).bool() for batch in batches]
        tokens = [x[mask] for x, mask in zip(tokens, masks, strict=True)]
    return torch.cat(tokens)


@pytest.mark.parametrize("family", ["llava_siglip", "blip2_opt", "llama"])
def test_a_matrix_sees_the_second_moment_of_its_inputs_behind_the_compressed_prefix(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = QUARTER if family == "llava_siglip" else Replace(language=Layer(n=4), vision=None)
    student, _, plan = swapped(replace, family)
    moments: list[Tensor] = []
    real = matrices.fit
    monkeypatch.setattr(matrices, "fit", lambda w, a, c, **kw: (moments.append(c.clone()), real(w, a, c, **kw))[1])
    order: list[str] = []
    batches = _padded_batches(family)
    fit_(student, plan, batches, LIGHT, on_layer=lambda layer: order.append(layer.name))
    assert len(moments) == len(order) == len(plan.swaps)

    layers = blends(student)
    regions = {swap.name: swap.region for swap in plan.swaps}
    groups = [group for ffn in _by_use(plan) for group in (ffn.readers, (ffn.writer,))]
    assert [name for group in groups for name in group] == order
    compressed: list[str] = []
    for group in groups:
        for name in group:
            for other, blend in layers.items():
                blend.alpha = float(other in compressed)
            x = _inputs_of(student, name, batches, padded=regions[name] == "language")
            expected = x.T @ x / len(x)
            # observed 0: the very same forward passes
            torch.testing.assert_close(moments[order.index(name)], expected, rtol=1e-9, atol=1e-12)
        compressed += group


def _by_use(plan: Plan) -> list[Any]:
    """FFNs in the order of a forward pass: the tower, then the language model."""
    return sorted(plan.ffns, key=lambda ffn: ffn.region != "vision")


def test_padding_would_change_the_second_moment() -> None:
    """The oracle above can fail: with the padding the moments differ."""
    student, _, plan = swapped()
    name = next(swap.name for swap in plan.swaps if swap.region == "language")
    with_padding, without = (_inputs_of(student, name, calibration(), padded) for padded in (False, True))
    assert len(with_padding) > len(without)
    moments = [x.T @ x / len(x) for x in (with_padding, without)]
    assert (moments[0] - moments[1]).norm() > 0.01 * moments[1].norm()  # observed 0.17


def test_errors_are_those_of_the_layers_that_were_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    student, _, plan = swapped(HALF)
    calls: dict[str, Tensor] = {}
    real = calibrate.fit_matrix
    names = {id(blend.light): name for name, blend in blends(student).items()}

    def spy(weight: Tensor, light: Any, spec: Any, rival: Any, moment: Tensor, recipe: Fit) -> tuple[float, int]:
        calls[names[id(light)]] = moment.clone()
        return real(weight, light, spec, rival, moment, recipe)

    monkeypatch.setattr(calibrate, "fit_matrix", spy)
    fitted = fit_(student, plan, calibration(), LIGHT)
    swaps, layers = {swap.name: swap for swap in plan.swaps}, blends(student)
    assert {layer.name for layer in fitted} == set(swaps)
    for layer in fitted:
        dense, moment = layers[layer.name].dense.weight.double(), calls[layer.name]
        rival = low_rank(dense, matched_low_rank(swaps[layer.name]), moment, ridge=LIGHT.ridge)
        assert layer.low_rank_error == rival.error
        rest = dense - layers[layer.name].light.weight.double()
        error = ((rest @ moment @ rest.T).trace() / (dense @ moment @ dense.T).trace()).sqrt().item()
        assert layer.error == pytest.approx(error, rel=1e-6)  # observed 8e-9
        assert layer.sweeps >= 1
        assert layer.label == swaps[layer.name].spec.label


def test_a_low_rank_layer_reports_its_own_error_as_the_rivals() -> None:
    choice = Layer(kind="low_rank", fraction=0.5)
    student, _, plan = swapped(Replace(language=choice, vision=choice))
    fitted = fit_(student, plan, calibration(), LIGHT)
    assert all(layer.error == layer.low_rank_error is not None for layer in fitted)


def _one_shot_error(fit: Fit) -> float:
    student, teacher, plan = swapped(HALF)
    fit_(student, plan, calibration(), fit)
    set_alpha_(student, 1.0)
    batch = calibration()[1]
    with torch.no_grad():
        wanted, given = (model(**batch).logits[batch["labels"] != -100] for model in (teacher, student))
    return ((given - wanted).norm() / wanted.norm()).item()


def test_a_calibrated_start_beats_frobenius_which_beats_random() -> None:
    calibrated, frobenius, random = (
        _one_shot_error(Fit(method=m, sweeps=8)) for m in ("calibrated", "frobenius", "random")
    )
    assert calibrated < frobenius < random  # observed 0.61, 0.92, 0.98


def test_the_energy_basis_keeps_the_dense_function_and_reorders_the_hidden_units() -> None:
    student, teacher, plan = swapped()
    batch = calibration()[0]
    with torch.no_grad():
        before, wanted = student(**batch).logits, teacher(**batch).logits
        fit_(student, plan, calibration(), changed_basis())
        after = student(**batch).logits
        still = teacher(**batch).logits
    assert torch.equal(before, wanted)
    assert torch.equal(still, wanted)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)  # observed 3e-6
    layers = blends(student)
    for ffn in plan.ffns:
        new, old = layers[ffn.writer].dense.weight, teacher.get_submodule(ffn.writer).weight
        assert not torch.equal(new, old)
        assert torch.equal(new.sort(dim=1).values, old.sort(dim=1).values)


def changed_basis() -> Fit:
    return LIGHT.model_copy(update={"basis": "energy"})


def test_the_energy_basis_sorts_by_the_energy_of_the_hidden_units() -> None:
    student, _, plan = swapped()
    fit_(student, plan, calibration(), changed_basis())
    first = _by_use(plan)[0]  # nothing is compressed before it
    set_alpha_(student, 0.0)
    energy = _inputs_of(student, first.writer, calibration(), padded=False).square().mean(0)
    assert (energy.diff() <= 1e-6 * energy[0]).all()


@pytest.mark.parametrize("basis", ["none", "energy"])
def test_a_fit_continues_from_its_folder_without_fitting_again(
    basis: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = LIGHT.model_copy(update={"basis": basis})
    whole, _, plan = swapped()
    expected = fit_(whole, plan, calibration(), recipe)

    class Killed(Exception):
        pass

    def stop(layer: LayerFit) -> None:
        if layer.name == _by_use(plan)[2].readers[0]:
            raise Killed

    first, _, _ = swapped()
    with pytest.raises(Killed):
        fit_(first, plan, calibration(), recipe, tmp_path, stop)
    assert len(list(tmp_path.iterdir())) == 3

    second, _, _ = swapped()
    fresh: list[str] = []
    real = matrices.fit
    monkeypatch.setattr(matrices, "fit", lambda *a, **k: (fresh.append("fit"), real(*a, **k))[1])
    continued = fit_(second, plan, calibration(), recipe, tmp_path)
    assert len(fresh) == len(plan.swaps) - sum(len(ffn.linears) for ffn in _by_use(plan)[:3])
    assert_same_weights(weights(whole), weights(second))
    assert [changed(layer, seconds=0) for layer in continued] == [changed(layer, seconds=0) for layer in expected]

    third, _, _ = swapped()
    fresh.clear()
    again = fit_(third, plan, calibration(), recipe, tmp_path)
    assert (fresh, again) == ([], continued)
    assert_same_weights(weights(whole), weights(third))


def test_an_ffn_that_no_batch_reaches_is_named() -> None:
    student, _, plan = swapped()
    text = [{key: batch[key][:, 4:] for key in ("input_ids", "attention_mask")} for batch in calibration()]
    with pytest.raises(FitError, match=r"vision_tower.*layers\.0\.mlp.*"):
        fit_(student, plan, text, LIGHT)


def test_activations_that_are_not_finite_name_the_matrix() -> None:
    student, _, plan = swapped()
    student.model.language_model.layers[1].post_attention_layernorm.weight.data[3] = float("nan")
    with pytest.raises(FitError, match=r"language_model\.layers\.1\.mlp\.gate_proj: .*NaN"):
        fit_(student, plan, calibration(), LIGHT)


def test_a_calibrated_fit_without_batches_is_refused_and_a_frobenius_fit_needs_none() -> None:
    student, _, plan = swapped()
    with pytest.raises(FitError, match="needs calibration batches"):
        fit_(student, plan, [], LIGHT)
    fitted = fit_(student, plan, [], Fit(method="frobenius", sweeps=3))
    layers = blends(student)
    for layer in fitted:
        dense, light = layers[layer.name].dense.weight, layers[layer.name].light.weight
        assert layer.error == pytest.approx(((dense - light).norm() / dense.norm()).item(), rel=1e-5)  # observed 1e-7


def test_a_random_start_changes_nothing_and_claims_nothing() -> None:
    student, _, plan = swapped()
    before = weights(student)
    fitted = fit_(student, plan, [], Fit(method="random"))
    assert_same_weights(before, weights(student))
    assert [(layer.error, layer.low_rank_error) for layer in fitted] == [(None, None)] * len(plan.swaps)


def test_the_model_comes_back_as_it_was_given() -> None:
    student, teacher, plan = swapped()
    student.train()
    fit_(student, plan, calibration(), LIGHT)
    assert student.training
    assert {blend.alpha for blend in blends(student).values()} == {0.0}
    assert not any(module._forward_pre_hooks for module in blends(student).values())
    student.eval()
    batch = calibration()[0]
    with torch.no_grad():
        assert torch.equal(student(**batch).logits, teacher(**batch).logits)


def test_the_energy_basis_moves_biases_along() -> None:
    """With large biases a light reader in another order than its writer would be far off."""
    student, _, the_plan = swapped()
    for ffn in the_plan.ffns:
        for name in ffn.linears:
            blend = student.get_submodule(name)
            if blend.dense.bias is not None:
                torch.nn.init.normal_(blend.dense.bias, std=2.0)
                blend.light.bias.data.copy_(blend.dense.bias)
    batches = calibration()
    fit_(student, the_plan, batches, Fit(basis="energy", sweeps=3))
    biased = [blend for blend in blends(student).values() if blend.dense.bias is not None]
    assert biased
    for blend in biased:
        assert torch.equal(blend.light.bias, blend.dense.bias)
