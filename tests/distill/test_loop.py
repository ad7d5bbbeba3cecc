"""The loop: what a step computes, what is written, how it stops and how it goes on."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES
from torch import Tensor
from toy import assert_same_weights, batch_of, calibration, swapped, train, weights

import hyperfade.distill.loop as loop
from hyperfade.build import choose_trained_
from hyperfade.distill import (
    Batches,
    StepReport,
    alpha_at,
    check_hidden_states,
    data_order,
    distill_,
    fit_,
    latest_step,
    learning_rate_factor,
)
from hyperfade.distill.losses import answer_logits, cross_entropy, kl_divergence
from hyperfade.distill.state import trained_parameters
from hyperfade.errors import CheckpointError, TrainingError
from hyperfade.nn import light_modules
from hyperfade.recipe import Fit, Train
from hyperfade.surgery import blends


class Stopped(Exception):
    """Stands for a kill at the end of a step."""


def run(
    folder: Path, recipe: Train, *, stop_after: int | None = None, batches: Any = batch_of, prepare: Any = None
) -> tuple[Any, list[StepReport]]:
    """Fit, then distil a fresh toy model; `stop_after` interrupts it after that step."""
    student, teacher, plan = swapped()
    fit_(student, plan, calibration(), Fit(sweeps=2), folder / "fit")
    choose_trained_(student, recipe)
    if prepare:
        prepare(student)
    reports: list[StepReport] = []

    def on_step(report: StepReport) -> None:
        reports.append(report)
        if report.step == stop_after:
            raise Stopped

    try:
        distill_(student, teacher, 20, batches, recipe, seed=3, folder=folder, on_step=on_step)
    except Stopped:
        assert stop_after is not None
    return student, reports


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


# --- one step against a step written out by hand ---------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_steps_equal_the_same_steps_written_out_by_hand(checkpointing: bool, tmp_path: Path) -> None:
    recipe = train(
        fade_steps=2,
        polish_steps=8,
        kd_weight=0.7,
        temperature=3.0,
        label_smoothing=0.1,
        reconstruction_weight=0.01,
        hidden_weight=0.2,
        weight_decay=0.05,
        clip_norm=0.5,
        gradient_checkpointing=checkpointing,
    )
    mine, reports = run(tmp_path, recipe, stop_after=2)

    student, teacher, plan = swapped()
    fit_(student, plan, calibration(), Fit(sweeps=2))
    student.train()
    light = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(light, weight_decay=0.05)
    order = data_order(20, 3, 0)
    for step in range(2):
        optimizer.param_groups[0]["lr"] = 1e-2 * learning_rate_factor(step, recipe)
        for blend in blends(student).values():
            blend.alpha, blend.measure_reconstruction = (0.5, 1.0)[step], True
        batch = batch_of([next(order) for _ in range(4)])
        labels = batch.pop("labels")
        made = student(**batch, output_hidden_states=True)
        logits, targets = answer_logits(made.logits, labels)
        with torch.no_grad():
            taught = teacher(**batch, output_hidden_states=True)
            wanted, _ = answer_logits(taught.logits, labels)
        pairs = zip(made.hidden_states, taught.hidden_states, strict=True)
        real = batch["attention_mask"].bool()
        parts = [((s - t).square().sum(-1) / t.square().sum(-1))[real].mean() for s, t in pairs]
        hidden = torch.stack(parts).mean()
        ce, kl = cross_entropy(logits, targets, 0.1), kl_divergence(logits, wanted, 3.0)
        off = torch.stack([blend.reconstruction for blend in blends(student).values()]).mean()
        loss = 0.3 * ce + 0.7 * kl + 0.01 * off + 0.2 * hidden
        loss.backward()
        torch.nn.utils.clip_grad_norm_(light, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        given = reports[step]
        expected = [x.item() for x in (loss, ce, kl, off, hidden)]
        parts = [given.loss, given.cross_entropy, given.kl, given.reconstruction, given.hidden]
        assert parts == pytest.approx(expected, rel=1e-5)  # observed 1e-7
        assert given.alpha == (0.5, 1.0)[step]
    for name, value in weights(student).items():
        torch.testing.assert_close(weights(mine)[name], value, rtol=0, atol=1e-5)  # observed 0


def test_hidden_weight_asks_for_a_model_with_hidden_states(tmp_path: Path) -> None:
    student, teacher, _ = swapped()
    forward = student.forward
    student.forward = lambda **inputs: SimpleNamespace(logits=forward(**inputs).logits)
    with pytest.raises(TrainingError, match="needs hidden states, and SimpleNamespace has none"):
        distill_(student, teacher, 20, batch_of, train(hidden_weight=1.0), seed=0, folder=tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_hidden_states_to_learn_from(name: str) -> None:
    batch = FAMILIES[name].inputs()
    batch |= {"labels": batch["input_ids"]} | ({"decoder_input_ids": batch["input_ids"]} if "t5" in name else {})
    check_hidden_states(FAMILIES[name].build(), batch, None)


def test_a_model_without_hidden_states_is_refused_before_its_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = FAMILIES["llava_siglip"].build(), FAMILIES["llava_siglip"].inputs()
    monkeypatch.setattr(model, "forward", lambda **inputs: SimpleNamespace(logits=None))
    with pytest.raises(TrainingError, match="needs hidden states, and SimpleNamespace has none"):
        check_hidden_states(model, batch | {"labels": batch["input_ids"]}, None)


def test_dense_parameters_train_at_their_own_rate(tmp_path: Path) -> None:
    """Adam's first step is the learning rate in size, whatever the gradient."""
    recipe = train(fade_steps=0, polish_steps=1, warmup_fraction=0, train_also=("*lm_head*",), dense_learning_rate=1e-4)
    student, teacher, _ = swapped()
    choose_trained_(student, recipe)
    before = weights(student)
    distill_(student, teacher, 20, batch_of, recipe, seed=0, folder=tmp_path)
    after = {name.replace(".light.", "."): value for name, value in before.items()}
    moved = {name: (value - after[name]).abs().max().item() for name, value in weights(student).items()}
    head = moved.pop("lm_head.weight")
    assert head == pytest.approx(1e-4, rel=1e-2)  # observed 2e-4, Adam's epsilon
    assert max(moved.values()) == pytest.approx(1e-2, rel=1e-2)
    light = light_modules(student)
    still = [n for n, size in moved.items() if size and not any(n.startswith(f"{layer}.") for layer in light)]
    assert still == []


