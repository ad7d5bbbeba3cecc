"""What a training step costs with cached teacher answers beside the live teacher: python benchmarks/teacher_cost.py

Both train the same quarter-size student in polish as `hyperfade compress` does, in alternating rounds; reported are the
medians of the rounds' ratios, and what the answers take on disk and took to compute. Beside the clock stands the time
the processor worked for this process, which tells the two apart on a machine that others use too (not on a GPU).
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from hyperfade.data import Collator, open_source
from hyperfade.distill import (
    Batches,
    CachedTeacher,
    StepReport,
    answers_only,
    autocast_dtype,
    cache_teacher,
    distill_,
    teacher_of,
)
from hyperfade.hub import load, load_processor
from hyperfade.measure import device, machine
from hyperfade.recipe import Layer, Replace, Train
from hyperfade.surgery import plan, swap_
from hyperfade.workspace import write_json


def main() -> None:
    """Measure and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="embedded", help="checkpoint folder, or `embedded`")
    parser.add_argument("--batch-size", type=int, default=64, help="samples per step")
    parser.add_argument("--top-k", type=int, default=32, help="tokens kept per answer token")
    parser.add_argument("--steps", type=int, default=6, help="steps per round; the first is left out")
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "teacher_cost.json")
    args = parser.parse_args()
    source = open_source("easy-vqa:train")
    collator = Collator(load_processor(args.model), max_tokens=512)
    train = Train(
        fade_steps=0,
        polish_steps=args.steps,
        batch_size=args.batch_size,
        mixed_precision="bf16",
        checkpoint_every=10**6,
        teacher_top_k=args.top_k,
    )

    def batch_of(numbers: Sequence[int]) -> dict[str, Tensor]:
        batch = answers_only(collator.training_batch([source[i] for i in numbers]))
        return {key: value.to(device()) for key, value in batch.items()}

    def fresh() -> Any:
        return load(args.model, "float32").to(device())  # pyright: ignore

    def seconds(cached: CachedTeacher | None) -> tuple[float, float]:
        """Of a step: by the clock, and of the processor."""
        student = fresh()
        teacher = cached or teacher_of(student)
        student.requires_grad_(False)
        swap_(student, plan(student, Replace(language=Layer(n=4), vision=Layer(n=4))))
        taken, ends = [], []

        def note(report: StepReport) -> None:
            taken.append(report.seconds)
            ends.append(time.process_time())

        with tempfile.TemporaryDirectory() as folder:
            distill_(
                student,
                teacher,
                len(source),
                batch_of,
                train,
                seed=0,
                folder=Path(folder),
                on_step=note,
            )
        return statistics.median(taken[1:]), statistics.median(late - early for early, late in pairwise(ends))

    with tempfile.TemporaryDirectory() as folder:
        model, numbers = fresh(), Batches(len(source), args.batch_size, 0).drawn(args.steps)
        began = time.perf_counter()
        cached = cache_teacher(
            model,
            numbers,
            batch_of,
            Path(folder),
            {},
            top_k=args.top_k,
            temperature=train.temperature,
            batch_size=args.batch_size,
            autocast_dtype=autocast_dtype(model, train),
        )
        caching = time.perf_counter() - began
        taken = sum(file.stat().st_size for file in cached.folder.iterdir())
        rounds = []
        for number in range(args.rounds):
            rounds.append(dict(zip(("live", "cached"), map(seconds, (None, cached)), strict=True)))
            print(f"round {number + 1}/{args.rounds}: {rounds[-1]}", flush=True)
    summary = {}
    for place, clock in enumerate(("clock", "processor")):
        ratios = [r["cached"][place] / r["live"][place] for r in rounds]
        summary[clock] = {"median": statistics.median(ratios), "smallest": min(ratios), "largest": max(ratios)}
    print(f"cached / live: {summary}; {len(numbers)} examples took {caching:.1f} s to answer and {taken:,} bytes")
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    cache = {"examples": len(numbers), "seconds": caching, "bytes": taken}
    write_json(
        args.output,
        {
            "machine": machine(),
            "settings": settings,
            "step_seconds_clock_processor": rounds,
            "ratio_to_live": summary,
            "cache": cache,
        },
    )


if __name__ == "__main__":
    main()
