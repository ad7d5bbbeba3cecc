"""How good: exact match of greedy answers, overall and per kind of question, with confidence intervals."""

import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hyperfade.data import Collator, Example, open_source
from hyperfade.errors import DataError


@dataclass(frozen=True)
class Score:
    """Share of right answers among `count`, with its 95 % Wilson interval."""

    accuracy: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Quality:
    """Exact match overall and by kind of question. `skipped`: samples that could not be used, with the reason."""

    overall: Score
    by_kind: dict[str, Score]
    skipped: tuple[tuple[str, str], ...]


def evaluate(
    model: Any,
    processor: Any,
    data: str = "easy-vqa:test",
    *,
    limit: int | None = None,
    batch_size: int = 64,
    max_tokens: int = 2048,
    max_new_tokens: int = 16,
    on_bad_sample: str = "error",
    seed: int = 0,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> Quality:
    """Ask `model` every question of `data` and compare its greedy answers with the references.

    data: as for `hyperfade.data.open_source`. limit: only the first `limit` examples of a shuffle seeded by `seed`.
    An answer is right if it equals a reference after case and white space are evened out. Raises `DataError` for data
    that cannot be used.
    """
    source = open_source(data, on_bad=on_bad_sample)  # type: ignore[arg-type]
    collator = Collator(processor, max_tokens=max_tokens, on_bad=on_bad_sample)  # type: ignore[arg-type]
    numbers = list(range(len(source)))
    if limit is not None and limit < len(numbers):
        numbers = sorted(random.Random(seed).sample(numbers, limit))
    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(numbers), batch_size):
        examples = [source[i] for i in numbers[start : start + batch_size]]
        try:
            answered = answers(model, processor, collator, examples, max_new_tokens)
        except DataError:  # nothing of this batch is left
            if on_bad_sample == "error":
                raise
            continue
        for example, answer in answered:
            right[example.kind].append(is_right(answer, example.references))
        on_batch(min(start + batch_size, len(numbers)), len(numbers))
    every = [hit for hits in right.values() for hit in hits]
    by_kind = {kind: wilson(sum(hits), len(hits)) for kind, hits in sorted(right.items()) if kind}
    skipped = tuple((s.where, s.reason) for s in (*source.skipped, *collator.skipped))
    return Quality(wilson(sum(every), len(every)), by_kind, skipped)


@torch.inference_mode()
def answers(
    model: Any, processor: Any, collator: Collator, examples: Sequence[Example], max_new_tokens: int
) -> list[tuple[Example, str]]:
    """The model's greedy answers to `examples`, the prompt left out; bad samples are left out as the collator says."""
    batch = {key: value.to(model.device) for key, value in collator.prompt_batch(examples).items()}
    for key, value in batch.items():
        if value.is_floating_point():
            batch[key] = value.to(model.dtype)
    tokenizer = getattr(processor, "tokenizer", processor)
    generated = model.generate(
        **batch, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id
    )
    texts = tokenizer.batch_decode(generated[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return list(zip(collator.kept, texts, strict=True))


def is_right(answer: str, references: Sequence[str]) -> bool:
    """Exact match after case and white space are evened out."""
    return _even(answer) in {_even(reference) for reference in references}


def _even(text: str) -> str:
    return " ".join(text.casefold().split())


def wilson(hits: int, count: int) -> Score:
    """Share of hits with Wilson's 95 % interval (Wilson 1927), which stays inside [0, 1]."""
    if not count:
        return Score(0.0, 0.0, 1.0, 0)
    z, p = 1.959964, hits / count
    centre = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return Score(p, centre - half, centre + half, count)