def test_accumulated_small_batches_equal_one_large_batch(tmp_path: Path) -> None:
    one, large = run(tmp_path / "a", train(batch_size=8, fade_steps=2, polish_steps=2))
    two, small = run(tmp_path / "b", train(batch_size=4, accumulation=2, fade_steps=2, polish_steps=2))
    assert len(large) == len(small) == 4
    for a, b in zip(large, small, strict=True):
        # every example has two answer tokens; observed 9e-7
        assert [a.loss, a.cross_entropy, a.kl] == pytest.approx([b.loss, b.cross_entropy, b.kl], rel=1e-5)
        assert (a.alpha, a.learning_rate) == (b.alpha, b.learning_rate)
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(two)[name], value, rtol=0, atol=1e-4)  # observed 8e-7


def test_checkpointed_activations_give_the_same_losses_and_weights(tmp_path: Path) -> None:
    plain, reports = run(tmp_path / "a", train(reconstruction_weight=0.1))
    saving, again = run(tmp_path / "b", train(reconstruction_weight=0.1, gradient_checkpointing=True))
    assert any(getattr(module, "gradient_checkpointing", False) for module in saving.modules())
    assert [r.loss for r in again] == pytest.approx([r.loss for r in reports], rel=1e-5)  # observed 0
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(saving)[name], value, rtol=0, atol=1e-4)  # observed 0


