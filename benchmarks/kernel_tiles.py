"""How large the tiles of the kernel for one token should be, on one GPU: python benchmarks/kernel_tiles.py

Times `hyperfade.nn.kernel.one_token` as CUDA graphs over copies that no cache holds, for the FFN matrices of
Qwen2.5-VL-3B (gate and up joined, down) and every tile: microseconds of a call beside those that reading the weights
takes at the best rate measured. The tiles with the smallest mean loss against the best one of each matrix go to
src/hyperfade/nn/tiles.json, from which the kernel takes them. Compiles in several processes first.
"""

import argparse
import json
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, astuple, dataclass, fields
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from gpu_ways import captured
from torch import Tensor

from hyperfade.measure import ceilings, machine, time_alternately
from hyperfade.nn.kernel import Tile, one_token, tile_kind
from hyperfade.workspace import read_json, write_json

RESULTS = Path(__file__).parent / "results" / "kernel_tiles.json"
TILES = Path(__file__).parents[1] / "src" / "hyperfade" / "nn" / "tiles.json"
WIDTH, HIDDEN = 2048, 11008
CHOICES = [Tile(*each) for each in product((1, 2, 4, 8), (4096, 8192, 16384), (4, 8))]
READ_BYTES = 300e6  # by one launch, several times what the cache holds


@dataclass(frozen=True)
class Product:
    """What a kernel call computes: `layers` hypercomplex matrices d → k of `count` products."""

    d: int
    k: int
    layers: int
    n: int
    count: int

    def weights(self) -> Tensor:
        """T (copies, layers·R, k/n, d/n), random."""
        shape = self.layers * self.count, self.k // self.n, self.d // self.n
        copies = max(1, round(READ_BYTES / (2 * shape[0] * shape[1] * shape[2])))
        return torch.randn(copies, *shape, device="cuda", dtype=torch.bfloat16)

    @property
    def kind(self) -> str:
        """Where its tile stands in tiles.json."""
        return tile_kind(self.layers * self.k // self.n)


def products() -> list[Product]:
    """Gate and up, and down, for every algebra."""
    found = []
    for n, count in ((4, 4), (2, 2), (8, 8), (4, 12)):
        found += [Product(WIDTH, HIDDEN, 2, n, count), Product(HIDDEN, WIDTH, 1, n, count)]
    return found


def inputs(of: Product) -> tuple[Tensor, Tensor, Tensor]:
    """x, P and Q."""
    like = {"device": "cuda", "dtype": torch.bfloat16}
    mixing = torch.randn(2, of.layers * of.count, of.n, **like)
    return torch.randn(1, of.n, of.d // of.n, **like), mixing[0], mixing[1]


def compile_all(of: Product) -> None:
    """Fill Triton's cache on disk."""
    x, p, q = inputs(of)
    t = of.weights()[0]
    for tile in CHOICES:
        one_token(x, p, q, t, of.layers, tile)
    torch.cuda.synchronize()


def microseconds(of: Product) -> tuple[dict[str, float], int]:
    """Of one call with every tile; and the bytes of its weights."""
    x, p, q = inputs(of)
    copies = of.weights()
    calls = {}
    for tile in CHOICES:

        def loop(tile: Tile = tile) -> None:
            for t in copies:
                one_token(x, p, q, t, of.layers, tile)

        calls[" ".join(map(str, tile))] = captured(loop, x.device)
    times = time_alternately(calls, rounds=(5, 5), least_seconds=1e-3, budget_seconds=1.0)
    medians = {name: round(1e6 * statistics.median(own) / len(copies), 2) for name, own in times.items()}
    return medians, copies[0].nbytes


def main() -> None:
    """Compile, time, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=8, help="that compile at once")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    with ProcessPoolExecutor(args.processes, get_context("spawn")) as pool:
        list(pool.map(compile_all, products()))
    rate = ceilings(torch.bfloat16, torch.device("cuda")).read_bytes_per_second
    cells = []
    for of in products():
        taken, weight_bytes = microseconds(of)
        least = round(1e6 * weight_bytes / rate, 2)
        cells.append({**asdict(of), "reading_us": least, "us": taken})
        best = sorted(taken, key=taken.__getitem__)[:3]
        print(astuple(of), f"reading {least} us;", "; ".join(f"{name}: {taken[name]}" for name in best), flush=True)
        write_json(args.output, {"machine": machine(), "read_bytes_per_second": rate, "cells": cells})
    write_json(TILES, best_tiles(cells))
    print(json.dumps(read_json(TILES)))


def best_tiles(cells: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """For every kind the tile whose times are nearest to each matrix's own best, by geometric mean."""
    losses: dict[str, dict[str, list[float]]] = {}
    for cell in cells:
        kind = Product(**{field.name: cell[field.name] for field in fields(Product)}).kind
        least = min(cell["us"].values())
        for name, taken in cell["us"].items():
            losses.setdefault(kind, {}).setdefault(name, []).append(taken / least)
    table: dict[str, dict[str, int]] = {}
    for kind, by_tile in losses.items():
        name = min(by_tile, key=lambda name: statistics.geometric_mean(by_tile[name]))
        table[kind] = Tile(*map(int, name.split()))._asdict()
    return table


if __name__ == "__main__":
    main()
