"""Whole models, dense and compressed: python benchmarks/model_speed.py

True shapes, random weights, bfloat16, no download: time to first token with an image (vision tower and prompt in one
prefill), time per output token at batch 1 and 8, time to load, memory. Each cell is a process of its own that builds
the dense model and some variants and times them in alternating rounds. Beside it stands what Amdahl's law predicts from
the FFN's share of the dense model's time and the FFNs' own speed-ups, both measured in that process. Hypercomplex
variants run twice, as they are and with their FFNs compiled.

Every finished cell is kept; a repeat goes on with those that are missing, unless --fresh is given.
"""

import argparse
import copy
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from shapes import LOW_RANK, MODELS
from whole_models import SHARED_PERIOD, built, compressed, decode, prefill, prompt, twin

from hyperfade.measure import disk_bytes, machine, speedup, time_alternately
from hyperfade.measure.speed import now
from hyperfade.nn import compile_
from hyperfade.workspace import read_json, write_json

RESULTS = Path(__file__).parent / "results" / "model_speed.json"
GROUPS = (("paper", "products n=4"), ("products n=2", "learned n=4", "low-rank 1/4"))  # that fit into memory together
NEW_TOKENS, BATCH, BATCH_TOKENS = 16, 8, 4
ROUNDS = {"SmolVLM-256M": 9, "Qwen2.5-VL-3B": 3, "Qwen2.5-VL-7B": 2}


@dataclass(frozen=True)
class SpeedCell:
    """One model dense and with some variants, side by side. Without prefill only decoding is timed."""

    name: str
    group: tuple[str, ...]
    dtype: str
    prefill: bool
    compiled: bool = True  # hypercomplex variants also with their FFNs compiled

    @property
    def key(self) -> str:
        """Its name in the results file."""
        return f"speed|{self.name}|{', '.join(self.group)}, {self.dtype}"


@torch.inference_mode()
def speed_cell(cell: SpeedCell) -> dict[str, Any]:
    """Dense and the group's variants in alternating rounds, and Amdahl's check of each."""
    name, dtype = cell.name, getattr(torch, cell.dtype)
    period = SHARED_PERIOD.get((name, dtype))
    dense = built(name, dtype, period)
    models, plans = {"dense": dense}, {}
    for variant in cell.group:
        models[variant], plans[variant] = compressed(dense, name, variant, period)
        if cell.compiled and variant not in LOW_RANK:
            models[f"{variant}, compiled"], plans[f"{variant}, compiled"] = twin(models[variant]), plans[variant]
            compile_(models[f"{variant}, compiled"])
    batch, patches = prompt(dense)
    text = {key: batch[key][:, -8:] for key in ("input_ids", "attention_mask")}
    caches: dict[str, Any] = {}
    for variant, model in models.items():
        caches[variant] = prefill(model, text)
        decode(model, *caches[variant], 1)  # a short warm-up: the first touch of the weights
        if variant.endswith("compiled"):
            prefill(model, batch)  # every region's graph for many tokens
            decode(model, *_widened(*caches[variant], 2), 1)
    ffn_seconds = _listen(dense, next(iter(plans.values())))
    first: dict[str, list[float]] = defaultdict(list)
    share: dict[str, list[float]] = defaultdict(list)  # of the dense model's time, by phase and region
    for _ in range(ROUNDS[name] if cell.prefill else 0):
        for variant, model in models.items():
            ffn_seconds.clear()
            seconds, caches[variant] = _timed(lambda model=model: prefill(model, batch))
            first[variant].append(seconds)
            if variant == "dense":
                for region, spent in ffn_seconds.items():
                    share[f"prefill {region}"].append(spent / seconds)
    phases = {"first_token": first} if cell.prefill else {}
    for phase, size, tokens in (("per_token", 1, NEW_TOKENS), ("per_token_batch_8", BATCH, BATCH_TOKENS)):
        phases[phase] = defaultdict(list)
        several = {variant: _widened(*caches[variant], size) for variant in models}
        for _ in range(ROUNDS[name]):
            for variant, model in models.items():
                ffn_seconds.clear()
                seconds, _ = _timed(lambda m=model, v=variant, n=tokens, s=several: decode(m, *s[v], n))
                phases[phase][variant].append(seconds / tokens)
                if variant == "dense" and size == 1:
                    share["decode language"].append(ffn_seconds["language"] / seconds)
    shares = {key: statistics.median(values) for key, values in share.items()}
    for hook in ffn_seconds.hooks:
        hook.remove()
    prompt_tokens = batch["input_ids"].shape[1]
    rows = {"prefill language": prompt_tokens, "prefill vision": patches, "decode language": 1}
    ratios = _ffn_ratios(models, plans, {key: rows[key] for key in shares})
    result: dict[str, Any] = {"dtype": cell.dtype, "prompt_tokens": prompt_tokens, "patches": patches}
    result |= {"ffn_share": shares, "rounds": ROUNDS[name], "shared_period": period, "models": {}}
    for variant in models:
        own = {phase: {"seconds": statistics.median(times[variant])} for phase, times in phases.items()}
        for phase, times in phases.items():
            own[phase]["speedup"] = speedup(times[variant], times["dense"])
        whole = plans.get(variant) or next(iter(plans.values()))
        own["parameters"] = whole.parameters_before if variant == "dense" else whole.parameters_after
        if variant != "dense":
            own["ffn_speedup"] = ratios[variant]
            own["amdahl"] = {
                phase: _amdahl(shares, ratios[variant], stage, own[phase]["speedup"].median)
                for phase, stage in (("first_token", "prefill"), ("per_token", "decode"))
                if phase in phases
            }
        result["models"][variant] = own
    return result


