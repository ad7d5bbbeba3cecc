"""Products in few bits on a CPU: all in one kernel call, or a call for each, beside the dense matrix in as few bits.

    python benchmarks/low_bit_forms.py
    python benchmarks/quantization_report.py

`hyperfade.nn.execution.kernel_calls` chooses by what is measured here. Numbers are random.
"""

import argparse
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperfade.algebra import Algebra
from hyperfade.measure import machine
from hyperfade.measure.speed import time_alternately
from hyperfade.nn import LowBit, LowBitLinear, PHMLinear, fitting_group
from hyperfade.nn.execution import kernel_calls
from hyperfade.workspace import write_json

RESULTS = Path(__file__).parent / "results" / "low_bit_forms.json"
SHAPES = ((576, 1536), (1536, 576), (2048, 11008), (11008, 2048))
BEYOND_CACHE_BYTES = 64_000_000


def low_bit(in_features: int, out_features: int, to: Any, parts: int = 1) -> LowBitLinear:
    """A random matrix as `hyperfade quantize` holds it."""
    held = LowBit(to, fitting_group(to, in_features, 64 if to == "int4" else 0) or 0)
    layer = LowBitLinear(in_features, out_features, held, dtype=torch.bfloat16)
    layer.qdata.random_(0, 255 if to == "int4" else 127)
    layer.scale.uniform_(0.01, 0.02)
    if layer.zero_point is not None:
        layer.zero_point.fill_(8)
    layer.parts = parts
    layer.pack_()
    return layer


def products(in_features: int, out_features: int, n: int, to: Any, calls: int) -> PHMLinear:
    """n products in few bits, laid out for so many calls."""
    layer = PHMLinear(in_features, out_features, Algebra.products(n), bias=False, dtype=torch.bfloat16)
    layer.requires_grad_(False).stack_()
    layer.core = low_bit(in_features // n, out_features, to, calls)  # type: ignore[assignment]
    return layer


def in_turn(make: Callable[[], Any], dense_bytes: int, x: Tensor) -> Callable[[], Any]:
    """A call of one layer after the other, of so many that the dense ones would not fit into a cache together."""
    layers = itertools.cycle([make() for _ in range(max(1, BEYOND_CACHE_BYTES // dense_bytes))])
    return lambda: next(layers)(x)


@torch.inference_mode()
def cell(in_features: int, out_features: int, n: int, to: str, tokens: int) -> dict[str, Any]:
    """Least times, which other work on the machine spoils least, and the calls that are chosen."""
    chosen = kernel_calls(Algebra.products(n), in_features, out_features)
    x = torch.randn(tokens, in_features, dtype=torch.bfloat16)
    shape, dense_bytes = (in_features, out_features), in_features * out_features // (2 if to == "int4" else 1)
    makers = {"dense": partial(low_bit, *shape, to)}
    makers |= {f"{calls} calls": partial(products, *shape, n, to, calls) for calls in (1, n)}
    calls = {name: in_turn(make, dense_bytes, x) for name, make in makers.items()}
    times = time_alternately(calls, rounds=(31, 31))
    return {"microseconds": {name: 1e6 * min(own) for name, own in times.items()}, "chosen": f"{chosen} calls"}


def main() -> None:
    """Measure every cell, in one go."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    kept: dict[str, Any] = {"machine": machine(), "cells": {}}
    for (d, k), n, to, tokens in itertools.product(SHAPES, (2, 4), ("int8", "int4"), (1, 8, 64)):
        key = f"{d}x{k}|{n}|{to}|{tokens}"
        kept["cells"][key] = cell(d, k, n, to, tokens)
        print(key, kept["cells"][key], flush=True)
    write_json(args.results, kept)


if __name__ == "__main__":
    main()
