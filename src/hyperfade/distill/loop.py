"""Fade, then polish: the one training loop.

A step draws its examples by number, sets α, and minimises cross-entropy, the KL to the teacher, the error of its hidden
states and the reconstruction of the layers that fade (`step.py`). When the fade is over the dense branches are dropped
and the rest of the steps polish what is left. α, λ and the learning rate are pure functions of the optimizer step
(`schedule.py`), and what was done about faults stands in `metrics.jsonl`, so a run can stop after any state and
continue as if nothing had happened.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from torch import nn

from hyperfade.distill.cached import CachedTeacher
from hyperfade.distill.divide import Reached, collect_, divide_, divided_twin, free_
from hyperfade.distill.journal import Fault, Halving, Journal, Rollback, StepReport
from hyperfade.distill.optimizer import optimizer_of, to_float32_
from hyperfade.distill.order import Batches
from hyperfade.distill.recovery import LASTING, MAX_ROLLBACKS, not_finite, outdated, spike, state_before
from hyperfade.distill.schedule import alpha_at, learning_rate_factor, total_steps
from hyperfade.distill.state import load_state, remove_state, save_state, saved_steps
from hyperfade.distill.step import BatchOf, Objective, autocast_dtype, gradients_
from hyperfade.errors import TrainingError
from hyperfade.nn import BlendLinear
from hyperfade.processes import copy_from_first_, is_first, join, on_cpu, wait
from hyperfade.recipe import Train
from hyperfade.surgery import blends, drop_dense_


@dataclass(frozen=True)
class Summary:
    """What the training did in this process: `seconds` leaves out what an earlier, interrupted process did."""

    steps: int
    resumed_from: int
    seconds: float


def distill_(
    student: nn.Module,
    teacher: nn.Module | CachedTeacher,
    num_examples: int,
    batch_of: BatchOf,
    train: Train,
    *,
    seed: int,
    folder: Path,
    on_step: Callable[[StepReport], None] = lambda report: None,
    on_fault: Callable[[Fault], None] = lambda fault: None,
    length_of: Callable[[int], int] | None = None,
) -> Summary:
    """Train `student` (swapped, maybe fitted, at any α) until only its light branches are left.

    teacher: the untouched model, or its cached answers. batch_of turns example numbers into a training batch with
    labels. folder: states and metrics.jsonl go there; a newer state in it is continued from. Parameters with
    requires_grad outside the light layers train at the dense rate. What trains is float32 meanwhile, under autocast
    where the rest of the model is not. Several processes call this alike, with one folder that all of them can read;
    `train.batch_size` is the batch of all together. With `train.shard` each of them holds a part of student and
    teacher; the teacher stays in parts, and the student is whole again in the first process only. length_of: an
    example's length, to put those of like length into one batch.

    A loss that is not finite, or a spike, sends the run back to an earlier state with half the learning rate
    (`recovery.py`); where memory runs out, micro-batches are taken in twice as many parts from then on. Raises
    `TrainingError` when that does not help; the last state stays as it is.
    """
    _check_trackers(train)
    began = time.perf_counter()
    processes = join()
    accelerator = Accelerator(
        mixed_precision="no",
        cpu=on_cpu(),
        log_with=list(train.trackers) or None,
        project_dir=str(folder),
    )
    if train.trackers:
        accelerator.init_trackers("hyperfade", config={k: str(v) for k, v in train.model_dump().items()})
    dtypes, whole, reached = to_float32_(student), student, None
    copy_from_first_(list(dtypes))
    if train.shard and processes.num_processes > 1:
        _check_share(train, processes.num_processes)
        student = divided_twin(whole)
        reached = Reached(student)
        if isinstance(teacher, nn.Module):
            divide_(teacher)
    objective = Objective(student, teacher, batch_of, train, seed, autocast_dtype(student, train), reached)
    optimizer, peaks = optimizer_of(student, train)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    batches = Batches(num_examples, train.batch_size, seed, length_of)
    states, steps = saved_steps(folder), total_steps(train)
    first = step = max(states, default=0)
    wait()  # all have seen the same states
    journal = Journal(folder / "metrics.jsonl", step, writes=processes.is_main_process)
    faded = blends(student)
    _prepare_branches_(student, step, train, faded)
    if states:
        load_state(folder, step, student, optimizer)
    else:
        states = _save(folder, states, 0, student, optimizer)
    student.train()
    while step < steps:
        started = time.perf_counter()
        _prepare_branches_(student, step, train, faded)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * learning_rate_factor(step, train) * journal.rate
        drawn = range(step * train.accumulation, (step + 1) * train.accumulation)
        numbers = [number for micro_batch in drawn for number in batches[micro_batch]]
        sums = gradients_(objective, numbers, step, journal.parts(step + 1))
        if sums is None:
            halving = _halve(train, step + 1, journal.parts(step + 1))
            optimizer.zero_grad()
            journal.add(halving)
            on_fault(halving)
            continue
        norm = torch.nn.utils.clip_grad_norm_(trained, train.clip_norm)
        fault, taken = not_finite(sums[0].item(), norm.item()), step
        if not fault:
            optimizer.step()
            *terms, hidden = sums.tolist()
            report = StepReport(
                step + 1,
                *terms,
                hidden=hidden,
                alpha=alpha_at(step, train),
                learning_rate=optimizer.param_groups[0]["lr"],
                seconds=time.perf_counter() - started,
            )
            journal.add(report)
            on_step(report)
            accelerator.log({k: v for k, v in asdict(report).items() if k != "step"}, step=step + 1)
            fault, taken = spike(journal.losses, step + 1, train.fade_steps, train.spike_factor), step + 1 - LASTING
        optimizer.zero_grad()
        if fault:
            back_to = _state_to_return_to(fault, step + 1, numbers, journal, state_before(states, taken), max(states))
            rollback = Rollback(fault, step + 1, back_to)
            states = _forget(folder, states, [state for state in states if state > back_to])
            journal.go_back(rollback)
            step = back_to
            _prepare_branches_(student, step, train, faded)
            load_state(folder, step, student, optimizer)
            on_fault(rollback)
            continue
        step += 1
        if step % train.checkpoint_every == 0 or step == steps:
            states = _save(folder, states, step, student, optimizer)
            states = _forget(folder, states, outdated(states, step) if step < steps else states[:-1])
            if states[0] >= train.fade_steps:
                while faded:  # nothing goes back to the fade any more: the dense weights may go
                    free_(faded.popitem()[1].dense)
    journal.close()
    for model in (student, whole):
        _prepare_branches_(model, steps, train, {})
    if student is not whole:
        collect_(whole, student, dtypes)
    for parameter, dtype in dtypes.items():
        parameter.data = parameter.data.to(dtype)
    for tracker in accelerator.trackers:
        tracker.finish()
    whole.eval()
    return Summary(steps, first, time.perf_counter() - began)


def _save(
    folder: Path, states: list[int], step: int, student: nn.Module, optimizer: torch.optim.Optimizer
) -> list[int]:
    """Write the state after `step`; returns all states there are then."""
    save_state(folder, step, student, optimizer)
    wait()
    return [*states, step]


def _forget(folder: Path, states: list[int], gone: list[int]) -> list[int]:
    """Remove the states `gone`; returns those that are left."""
    if is_first():
        for step in gone:
            remove_state(folder, step)
    return [state for state in states if state not in gone]


def _check_share(train: Train, num_processes: int) -> None:
    if train.batch_size < num_processes:
        raise TrainingError(
            f"train.batch_size {train.batch_size} leaves some of {num_processes} processes without an example.",
            f"With train.shard every process needs one: take {num_processes} or more, or fewer processes.",
        )


def _halve(train: Train, step: int, parts: int) -> Halving:
    share = math.ceil(train.batch_size / join().num_processes)
    if parts >= share:
        raise TrainingError(
            f"Memory ran out in step {step} with one example at a time.",
            "Set train.gradient_checkpointing: true, lower data.max_tokens, or take a larger device.",
        )
    return Halving("out of memory", step, min(2 * parts, share))


def _state_to_return_to(
    fault: str, step: int, numbers: list[int], journal: Journal, before: int | None, latest: int
) -> int:
    """The state to go on from after `fault` in `step`; raises `TrainingError` where going back is no help."""
    if before is not None and len(journal.rollbacks) < MAX_ROLLBACKS:
        return before
    tried = f"{len(journal.rollbacks)} times with smaller steps" if journal.rollbacks else "and no state is older"
    drawn = ", ".join(map(str, numbers[:8])) + (" …" if len(numbers) > 8 else "")
    raise TrainingError(
        f"The {fault} in step {step}, {tried}; the state after step {latest} is intact.",
        f"Look at what this step draws (examples {drawn}, counted from 0). Else lower train.learning_rate, or use "
        "train.mixed_precision: no, in a new output folder.",
    )


def _prepare_branches_(student: nn.Module, step: int, train: Train, faded: dict[str, BlendLinear]) -> None:
    """Set every α for `step`; once the fade is over, drop the dense branches, and put them back (from `faded`) where a
    fault has led back into the fade."""
    fading = blends(student)
    if step >= train.fade_steps:
        if fading:
            drop_dense_(student)
        return
    for name in faded.keys() - fading.keys():
        student.set_submodule(name, faded[name])
    fading = blends(student)
    for number, blend in enumerate(fading.values()):
        blend.alpha = alpha_at(step, train, number, len(fading))
        blend.measure_reconstruction = train.reconstruction_weight > 0


def _check_trackers(train: Train) -> None:
    """accelerate passes over a tracker that is not installed without a word."""
    known = {"all", *map(str, get_available_trackers())}
    missing = [tracker for tracker in train.trackers if tracker not in known]
    if missing:
        raise TrainingError(
            f"train.trackers: {', '.join(missing)} is not installed, or unknown to accelerate.",
            f"Install it (pip install {missing[0]}), or leave it out: metrics.jsonl is always written.",
        )
