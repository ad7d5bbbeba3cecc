"""What each exact form of a layer takes, and the prices that choose between them: python benchmarks/execution.py

First the unit prices of this processor are measured and kept in src/hyperfade/nn/prices.json, with which
`hyperfade.nn.execution` chooses. Then every form runs beside the dense layer over a grid of algebras, shapes and
tokens. The results keep each form's speed-up over dense, and the regret: how much slower than the best form the chosen
one was. On a processor without bfloat16 instructions the grid leaves out bfloat16 with many tokens, which nobody would
run there.
"""

import argparse
import json
import math
import statistics
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from hyperfade.algebra import Algebra, kron_sum
from hyperfade.measure import device, machine
from hyperfade.measure.layers import copies
from hyperfade.measure.speed import time_alternately
from hyperfade.nn import PHMLinear
from hyperfade.nn.execution import Prices, candidates, execution, prices, processor
from hyperfade.nn.forms import mixed, mixed_by_library, mixed_by_sums, sliced
from hyperfade.nn.kernel_use import mixes_in_kernel
from hyperfade.workspace import write_json

PRICES = Path(__file__).parents[1] / "src" / "hyperfade" / "nn" / "prices.json"
RESULTS = Path(__file__).parent / "results"
SHAPES = [(576, 1536), (1536, 576), (2048, 11008), (11008, 2048)]  # FFNs of SmolVLM-256M and Qwen2.5-VL-3B
TOKENS = [1, 8, 64, 512, 2048]
ALGEBRAS = [
    Algebra.products(2),
    Algebra.products(4),
    Algebra.products(8),
    Algebra.learned(4),
    Algebra.named("paper"),
    Algebra.named("paper", terms=3),
    Algebra.named("quaternion"),
    Algebra.named("z2", n=4),
    Algebra.named("cyclic", n=4),
]
FEW_TOKENS = 8  # up to which reading the weights counts
CACHES = [2, 4, 8, 16, 32]  # MB
SLOW_MULTIPLY_ADD = 4e-11  # seconds, 50 GFLOP/s: dearer than this, products run without instructions of the dtype


