"""FFN layers side by side: dense, hypercomplex, low-rank of equal size: python benchmarks/ffn_speed.py

At the true shapes of three models, whole FFNs and single matrices, float32 and bfloat16, 1 to 2048 tokens. A round
times every layer once; what is kept are medians and quartiles of the rounds' ratios. Calls go round copies of a layer
that exceed the last cache four times, as weights in a model do; with few tokens a second timing leaves the weights in
the cache (`hot`), to show what that would make of the numbers. Whole FFNs in bfloat16 run twice, as they are and as
compiled by `torch.compile`. The machine's ceilings are measured in the same run.

Every finished cell is kept; a repeat goes on with those that are missing, unless --fresh is given.
"""

import argparse
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from shapes import LOW_RANK, MODELS, RIVAL, VARIANTS
from torch import nn

from hyperfade.errors import AlgebraError
from hyperfade.measure import device, machine
from hyperfade.measure.layers import (
    TOKENS,
    LayerTime,
    compiled_copies,
    copies,
    describe,
    input_width,
    lone_ffn,
    time_layers,
)
from hyperfade.measure.roofline import ceilings
from hyperfade.recipe import Replace
from hyperfade.surgery import FFN, Swap, find_ffns, plan
from hyperfade.workspace import read_json, write_json

RESULTS = Path(__file__).parent / "results" / "ffn_speed.json"
HOT_TOKENS = (1, 8)
COMPILED = ("dense", *VARIANTS, "low-rank 1/4")


@dataclass(frozen=True)
class Shape:
    """A layer to time: an FFN of a (meta) model, or one matrix of it."""

    part: str  # ffn or matrix
    region: str
    name: str
    models: tuple[str, ...]
    model: nn.Module
    ffn: FFN
    choices: dict[str, tuple[Swap, ...]]
    left_out: dict[str, str]

    @property
    def multiply_adds(self) -> int:
        """Of the dense layer, per token."""
        linears = [self.model.get_submodule(name) for name in self.ffn.linears]
        return sum(linear.in_features * linear.out_features for linear in linears)


def shapes() -> list[Shape]:
    """The distinct FFNs of all models, then their distinct matrices."""
    ffns: dict[tuple[str, str], list[tuple[str, nn.Module, FFN]]] = {}
    matrices: dict[tuple[int, int], list[str]] = {}
    for name, made in MODELS.items():
        model = made.skeleton()
        for ffn in {ffn.region: ffn for ffn in reversed(find_ffns(model)) if ffn.region != "projector"}.values():
            ffns.setdefault((ffn.region, describe(model, ffn)), []).append((name, model, ffn))
            for linear in map(model.get_submodule, ffn.linears):
                users = matrices.setdefault((linear.in_features, linear.out_features), [])
                users += [name] if name not in users else []
    found = []
    for (region, shape), users in ffns.items():
        _, model, ffn = users[0]
        found.append(Shape("ffn", region, shape, tuple(u[0] for u in users), model, ffn, *choices_for(model, ffn)))
    for (d, k), users in matrices.items():
        model = nn.Sequential(nn.Linear(d, k, bias=False, device="meta"))
        ffn = FFN("0", "other", (), "0")
        found.append(Shape("matrix", "", f"{d} → {k}", tuple(users), model, ffn, *choices_for(model, ffn)))
    return found


def choices_for(model: nn.Module, ffn: FFN) -> tuple[dict[str, tuple[Swap, ...]], dict[str, str]]:
    """The swaps of every variant, dense (none) first; and why the shape does not take the others."""
    found: dict[str, tuple[Swap, ...]] = {"dense": ()}
    left_out = {}
    for name, layer in (VARIANTS | LOW_RANK).items():
        patterns = {"patterns": ("0",), "language": None, "vision": None} if ffn.region == "other" else {}
        try:
            swaps = plan(model, Replace(**{"language": None, "vision": None, **patterns, ffn.region: layer})).swaps
        except AlgebraError as error:
            left_out[name] = error.message
            continue
        found[name] = tuple(swap for swap in swaps if swap.ffn == ffn.name)
    return found, left_out


@dataclass(frozen=True)
class Cell:
    """One line of the results."""

    shape: Shape
    dtype: str
    tokens: int
    cache: str  # cold or hot

    @property
    def key(self) -> str:
        """Its name in the results file."""
        return "|".join([self.shape.part, self.shape.region, self.shape.name, self.dtype, str(self.tokens), self.cache])


def cells(quick: bool) -> Iterator[Cell]:
    """All cells, those of one shape and dtype together; matrices in bfloat16 only. Quick: whole FFNs in bfloat16, three
    token counts, cold."""
    for shape in shapes():
        if quick and shape.part == "matrix":
            continue
        for dtype in ("bfloat16",) if quick or shape.part == "matrix" else ("bfloat16", "float32"):
            for tokens in (1, 64, 512) if quick else TOKENS:
                if shape.part == "matrix" and tokens == max(TOKENS):
                    continue  # whole FFNs show it, and it takes longest
                yield Cell(shape, dtype, tokens, "cold")
                if tokens in HOT_TOKENS and (shape.part, dtype, quick) == ("ffn", "bfloat16", False):
                    yield Cell(shape, dtype, tokens, "hot")


