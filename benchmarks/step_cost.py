"""What a training step costs beside plain fine-tuning of the same model: python benchmarks/step_cost.py

Plain: all weights train, cross-entropy. Fade and polish: `distill_` as `hyperfade compress` runs it, with the teacher's
forward pass. All three see the same batches, in alternating rounds; reported are medians of the rounds' ratios.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperfade.data import Collator, open_source
from hyperfade.distill import distill_, teacher_of
from hyperfade.hub import load, load_processor
from hyperfade.measure import machine
from hyperfade.recipe import Layer, Replace, Train
from hyperfade.surgery import plan, swap_
from hyperfade.workspace import write_json

BatchOf = Callable[[Sequence[int]], dict[str, Tensor]]


def plain(model: Any, batch_of: BatchOf, batch_size: int, steps: int) -> list[float]:
    """Seconds of each step of ordinary fine-tuning."""
    model.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    seconds = []
    for step in range(steps):
        start = time.perf_counter()
        batch = batch_of(range(step * batch_size, (step + 1) * batch_size))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return seconds


def distilled(model: Any, batch_of: BatchOf, batch_size: int, steps: int, num_examples: int, fade: bool) -> list[float]:
    """Seconds of each step of fade or polish; the fade also measures reconstruction, its dearest setting."""
    teacher = teacher_of(model)
    model.requires_grad_(False)
    swap_(model, plan(model, Replace(language=Layer(n=4), vision=Layer(n=4))))
    train = Train(
        fade_steps=steps + 1 if fade else 0,  # one more than is taken: the last step of a fade has no dense branch
        polish_steps=0 if fade else steps,
        batch_size=batch_size,
        reconstruction_weight=1e-3 if fade else 0,
        mixed_precision="bf16",
        checkpoint_every=10**6,
    )
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        distill_(
            model,
            teacher,
            num_examples,
            batch_of,
            train,
            seed=0,
            folder=Path(folder),
            on_step=lambda report: seconds.append(report.seconds),
        )
    return seconds[:steps]


def main() -> None:
    """Measure and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="embedded", help="checkpoint folder, or `embedded`")
    parser.add_argument("--batch-size", type=int, default=64, help="samples per step")
    parser.add_argument("--steps", type=int, default=6, help="steps per round; the first is left out")
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "step_cost.json")
    args = parser.parse_args()
    source = open_source("easy-vqa:train")
    collator = Collator(load_processor(args.model), max_tokens=512)

    def batch_of(numbers: Sequence[int]) -> dict[str, Tensor]:
        return collator.training_batch([source[i] for i in numbers])

    rounds: list[dict[str, float]] = []
    for number in range(args.rounds):
        times = {
            "plain": plain(load(args.model, "float32"), batch_of, args.batch_size, args.steps),
            "fade": distilled(
                load(args.model, "float32"), batch_of, args.batch_size, args.steps, len(source), fade=True
            ),
            "polish": distilled(
                load(args.model, "float32"), batch_of, args.batch_size, args.steps, len(source), fade=False
            ),
        }
        rounds.append({name: statistics.median(seconds[1:]) for name, seconds in times.items()})
        print(f"round {number + 1}/{args.rounds}:", {name: round(s, 3) for name, s in rounds[-1].items()}, flush=True)
    ratios = {name: [r[name] / r["plain"] for r in rounds] for name in ("fade", "polish")}
    summary = {
        name: {"median": statistics.median(values), "smallest": min(values), "largest": max(values)}
        for name, values in ratios.items()
    }
    print({name: {key: round(value, 2) for key, value in entry.items()} for name, entry in summary.items()})
    write_json(args.output, {"machine": machine(), "step_seconds": rounds, "ratio_to_plain": summary})


if __name__ == "__main__":
    main()
