"""Does the fade help? The embedded model at a quarter, each fit with fades of several lengths, one budget for all.

    python benchmarks/fade.py

Exact match before and after training, on a sample of the training questions of which one in twenty was trained on (the
test questions decide nothing), and the last steps' KL to the teacher. A cell that is in the results file already is not
run again, so the command can be stopped and continued.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from hyperfade.data import Collator, open_source
from hyperfade.distill import distill_, fit_, teacher_of
from hyperfade.hub import load, load_processor
from hyperfade.measure import evaluate, machine
from hyperfade.recipe import Fit, Layer, Replace, Train
from hyperfade.surgery import plan, set_alpha_, swap_
from hyperfade.workspace import write_json

EVALUATION = "easy-vqa:train"


def cell(method: str, fade_share: float, args: argparse.Namespace) -> dict[str, float]:
    """Fit, train with a fade of `fade_share` of the steps, and measure."""
    torch.manual_seed(0)
    processor, source = load_processor("embedded"), open_source("easy-vqa:train")
    collator = Collator(processor, max_tokens=512)
    model = load("embedded", "float32")
    chosen = plan(model, Replace(language=Layer(n=4), vision=Layer(n=4)))
    teacher = teacher_of(model)
    model.requires_grad_(False)
    swap_(model, chosen)
    calibration = [
        collator.training_batch([source[i * 601 % len(source)] for i in range(first, first + 32)])
        for first in range(0, 256, 32)
    ]
    fit_(model, chosen, calibration, Fit(method=method))  # pyright: ignore[reportArgumentType]
    set_alpha_(model, 1)
    before = evaluate(model, processor, EVALUATION, limit=args.questions).overall.value
    set_alpha_(model, 0)
    fade_steps = round(fade_share * args.steps)
    train = Train(
        fade_steps=fade_steps,
        polish_steps=args.steps - fade_steps,
        batch_size=args.batch_size,
        mixed_precision="bf16",
        checkpoint_every=10**6,
    )
    kl: list[float] = []
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        distill_(
            model,
            teacher,
            len(source),
            lambda numbers: collator.training_batch([source[i] for i in numbers]),
            train,
            seed=0,
            folder=Path(folder),
            on_step=lambda report: kl.append(report.kl),
        )
    seconds = time.perf_counter() - start
    after = evaluate(model, processor, EVALUATION, limit=args.questions).overall.value
    return {"before": before, "after": after, "kl_of_last_steps": statistics.mean(kl[-20:]), "train_seconds": seconds}


def main() -> None:
    """Run every cell and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of every cell")
    parser.add_argument("--batch-size", type=int, default=32, help="samples per step")
    parser.add_argument("--questions", type=int, default=1000, help="questions of the evaluation")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "fade.json")
    args = parser.parse_args()
    settings = {key: getattr(args, key) for key in ("steps", "batch_size", "questions")}
    results = json.loads(args.output.read_text(encoding="utf-8")) if args.output.exists() else {}
    if results.get("settings") != settings:
        results = {"machine": machine(), "settings": settings, "cells": {}}
    for method in ("calibrated", "frobenius", "random"):
        for share in (0.0, 0.35, 0.7):
            name = f"{method}, fade over {share:.0%} of the steps"
            if name not in results["cells"]:
                results["cells"][name] = cell(method, share, args)
                write_json(args.output, results)
            print(name, results["cells"][name], flush=True)


if __name__ == "__main__":
    main()