def test_checkpointing_reaches_every_light_layer(tmp_path: Path) -> None:
    """Also in the vision tower, whose inputs carry no gradient."""
    recipe = train(fade_steps=2, polish_steps=0, gradient_checkpointing=True)
    student, teacher, _ = swapped()
    choose_trained_(student, recipe)
    names = dict(light_modules(student))
    before = {name: layer.T.detach().clone() for name, layer in names.items()}
    distill_(student, teacher, 20, batch_of, recipe, seed=0, folder=tmp_path)
    assert [name for name, layer in names.items() if torch.equal(layer.T, before[name])] == []


# --- the course of a run ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["together", "layer_by_layer"])
def test_every_step_is_one_line_and_the_dense_branches_are_gone_at_the_end(order: str, tmp_path: Path) -> None:
    recipe = train(fade_order=order, checkpoint_every=3)
    alphas: list[list[float]] = []
    student, reports = run(
        tmp_path, recipe, prepare=lambda s: s.register_forward_pre_hook(lambda *_: alphas.append(_alphas(s)))
    )
    assert blends(student) == {}
    assert not student.training
    written = lines(tmp_path)
    assert [line["step"] for line in written] == list(range(1, 9))
    assert set(written[0]) == {
        *("step", "loss", "cross_entropy", "kl", "reconstruction", "alpha", "learning_rate", "seconds"),
        "hidden",
    }
    assert [StepReport(**line) for line in written] == reports  # type: ignore[arg-type]
    assert all(line["seconds"] > 0 and math.isfinite(line["loss"]) for line in written)
    assert [line["learning_rate"] for line in written] == pytest.approx(
        [1e-2 * learning_rate_factor(step, recipe) for step in range(8)]
    )
    number = len(alphas[0])
    expected = [[alpha_at(step, recipe, layer, number) for layer in range(number)] for step in range(4)]
    assert alphas == expected + [[]] * 4
    assert latest_step(tmp_path) == 8
    assert [path.name for path in tmp_path.glob("*step-*")] == ["step-0000008"]


def _alphas(student: Any) -> list[float]:
    return [blend.alpha for blend in blends(student).values()]


def test_a_run_without_a_fade_trains_the_light_layers_alone(tmp_path: Path) -> None:
    student, reports = run(tmp_path, train(fade_steps=0, polish_steps=3))
    assert blends(student) == {}
    assert [report.alpha for report in reports] == [1.0] * 3


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    _, reports = run(tmp_path, train(fade_steps=0, polish_steps=30, batch_size=10))
    first, last = (sum(r.loss for r in reports[at]) for at in (slice(0, 3), slice(-3, None)))
    assert last < 0.8 * first  # observed 0.69


def test_without_distillation_the_teacher_is_not_asked(tmp_path: Path) -> None:
    student, teacher, _ = swapped()
    teacher.register_forward_pre_hook(lambda *_: pytest.fail("the teacher ran"))
    distill_(student, teacher, 20, batch_of, train(kd_weight=0), seed=0, folder=tmp_path)
    assert {line["kl"] for line in lines(tmp_path)} == {0.0}


def test_batches_are_of_like_length_where_lengths_are_known(tmp_path: Path) -> None:
    drawn: list[list[int]] = []

    def recorded(numbers: Sequence[int]) -> dict[str, Tensor]:
        drawn.append(list(numbers))
        return batch_of(numbers)

    student, teacher, _ = swapped()
    recipe = train(kd_weight=0)
    distill_(student, teacher, 20, recorded, recipe, seed=4, folder=tmp_path, length_of=lambda number: -number)
    batches = Batches(20, recipe.batch_size, 4, lambda number: -number)
    assert drawn == [batches[number] for number in range(len(drawn))]
    assert drawn[0] != Batches(20, recipe.batch_size, 4)[0]


