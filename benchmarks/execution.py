"""What each exact form of a layer takes, and the prices that choose between them: python benchmarks/execution.py

First the unit prices of this machine's processor and dtype are measured and written to src/hyperfade/nn/prices.json,
with which `hyperfade.nn.execution` chooses. Then every form runs beside the dense layer over a grid of algebras, shapes
and tokens; results keep the ratio of dense to each form, and the regret: how much slower than the best form the chosen
one was.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from hyperfade.algebra import Algebra
from hyperfade.measure import machine
from hyperfade.nn import PHMLinear
from hyperfade.nn.execution import Prices, candidates, execution, prices
from hyperfade.nn.forms import mixed, mixed_by_sums
from hyperfade.workspace import write_json

PRICES = Path(__file__).parents[1] / "src" / "hyperfade" / "nn" / "prices.json"
RESULTS = Path(__file__).parent / "results" / "execution.json"
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
CACHES = [2, 4, 8, 16, 32]  # MB


def seconds_of(calls: dict[str, Callable[[], object]], rounds: int, least_seconds: float = 0.005) -> dict[str, float]:
    """Median seconds of each call, over rounds in which each has its turn."""
    repeats = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, math.ceil(least_seconds / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return {name: statistics.median(values) for name, values in times.items()}


def measured_prices(dtype: torch.dtype, rounds: int) -> Prices:
    """The unit prices of one dtype on this machine."""
    like = {"dtype": dtype}
    small, wide, tall = (
        torch.randn(1, 4, 384, **like),
        torch.randn(256, 4, 2752, **like),
        torch.randn(512, 2048, **like),
    )
    mixing, weight = torch.randn(4, 4, **like), torch.randn(2752, 2048, **like)
    streamed = [torch.randn(11008, 2048, **like) for _ in range(8)]
    one, tiny_weight = torch.randn(1, 2048, **like), torch.randn(256, 256, **like)
    times = seconds_of(
        {
            "tiny product": lambda: F.linear(one[:, :256], tiny_weight),
            "product": lambda: F.linear(tall, weight),
            "stream": lambda: [F.linear(one, w) for w in streamed],
            "small mix": lambda: mixed(small, mixing),
            "wide mix": lambda: mixed(wide, mixing),
            "small sum": lambda: mixed_by_sums(small, mixing),
            "wide sum": lambda: mixed_by_sums(wide, mixing),
        },
        rounds,
        0.02,
    )
    price = Prices(
        product_call=times["tiny product"],
        multiply_add=times["product"] / (tall.numel() * len(weight)),
        weight_byte=times["stream"] / sum(w.numel() * w.itemsize for w in streamed),
        small_product_call=times["small mix"],
        small_product_element=(times["wide mix"] - times["small mix"]) / wide.numel(),
        sum_call=times["small sum"] / 4,
        sum_element=(times["wide sum"] - times["small sum"]) / (4 * wide.numel()),
        cache_bytes=0,
    )
    print(f"{dtype}: {price}", flush=True)
    cost = dict.fromkeys(CACHES, 0.0)
    for d, k in SHAPES[2:]:
        layer, x = PHMLinear(d, k, Algebra.products(4), bias=False, **like), torch.randn(2048, d, **like)
        how = candidates(layer.algebra)[0]
        chunks = {size: max(64, size * 10**6 // ((d + k) * dtype.itemsize) // 64 * 64) for size in CACHES}
        calls = {str(size): partial(layer.run, x, replace(how, chunk=chunk)) for size, chunk in chunks.items()}
        for size, taken in seconds_of(calls, rounds).items():
            cost[int(size)] += math.log(taken)
    print(
        f"{dtype}: time by cache size { ({size: round(math.exp(c / 2), 4) for size, c in cost.items()}) }", flush=True
    )
    return replace(price, cache_bytes=min(cost, key=cost.__getitem__) * 10**6)


def cell(algebra: Algebra, d: int, k: int, tokens: int, dtype: torch.dtype, rounds: int) -> dict:
    """Every form beside the dense layer."""
    layer, x = PHMLinear(d, k, algebra, bias=False, dtype=dtype), torch.randn(tokens, d, dtype=dtype)
    dense = torch.nn.Linear(d, k, bias=False, dtype=dtype)
    chosen = execution(algebra, d, k, tokens, dtype, "cpu")
    forms = {*candidates(algebra), chosen, *(replace(how, chunk=chosen.chunk) for how in candidates(algebra))}
    calls: dict[str, Callable[[], object]] = {"dense": lambda: dense(x)}
    names = {how: "-".join(str(part) for part in asdict(how).values() if part) for how in forms}
    calls |= {names[how]: partial(layer.run, x, how) for how in sorted(forms, key=str)}
    times = seconds_of(calls, rounds)
    ratios = {name: times["dense"] / taken for name, taken in times.items() if name != "dense"}
    return {
        "algebra": asdict(algebra),
        "shape": [d, k],
        "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "dense_seconds": times["dense"],
        "speedups": ratios,
        "chosen": names[chosen],
        "regret": max(ratios.values()) / ratios[names[chosen]] - 1,
    }


@torch.inference_mode()
def main() -> None:
    """Measure, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds")
    parser.add_argument("--keep-prices", action="store_true", help="choose with the committed prices")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    args = parser.parse_args()
    torch.manual_seed(0)
    if not args.keep_prices:
        table = json.loads(PRICES.read_text(encoding="utf-8")) if PRICES.exists() else {"prices": {}}
        for name in args.dtypes:
            price = measured_prices(getattr(torch, name), args.rounds)
            table["prices"].setdefault("cpu", {})[name] = asdict(price)
        write_json(PRICES, {"machine": machine(), **table})
        prices.cache_clear()
    cells, start = [], time.perf_counter()
    todo = [
        (algebra, d, k, tokens, getattr(torch, name))
        for name in args.dtypes
        for d, k in SHAPES
        for tokens in TOKENS
        for algebra in ALGEBRAS
        if name != "float32" or tokens < 2048
    ]
    for number, one in enumerate(todo, 1):
        cells.append(cell(*one, args.rounds))
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
    write_json(RESULTS, {"machine": machine(), "rounds": args.rounds, "cells": cells})


if __name__ == "__main__":
    main()
