"""A checkpoint converted from disk is, file by file, the one that fitting the model in memory and saving it gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES

from hyperfade.convert import convert
from hyperfade.distill import fit_
from hyperfade.hub import fold_, load, round_, save
from hyperfade.recipe import Fit, Layer, Recipe, Replace
from hyperfade.surgery import plan, swap_

PRODUCTS = Layer(n=4)
KINDS = {
    "products": PRODUCTS,
    "companion": Layer(n=4, companion_rank=2),
    "complex": Layer(kind="complex", terms=2),
    "learned": Layer(kind="learned", n=2, terms=1),
    "low_rank": Layer(kind="low_rank", fraction=0.4),
}


def source(folder: Path, family: str, **options: Any) -> Path:
    """A dense checkpoint of the tiny model."""
    FAMILIES[family].build().save_pretrained(folder, **options)
    return folder


def recipe(folder: Path, output: Path, layer: Layer = PRODUCTS, **fields: Any) -> Recipe:
    chosen = Replace(language=layer, vision=layer, projector=layer)
    fields = {"dtype": "float32", "fit": Fit(method="frobenius", sweeps=2), **fields}
    return Recipe(model=str(folder), output=output, replace=chosen, **fields)


def in_memory(wanted: Recipe, folder: Path, **options: Any) -> Path:
    """The same fit as `hyperfade compress` makes it: with the model in memory."""
    model = load(wanted.model, wanted.dtype)
    whole = plan(model, wanted)
    swap_(model, whole)
    fit_(model, whole, (), wanted.fit)
    storage = getattr(torch, wanted.save_dtype or wanted.dtype)
    fold_(model)
    round_(model, storage)
    save(model, folder, storage_dtype=storage, **options)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.name != "README.md"}


def quiet(line: str) -> None:
    pass


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_checkpoint_that_fitting_in_memory_gives(family: str, tmp_path: Path) -> None:
    wanted = recipe(source(tmp_path / "dense", family), tmp_path / "out")
    convert(wanted, quiet)
    assert files(tmp_path / "out" / "model") == files(in_memory(wanted, tmp_path / "expected"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llava_siglip", "blip2_opt"])
def test_every_kind_of_layer(family: str, kind: str, tmp_path: Path) -> None:
    wanted = recipe(source(tmp_path / "dense", family), tmp_path / "out", KINDS[kind])
    convert(wanted, quiet)
    assert files(tmp_path / "out" / "model") == files(in_memory(wanted, tmp_path / "expected"))
