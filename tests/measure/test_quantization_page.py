"""The page on rounding is exactly what the kept results give."""

import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import quantization
import quantization_report
import rounding_quality
import stacking_report
from rounding import kurtosis, largest, nearest
from stacking_report import targets
from tiny_models import FAMILIES
from torch import nn

from hyperfade.hub import fold_
from hyperfade.recipe import Layer, Replace
from hyperfade.surgery import plan, set_alpha_, swap_


def test_the_page_is_what_the_kept_results_give() -> None:
    kept = quantization_report.kept_results()
    assert quantization_report.page(*kept) == quantization_report.PAGE.read_text(encoding="utf-8")
    readme = quantization_report.README.read_text(encoding="utf-8")
    assert stacking_report.with_stacking(readme, kept[1]) == readme


def test_targets_are_judged_by_what_was_measured() -> None:
    def cells(dense: float, products: float) -> dict[str, Any]:
        found = {"dense|bf16": 0.99, "dense|int4": dense, "products n=4|bf16": 0.98, "products n=4|int4": products}
        return {"cells": {f"embedded|{key}": {"exact_match": value, "ffn_bytes": 1} for key, value in found.items()}}

    assert "costs +0.40 points more than it costs dense (target 0.5): **reached**" in targets(cells(0.985, 0.971))
    assert "costs +0.60 points more than it costs dense (target 0.5): **missed**" in targets(cells(0.985, 0.969))
    assert "100.0% of the bytes" in targets(cells(0.985, 0.969))
    assert targets({"cells": {}}) == "Not measured yet."


def test_rounding_to_two_bits_by_hand() -> None:
    weight = torch.tensor([[-1.0, 0.4, 0.9, 2.0], [0.0, 0.0, 3.0, 3.0]])
    assert torch.equal(nearest(weight, 2), torch.tensor([[-1.0, 0.0, 1.0, 2.0], [0.0, 0.0, 3.0, 3.0]]))
    by_pairs = nearest(weight, 2, group=2)
    assert torch.allclose(by_pairs[0, :2], torch.tensor([-2 * 1.4 / 3, 1.4 / 3]))  # zero is the third of four levels
    assert torch.equal(by_pairs[1], weight[1])
    assert nearest(weight, 2, symmetric=True)[0, 1] == 0


def test_statistics_of_known_distributions() -> None:
    numbers = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    assert kurtosis(numbers) == pytest.approx(3, abs=0.05)  # observed 3.01
    assert kurtosis(torch.linspace(-1, 1, 10_001)) == pytest.approx(1.8, abs=1e-3)
    assert largest(torch.tensor([1.0, -1.0, 1.0, -1.0])) == pytest.approx(0.75**0.5)


def test_a_matrix_is_measured_by_every_method_and_left_as_it_was() -> None:
    torch.manual_seed(0)
    linear, moment = nn.Linear(64, 128, bias=False), torch.eye(64, dtype=torch.float64)
    before = linear.weight.detach().clone()
    found = quantization.measured(linear, moment, moment, sweeps=1)
    assert tuple(found) == quantization_report.METHODS
    assert torch.equal(linear.weight, before)
    for own in found.values():
        by_bits = {r["bits"]: r for r in own["rounded"] if r["grouped"] and not r["mixes_rounded"]}
        assert by_bits[8]["weight_sqnr"] > by_bits[4]["weight_sqnr"] + 20  # observed 24 to 25
        assert by_bits[8]["error"] == pytest.approx(own["fit_error"], abs=0.02)
    dense = found["dense"]["rounded"]
    assert all(row["error"] == row["added_error"] for row in dense)
    # with C the identity, what the output hears is what the weights have
    assert all(row["added_error"] == pytest.approx(10 ** (-row["weight_sqnr"] / 20), rel=1e-3) for row in dense)


@pytest.mark.parametrize(("kind", "stored"), [("products", "T"), ("learned", "core.weight"), ("dense", "weight")])
def test_every_matrix_of_the_ffns_is_rounded_and_nothing_else(
    kind: Literal["products", "learned", "dense"], stored: str
) -> None:
    model = FAMILIES["llava_siglip"].build()
    if kind != "dense":
        layer = Layer(kind=kind, n=2)
        swap_(model, plan(model, Replace(language=layer, vision=layer)))
        set_alpha_(model, 1.0)
        fold_(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rounding_quality.round_(model, 2, "rows")
    changed = {name: tensor for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert set(changed) == {
        name for name in before if ".layers." in name and ".mlp." in name and name.endswith("." + stored)
    }
    assert all(len(row.unique()) <= 4 for tensor in changed.values() for row in tensor.flatten(0, -2))