# --- resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"lora_rank": 2, "train_also": ("*embed_tokens*",)}, {"accumulation": 2, "reconstruction_weight": 0.1}],
    ids=["light", "lora and dense", "accumulation"],
)
@pytest.mark.parametrize("stops", [[3], [4], [5], [2, 6, 7]], ids=str)
def test_an_interrupted_run_continued_equals_one_that_was_not(
    changes: dict[str, Any], stops: list[int], tmp_path: Path
) -> None:
    recipe = train(checkpoint_every=2, weight_decay=0.01, **changes)
    whole, _ = run(tmp_path / "whole", recipe)
    for stop in stops:
        run(tmp_path / "parts", recipe, stop_after=stop)
        assert latest_step(tmp_path / "parts") == (stop - 1) // 2 * 2  # it stopped before this step's state was written
    parts, reports = run(tmp_path / "parts", recipe)
    assert reports[0].step == (stops[-1] - 1) // 2 * 2 + 1
    assert_same_weights(weights(whole), weights(parts))
    one, other = ([{**line, "seconds": 0} for line in lines(tmp_path / name)] for name in ("whole", "parts"))
    assert one == other


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    whole, _ = run(tmp_path, train())
    again, reports = run(tmp_path, train())
    assert reports == []
    assert len(lines(tmp_path)) == 8
    assert_same_weights(weights(whole), weights(again))


def test_random_numbers_are_those_of_the_step(tmp_path: Path) -> None:
    """Dropout draws the same numbers after a resume."""

    def add_dropout(student: Any) -> None:
        student.model.language_model.norm = torch.nn.Sequential(student.model.language_model.norm, torch.nn.Dropout())

    recipe = train(checkpoint_every=2)
    whole, _ = run(tmp_path / "whole", recipe, prepare=add_dropout)
    run(tmp_path / "parts", recipe, prepare=add_dropout, stop_after=5)
    torch.manual_seed(99)
    parts, _ = run(tmp_path / "parts", recipe, prepare=add_dropout)
    assert_same_weights(weights(whole), weights(parts))


def test_the_state_of_another_recipe_is_refused(tmp_path: Path) -> None:
    run(tmp_path, train(checkpoint_every=2), stop_after=4)
    with pytest.raises(CheckpointError, match="another model or recipe"):
        run(tmp_path, train(lora_rank=2))


def test_metrics_cut_short_by_a_kill_are_mended(tmp_path: Path) -> None:
    run(tmp_path, train(checkpoint_every=2), stop_after=4)
    path = tmp_path / "metrics.jsonl"
    text = path.read_text(encoding="utf-8")
    path.write_text(text[: len(text) - 20], encoding="utf-8")  # in the middle of a line
    run(tmp_path, train(checkpoint_every=2))
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 9))


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tracker", ["tensorboard", "no-such-tracker"])
def test_a_tracker_that_is_not_there_is_an_error_not_a_silence(
    tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "get_available_trackers", list)
    with pytest.raises(TrainingError, match=f"{tracker} is not installed") as error:
        run(tmp_path, train(trackers=(tracker,)))
    assert f"pip install {tracker}" in error.value.hint


def test_small_steps_count_in_a_bfloat16_model(tmp_path: Path) -> None:
    """bfloat16 keeps 8 bits: added in place, most steps of this size would be lost. Afterwards the dtype is back."""
    student, teacher, _ = swapped()
    student, teacher = student.to(torch.bfloat16), teacher.to(torch.bfloat16)
    before = {name: p.detach().clone() for name, p in trained_parameters(student).items()}
    moved: dict[str, float] = {}

    def watch(report: StepReport) -> None:
        if report.step == 3:
            now = trained_parameters(student)
            assert {p.dtype for p in now.values()} == {torch.float32}
            moved.update({n: (p != before[n].float()).float().mean().item() for n, p in now.items()})

    recipe = train(fade_steps=0, polish_steps=3, learning_rate=1e-5)
    distill_(student, teacher, 20, batch_of, recipe, seed=3, folder=tmp_path, on_step=watch)
    assert {name: share for name, share in moved.items() if share < 0.9} == {}
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
