"""How many samples does a calibrated fit need, and how much ridge? python benchmarks/calibration.py

The embedded model at a quarter, before any training: KL to the teacher on 1000 training questions that the calibration
has not seen, and exact match on a sample of all of them. Whitened low-rank of the same size stands beside it.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import torch

from hyperfade.data import Collator, open_source
from hyperfade.distill import fit_, teacher_of
from hyperfade.distill.losses import answer_logits, kl_divergence
from hyperfade.hub import load, load_processor
from hyperfade.measure import evaluate, machine
from hyperfade.recipe import Fit, Layer, Replace
from hyperfade.surgery import plan, set_alpha_, swap_
from hyperfade.workspace import write_json

EVALUATION = "easy-vqa:train"
LAYERS = {"products n=4": Layer(n=4), "low-rank": Layer(kind="low_rank", fraction=0.25)}


@torch.no_grad()
def cell(layer: Layer, samples: int, ridge: float, questions: int) -> dict[str, float | list]:
    """Fit on `samples` training questions and measure without training."""
    processor, source = load_processor("embedded"), open_source("easy-vqa:train")
    collator = Collator(processor, max_tokens=512)
    model = load("embedded", "float32")
    chosen = plan(model, Replace(language=layer, vision=layer))
    teacher = teacher_of(model)
    swap_(model, chosen)
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0)).tolist()
    batches = [
        collator.training_batch([source[i] for i in order[first : first + 32]]) for first in range(0, samples, 32)
    ]
    fitted = fit_(model, chosen, batches, Fit(ridge=ridge))
    set_alpha_(model, 1)
    held_out = collator.training_batch([source[i] for i in order[-1000:]])
    labels = held_out.pop("labels")
    student, _ = answer_logits(model(**held_out).logits, labels)
    wanted, _ = answer_logits(teacher(**held_out).logits, labels)
    return {
        "samples": samples,
        "ridge": ridge,
        "held_out_kl": kl_divergence(student, wanted, 1.0).item(),
        "exact_match": evaluate(model, processor, EVALUATION, limit=questions).overall.value,
        "layers": [asdict(one) for one in fitted],
    }


def main() -> None:
    """Run every cell and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[64, 256], help="calibration samples")
    parser.add_argument(
        "--ridges", type=float, nargs="+", default=[1e-6, 1e-3], help="ridge relative to C's mean diagonal"
    )
    parser.add_argument("--questions", type=int, default=1000, help="questions of the evaluation")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "calibration.json")
    args = parser.parse_args()
    results: dict[str, list] = {name: [] for name in LAYERS}
    for name, layer in LAYERS.items():
        for samples in args.samples:
            for ridge in args.ridges:
                results[name].append(cell(layer, samples, ridge, args.questions))
                one = results[name][-1]
                print(
                    f"{name}, {samples} samples, ridge {ridge:g}:", one["held_out_kl"], one["exact_match"], flush=True
                )
    write_json(args.output, {"machine": machine(), "questions": args.questions, "cells": results})


if __name__ == "__main__":
    main()
