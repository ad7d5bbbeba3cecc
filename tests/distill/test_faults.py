"""Faults of the training: back to a state from before them with smaller steps, or the same step in smaller parts."""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import assert_same_weights, batch_of, swapped, train, weights

import hyperfade.distill.step as step_module
from hyperfade.distill import Fault, Halving, Rollback, StepReport, distill_, learning_rate_factor, read_faults
from hyperfade.distill.order import data_order
from hyperfade.distill.recovery import outdated, spike, state_before
from hyperfade.distill.state import saved_steps, trained_parameters
from hyperfade.errors import TrainingError
from hyperfade.recipe import Train

BatchOf = Callable[[Sequence[int]], dict[str, Tensor]]


class Stopped(Exception):
    """Stands for a kill."""


def run(
    folder: Path, recipe: Train, batches: BatchOf = batch_of, *, stop: Callable[[int, int], bool] = lambda *_: False
) -> tuple[Any, list[StepReport], list[Fault]]:
    """Distil a fresh toy model; `stop(step, number of faults)` interrupts it at the end of a step."""
    student, teacher, _ = swapped()
    reports: list[StepReport] = []
    faults: list[Fault] = []

    def on_step(report: StepReport) -> None:
        reports.append(report)
        if stop(report.step, len(faults)):
            raise Stopped

    with suppress(Stopped):
        distill_(student, teacher, 20, batches, recipe, seed=3, folder=folder, on_step=on_step, on_fault=faults.append)
    return student, reports, faults


def lines(folder: Path) -> list[dict[str, Any]]:
    written = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{**json.loads(line), "seconds": 0} for line in written]


def poisoned(*calls: int) -> BatchOf:
    """Batches of which those with these numbers, counted as they are made, hold a NaN."""
    made = iter(range(1, 1000))

    def batches(numbers: Sequence[int]) -> dict[str, Tensor]:
        batch = batch_of(numbers)
        if next(made) in calls:
            batch["pixel_values"][0, 0, 0, 0] = float("nan")
        return batch

    return batches


def always_poisoned(number: int) -> BatchOf:
    """Batches in which this example always holds a NaN."""

    def batches(numbers: Sequence[int]) -> dict[str, Tensor]:
        batch = batch_of(numbers)
        batch["pixel_values"][[n == number for n in numbers], 0, 0, 0] = float("nan")
        return batch

    return batches


# --- which state -----------------------------------------------------------------------------------------------------


def test_a_spike_is_five_losses_in_a_row_far_above_the_twenty_before() -> None:
    losses = {step: 1 + step % 3 / 10 for step in range(1, 26)} | dict.fromkeys(range(26, 31), 4.0)
    assert spike(losses, 30, 0, 3.0) == "loss was 4 or more for 5 steps, 1.2 or less in the 20 before"
    assert spike(losses, 30, 0, 3.4) is None  # 4 is less than 3.4 times 1.2
    assert spike(losses, 30, 0, None) is None
    assert spike(losses, 29, 0, 3.0) is None  # four of them
    assert spike(losses | {28: 3.5}, 30, 0, 3.0) is None  # one of them came down again
    assert spike(losses | {7: 1.4}, 30, 0, 3.0) is None  # such a loss has been seen
    assert spike(losses, 30, 5, 3.0) is not None
    assert spike(losses, 30, 6, 3.0) is None  # step 6 belongs to the fade
    assert spike({k: v for k, v in losses.items() if k != 9}, 30, 0, 3.0) is None


def test_states_are_kept_as_long_as_a_fault_may_need_them() -> None:
    """Whatever is found after any step, there is a state from before it, if there ever was one."""
    for every in (1, 2, 3, 5, 6, 7, 100):
        states = [0]
        for step in range(1, 120):
            lasting = step - 5  # a spike found in this step began after so many steps
            assert state_before(states, step - 1) == (step - 2) // every * every if step > 1 else True
            if lasting > 0:
                assert state_before(states, lasting) == (lasting - 1) // every * every
            if step % every == 0:
                states.append(step)
                states = [state for state in states if state not in outdated(states, step)]
                assert len(states) <= 2 + 5 // every + 1


