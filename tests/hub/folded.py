"""Compressed tiny models for the tests of this folder, and small tools to look at and damage their checkpoints."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import FAMILIES
from torch import Tensor

from hyperfade.hub import fold_, save
from hyperfade.recipe import Layer, Replace
from hyperfade.surgery import plan, swap_

KINDS = {
    "products": Layer(n=4),
    "learned": Layer(kind="learned", n=2, terms=3),
    "complex": Layer(kind="complex", terms=3),
    "companion": Layer(n=4, companion_rank=2),
    "low_rank": Layer(kind="low_rank", fraction=0.4),
}
NARROW = {
    "narrow": Layer(kind="dense", width=0.5),
    "narrow_products": Layer(n=4, width=0.5),
}
"""Kinds that keep a part of an FFN's hidden units; a projector of one matrix cannot become the first."""


def folded(name: str, layer: Layer = KINDS["products"], dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """The tiny model of family `name` with every FFN and the projector replaced, its dense branches dropped.

    Where the layers have a width the projector becomes products: it may be one matrix, which has no hidden units.
    """
    model = FAMILIES[name].build(seed, dtype)
    projector = layer if layer.width is None else KINDS["products"]
    swap_(model, plan(model, Replace(language=layer, vision=layer, projector=projector)))
    fold_(model)
    return model


def saved(folder: Path, name: str = "llama", **options: Any) -> Path:
    """A folder with the checkpoint of `folded(name)`."""
    save(folded(name), folder, **options)
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by name, over all its shards."""
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def stored_dtypes(folder: Path) -> set[str]:
    """The dtypes that the safetensors headers name."""
    found = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found |= {opened.get_slice(k).get_dtype() for k in opened.keys()}  # noqa: SIM118 (not a mapping)
    return found


def edit_json(file: Path, change: Callable[[Any], Any]) -> None:
    """Read `file`, let `change` alter it in place, write it back."""
    fields = json.loads(file.read_text())
    change(fields)
    file.write_text(json.dumps(fields))


def files(folder: Path) -> dict[str, bytes]:
    """Everything below `folder`, hidden files included."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
