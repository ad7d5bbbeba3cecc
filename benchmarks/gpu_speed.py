"""FFNs alone and whole models on one GPU, unattended and within its minutes: python benchmarks/gpu_speed.py

The suite of `ffn_speed.py` and `model_speed.py`, with CUDA graphs: the device's ceilings and unit prices, FFNs in
bfloat16, Qwen2.5-VL-3B and 7B with random weights, compiled FFNs, FFNs in float32. The minutes are divided over these
parts; what one leaves goes to the next. Each part is a process of its own that ends when its time is up, so neither a
call that hangs nor a fault of the device can take more than one cell along. A cell that fails keeps the error's text.

Beside the times stands `gap_to_bandwidth`: by how much PyTorch's best way misses the time that moving the layer's bytes
takes at the best rate measured. Above 15 % a kernel of our own would be worth writing; below, it is not.

Finished cells are kept; a repeat goes on with those that are missing or failed, unless --fresh is given.
The measuring itself is in `gpu_parts.py`. With --device cpu --tiny the same paths run on toy shapes, without graphs.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_parts import Run, measure_part

from hyperfade.measure import machine
from hyperfade.workspace import read_json, write_json

RESULTS = Path(__file__).parent / "results" / "gpu_speed.json"
SHARES = {  # of the minutes, in this order
    "device": 12,
    "ffns bfloat16": 36,
    "model Qwen2.5-VL-7B": 24,
    "model Qwen2.5-VL-3B": 16,
    "ffns compiled": 10,
    "ffns float32": 7,
}
TINY_SHARES = {"device": 1, "ffns bfloat16": 1, "model tiny": 1, "ffns compiled": 1, "ffns float32": 1}
LEAST_SECONDS = 3  # a process that has less is not worth its start


def main(arguments: Sequence[str] | None = None) -> None:
    """Divide the minutes, run the parts, say what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--minutes", type=float, default=9.0, help="never run longer; a repeat goes on")
    parser.add_argument("--only", default="", help=f"parts whose name contains this text, of: {', '.join(SHARES)}")
    parser.add_argument("--device", help="default: the accelerator")
    parser.add_argument("--tiny", action="store_true", help="toy shapes, and the device's prices stay as they are")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--part", help=argparse.SUPPRESS)  # a child process: measure this alone
    parser.add_argument("--end", type=float, help=argparse.SUPPRESS)  # and begin nothing that lasts beyond, Unix time
    args = parser.parse_args(arguments)
    if args.device is None and not torch.accelerator.is_available():
        parser.error(
            "torch finds no accelerator: install its driver and a torch built for it, or add --device cpu --tiny"
        )
    device = torch.device(args.device) if args.device else torch.accelerator.current_accelerator()
    assert device is not None
    if device.type == "cpu" and not args.tiny:
        parser.error("--device cpu goes with --tiny; ffn_speed.py and model_speed.py time a processor")
    if args.tiny and args.output == RESULTS:
        parser.error("--tiny needs an --output of its own: toy numbers must not stand among the results")
    torch.manual_seed(0)
    if args.part:
        measure_part(args.part, Run(device, args.tiny, args.output, args.end))
        return
    write_json(args.output, beginning(args.output, device, args.fresh, parser))
    shares = {part: share for part, share in (TINY_SHARES if args.tiny else SHARES).items() if args.only in part}
    end = time.time() + 60 * args.minutes
    for part in list(shares):
        left_seconds = end - time.time()
        part_end = time.time() + left_seconds * shares[part] / sum(shares.values())
        print(f"{part}: at most {part_end - time.time():.0f} s of the {left_seconds:.0f} s left", flush=True)
        flags = ["--device", str(device), "--output", str(args.output), *(["--tiny"] if args.tiny else [])]
        run_part(part, part_end, [sys.executable, __file__, "--part", part, *flags], args.output)
        del shares[part]
    results = read_json(args.output)
    bad = {key: cell for group in ("cells", "models") for key, cell in results[group].items() if failed(cell)}
    print(f"{len(results['cells'])} FFN cells, {len(results['models'])} of models; without a number: {len(bad)}")


def beginning(output: Path, device: torch.device, fresh: bool, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Earlier results that hold, with this machine's facts."""
    empty: dict[str, Any] = {"ceilings": {}, "cells": {}, "models": {}, "gap_to_bandwidth": {}}
    facts = machine() | ({"accelerator": "cpu"} if device.type == "cpu" else {})
    if fresh or not output.exists():
        return {"machine": facts, **empty}
    kept = read_json(output)
    if kept["machine"]["accelerator"] != facts["accelerator"]:
        parser.error(f"{output} holds results of {kept['machine']['accelerator']}; --fresh forgets them")
    for group in ("cells", "models"):
        kept[group] = {key: cell for key, cell in kept[group].items() if not failed(cell)}
    return kept | {"machine": facts}


def failed(cell: dict[str, Any]) -> bool:
    """Whether an error stands in place of one of its numbers."""
    models = cell.get("models", {})
    phases = [phase for own in models.values() for phase in own.values()] if isinstance(models, dict) else []
    return "error" in cell or any(isinstance(phase, dict) and "error" in phase for phase in phases)


def run_part(part: str, end: float, command: list[str], output: Path) -> None:
    """Run a part's process until it is done; again where a fault of the device ended it, as long as cells get done."""
    while (seconds := end - time.time()) > LEAST_SECONDS:
        before = output.read_bytes()
        try:
            code = subprocess.run([*command, "--end", str(end)], timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            print(f"  {part}: out of time", flush=True)
            return
        if code == 0:
            return
        print(f"  {part}: the process ended with {code}", flush=True)
        if output.read_bytes() == before:
            return


if __name__ == "__main__":
    main()