def measure(cell: Cell, layers: dict[str, list[nn.Module]], rounds: tuple[int, int]) -> dict[str, Any]:
    """The cell's numbers."""
    shape = cell.shape
    turns = layers if cell.cache == "cold" else {name: same[:1] for name, same in layers.items()}
    times = time_layers(turns, input_width(shape.model, shape.ffn), cell.tokens, rounds=rounds)
    return facts_of(cell, len(times["dense"].seconds)) | {"layers": numbers_of(times)}


def facts_of(cell: Cell, rounds: int) -> dict[str, Any]:
    """What was timed."""
    shape = cell.shape
    features = [input_width(shape.model, shape.ffn), shape.model.get_submodule(shape.ffn.writer).out_features]
    facts = {"part": shape.part, "region": shape.region, "shape": shape.name, "models": list(shape.models)}
    facts |= {"dtype": cell.dtype, "tokens": cell.tokens, "cache": cell.cache, "features": features}
    return facts | {"rounds": rounds}


def numbers_of(times: Mapping[str, LayerTime]) -> dict[str, dict[str, Any]]:
    """Every layer's time and work, its speed-up over dense, and over the low-rank layer of its size."""
    results = {}
    for name, mine in times.items():
        results[name] = {
            "seconds": mine.median_seconds,
            "speedup": mine.speedup_over(times["dense"]),
            "flops": mine.flops,
            "weight_bytes": mine.weight_bytes,
        }
        if RIVAL.get(name) in times:
            results[name]["speedup_over_low_rank"] = mine.speedup_over(times[RIVAL[name]])
    return rounded(results)


def rounded(value: Any) -> Any:
    """Four digits: what a timing can carry."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, tuple):
        return [rounded(inner) for inner in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    """Measure what is missing, and keep it cell by cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--quick", action="store_true", help="bfloat16 FFNs with 1, 64 and 512 tokens only")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after so long; a repeat goes on")
    parser.add_argument("--longest-call", type=float, default=8.0, help="leave out cells whose dense call lasts longer")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # not time, silently, what was not compiled
    kept = read_json(args.output) if args.output.exists() and not args.fresh else {"cells": {}}
    results = {
        "machine": machine(),
        "ceilings": kept.get("ceilings", {}),
        "left_out": kept.get("left_out", {}),
        "cells": kept["cells"],
    }
    todo = [cell for cell in cells(args.quick) if cell.key not in results["cells"]]
    start, built = time.perf_counter(), (None, None, {})
    for dtype in dict.fromkeys(cell.dtype for cell in todo):
        if dtype not in results["ceilings"]:
            results["ceilings"][dtype] = rounded(asdict(ceilings(getattr(torch, dtype), device())))
            print(f"ceilings, {dtype}: {results['ceilings'][dtype]}", flush=True)
    expected = {cell.key: _expected_seconds(cell, results["ceilings"]) for cell in todo}
    for number, cell in enumerate(todo, 1):
        shape = cell.shape
        call_seconds = 2 * shape.multiply_adds * cell.tokens / results["ceilings"][cell.dtype]["flops_per_second"]
        for name, reason in shape.left_out.items():
            results["left_out"][f"{shape.part} {shape.region} {shape.name}: {name}"] = reason
        if call_seconds > args.longest_call:
            reason = f"one dense call lasts about {call_seconds:.0f} s on this machine"
            results["left_out"][f"{shape.part} {shape.region} {shape.name}: {cell.dtype}, {cell.tokens} tokens"] = (
                reason
            )
            continue
        if time.perf_counter() - start > 60 * args.minutes:
            print(f"{len(todo) - number + 1} cells are left for a repeat", flush=True)
            break
        if built[:2] != (shape.name, cell.dtype):
            built = (None, None, {})  # free the old layers first
            layers = {
                name: copies(lone_ffn(shape.model, shape.ffn, swaps, getattr(torch, cell.dtype), device()))
                for name, swaps in shape.choices.items()
            }
            if (shape.part, cell.dtype) == ("ffn", "bfloat16"):
                layers |= {f"{name}, compiled": compiled_copies(layers[name]) for name in COMPILED if name in layers}
            built = (shape.name, cell.dtype, layers)
        results["cells"][cell.key] = measure(cell, built[2], (3, 15) if call_seconds > 0.3 else (7, 15))
        write_json(args.output, results)
        done, left = (sum(expected[c.key] for c in part) for part in (todo[:number], todo[number:]))
        minutes_left = (time.perf_counter() - start) / done * left / 60
        ratios = ", ".join(f"{n} {r['speedup'][0]:.2f}×" for n, r in results["cells"][cell.key]["layers"].items())
        print(f"{number}/{len(todo)}, about {minutes_left:.0f} min left: {cell.key}: {ratios}", flush=True)
    write_json(args.output, results)


def _expected_seconds(cell: Cell, roofs: dict[str, Any]) -> float:
    """For the estimate of what is left: five calls of all layers, or the rounds' own length."""
    call_seconds = 2 * cell.shape.multiply_adds * cell.tokens / roofs[cell.dtype]["flops_per_second"]
    return 5 + 9 * call_seconds * len(cell.shape.choices) * 0.6


if __name__ == "__main__":
    main()
