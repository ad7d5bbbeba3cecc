"""What a training step costs with cached teacher answers beside the live teacher: python benchmarks/teacher_cost.py

Both train the same quarter-size student in polish, or with --fade in the fade, as `hyperfade compress` does, in
alternating rounds; reported are the medians of the rounds' ratios, what the answers take on disk and took to compute,
and what the live step's time goes to. Beside the clock stands the time the processor worked for this process, which
tells the two apart on a machine that others use too (not on a GPU).

What can be gained: if the student's forward pass costs s of the teacher's, and its backward pass twice that, a step
costs 1 + 3s with a teacher and 3s without: 0.75 for s = 1, 0.7 for s = 0.78, 0.6 for s = 0.5.
"""

import argparse
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

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
from hyperfade.hub import load, load_config, load_processor
from hyperfade.measure import device, machine
from hyperfade.recipe import Layer, Replace, Train
from hyperfade.surgery import plan, swap_
from hyperfade.workspace import write_json


def widened(hidden: int, ffn: int, layers: int) -> Any:
    """The shipped model with a language model of other sizes, and random weights."""
    config = load_config("embedded")
    sizes = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers}
    for name, value in (sizes | {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64}).items():
        setattr(config.text_config, name, value)
    torch.manual_seed(0)
    return LlavaForConditionalGeneration._from_config(config, dtype=torch.bfloat16)


def watch_(module: nn.Module, name: str, spent: Counter[str]) -> None:
    """Add the processor seconds of the module's forward passes to `spent`."""
    module.register_forward_pre_hook(lambda *_: spent.subtract({name: time.process_time()}))  # type: ignore[dict-item]
    module.register_forward_hook(lambda *_: spent.update({name: time.process_time()}))  # type: ignore[dict-item]


def main() -> None:
    """Measure and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="embedded", help="checkpoint folder, or `embedded`")
    parser.add_argument("--shape", help="HIDDEN,FFN,LAYERS of a random language model in the shipped one's place")
    parser.add_argument("--fade", action="store_true", help="steps of the fade, with reconstruction, not of the polish")
    parser.add_argument("--attention", default="eager", help="sdpa or eager, which is faster with short sequences here")
    parser.add_argument("--batch-size", type=int, default=64, help="samples per step")
    parser.add_argument("--top-k", type=int, default=32, help="tokens kept per answer token")
    parser.add_argument("--steps", type=int, default=6, help="steps per round; the first is left out")
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "teacher_cost.json")
    args = parser.parse_args()
    source = open_source("easy-vqa:train")
    collator = Collator(load_processor(args.model), max_tokens=512)
    train = Train(
        fade_steps=args.steps + 1 if args.fade else 0,  # the last step of a fade has no dense branch
        polish_steps=0 if args.fade else args.steps,
        reconstruction_weight=1e-3 if args.fade else 0.0,
        batch_size=args.batch_size,
        checkpoint_every=10**6,
        teacher_top_k=args.top_k,
    )

    spent: Counter[str] = Counter()  # of live rounds

    def batch_of(numbers: Sequence[int]) -> dict[str, Tensor]:
        began = time.process_time()
        batch = answers_only(collator.training_batch([source[i] for i in numbers]))
        spent["batch"] += time.process_time() - began  # type: ignore[assignment]
        return {key: value.to(device()) for key, value in batch.items()}

    def fresh() -> Any:
        model: Any = widened(*map(int, args.shape.split(","))) if args.shape else load(args.model, "bfloat16")
        model.set_attn_implementation(args.attention)
        return model.to(device())

    def seconds(cached: CachedTeacher | None) -> tuple[float, float]:
        """Of a step: by the clock, and of the processor."""
        student = fresh()
        teacher = cached or teacher_of(student)
        student.requires_grad_(False)
        swap_(student, plan(student, Replace(language=Layer(n=4), vision=Layer(n=4))))
        before = Counter(spent)
        if isinstance(teacher, nn.Module):
            watch_(teacher, "teacher forward", spent)
            watch_(student, "student forward", spent)
        taken, ends = [], [time.process_time()]

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
        if cached is not None:
            spent.clear()
            spent.update(before)
        else:
            spent["step"] += ends[-1] - ends[0]  # type: ignore[assignment]
        taken, ends = taken[: args.steps], ends[: args.steps + 1]
        return statistics.median(taken[1:]), statistics.median(late - early for early, late in pairwise(ends[1:]))

    with tempfile.TemporaryDirectory() as folder:
        model, numbers = fresh(), Batches(len(source), args.batch_size, 0).drawn(args.steps + args.fade)
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
        spent.clear()
        taken = sum(file.stat().st_size for file in cached.folder.iterdir())
        rounds = []
        for number in range(args.rounds):
            rounds.append(dict(zip(("live", "cached"), map(seconds, (None, cached)), strict=True)))
            print(f"round {number + 1}/{args.rounds}: {rounds[-1]}", flush=True)
    summary = {}
    for place, clock in enumerate(("clock", "processor")):
        ratios = [r["cached"][place] / r["live"][place] for r in rounds]
        summary[clock] = {"median": statistics.median(ratios), "smallest": min(ratios), "largest": max(ratios)}
    parts = {name: spent[name] / spent["step"] for name in ("batch", "teacher forward", "student forward")}
    parts["backward and optimizer"] = 1 - sum(parts.values())
    print(f"a live step: { {name: round(share, 3) for name, share in parts.items()} }")
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
            "processor_shares_of_a_live_step": parts,
            "cache": cache,
        },
    )


if __name__ == "__main__":
    main()