# --- not finite ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [3, 7])
def test_a_loss_that_is_not_finite_leads_back_with_half_the_step(at: int, tmp_path: Path) -> None:
    """In the fade and after it, when the dense branches have been dropped already."""
    recipe = train(checkpoint_every=2)
    back_to = {3: 0, 7: 4}[at]  # states after 2 and 6 steps gave the fault themselves
    student, reports, faults = run(tmp_path, recipe, poisoned(at))
    assert faults == read_faults(tmp_path / "metrics.jsonl") == [Rollback("loss became nan", at, back_to)]
    assert [report.step for report in reports] == [*range(1, at), *range(back_to + 1, 9)]
    again = reports[at - 1 :]
    assert [r.learning_rate for r in again] == [
        1e-2 * learning_rate_factor(step, recipe) / 2 for step in range(back_to, 8)
    ]
    written = [line for line in lines(tmp_path) if "loss" in line]
    assert [line["step"] for line in written] == list(range(1, 9))
    assert all(math.isfinite(line["loss"]) for line in written)
    assert again[0].loss == reports[back_to].loss  # the same weights meet the same examples: observed equal
    assert all(torch.isfinite(value).all() for value in weights(student).values())


def test_a_fault_of_the_polish_can_lead_back_into_the_fade(tmp_path: Path) -> None:
    recipe = train(checkpoint_every=3)  # a fade of 4
    _, reports, faults = run(tmp_path / "a", recipe, poisoned(6))
    assert faults == [Rollback("loss became nan", 6, 3)]
    assert [(r.step, r.alpha) for r in reports[5:8]] == [(4, 1.0), (5, 1.0), (6, 1.0)]
    _, earlier, faults = run(tmp_path / "b", recipe, poisoned(5))
    assert faults == [Rollback("loss became nan", 5, 3)]
    assert [r.loss for r in earlier[4:]] == [r.loss for r in reports[5:]]


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = step_module.losses, iter(range(1, 100))

    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0] * float("inf")

    def losses(*arguments: Any) -> Any:
        terms = real(*arguments)
        if next(calls) == 3:
            terms = replace(terms, cross_entropy=Bad.apply(terms.cross_entropy))
        return terms

    monkeypatch.setattr(step_module, "losses", losses)
    student, _, faults = run(tmp_path, train(checkpoint_every=1))
    (fault,) = faults
    assert isinstance(fault, Rollback)
    assert fault.fault in ("gradient norm became nan", "gradient norm became inf")
    assert (fault.step, fault.back_to) == (3, 1)
    assert all(torch.isfinite(p).all() for p in trained_parameters(student).values())


def test_after_three_rollbacks_the_run_stops_and_says_so_again_when_it_is_continued(tmp_path: Path) -> None:
    recipe = train(checkpoint_every=2)
    bad = next(islice(data_order(20, 3, 0), 13, None))  # drawn in step 4
    with pytest.raises(TrainingError, match=r"3 times with smaller steps; the state after step \d is intact") as caught:
        run(tmp_path / "parts", recipe, always_poisoned(bad))
    assert f"{bad}" in caught.value.hint  # the step's examples are named
    faults = read_faults(tmp_path / "parts" / "metrics.jsonl")
    assert len(faults) == 3
    assert len({(fault.step, fault.back_to) for fault in faults if isinstance(fault, Rollback)}) == 1
    text = (tmp_path / "parts" / "metrics.jsonl").read_bytes()
    with pytest.raises(TrainingError) as again:
        run(tmp_path / "parts", recipe, always_poisoned(bad))
    assert str(again.value) == str(caught.value)
    assert len((tmp_path / "parts" / "metrics.jsonl").read_bytes()) == pytest.approx(len(text), abs=20)  # seconds
    assert saved_steps(tmp_path / "parts")


def test_a_first_step_that_is_not_finite_stops_at_once(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="loss became nan in step 1, and no state is older"):
        run(tmp_path, train(), poisoned(1))


# --- spikes ----------------------------------------------------------------------------------------------------------


def spiking(monkeypatch: pytest.MonkeyPatch, first: int, last: int) -> None:
    """Let the batches from `first` to `last`, counted as they are computed, have ten times their loss."""
    real, computed = step_module.losses, iter(range(1, 1000))

    def losses(*arguments: Any) -> Any:
        terms = real(*arguments)
        factor = 10 if first <= next(computed) <= last else 1
        return replace(terms, cross_entropy=factor * terms.cross_entropy)

    monkeypatch.setattr(step_module, "losses", losses)


