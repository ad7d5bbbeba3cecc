"""Fits of a model on disk are those of the model in memory, bit for bit, whatever the fit asks of the activations."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import FAMILIES
from torch import Tensor

from hyperfade.distill import LayerFit, fit_, fit_streamed
from hyperfade.hub import skeleton, stored
from hyperfade.recipe import Fit, Layer, Replace
from hyperfade.surgery import blends, plan, swap_

PRODUCTS, NARROW = Layer(n=4), Layer(kind="dense", width=0.5)


def batches_of(family: str) -> list[dict[str, Tensor]]:
    """Two batches with other words and other pictures."""
    first = FAMILIES[family].inputs()
    second = {key: value * 0.5 if value.is_floating_point() else value for key, value in first.items()}
    words = second["input_ids"].clone()
    words[:, -2:] = torch.tensor([11, 23])
    batches = [first, second | {"input_ids": words}]
    if "decoder" in family or "t5" in family:
        batches = [batch | {"decoder_input_ids": torch.tensor([[0, 7]])} for batch in batches]
    return batches


def both(family: str, layer: Layer, recipe: Fit, folder: Path, batches: Any = None) -> tuple[Any, Any]:
    """(layers by name, LayerFits) of a fit in memory, and of one from disk."""
    model = FAMILIES[family].build()
    model.save_pretrained(folder / "dense")
    projector = layer if layer.width is None else PRODUCTS
    chosen = Replace(language=layer, vision=layer, projector=projector)
    batches = batches_of(family) if batches is None else batches
    whole = plan(model, chosen)
    swap_(model, whole)
    fits = fit_(model, whole, batches, recipe)
    expected = {f"{name}/{k}": v for name, b in blends(model).items() for k, v in b.light.state_dict().items()}

    empty = skeleton(str(folder / "dense"), torch.float32, "cpu")
    assert all(parameter.is_meta for parameter in empty.parameters())
    source = stored(folder / "dense", skeleton(str(folder / "dense")))
    found = fit_streamed(empty, whole, batches, recipe, folder / "fit", lambda name: source.by_name[name].read())
    tensors = {k: v for file in (folder / "fit").glob("*.safetensors") for k, v in load_file(file).items()}
    streamed = {key: value for key, value in tensors.items() if "/" in key}
    return (expected, fits), (streamed, found)


def assert_same(one: tuple[dict[str, Tensor], list[LayerFit]], two: tuple[dict[str, Tensor], list[LayerFit]]) -> None:
    assert one[0].keys() == two[0].keys()
    assert [key for key, value in one[0].items() if not torch.equal(value, two[0][key])] == []
    assert [(fit.name, fit.error, fit.low_rank_error) for fit in one[1]] == [
        (fit.name, fit.error, fit.low_rank_error) for fit in two[1]
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_calibrated_fit_from_disk_is_the_one_in_memory(family: str, tmp_path: Path) -> None:
    assert_same(*both(family, PRODUCTS, Fit(sweeps=2), tmp_path))


FITS = {
    "energy": (PRODUCTS, Fit(sweeps=2, basis="energy")),
    "dense prefix": (PRODUCTS, Fit(sweeps=2, prefix="dense")),
    "width": (NARROW, Fit()),
    "width, dense prefix": (NARROW, Fit(prefix="dense")),
    "width under products": (Layer(n=4, width=0.5), Fit(sweeps=2)),
    "low-rank": (Layer(kind="low_rank", fraction=0.4), Fit()),
    "frobenius": (PRODUCTS, Fit(method="frobenius", sweeps=2)),
}


@pytest.mark.parametrize("kind", FITS)
def test_every_kind_of_fit(kind: str, tmp_path: Path) -> None:
    assert_same(*both("qwen2_5_vl", *FITS[kind], tmp_path))
