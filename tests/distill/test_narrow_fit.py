"""FFNs that keep a part of their hidden units, against least squares on the activations that a hook sees."""

import copy
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy import QUARTER, assert_same_weights, calibration, swapped, weights

import hyperfade.distill.calibrate as calibrate
from hyperfade.distill import LayerFit, fit_
from hyperfade.errors import FitError
from hyperfade.recipe import Fit, Layer, Replace
from hyperfade.surgery import FFN, Plan, blends, set_alpha_

DENSE = Replace(language=Layer(kind="dense", width=0.5), vision=Layer(kind="dense", width=0.6))
PRODUCTS = Replace(language=Layer(n=4, width=0.5), vision=Layer(n=4, products=8, width=0.6))
CHOICES = {"dense": DENSE, "products": PRODUCTS}
LIGHT = Fit(sweeps=3, ridge=0)
BEHIND_DENSE = Fit(sweeps=3, ridge=0, prefix="dense")


def _by_use(plan: Plan) -> list[FFN]:
    """FFNs in the order of a forward pass: the tower, then the language model."""
    return sorted(plan.ffns, key=lambda ffn: ffn.region != "vision")


@torch.no_grad()
def _read(model: Any, name: str, region: str) -> Tensor:
    """What a layer reads over the calibration batches, padding left out: (tokens, features) in float64."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(args[0]))
    for batch in calibration():
        model(**batch)
    handle.remove()
    tokens = [x.reshape(-1, x.shape[-1]).double() for x in seen]
    if region == "language":
        masks = [batch["attention_mask"].reshape(-1).bool() for batch in calibration()]
        tokens = [x[mask] for x, mask in zip(tokens, masks, strict=True)]
    return torch.cat(tokens)


@torch.no_grad()
def _hidden(model: Any, ffn: FFN, x: Tensor) -> Tensor:
    """The hidden units of an FFN alone at some input."""
    seen: list[Tensor] = []
    handle = model.get_submodule(ffn.writer).register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model.get_submodule(ffn.name)(x)
    handle.remove()
    return seen[0].double()


def _best_units(writer: Tensor, h: Tensor, count: int) -> Tensor:
    """The units with the largest mean square contribution to the output, one after the other."""
    worth = [(h[:, unit, None] * writer[None, :, unit]).square().sum().item() for unit in range(h.shape[1])]
    return torch.tensor(sorted(range(h.shape[1]), key=lambda unit: -worth[unit])[:count])


def _fitted(choice: Replace, recipe: Fit) -> tuple[Any, Any, Plan, dict[str, LayerFit]]:
    """Student at α = 1 after its fit, teacher, plan, and the fits by name."""
    student, teacher, plan = swapped(choice)
    fits = {layer.name: layer for layer in fit_(student, plan, calibration(), recipe)}
    set_alpha_(student, 1.0)
    return student, teacher, plan, fits


def _relative(wanted: Tensor, given: Tensor) -> float:
    return ((given - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("refit", [True, False], ids=["refitted", "pruned"])
@pytest.mark.parametrize("prefix", ["dense", "compressed"])
def test_a_narrow_dense_ffn_computes_the_best_units_through_the_best_writer(prefix: str, refit: bool) -> None:
    recipe = Fit(ridge=0, prefix=prefix, refit_writer=refit)
    student, teacher, plan, fits = _fitted(DENSE, recipe)
    oracle = copy.deepcopy(teacher)  # what an FFN is fitted behind
    count = {swap.name: swap.spec.in_features for swap in plan.swaps}
    for ffn in _by_use(plan):
        h = _read(oracle, ffn.writer, ffn.region)
        writer = teacher.get_submodule(ffn.writer)
        w, bias = writer.weight.double(), 0 if writer.bias is None else writer.bias.double()
        kept = _best_units(w, h, count[ffn.writer])
        d = torch.linalg.lstsq(h[:, kept], h @ w.T).solution.T if refit else w[:, kept]
        x = torch.randn(9, teacher.get_submodule(ffn.readers[0]).in_features)
        expected = _hidden(teacher, ffn, x)[:, kept] @ d.T + bias
        with torch.no_grad():
            given = student.get_submodule(ffn.name)(x).double()
        torch.testing.assert_close(given, expected, rtol=0, atol=5e-6)  # observed 5e-7
        error = _relative(h @ w.T, h[:, kept] @ d.T)
        assert fits[ffn.writer].error == pytest.approx(error, rel=1e-9)  # observed 8e-16
        assert [fits[name].error for name in ffn.readers] == [0.0] * len(ffn.readers)
        if prefix == "compressed":
            oracle.set_submodule(ffn.name, student.get_submodule(ffn.name))


def test_the_refit_lowers_what_the_model_gets_wrong() -> None:
    errors: dict[bool, list[float]] = {}
    for refit in (True, False):
        student, teacher, plan, _ = _fitted(DENSE, Fit(ridge=0, refit_writer=refit))
        first = _by_use(plan)[0]
        x = _read(teacher, first.readers[0], first.region).float()
        with torch.no_grad():
            block = _relative(*(model.get_submodule(first.name)(x) for model in (teacher, student)))
            batch = calibration()[1]
            answers = batch["labels"] != -100
            whole = _relative(*(model(**batch).logits[answers] for model in (teacher, student)))
        errors[refit] = [block, whole]
    assert errors[True][0] < 0.8 * errors[False][0]  # observed 0.18 and 0.40
    assert errors[True][1] < errors[False][1]  # observed 0.34 and 0.44


@pytest.mark.parametrize("prefix", ["dense", "compressed"])
def test_a_writers_error_holds_both_parts(prefix: str) -> None:
    """What leaving units out costs, and what products add to it: E‖W h − Ŵ h_S‖² = E‖W h − D h_S‖² + E‖(D − Ŵ) h_S‖²,
    because what D leaves is orthogonal to h_S. Behind a compressed prefix the second is measured on other h_S."""
    student, teacher, plan, fits = _fitted(PRODUCTS, LIGHT.model_copy(update={"prefix": prefix}))
    oracle, layers = copy.deepcopy(teacher), blends(student)
    for ffn in _by_use(plan):
        h, w = _read(oracle, ffn.writer, ffn.region), teacher.get_submodule(ffn.writer).weight.double()
        blend = layers[ffn.writer]
        d, light = blend.dense.weight.double(), blend.light.weight.double()
        kept = _best_units(w, h, d.shape[1])
        lost = _relative(h @ w.T, h[:, kept] @ d.T)
        if prefix == "compressed":
            x = _read(oracle, ffn.readers[0], ffn.region).float()
            own = _hidden(student, ffn, x)
            error = (lost**2 + _relative(own @ d.T, own @ light.T) ** 2 * (1 - lost**2)) ** 0.5
            oracle.set_submodule(ffn.name, student.get_submodule(ffn.name))
        else:
            error = _relative(h @ w.T, h[:, kept] @ light.T)
        assert lost < error < 1
        assert fits[ffn.writer].error == pytest.approx(error, rel=1e-6)  # observed 5e-9: weights are float32
        for name in ffn.readers:
            assert 0 < fits[name].error < 1
            assert layers[name].light.weight.shape == layers[name].dense.weight.shape


def test_without_the_refit_the_two_parts_add_up_nearly() -> None:
    """What plain pruning leaves is not orthogonal to the units that stay."""
    student, teacher, plan, fits = _fitted(PRODUCTS, BEHIND_DENSE.model_copy(update={"refit_writer": False}))
    for ffn in plan.ffns:
        h, w = _read(teacher, ffn.writer, ffn.region), teacher.get_submodule(ffn.writer).weight.double()
        blend = student.get_submodule(ffn.writer)
        kept = _best_units(w, h, blend.dense.in_features)
        assert torch.equal(blend.dense.weight, teacher.get_submodule(ffn.writer).weight[:, kept])
        error = _relative(h @ w.T, h[:, kept] @ blend.light.weight.double().T)
        assert fits[ffn.writer].error == pytest.approx(error, rel=0.05)  # observed 0.014


@pytest.mark.parametrize("kind", CHOICES)
def test_rows_and_biases_are_those_of_the_units_that_stay(kind: str) -> None:
    student, teacher, plan, _ = _fitted(CHOICES[kind], LIGHT)
    layers, biased = blends(student), 0
    for ffn in plan.ffns:
        for name in ffn.readers:
            blend, dense = layers[name], teacher.get_submodule(name)
            rows = [(dense.weight == row).all(1).nonzero().item() for row in blend.dense.weight]
            assert len(set(rows)) == len(rows) == blend.light.out_features
            if dense.bias is not None:
                biased += 1
                assert torch.equal(blend.dense.bias, dense.bias[rows])
                assert torch.equal(blend.light.bias, dense.bias[rows])
        writer = layers[ffn.writer]
        if writer.dense.bias is not None:
            assert torch.equal(writer.light.bias, teacher.get_submodule(ffn.writer).bias)
    assert biased == 2


def test_the_teacher_and_everything_outside_the_ffns_stay_as_they_were() -> None:
    student, teacher, plan = swapped(DENSE)
    before = weights(teacher)
    others = {name: tensor for name, tensor in weights(student).items() if ".mlp." not in name}
    fit_(student, plan, calibration(), LIGHT)
    assert_same_weights(before, weights(teacher))
    assert_same_weights(others, {name: tensor for name, tensor in weights(student).items() if ".mlp." not in name})
    assert {blend.alpha for blend in blends(student).values()} == {0.0}


@pytest.mark.parametrize("kind", CHOICES)
def test_after_the_fit_both_branches_have_the_units_that_stay(kind: str) -> None:
    student, _, plan = swapped(CHOICES[kind])
    fit_(student, plan, calibration(), LIGHT)
    for blend in blends(student).values():
        assert (blend.dense.in_features, blend.dense.out_features) == (
            blend.light.in_features,
            blend.light.out_features,
        )
        assert blend.dense.weight.shape == (blend.light.out_features, blend.light.in_features)
        blend.measure_reconstruction = True
    found = []
    for alpha in (0.0, 0.5, 1.0):
        set_alpha_(student, alpha)
        with torch.no_grad():
            found.append(student(**calibration()[0]).logits)
        measured = [float(blend.reconstruction) for blend in blends(student).values()]
        assert all(value == 0 for value in measured) if kind == "dense" else min(measured) > 0
    if kind == "dense":  # nothing is left to fade
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)  # observed 0
        assert torch.equal(found[2], found[0])
    else:
        assert not torch.equal(found[2], found[0])


# --- a dense prefix ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CHOICES)
def test_a_dense_prefix_takes_every_second_moment_in_one_pass_over_the_dense_model(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher, plan = swapped(CHOICES[kind])
    taken: list[dict[str, Tensor]] = []
    real = calibrate.second_moments
    monkeypatch.setattr(
        calibrate,
        "second_moments",
        lambda *a: (taken.append(real(*a)), {k: v.clone() for k, v in taken[-1].items()})[1],
    )
    passes: list[int] = []
    student.register_forward_pre_hook(lambda *_: passes.append(1))
    fit_(student, plan, calibration(), BEHIND_DENSE)
    assert len(passes) == len(calibration()) + 1  # one more, over the first batch, finds the order of the FFNs
    assert len(taken) == 1
    assert taken[0].keys() == {swap.name for swap in plan.swaps}
    for swap in plan.swaps:
        x = _read(teacher, swap.name, swap.region)
        torch.testing.assert_close(taken[0][swap.name], x.T @ x / len(x), rtol=1e-9, atol=1e-12)  # observed 0


@pytest.mark.parametrize("choice", [DENSE, PRODUCTS, QUARTER], ids=["dense", "products", "no width"])
def test_what_nothing_compressed_lies_before_is_fitted_alike_behind_either_prefix(choice: Replace) -> None:
    fitted = [_fitted(choice, recipe) for recipe in (LIGHT, BEHIND_DENSE)]
    first = _by_use(fitted[0][2])[0]
    one, other = (weights(student.get_submodule(first.readers[0])) for student, *_ in fitted)
    assert_same_weights(one, other)
    assert fitted[0][3][first.readers[0]].error == fitted[1][3][first.readers[0]].error
    if choice is DENSE:  # else its writer reads what compressed readers write
        assert_same_weights(*(weights(student.get_submodule(first.writer)) for student, *_ in fitted))
    last = _by_use(fitted[0][2])[-1].writer
    assert not torch.equal(*(student.get_submodule(last).light.weight for student, *_ in fitted))


# --- interruptions ----------------------------------------------------------------------------------------------------


class _Killed(Exception):
    pass


@pytest.mark.parametrize("kind", CHOICES)
@pytest.mark.parametrize("recipe", [LIGHT, BEHIND_DENSE], ids=["compressed", "dense"])
def test_a_narrow_fit_continues_from_its_folder_bit_for_bit(
    kind: str, recipe: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _, plan = swapped(CHOICES[kind])
    expected = fit_(whole, plan, calibration(), recipe)
    second_ffn = _by_use(plan)[1]

    def stop(layer: LayerFit) -> None:
        if layer.name == second_ffn.readers[0]:
            raise _Killed

    first, _, _ = swapped(CHOICES[kind])
    with pytest.raises(_Killed):
        fit_(first, plan, calibration(), recipe, tmp_path, stop)
    assert len(list(tmp_path.iterdir())) == 2

    asked: list[str] = []
    real = calibrate.second_moments
    monkeypatch.setattr(
        calibrate, "second_moments", lambda m, layers, *a: (asked.extend(layers), real(m, layers, *a))[1]
    )
    second, _, _ = swapped(CHOICES[kind])
    continued = fit_(second, plan, calibration(), recipe, tmp_path)
    assert not {name for ffn in _by_use(plan)[:2] for name in ffn.linears} & set(asked)
    assert_same_weights(weights(whole), weights(second))  # light and dense branches
    shapes = [
        {name: (m.in_features, m.out_features) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        for model in (whole, second)
    ]
    assert shapes[0] == shapes[1]
    assert [changed(layer, seconds=0) for layer in continued] == [changed(layer, seconds=0) for layer in expected]

    asked.clear()
    third, _, _ = swapped(CHOICES[kind])
    assert fit_(third, plan, calibration(), recipe, tmp_path) == continued
    assert asked == []
    assert_same_weights(weights(whole), weights(third))


@pytest.mark.parametrize("method", ["random", "frobenius"])
def test_a_fit_without_activations_cannot_choose_units_and_touches_nothing(method: str) -> None:
    student, _, plan = swapped(DENSE)
    before = weights(student)
    with pytest.raises(FitError, match=rf"mlp\.\w+ keeps a part .* a {method} fit cannot tell which"):
        fit_(student, plan, calibration(), Fit(method=method))
    assert_same_weights(before, weights(student))
