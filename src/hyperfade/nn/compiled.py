"""Compressed FFNs by torch's compiler, which makes one pass of a layer's mixes and what surrounds them.

Eager calls pay a fixed price for every mix and write its result to memory. Compiled, a mix is part of the activation
next to it, and a single token's products read their weights in one loop, faster than the matrix library does.
`docs/speed.md` has the numbers. The rest of the model stays as it is, so that generation needs no fixed shapes.
"""

import os
import shutil

import torch
from torch import nn

from hyperfade.errors import MissingLibraryError
from hyperfade.nn.phm import PHMLinear
from hyperfade.nn.spec import light_modules

_GRAPHS = 4  # of one kind of module: a single token, several, many of fixed algebras, and one to spare


def compile_(model: nn.Module) -> list[str]:
    """Let every FFN that has hypercomplex layers be compiled at its first call, in place; returns their names.

    A module is an FFN here if all its parameters are those of light layers in it; where one holds more (OPT's decoder
    layer), its hypercomplex layers are compiled one by one. Layers in few bits and experts are left out. First calls
    take seconds for each kind of FFN: one graph serves single tokens, one any number. Weights, state and saving do not
    change. Raises `MissingLibraryError` where a CPU model finds no C++ compiler.
    """
    layers = {name: m for name, m in light_modules(model).items() if isinstance(m, PHMLinear) and _in_full(m)}
    holders = dict.fromkeys(_holder(model, name) for name in layers)
    chosen = {name: model.get_submodule(name) for name in holders}
    if any(p.device.type == "cpu" for layer in layers.values() for p in layer.parameters()):
        _need_compiler()
    kinds = {(type(m), *((n, p.shape, p.dtype) for n, p in m.named_parameters())) for m in chosen.values()}
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _GRAPHS * len(kinds))
    for module in chosen.values():
        module.compile(dynamic=True)
    return list(chosen)


def _in_full(layer: PHMLinear) -> bool:
    """Whether no quantizer or adapter has a part in the layer."""
    return not layer.stacked if layer.algebra.form == "products" else layer.plain_core


def _holder(model: nn.Module, name: str) -> str:
    """The FFN around a layer, or the layer itself."""
    parent = name.rpartition(".")[0]
    around = model.get_submodule(parent)
    of_layers = {id(p) for layer in light_modules(around).values() for p in layer.parameters()}
    return parent if all(id(p) in of_layers for p in around.parameters()) else name


def _need_compiler() -> None:
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        raise MissingLibraryError(
            f"Compiling for a CPU needs a C++ compiler, and there is no {name}.",
            "Install one (on Debian: apt install g++), or name yours in the environment variable CXX.",
        )
