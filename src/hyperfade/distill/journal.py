"""metrics.jsonl: one line per optimizer step, and one per fault with what was done about it.

How a run goes on after a fault depends on these lines and on nothing else, so a run that is killed and continued does
what one that was never killed does.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hyperfade.errors import TrainingError


@dataclass(frozen=True)
class StepReport:
    """One step. Loss terms are means over the step's micro-batches; seconds are per step."""

    step: int
    loss: float
    cross_entropy: float
    kl: float
    reconstruction: float
    alpha: float
    learning_rate: float
    seconds: float
    hidden: float = 0.0


@dataclass(frozen=True)
class Rollback:
    """`fault` was found in `step`: training went on from the state after step `back_to` with smaller steps."""

    fault: str
    step: int
    back_to: int


@dataclass(frozen=True)
class Halving:
    """Memory ran out in `step`: from it on every micro-batch is taken in `parts` parts."""

    fault: str
    step: int
    parts: int


Fault = Rollback | Halving


class Journal:
    """The lines of one run. `losses` are the steps' losses by step, `rollbacks` and `halvings` the faults so far.

    Opening it leaves out lines of steps after `step`, which a resumed run takes again, and a line that a kill cut
    short. writes: whether this process writes the file; the others only know what is in it.
    Raises `TrainingError` for a file that is not a journal.
    """

    def __init__(self, path: Path, step: int, *, writes: bool = True) -> None:
        self._path, self._writes = path, writes
        self.losses: dict[int, float] = {}
        self.rollbacks: list[Rollback] = []
        self.halvings: list[Halving] = []
        self._file: Any = None
        kept = [entry for entry in _read(path) if isinstance(entry, Fault) or entry.step <= step]
        for entry in kept:
            self._remember(entry)
        if writes:
            self._rewrite(kept)

    @property
    def rate(self) -> float:
        """What learning rates are multiplied by: half for every rollback."""
        return 0.5 ** len(self.rollbacks)

    def parts(self, step: int) -> int:
        """Into how many parts micro-batches are split in `step` (from 1)."""
        return max((halving.parts for halving in self.halvings if halving.step <= step), default=1)

    def add(self, entry: StepReport | Halving) -> None:
        """Append a line."""
        self._remember(entry)
        if self._writes:
            self._file.write(_line(entry))

    def go_back(self, rollback: Rollback) -> None:
        """Note a rollback and forget the steps that are taken again; the file changes in one piece."""
        self.losses = {step: loss for step, loss in self.losses.items() if step <= rollback.back_to}
        self.rollbacks.append(rollback)
        if self._writes:
            self.close()
            entries = [e for e in _read(self._path) if isinstance(e, Fault) or e.step <= rollback.back_to]
            self._rewrite([*entries, rollback])

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _remember(self, entry: StepReport | Fault) -> None:
        if isinstance(entry, StepReport):
            self.losses[entry.step] = entry.loss
        elif isinstance(entry, Rollback):
            self.rollbacks.append(entry)
        else:
            self.halvings.append(entry)

    def _rewrite(self, entries: list[StepReport | Fault]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(map(_line, entries)), encoding="utf-8")
        partial.replace(self._path)
        self._file = self._path.open("a", encoding="utf-8", buffering=1)


def read_steps(path: Path) -> list[StepReport]:
    """The steps of a metrics.jsonl, in order; empty where there is none. Raises `TrainingError` as `Journal` does."""
    return [entry for entry in _read(path) if isinstance(entry, StepReport)]


def read_faults(path: Path) -> list[Fault]:
    """The faults of a metrics.jsonl, in order; empty where there is none. Raises `TrainingError` as `Journal` does."""
    return [entry for entry in _read(path) if isinstance(entry, Fault)]


def _line(entry: StepReport | Fault) -> str:
    return json.dumps(asdict(entry)) + "\n"


def _read(path: Path) -> list[StepReport | Fault]:
    if not path.exists():
        return []
    entries: list[StepReport | Fault] = []
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            entries.append(_entry(json.loads(line)))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            if number == len(lines) and not line.endswith(b"\n"):
                break  # cut short by a kill: its step runs again
            raise TrainingError(
                f"{path} line {number} is neither a step nor a fault of a training run: {line[:80]!r}.",
                "Remove that line if you have edited the file, or start in a new output folder.",
            ) from error
    return entries


def _entry(fields: dict[str, Any]) -> StepReport | Fault:
    kind = StepReport if "fault" not in fields else Rollback if "back_to" in fields else Halving
    entry = kind(**fields)
    for key, value in fields.items():
        wanted = str if key == "fault" else int if key in ("step", "back_to", "parts") else (int, float)
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise TypeError(key)
    return entry
