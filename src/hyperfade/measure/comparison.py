"""Answers, example by example, kept so that models can be compared on the very same examples later.

Whether one model is worse than another is a question about their difference. Two intervals that overlap do not settle
it: most of their width is the choice of examples, which both models shared, and which the difference is free of.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from hyperfade.errors import DataError, OutputError
from hyperfade.measure.intervals import RESAMPLES, Score, resampled_sums
from hyperfade.measure.scores import METRICS, Array


@dataclass(frozen=True)
class Answer:
    """A model's answer to one example."""

    where: str
    """The example, as `Example.where` names it."""
    task: str
    kind: str
    modality: Literal["image", "text"]
    """With an image, or text only."""
    answer: str
    references: tuple[str, ...]
    statistics: dict[str, tuple[float, ...]]
    """By metric, what enters its sums (see `scores`)."""


def write_answers(path: Path, answers: Iterable[Answer]) -> None:
    """One JSON object per line and answer, atomically; the folder is made. Raises `OutputError` where that fails."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            for answer in answers:
                file.write(json.dumps(asdict(answer), ensure_ascii=False) + "\n")
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"Cannot write {path}: {error}.", "Choose another file for the answers.") from error


def read_answers(path: Path) -> tuple[Answer, ...]:
    """What `write_answers` wrote. Raises `DataError` for anything else."""
    answers = []
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                fields = json.loads(line)
                fields["references"] = tuple(fields["references"])
                fields["statistics"] = {name: tuple(numbers) for name, numbers in fields["statistics"].items()}
                answers.append(Answer(**fields))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        message = f"{path}: line {len(answers) + 1} is no answer of hyperfade evaluate: {error}"
        raise DataError(message, "Write the file with hyperfade evaluate --answers FILE.") from error
    return tuple(answers)


def paired_difference(
    one: Sequence[Answer],
    other: Sequence[Answer],
    *,
    task: str | None = None,
    metric: str | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Score:
    """The score of `one` minus that of `other`, two models' answers to the same examples, with its 95 % interval.

    task: may be left out where all answers are of one task. metric: the task's headline, unless named. Examples are
    resampled for both models alike (paired percentile bootstrap), so an interval above -m says that `one` is not worse
    than `other` by more than m. Raises `DataError` unless both answered the same examples of the task.
    """
    task = task or _only_task([*one, *other])
    if task not in METRICS:
        raise DataError(f"There is no task {task!r}.", f"The tasks are {', '.join(METRICS)}.")
    chosen = METRICS[task][0] if metric is None else next((m for m in METRICS[task] if m.name == metric), None)
    if chosen is None:
        raise DataError(
            f"Answers to a {task} have no metric {metric!r}.",
            f"The metrics are {', '.join(m.name for m in METRICS[task])}.",
        )
    pairs = _pairs(*([answer for answer in answers if answer.task == task] for answers in (one, other)))
    numbers = np.array(
        [[a.statistics[chosen.name] for a in pair] for pair in pairs], float
    )  # (examples, 2, statistics)
    sums = resampled_sums(numbers.reshape(len(pairs), -1), resamples, seed).reshape(resamples, *numbers.shape[1:])

    def difference(summed: Array) -> Array:
        mine, theirs = np.moveaxis(chosen.of(summed), -1, 0)
        return mine - theirs

    low, high = np.percentile(difference(sums), (2.5, 97.5))
    return Score(float(difference(numbers.sum(axis=0))), float(low), float(high), len(pairs))


def _pairs(one: Sequence[Answer], other: Sequence[Answer]) -> list[tuple[Answer, Answer]]:
    """The answers to each example, in the order of `one`."""
    mine, theirs = ({answer.where: answer for answer in answers} for answers in (one, other))
    apart = sorted(mine.keys() ^ theirs.keys())
    if apart or not mine or len(mine) < len(one) or len(theirs) < len(other):
        example = f" ({apart[0]} was answered by one of them)" if apart else ""
        raise DataError(
            f"The models did not answer the same examples once each{example}: "
            f"{len(one)} answers to {len(mine)} examples, and {len(other)} to {len(theirs)}.",
            "Evaluate both on the same data, with the same limit and seed.",
        )
    pairs = [(answer, theirs[where]) for where, answer in mine.items()]
    for a, b in pairs:
        if a.references != b.references:
            raise DataError(
                f"{a.where}: one model was scored by the references {a.references}, the other by {b.references}.",
                "Evaluate both on the same data.",
            )
    return pairs


def _only_task(answers: Sequence[Answer]) -> str:
    tasks = sorted({answer.task for answer in answers})
    if len(tasks) != 1:
        raise DataError(f"The answers are of {len(tasks)} tasks: {', '.join(tasks)}.", "Name the one to compare.")
    return tasks[0]
