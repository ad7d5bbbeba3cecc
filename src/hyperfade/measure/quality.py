"""How good: greedy answers, scored task by task, with intervals, in whole and by kind and modality."""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from hyperfade.data import Collator, Example, Source, open_source
from hyperfade.errors import DataError
from hyperfade.measure.comparison import Answer
from hyperfade.measure.intervals import Score, score
from hyperfade.measure.scores import METRICS, Array, require, statistics

Scores = Mapping[str, Score]
"""By metric; the headline first."""


@dataclass(frozen=True)
class TaskQuality:
    """The scores of a task's examples: all of them, those of each kind that has a name, of modality image and text."""

    headline: str
    """The metric that stands for the task."""
    scores: Scores
    by_kind: Mapping[str, Scores]
    by_modality: Mapping[str, Scores]


@dataclass(frozen=True)
class Quality:
    """Scores by task. `skipped`: samples that could not be used, with the reason. `answers`: kept on request."""

    tasks: Mapping[str, TaskQuality]
    skipped: tuple[tuple[str, str], ...]
    answers: tuple[Answer, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """All but the answers, for JSON."""
        return {name: part for name, part in asdict(replace(self, answers=())).items() if name != "answers"}

    @property
    def overall(self) -> Score:
        """The headline of the only task. Raises `DataError` where there are several, which have no common measure."""
        if len(self.tasks) != 1:
            raise DataError(f"The data have {len(self.tasks)} tasks: {', '.join(self.tasks)}.", "Look at each of them.")
        (only,) = self.tasks.values()
        return only.scores[only.headline]


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
    keep_answers: bool = False,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> Quality:
    """Ask `model` everything in `data` and score its greedy answers by the references, task by task.

    data: as for `hyperfade.data.open_source`. limit: only the first `limit` examples of a shuffle seeded by `seed`.
    What the scores mean is in `hyperfade.measure.scores`. Raises `DataError` for data that cannot be used or name an
    unknown task, and `MissingLibraryError` where a task needs a library that is not there; the latter two before the
    model is asked anything.
    """
    source = open_source(data, on_bad=on_bad_sample)  # type: ignore[arg-type]
    collator = Collator(processor, max_tokens=max_tokens, on_bad=on_bad_sample)  # type: ignore[arg-type]
    numbers = _chosen(len(source), limit, seed)
    check_tasks(source, limit=limit, seed=seed)
    answered: list[tuple[Example, str]] = []
    for start in range(0, len(numbers), batch_size):
        examples = [source[i] for i in numbers[start : start + batch_size]]
        try:
            answered += answers(model, processor, collator, examples, max_new_tokens)
        except DataError:  # nothing of this batch is left
            if on_bad_sample == "error":
                raise
            continue
        on_batch(min(start + batch_size, len(numbers)), len(numbers))
    if not answered:
        last = collator.skipped[-1]
        raise DataError(
            f"{data}: none of {len(numbers)} examples can be used. The last, {last.where}: {last.reason}",
            "Mend the data; without on_bad_sample=skip the first bad example stops the evaluation.",
        )
    scored = score_answers(answered)
    skipped = tuple((s.where, s.reason) for s in (*source.skipped, *collator.skipped))
    return Quality(by_task(scored), skipped, tuple(scored) if keep_answers else ())


def check_tasks(source: Source, *, limit: int | None = None, seed: int = 0) -> None:
    """Raises what `evaluate` raises for examples of unknown tasks, or of tasks that need a missing library."""
    for task in sorted({_task(source[i]) for i in _chosen(len(source), limit, seed)}):
        require(task)


def score_answers(answered: Sequence[tuple[Example, str]]) -> list[Answer]:
    """Examples and the answers given to them, with their statistics, in the same order."""
    tasks = [_task(example) for example, _ in answered]
    scored: dict[int, Answer] = {}
    for task in METRICS:
        places = [i for i, own in enumerate(tasks) if own == task]
        examples = [answered[i][0] for i in places]
        if not examples:
            continue
        found = statistics(task, [answered[i][1] for i in places], [example.references for example in examples])
        for row, (place, example) in enumerate(zip(places, examples, strict=True)):
            scored[place] = Answer(
                where=example.where,
                task=task,
                kind=example.kind,
                modality="image" if example.images else "text",
                answer=answered[place][1],
                references=example.references,
                statistics={name: tuple(numbers[row].tolist()) for name, numbers in found.items()},
            )
    return [scored[i] for i in range(len(answered))]


def by_task(answers: Sequence[Answer]) -> dict[str, TaskQuality]:
    """The scores of answers, by task; tasks without an answer are left out."""
    qualities = {}
    for task, metrics in METRICS.items():
        own = [answer for answer in answers if answer.task == task]
        if own:
            numbers = {m.name: np.array([answer.statistics[m.name] for answer in own], float) for m in metrics}
            kinds, modalities = [answer.kind for answer in own], [answer.modality for answer in own]
            qualities[task] = TaskQuality(
                headline=metrics[0].name,
                scores=_scores(task, numbers, [True] * len(own)),
                by_kind={k: _scores(task, numbers, _are(k, kinds)) for k in sorted({*kinds} - {""})},
                by_modality={m: _scores(task, numbers, _are(m, modalities)) for m in sorted({*modalities})},
            )
    return qualities


def _are(value: str, values: Iterable[str]) -> list[bool]:
    return [own == value for own in values]


def _scores(task: str, numbers: Mapping[str, Array], rows: list[bool]) -> dict[str, Score]:
    return {metric.name: score(metric, numbers[metric.name][rows]) for metric in METRICS[task]}


def _task(example: Example) -> str:
    task = example.task or "question"
    if task not in METRICS:
        raise DataError(
            f"{example.where}: there is no task {task!r}.",
            f"Write one of {', '.join(METRICS)} as task; without one an example is a question.",
        )
    return task


def _chosen(count: int, limit: int | None, seed: int) -> list[int]:
    """The numbers of the examples to ask."""
    if limit is None or limit >= count:
        return list(range(count))
    return sorted(random.Random(seed).sample(range(count), limit))


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