def test_a_spike_leads_back_to_before_it_and_a_killed_run_does_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses are compared that metrics.jsonl keeps: a run killed within the spike finds it at the same step."""
    recipe = train(fade_steps=0, polish_steps=34, checkpoint_every=9, kd_weight=0)
    with monkeypatch.context() as patch:
        spiking(patch, 26, 30)
        whole, _, faults = run(tmp_path / "whole", recipe)
    (fault,) = faults
    assert isinstance(fault, Rollback)
    assert (fault.step, fault.back_to) == (30, 18)
    assert fault.fault.startswith("loss was ")
    assert len(saved_steps(tmp_path / "whole")) == 1

    with monkeypatch.context() as patch:
        spiking(patch, 26, 30)
        run(tmp_path / "parts", recipe, stop=lambda step, _: step == 28)
    assert saved_steps(tmp_path / "parts") == [18, 27]
    with monkeypatch.context() as patch:
        spiking(patch, 1, 3)  # steps 28, 29 and 30
        _, _, later = run(tmp_path / "parts", recipe, stop=lambda step, faults: step == 21 and faults > 0)
    assert later == faults
    parts, _, _ = run(tmp_path / "parts", recipe)
    assert_same_weights(weights(whole), weights(parts))
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


# --- memory ----------------------------------------------------------------------------------------------------------


def running_out(monkeypatch: pytest.MonkeyPatch, limit: int, after: int = 0) -> list[int]:
    """Let `torch.OutOfMemoryError` come out of every backward pass of more than `limit` examples, once `after` steps
    of losses have been computed; returns the sizes that were tried."""
    real, tried = step_module.losses, []

    class Exhausted(torch.autograd.Function):
        """In the middle of the backward pass: some gradients have been added by then."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. (artificial)")

    def losses(objective: Any, batch: Any, numbers: Sequence[int]) -> Any:
        tried.append(len(numbers))
        terms = real(objective, batch, numbers)
        if len(numbers) > limit and len(tried) > after:
            terms.cross_entropy.backward(retain_graph=True)  # what a pass leaves behind that breaks off
            terms = replace(terms, cross_entropy=Exhausted.apply(terms.cross_entropy))
        return terms

    monkeypatch.setattr(step_module, "losses", losses)
    return tried


def uneven(numbers: Sequence[int]) -> dict[str, Tensor]:
    """The toy's batches with one to three answer tokens, so that parts weigh differently."""
    batch = batch_of(numbers)
    for row, number in enumerate(numbers):
        length = 5 + number % 4
        batch["labels"][row] = -100
        start = length + 4 - (1 + number % 3)
        batch["labels"][row, start : length + 4] = batch["input_ids"][row, start : length + 4]
    return batch


@pytest.mark.parametrize(("accumulation", "limit"), [(1, 4), (2, 1)])
def test_when_memory_runs_out_the_same_step_is_taken_in_parts(
    accumulation: int, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = train(batch_size=6, accumulation=accumulation, fade_steps=2, polish_steps=4)
    whole, reports, _ = run(tmp_path / "whole", recipe, uneven)
    tried = running_out(monkeypatch, limit, after=2)
    parts, again, faults = run(tmp_path / "parts", recipe, uneven)
    assert all(isinstance(fault, Halving) for fault in faults)
    assert [fault.parts for fault in faults if isinstance(fault, Halving)] == {4: [2], 1: [2, 4, 6]}[limit]
    assert max(tried[-6:]) <= limit
    assert tried.count(6) == 3  # two steps' worth before, and the one that failed: it is not tried again
    assert [r.step for r in again] == [1, 2, 3, 4, 5, 6]
    for one, other in zip(reports, again, strict=True):
        # observed 5e-7, of the KL
        assert [other.loss, other.cross_entropy, other.kl] == pytest.approx(
            [one.loss, one.cross_entropy, one.kl], rel=1e-5
        )
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], value, rtol=0, atol=1e-4)  # observed 3e-7


def test_a_run_that_ran_out_of_memory_and_was_killed_continues_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = train(batch_size=6, checkpoint_every=2)
    running_out(monkeypatch, 4, after=3)
    whole, _, faults = run(tmp_path / "whole", recipe)
    assert faults == [Halving("out of memory", 4, 2)]
    monkeypatch.undo()
    running_out(monkeypatch, 4, after=3)
    run(tmp_path / "parts", recipe, stop=lambda step, _: step == 5)
    monkeypatch.undo()
    tried = running_out(monkeypatch, 6)  # memory would do now
    parts, _, _ = run(tmp_path / "parts", recipe)
    assert set(tried) == {3}
    assert_same_weights(weights(whole), weights(parts))
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


def test_memory_for_less_than_one_example_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running_out(monkeypatch, 0)
    with pytest.raises(TrainingError, match="Memory ran out in step 1 with one example at a time"):
        run(tmp_path, train(batch_size=4))


# --- the journal -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line", ['{"step": "2"}', "[1]", '{"fault": 3, "step": 1, "back_to": 0}', "{", '{"step": 1, "loss": 1, "more": 2}']
)
def test_a_line_that_is_none_of_ours_is_named(line: str, tmp_path: Path) -> None:
    run(tmp_path, train(checkpoint_every=2), stop=lambda step, _: step == 3)
    path = tmp_path / "metrics.jsonl"
    path.write_text(line + "\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(TrainingError, match=r"metrics\.jsonl line 1 is neither a step nor a fault"):
        run(tmp_path, train(checkpoint_every=2))
