"""Fits of a model on disk are those of the model in memory, bit for bit, whatever the fit asks of the activations."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import FAMILIES
from torch import Tensor

from hyperfade.distill import LayerFit, fit_, fit_streamed
from hyperfade.errors import FitError
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
    if "t5" in family:
        batches = [batch | {"decoder_input_ids": torch.tensor([[0, 7]])} for batch in batches]
    return batches


Fits = tuple[dict[str, Tensor], list[LayerFit]]
"""Factors by matrix and part, and how the matrices came out."""


def choice(layer: Layer) -> Replace:
    return Replace(language=layer, vision=layer, projector=layer if layer.width is None else PRODUCTS)


def streamed(family: str, layer: Layer, recipe: Fit, folder: Path, batches: Any = None) -> Fits:
    """The fit of the checkpoint in `folder`, from disk."""
    name = str(folder / "dense")
    model, shapes = skeleton(name, torch.float32, "cpu"), skeleton(name)
    assert all(parameter.is_meta for parameter in model.parameters())
    source = stored(folder / "dense", shapes)
    fits = fit_streamed(
        model,
        plan(shapes, choice(layer)),
        batches_of(family) if batches is None else batches,
        recipe,
        folder / "fit",
        lambda name: source.by_name[name].read(),
    )
    tensors = {key: value for file in (folder / "fit").iterdir() for key, value in load_file(file).items()}
    return {key: value for key, value in tensors.items() if "/" in key}, fits


def both(family: str, layer: Layer, recipe: Fit, folder: Path, batches: Any = None) -> tuple[Fits, Fits]:
    """The fit in memory, and from disk."""
    model = FAMILIES[family].build()
    model.save_pretrained(folder / "dense")
    batches = batches_of(family) if batches is None else batches
    whole = plan(model, choice(layer))
    swap_(model, whole)
    fits = fit_(model, whole, batches, recipe)
    factors = {f"{name}/{k}": v for name, b in blends(model).items() for k, v in b.light.state_dict().items()}
    return (factors, fits), streamed(family, layer, recipe, folder, batches)


def assert_same(one: Fits, two: Fits) -> None:
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


def test_fits_that_are_there_are_what_later_ones_are_fitted_behind(tmp_path: Path) -> None:
    expected, _ = both("llava_siglip", PRODUCTS, Fit(sweeps=2), tmp_path)
    later = [file for file in (tmp_path / "fit").iterdir() if ".layers.2." in file.name or "vision" in file.name]
    assert len(later) == 3
    for file in later:
        file.unlink()
    assert_same(expected, streamed("llava_siglip", PRODUCTS, Fit(sweeps=2), tmp_path))


def test_a_batch_without_a_picture_waits_for_the_others(tmp_path: Path) -> None:
    with_picture, _ = batches_of("llava_siglip")
    words = {key: with_picture[key][:, 4:] for key in ("input_ids", "attention_mask")}
    assert_same(*both("llava_siglip", PRODUCTS, Fit(sweeps=2), tmp_path, [with_picture, words, with_picture]))


def test_what_no_batch_reaches_is_named(tmp_path: Path) -> None:
    with_picture, _ = batches_of("llava_siglip")
    words = {key: with_picture[key][:, 4:] for key in ("input_ids", "attention_mask")}
    FAMILIES["llava_siglip"].build().save_pretrained(tmp_path / "dense")
    threads = threading.active_count()
    with pytest.raises(FitError, match=r"never reaches .*vision_tower"):
        streamed("llava_siglip", PRODUCTS, Fit(sweeps=2), tmp_path, [words])
    assert threading.active_count() == threads  # passes that wait are ended


def test_what_fails_in_a_pass_comes_out(tmp_path: Path) -> None:
    batch, _ = batches_of("llava_siglip")
    wrong = batch | {"input_ids": batch["input_ids"] * 0}  # nowhere to put the picture
    FAMILIES["llava_siglip"].build().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="do not match"):
        streamed("llava_siglip", PRODUCTS, Fit(sweeps=2), tmp_path, [batch, wrong])


def test_an_ffn_that_runs_twice_is_refused(tmp_path: Path) -> None:
    batch, _ = batches_of("llama")
    FAMILIES["llama"].build().save_pretrained(tmp_path / "dense")
    model = skeleton(str(tmp_path / "dense"), torch.float32, "cpu")
    model.model.layers[1] = model.model.layers[0]
    shapes = skeleton(str(tmp_path / "dense"))
    whole, source = plan(shapes, Replace(exclude=("*.layers.1.*",))), stored(tmp_path / "dense", shapes)
    with pytest.raises(FitError, match=r"layers\.0\.mlp runs more than once"):
        fit_streamed(model, whole, [batch], Fit(), tmp_path / "fit", lambda name: source.by_name[name].read())