class _FFNSeconds(defaultdict[str, float]):
    """Seconds spent in FFN modules by region; `hooks` can be removed."""

    def __init__(self) -> None:
        super().__init__(float)
        self.hooks: list[Any] = []


def _listen(dense: Any, any_plan: Any) -> _FFNSeconds:
    """Let the dense model's FFN modules note how long they run."""
    spent, started = _FFNSeconds(), [0.0]

    def begin(module: Any, arguments: Any) -> None:
        started[0] = now()

    for ffn in any_plan.ffns:
        module = dense.get_submodule(ffn.name)

        def end(module: Any, arguments: Any, output: Any, region: str = ffn.region) -> None:
            spent[region] += now() - started[0]

        spent.hooks += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    return spent


def _ffn_ratios(models: dict[str, Any], plans: dict[str, Any], rows: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Speed-ups of the FFNs alone for so many tokens by `phase region`; calls go round the model's layers."""
    dense, result = models["dense"], {variant: {} for variant in plans}
    ffns = next(iter(plans.values())).ffns
    for key, tokens in rows.items():
        region = key.split()[1]
        names = [ffn for ffn in ffns if ffn.region == region]
        reads = names[0].readers[0]
        width = dense.get_submodule(reads).in_features
        x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(2)).to(dense.dtype)[None]
        x = x[0] if region == "vision" and dense.config.model_type == "qwen2_5_vl" else x
        turns = {v: cycle([model.get_submodule(ffn.name) for ffn in names]) for v, model in models.items()}
        calls = {v: lambda turn=turn, x=x: next(turn)(x) for v, turn in turns.items()}
        times = time_alternately(calls, rounds=(5, 2 * len(names)), least_seconds=0.01, budget_seconds=6.0)
        for variant in plans:
            result[variant][key] = speedup(times[variant], times["dense"])
    return result


def _amdahl(shares: dict[str, float], ratios: dict[str, Any], stage: str, measured: float) -> dict[str, float]:
    """What the FFNs' share of the time and their own speed-up predict, and how the measured speed-up compares."""
    parts = {key: part for key, part in shares.items() if key.startswith(stage)}
    left = 1 - sum(parts.values()) + sum(part / ratios[key].median for key, part in parts.items())
    return {"predicted": 1 / left, "measured_over_predicted": measured * left}


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = now()
    result = call()
    return now() - start, result


def _widened(token: Any, cache: Any, batch: int) -> tuple[Any, Any]:
    """The same state for a batch of equal requests."""
    if batch == 1:
        return token, cache
    cache = copy.deepcopy(cache)
    cache.batch_repeat_interleave(batch)
    return token.expand(batch, 1), cache


def load_cell(name: str, variant: str, folder: Path) -> dict[str, Any]:
    """Write the checkpoint in one process, load and use it in another; the file cache is dropped between them."""
    _child("save", name, variant, folder)
    disk = disk_bytes(folder)
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return _child("use", name, variant, folder) | {"disk_bytes": disk}


def save(name: str, variant: str, folder: Path) -> dict[str, Any]:
    """Build a model and save it."""
    model = built(name)
    if variant != "dense":
        model, _ = compressed(model, name, variant)
    model.save_pretrained(folder)
    return {}


