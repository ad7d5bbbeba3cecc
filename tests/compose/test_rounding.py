"""Calibrated int4: against exhaustive search, against rounding to nearest, in every form of layer."""

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_quantize import LAYERS
from tiny_models import FAMILIES
from torch import Tensor, nn

from hyperfade.algebra import Algebra, moments, output_error
from hyperfade.compose.quantize import quantize_
from hyperfade.compose.rounding import moments_in_core, rounded_for
from hyperfade.distill import second_moments
from hyperfade.errors import PlanError
from hyperfade.nn import PHMLinear, low_bit_modules

pytest.importorskip("torchao")


def correlated(features: int, tokens: int, directions: int = 8, outlier: float = 30) -> Tensor:
    """Inputs (tokens, features) of a few strong directions, and one feature that is so many times the others."""
    generator = torch.Generator().manual_seed(0)
    shapes = (tokens, directions), (directions, features)
    strengths, along = (torch.randn(*shape, generator=generator).double() for shape in shapes)
    x = strengths @ along
    x += 0.3 * torch.randn(tokens, features, generator=generator).double()
    x[:, features // 2] *= outlier
    return x


def unit_grid(columns: Tensor) -> tuple[Tensor, Tensor]:
    """A scale of 1, and 8 for zero."""
    return torch.ones(len(columns), 1), torch.full((len(columns), 1), 8)


def to_nearest(weight: Tensor) -> Tensor:
    return (weight.round() + 8).clamp(0, 15).to(torch.uint8)


def error_of(numbers: Tensor, weight: Tensor, moment: Tensor) -> float:
    off = numbers.double() - 8 - weight
    return ((off @ moment) * off).sum().item()


@given(seed=st.integers(0, 10**6), features=st.integers(1, 9), group=st.integers(1, 9))
@settings(max_examples=50, deadline=None)
def test_inputs_that_have_nothing_to_do_with_each_other_leave_the_nearest(seed: int, features: int, group: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = 3 * torch.randn(5, features, generator=generator).double()
    energies = torch.rand(features, generator=generator).double() + 0.1
    found = rounded_for(weight, energies.diag(), group, unit_grid)
    assert torch.equal(found.numbers, to_nearest(weight))
    assert found.scale.shape == found.zero_point.shape == (5, -(-features // group))


def test_errors_lie_between_the_best_there_is_and_the_nearest() -> None:
    """Every number within two of each of four weights, for a hundred rows."""
    weight = 2 * torch.randn(100, 4, generator=torch.Generator().manual_seed(0)).double()
    x = correlated(4, 64, directions=2, outlier=1)
    moment = x.T @ x / len(x)
    steps = torch.tensor(list(itertools.product(range(-2, 3), repeat=4)))
    off = (to_nearest(weight)[:, None].double() + steps).clamp(0, 15) - 8 - weight[:, None]  # (100, 625, 4)
    best = ((off @ moment) * off).sum(2).amin(1).sum().item()
    ours = error_of(rounded_for(weight, moment, 4, unit_grid).numbers, weight, moment)
    assert best <= ours < 2.6 * best  # observed 2.35
    assert ours < 0.65 * error_of(to_nearest(weight), weight, moment)  # observed 0.60


def test_a_feature_that_never_comes_and_one_token_are_no_obstacle() -> None:
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).double()
    x = torch.randn(1, 8, generator=torch.Generator().manual_seed(1)).double()
    x[:, 3] = 0
    found = rounded_for(weight, x.T @ x, 4, unit_grid)
    assert torch.equal(found.numbers[:, 3], to_nearest(weight)[:, 3])


@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_every_layer_is_nearer_on_new_inputs_than_with_the_nearest(kind: str) -> None:
    errors = []
    for calibrated in (False, True):
        torch.manual_seed(0)
        model: Any = nn.Sequential()
        model.up_proj = LAYERS[kind]()
        weight = model.up_proj.weight.double()
        x = correlated(weight.shape[1], 2048)
        batches = [{"input": part.float()} for part in x[:1024].split(128)]
        moments_of = partial(second_moments, model, batches=batches, ridge=0)
        report = quantize_(model, "int4", moments_of=moments_of if calibrated else None)
        assert report.calibrated == calibrated
        unseen = x[1024:].T @ x[1024:] / 1024
        errors.append(output_error(weight, model.up_proj.weight.double(), unseen))
    assert errors[1] < 0.7 * errors[0]  # observed 0.17 to 0.41


@pytest.mark.parametrize("algebra", [Algebra.products(4, 5), Algebra.learned(2, 3)])
@pytest.mark.parametrize("shape", [(16, 24), (24, 16)])
@torch.no_grad()
def test_what_counts_in_a_core_is_what_its_errors_do_to_the_output(algebra: Algebra, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = PHMLinear(*shape, algebra, bias=False, dtype=torch.float64)
    x = correlated(shape[0], 64)
    moment, exact = x.T @ x / len(x), layer.weight.clone()
    core = layer.T.flatten(0, 1) if algebra.form == "products" else layer.core.weight
    of_parts = moments_in_core(layer, moment)
    for rows, own in zip(core.chunk(len(of_parts)), of_parts, strict=True):
        off = torch.randn_like(rows)
        rows += off
        seen = layer.weight - exact
        assert torch.allclose(((off @ own) * off).sum(), ((seen @ moment) * seen).sum())
        rows -= off


def readings(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    return partial(second_moments, model, batches=[batch], ridge=0, reached_only=True)


@pytest.mark.parametrize("rest", [False, True])
def test_a_model_in_bfloat16_is_calibrated_part_by_part(rest: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES["llama"]
    model = family.build(dtype=torch.bfloat16)
    asked: list[list[str]] = []
    of_model = readings(model, family.inputs(torch.bfloat16))

    def moments_of(modules: Any) -> Any:
        asked.append(list(modules))
        return of_model(modules)

    monkeypatch.setattr(moments, "_MOMENTS_BYTES", 2 * 8 * 64**2)
    report = quantize_(model, "int4", rest=rest, moments_of=moments_of)
    assert len(asked) > 1
    assert [name for part in asked for name in part] == [n for n, _ in model.named_modules() if n in report.low_bits]
    assert not report.never_reached
    assert torch.isfinite(model(**family.inputs(torch.bfloat16)).logits).all()


def test_what_no_example_reaches_is_rounded_to_nearest_and_named() -> None:
    family = FAMILIES["llava_siglip"]
    calibrated, plain = family.build(), family.build()
    text = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.tensor([[0, 1, 1, 1]])}
    report = quantize_(calibrated, "int4", 32, moments_of=readings(calibrated, text))
    quantize_(plain, "int4", 32)
    assert report.never_reached
    assert all(".vision_tower." in name for name in report.never_reached)
    assert any(line.startswith("to nearest, as no calibration example gets there: ") for line in report.lines())
    for name, low in low_bit_modules(plain).items():
        same = torch.equal(calibrated.get_submodule(name).qdata, low.qdata)
        assert same == (name in report.never_reached)


def test_other_formats_are_refused_before_anything_is_changed() -> None:
    model = FAMILIES["llama"].build()
    with pytest.raises(PlanError, match="Calibrated rounding is for int4, not int8"):
        quantize_(model, "int8", moments_of=lambda modules: {})
    assert not low_bit_modules(model)
