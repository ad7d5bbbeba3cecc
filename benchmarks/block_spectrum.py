"""How much of a pretrained matrix any hypercomplex layer could keep, whatever its algebra: a bound by singular values.

    make reference
    python benchmarks/block_spectrum.py

Cut W into n × n blocks and write each as a row: t terms, or t products, are t combinations of rows, so what they keep
of ‖W‖² is at most the share of the t largest of the n² singular values, squared (Eckart and Young; Van Loan and
Pitsianis for Kronecker sums). Were the blocks unrelated numbers, the best t of n² would keep t / n². Beside it: what a
low-rank matrix with as many parameters keeps. All by weights alone; the calibrated fits know activations as well.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperfade.algebra import Algebra, fit, kron_sum, rank_for, rearranged
from hyperfade.hub import load
from hyperfade.measure import machine
from hyperfade.surgery import find_ffns
from hyperfade.workspace import write_json

RESULTS = Path(__file__).parent / "results" / "block_spectrum.json"
FRACTIONS = (0.5, 0.25, 0.125)
SIZES = (2, 4, 8)


def kept_by_terms(weight: Tensor, n: int) -> Tensor:
    """The largest share of ‖W‖² that t = 1 ... n² terms can keep: (n²,)."""
    blocks = rearranged(weight, n)
    energies = torch.linalg.eigvalsh(blocks @ blocks.T).flip(0).clamp_min(0)
    return energies.cumsum(0) / energies.sum()


def kept_by_ranks(weight: Tensor) -> Tensor:
    """The largest share of ‖W‖² that ranks 1 ... can keep."""
    energies = torch.linalg.svdvals(weight).square()
    return energies.cumsum(0) / energies.sum()


def kept_by_fit(weight: Tensor, algebra: Algebra) -> float:
    """The share of ‖W‖² that the package's fit of products keeps, by weights alone."""
    found = fit(weight, algebra, sweeps=12)
    assert found.left is not None
    assert found.right is not None
    light = kron_sum(found.left[:, :, None] * found.right[:, None, :], found.components)
    return 1 - ((light - weight).square().sum() / weight.square().sum()).item()


def measured(weight: Tensor) -> dict[str, Any]:
    """Shares kept at every fraction, by the bound for each n, by low-rank, and by the fit of products n = 4."""
    k, d = weight.shape
    ranks = kept_by_ranks(weight)
    found: dict[str, Any] = {"low-rank": [ranks[rank_for(d, k, d * k * f) - 1].item() for f in FRACTIONS]}
    for n in SIZES:
        terms = kept_by_terms(weight, n)
        found[f"n = {n}"] = [terms[int(f * n * n) - 1].item() if f * n * n >= 1 else None for f in FRACTIONS]
    found["products n = 4, fitted"] = [kept_by_fit(weight, Algebra.products(4, int(16 * f))) for f in FRACTIONS]
    return found


def main() -> None:
    """Measure every FFN matrix of a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/reference/model", help="any checkpoint; made by make reference")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file that the results are written to")
    args = parser.parse_args()
    model: Any = load(args.model, "float32")
    matrices = {name: ffn.region for ffn in find_ffns(model) if ffn.region != "projector" for name in ffn.linears}
    cells = {}
    for number, (name, region) in enumerate(matrices.items(), 1):
        weight = model.get_submodule(name).weight.detach()
        cells[name] = {"region": region, "shape": list(weight.shape), "kept": measured(weight.double())}
        print(f"{number}/{len(matrices)} {name}: {cells[name]['kept']}", flush=True)
    write_json(args.results, {"machine": machine(), "fractions": FRACTIONS, "cells": cells})


if __name__ == "__main__":
    main()