@torch.inference_mode()
def measured_prices(dtype: torch.dtype, place: torch.device, rounds: int) -> Prices:
    """The unit prices of one dtype on one device."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=place).to(dtype)

    wide_tokens = 256 if place.type == "cpu" else 8192  # an accelerator mixes hundreds of tokens while one call starts
    small, wide, tall = random(1, 4, 384), random(wide_tokens, 4, 2752), random(512, 2048)
    mixing, weight, tiny_weight = random(4, 4), random(2752, 2048), random(256, 256)
    terms = random(12, 4, 4), random(12, 688, 512)
    streamed, one = [random(11008, 2048) for _ in range(8)], random(1, 2048)
    few, stream_bytes = random(4, 2048), sum(w.nbytes for w in streamed)
    times = time_alternately(
        {
            "tiny product": partial(F.linear, one[:, :256], tiny_weight),
            "product": partial(F.linear, tall, weight),
            "stream": lambda: [F.linear(one, w) for w in streamed],
            "few rows": lambda: [F.linear(few, w) for w in streamed],
            "few rows sliced": lambda: [sliced(few, w) for w in streamed],
            "derived": partial(torch.add, streamed[0], streamed[1]),
            "weight": partial(kron_sum, *terms),
            "small mix": partial(mixed, small, mixing),
            "wide mix": partial(mixed_by_library, wide, mixing),
            "wide mix in a kernel": partial(mixed, wide, mixing),  # where there is one, else the same
            "small sum": partial(mixed_by_sums, small, mixing),
            "wide sum": partial(mixed_by_sums, wide, mixing),
        },
        rounds=(rounds, rounds),
        least_seconds=0.02,
    )
    seconds = {name: statistics.median(own) for name, own in times.items()}
    on_cpu = place.type == "cpu"  # elsewhere too little work hides behind the price of a call, so: what memory needs
    least_sum = 0.0 if on_cpu else 3 * dtype.itemsize * seconds["stream"] / stream_bytes
    price = Prices(
        product_call=seconds["tiny product"],
        multiply_add=seconds["product"] / (tall.numel() * len(weight)),
        weight_byte=seconds["stream"] / stream_bytes,
        few_rows_weight_byte=seconds["few rows"] / stream_bytes,
        few_rows_sliced_byte=seconds["few rows sliced"] / stream_bytes,
        derived_byte=seconds["derived"] / streamed[0].nbytes,
        small_product_call=seconds["small mix"],
        small_product_element=(seconds["wide mix"] - seconds["small mix"]) / wide.numel(),
        sum_call=seconds["small sum"] / 4,
        sum_element=max((seconds["wide sum"] - seconds["small sum"]) / (4 * wide.numel()), least_sum),
        kernel_element=(seconds["wide mix in a kernel"] - seconds["small mix"]) / (2 * wide.numel())
        if mixes_in_kernel(wide, mixing)
        else None,
        cache_bytes=None,
        weight_element=seconds["weight"] / weight.numel(),
    )
    chunked = replace(price, cache_bytes=best_cache_bytes(dtype, place, rounds))
    print(f"{dtype}: {chunked}", flush=True)
    return chunked


def best_cache_bytes(dtype: torch.dtype, place: torch.device, rounds: int) -> int | None:
    """The bytes of a chunk's input and output with which 2048 tokens take least; None where one chunk is best."""
    cost = dict.fromkeys([*CACHES, None], 0.0)
    for d, k in SHAPES[2:]:
        layer = PHMLinear(d, k, Algebra.products(4), bias=False, dtype=dtype, device=place)
        x, whole = torch.randn(2048, d, device=place).to(dtype), candidates(layer.algebra)[0]
        chunks = {size: size and max(64, size * 10**6 // ((d + k) * dtype.itemsize) // 64 * 64) for size in cost}
        calls = {str(size): partial(layer.run, x, replace(whole, chunk=chunk)) for size, chunk in chunks.items()}
        times = time_alternately(calls, rounds=(rounds, rounds))
        for size in cost:
            cost[size] += math.log(statistics.median(times[str(size)]))
    print(f"{dtype}: seconds by cache size { ({size: round(math.exp(c / 2), 4) for size, c in cost.items()}) }")
    best = min(cost, key=cost.__getitem__)
    return best and best * 10**6


def keep_prices(found: dict[str, Prices], place: torch.device) -> None:
    """Write measured prices by dtype under this device's kind of processor."""
    table = json.loads(PRICES.read_text(encoding="utf-8"))
    own = {"source": machine(), **{dtype: asdict(price) for dtype, price in found.items()}}
    write_json(PRICES, dict(sorted((table | {processor(place.type): own}).items())))
    prices.cache_clear()
    execution.cache_clear()


@torch.inference_mode()
def cell(algebra: Algebra, d: int, k: int, tokens: int, dtype: torch.dtype, place: torch.device, rounds: int) -> dict:
    """Every form beside the dense layer. With few tokens each goes round copies, whose weights are in memory only."""
    like = {"dtype": dtype, "device": place}
    x = torch.randn(tokens, d, device=place).to(dtype)
    both = PHMLinear(d, k, algebra, bias=False, **like), torch.nn.Linear(d, k, bias=False, **like)
    layers, dense = (copies(layer) if tokens <= FEW_TOKENS else [layer] for layer in both)
    chosen = execution(algebra, d, k, tokens, dtype, processor(place.type))
    forms = {replace(how, chunk=chunk) for how in candidates(algebra) for chunk in (None, chosen.chunk)}
    names = {how: "-".join(str(part) for part in asdict(how).values() if part) for how in forms}
    calls = {"dense": lambda: [layer(x) for layer in dense]}
    calls |= {names[how]: lambda how=how: [layer.run(x, how) for layer in layers] for how in sorted(forms, key=str)}
    times = time_alternately(calls, rounds=(rounds, rounds))
    seconds = {name: statistics.median(own) / len(layers) for name, own in times.items()}
    seconds["dense"] *= len(layers) / len(dense)
    ratios = {name: seconds["dense"] / own for name, own in seconds.items() if name != "dense"}
    facts = {"algebra": asdict(algebra), "shape": [d, k], "tokens": tokens, "dtype": str(dtype).removeprefix("torch.")}
    return facts | {
        "dense_seconds": seconds["dense"],
        "speedups": ratios,
        "chosen": names[chosen],
        "regret": max(ratios.values()) / ratios[names[chosen]] - 1,
    }


def main() -> None:
    """Measure, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds")
    parser.add_argument("--keep-prices", action="store_true", help="choose with the committed prices")
    parser.add_argument("--only-prices", action="store_true", help="leave the grid out")
    args = parser.parse_args()
    torch.manual_seed(0)
    place, dtypes = device(), (torch.bfloat16, torch.float32)
    if not args.keep_prices:
        found = {str(dtype).removeprefix("torch."): measured_prices(dtype, place, args.rounds) for dtype in dtypes}
        keep_prices(found, place)
    if args.only_prices:
        return
    kind = processor(place.type)
    most = {dtype: 64 if prices(kind, dtype).multiply_add > SLOW_MULTIPLY_ADD else max(TOKENS) for dtype in dtypes}
    todo = [
        (algebra, d, k, tokens, dtype)
        for dtype in dtypes
        for d, k in SHAPES
        for tokens in TOKENS
        for algebra in ALGEBRAS
        if tokens <= most[dtype]
    ]
    cells, start = [], time.perf_counter()
    for number, one in enumerate(todo, 1):
        cells.append(cell(*one, place, args.rounds))
        spent = time.perf_counter() - start
        last = cells[-1]
        print(
            f"{number}/{len(todo)}, {spent / number * (len(todo) - number):.0f} s left: {last['algebra']['name']} "
            f"n={last['algebra']['n']} {last['shape']} M={last['tokens']} {last['dtype']}: "
            f"{ {name: round(ratio, 2) for name, ratio in last['speedups'].items()} } chosen {last['chosen']}",
            flush=True,
        )
    regrets = [one["regret"] for one in cells]
    slower = [one for one in cells if one["speedups"][one["chosen"]] < 0.95]
    print(f"regret: mean {statistics.mean(regrets):.1%}, largest {max(regrets):.1%}; slower than dense: {len(slower)}")
    path = RESULTS / f"execution_{kind.replace(' ', '_').lower()}.json"
    write_json(path, {"machine": machine(), "rounds": args.rounds, "cells": cells})
    print(path)


if __name__ == "__main__":
    main()