@torch.inference_mode()
def use(name: str, variant: str, folder: Path) -> dict[str, Any]:
    """Load a checkpoint, answer once with it; seconds and this process's memory peaks."""
    before = _peak_bytes()
    seconds, model = _timed(
        lambda: MODELS[name].model_class.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True)
    )
    loaded = _peak_bytes()
    decode(model, *prefill(model, prompt(model)[0]), 1)
    return {"load_seconds": seconds, "peak_bytes": {"imports": before, "loaded": loaded, "answered": _peak_bytes()}}


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _child(*arguments: object) -> dict[str, Any]:
    """This script in a new process; its last line is its result."""
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _speed_child(cell: SpeedCell, folder: Path) -> dict[str, Any]:
    return _child("speed", json.dumps(asdict(cell)))


@torch.inference_mode()
def has_fast_bfloat16() -> bool:
    """Whether products in bfloat16 take less than twice the time of float32's."""
    calls = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        calls[str(dtype)] = partial(F.linear, x, weight)
    plain, half = (min(seconds) for seconds in time_alternately(calls).values())
    return half < 2 * plain


def all_cells(quick: bool, fast_bfloat16: bool, compiled: bool = True) -> dict[str, Callable[[Path], dict[str, Any]]]:
    """Every cell by its key. Quick: the two smaller models, and the paper's recipe beside products n=4 alone."""
    found: dict[str, Callable[[Path], dict[str, Any]]] = {}
    for name in list(MODELS)[: 2 if quick else None]:
        for group in GROUPS[: 1 if quick or name == "Qwen2.5-VL-7B" else None]:
            cells = [SpeedCell(name, group, "bfloat16", fast_bfloat16, compiled)]
            if not fast_bfloat16:
                cells.append(SpeedCell(name, group, "float32", True, compiled))
            found |= {cell.key: partial(_speed_child, cell) for cell in cells}
    for name in ("SmolVLM-256M", "Qwen2.5-VL-3B")[: 1 if quick else None]:
        for variant in ("dense", *(variant for group in GROUPS for variant in group)):
            found[f"load|{name}|{variant}"] = partial(load_cell, name, variant)
    return found


def main() -> None:
    """Measure what is missing, and keep it cell by cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--quick", action="store_true", help="SmolVLM-256M and Qwen2.5-VL-3B, one group of variants")
    parser.add_argument("--plain", action="store_true", help="leave out compiled FFNs")
    parser.add_argument("--only", default="", help="cells whose key contains this text")
    parser.add_argument("--minutes", type=float, default=90.0, help="begin no cell after so long; a repeat goes on")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        kind, *what = args.child
        if kind == "speed":
            fields = json.loads(what[0])
            result = speed_cell(SpeedCell(**fields | {"group": tuple(fields["group"])}))
        else:
            name, variant, folder = what
            result = {"save": save, "use": use}[kind](name, variant, Path(folder))
        print(json.dumps(result))
        return
    kept = read_json(args.output)["cells"] if args.output.exists() and not args.fresh else {}
    results = {"machine": machine(), "cells": kept}
    todo = {
        key: run
        for key, run in all_cells(args.quick, has_fast_bfloat16(), not args.plain).items()
        if key not in kept and args.only in key
    }
    start = time.perf_counter()
    for number, (key, run) in enumerate(todo.items()):
        if time.perf_counter() - start > 60 * args.minutes:
            print(f"{len(todo) - number} cells are left for a repeat", flush=True)
            break
        spent = time.perf_counter() - start
        estimate = f"about {spent / number * (len(todo) - number) / 60:.0f} min left" if number else "estimate follows"
        print(f"{number + 1}/{len(todo)}, {estimate}: {key}", flush=True)
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="hyperfade-speed-") as folder:
            results["cells"][key] = run(Path(folder)) | {"cell_seconds": round(time.perf_counter() - begun)}
        write_json(args.output, results)
        print(json.dumps(_summary(results["cells"][key])), flush=True)


def _summary(cell: dict[str, Any]) -> dict[str, Any]:
    if "models" not in cell:
        return {key: value for key, value in cell.items() if key != "peak_bytes"}
    phases = ("first_token", "per_token", "per_token_batch_8")
    return {v: {p: round(own[p]["speedup"][0], 2) for p in phases if p in own} for v, own in cell["models"].items()}


if __name__ == "__main__":
    main()
