"""A teacher on disk: the KL against its definition in float64, training against the live teacher, damaged files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB
from torch import Tensor
from toy import batch_of, swapped, train, weights

from hyperfade.distill import CachedTeacher, cache_teacher, digest, distill_
from hyperfade.distill.losses import answer_logits, answers_only, kl_divergence, top_k_log_probs, truncated_kl
from hyperfade.errors import CheckpointError, DataError, RecipeError
from hyperfade.recipe import Recipe, Train


def kl(student: Tensor, teacher: Tensor, k: int, temperature: float) -> Tensor:
    return truncated_kl(student, *top_k_log_probs(teacher, k, temperature), temperature)


# --- the loss --------------------------------------------------------------------------------------------------------


@given(st.integers(0, 99), st.integers(1, 12), st.floats(0.5, 5), st.floats(0.1, 4))
def test_what_truncation_loses_is_the_kl_among_the_tokens_left_out(
    seed: int, k: int, temperature: float, scale: float
) -> None:
    """In float64, by the definition: KL − KL_K = p_r · KL(p given not K ‖ q given not K), never negative."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(6, 12, generator=generator, dtype=torch.float64) for _ in range(2))
    p, q = ((x / temperature).softmax(-1) for x in (teacher, student))
    lost = torch.zeros((), dtype=torch.float64)
    for row in range(6):
        others = p[row].argsort(descending=True)[k:]
        if len(others):
            rest_p, rest_q = p[row, others].sum(), q[row, others].sum()
            given_p, given_q = p[row, others] / rest_p, q[row, others] / rest_q
            lost += rest_p * (given_p * (given_p / given_q).log()).sum() / 6
    exact = (p * (p / q).log()).sum(-1).mean()
    truncated = kl(student, teacher, k, temperature) / temperature**2
    torch.testing.assert_close(exact - truncated, lost, rtol=1e-8, atol=1e-12)
    assert truncated + 1e-12 >= 0
    assert truncated <= exact + 1e-12


def test_with_every_token_kept_nothing_is_lost() -> None:
    student, teacher = torch.randn(5, 9), torch.randn(5, 9)
    for k in (9, 100):
        torch.testing.assert_close(kl(student, teacher, k, 2.0), kl_divergence(student, teacher, 2.0))


def test_gradients_are_finite_and_right_where_the_rest_is_next_to_nothing() -> None:
    """A teacher and a student as sure as trained ones are: 1 − Σ would be 0 in float32."""
    teacher = torch.full((3, 50), -20.0)
    teacher[:, 7] = 20.0
    student = (teacher + 0.1 * torch.randn(3, 50)).requires_grad_()
    kl(student, teacher, 4, 1.0).backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    exact = student.detach().double().requires_grad_()
    kl(exact, teacher.double(), 4, 1.0).backward()
    assert exact.grad is not None
    torch.testing.assert_close(student.grad, exact.grad.float(), rtol=1e-3, atol=1e-9)


def test_the_truncated_kl_is_least_at_the_teacher_and_pushes_others_up_as_one() -> None:
    teacher = torch.randn(4, 30)
    same = teacher.clone().requires_grad_()
    loss = kl(same, teacher, 5, 2.0)
    loss.backward()
    assert abs(loss.item()) < 1e-6  # observed 0
    assert same.grad is not None
    assert same.grad.abs().max() < 1e-6  # observed 7e-9


# --- the files -------------------------------------------------------------------------------------------------------


def cached(folder: Path, teacher: Any, numbers: Any = range(20), batches: Any = batch_of, **changes: Any) -> Any:
    settings: dict[str, Any] = {"top_k": 16, "temperature": 2.0, "batch_size": 4, "autocast_dtype": None, **changes}
    return cache_teacher(teacher, numbers, batches, folder, {"model": "m", "data": "d"}, **settings)


def few(numbers: Sequence[int]) -> dict[str, Tensor]:
    return answers_only(batch_of(numbers))


@pytest.mark.parametrize("batches", [batch_of, few])
def test_what_is_read_back_is_what_the_teacher_says(batches: Any, tmp_path: Path) -> None:
    _, teacher, _ = swapped()
    found = cached(tmp_path, teacher, batches=batches)
    numbers = [13, 2, 2, 19, 7]
    batch = batches(numbers)
    labels = batch.pop("labels")
    with torch.no_grad():
        logits, targets = answer_logits(teacher(**batch).logits, labels)
    student = logits + torch.randn_like(logits)
    expected = kl(student, logits, 16, 2.0)
    torch.testing.assert_close(found.kl(numbers, student, targets), expected, rtol=1e-5, atol=1e-6)  # observed 0
    assert 0.1 < expected < kl_divergence(student, logits, 2.0)


def test_training_with_a_cached_teacher_equals_the_live_one_where_no_token_is_left_out(tmp_path: Path) -> None:
    recipe = train(batch_size=4, polish_steps=2, fade_steps=2)
    results = []
    for name in ("live", "cached"):
        student, teacher, _ = swapped()
        given_teacher = teacher if name == "live" else cached(tmp_path / "teacher", teacher, top_k=VOCAB)
        reports: list[Any] = []
        distill_(student, given_teacher, 20, batch_of, recipe, seed=3, folder=tmp_path / name, on_step=reports.append)
        results.append((weights(student), [report.kl for report in reports]))
    (one, live), (other, again) = results
    assert live[1] > 0
    assert again == pytest.approx(live, rel=1e-4, abs=1e-6)  # observed 9e-8
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=1e-4)  # observed 0


def test_only_what_is_missing_is_computed(tmp_path: Path) -> None:
    _, teacher, _ = swapped()
    asked: list[int] = []

    def batches(numbers: Sequence[int]) -> dict[str, Tensor]:
        asked.extend(numbers)
        return batch_of(numbers)

    cached(tmp_path, teacher, [1, 5, 9], batches)
    found = cached(tmp_path, teacher, [5, 9, 3, 12], batches)
    assert asked == [1, 5, 9, 3, 12]
    assert all(number in found for number in (1, 3, 5, 9, 12))
    assert 2 not in found
    cached(tmp_path, teacher, [1, 3, 12], batches)
    assert len(asked) == 5


def test_an_interrupted_pass_continues_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyperfade.distill.cached.EXAMPLES", 4)
    _, teacher, _ = swapped()
    seen: list[int] = []

    def stops(numbers: Sequence[int]) -> dict[str, Tensor]:
        if numbers[0] == 8:
            raise KeyboardInterrupt
        return batch_of(numbers)

    def batches(numbers: Sequence[int]) -> dict[str, Tensor]:
        seen.extend(numbers)
        return batch_of(numbers)

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, teacher, batches=stops)
    cached(tmp_path, teacher, batches=batches)
    assert seen == list(range(8, 20))


@pytest.mark.parametrize("change", [{"top_k": 8}, {"temperature": 1.0}, {"autocast_dtype": torch.bfloat16}])
def test_other_settings_are_another_folder(change: dict[str, Any], tmp_path: Path) -> None:
    _, teacher, _ = swapped()
    assert cached(tmp_path, teacher, [1]).folder != cached(tmp_path, teacher, [1], **change).folder
    for folder in tmp_path.iterdir():
        assert json.loads((folder / "key.json").read_text(encoding="utf-8"))["model"] == "m"


def test_a_digest_knows_values_names_shapes_and_dtypes() -> None:
    one = {"a": torch.arange(4.0), "b": torch.tensor(1, dtype=torch.bfloat16)}
    others = [
        {"a": torch.arange(4.0)},
        {**one, "a": torch.tensor([0.0, 1, 2, 4])},
        {**one, "a": torch.arange(4.0).view(2, 2)},
        {**one, "b": torch.tensor(1, dtype=torch.float16)},
        {"b": one["b"], "c": one["a"]},
    ]
    assert digest(one) == digest({name: tensor.clone() for name, tensor in one.items()})
    assert len({digest(tensors) for tensors in [one, *others]}) == 6


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_answers_of_other_examples_are_refused(tmp_path: Path) -> None:
    _, teacher, _ = swapped()
    found = cached(tmp_path, teacher, [1, 2])
    targets = answer_logits(torch.zeros(2, 12, VOCAB), batch_of([1, 2])["labels"])[1]
    logits = torch.zeros(len(targets), VOCAB)
    assert torch.isfinite(found.kl([1, 2], logits, targets))
    with pytest.raises(CheckpointError, match="holds other answers than the batch of examples 2, 1"):
        found.kl([2, 1], logits, targets)
    with pytest.raises(CheckpointError, match="has no answers for example 3"):
        found.kl([1, 3], logits, targets)


def test_batches_that_leave_examples_out_are_refused(tmp_path: Path) -> None:
    _, teacher, _ = swapped()
    with pytest.raises(DataError, match="A batch of 4 examples has 3"):
        cached(tmp_path, teacher, batches=lambda numbers: batch_of(numbers[1:]))


@pytest.mark.parametrize("how", ["cut", "version", "offsets", "missing"])
def test_a_damaged_file_is_named(how: str, tmp_path: Path) -> None:
    _, teacher, _ = swapped()
    folder = cached(tmp_path, teacher).folder
    (file,) = folder.glob("answers-*")
    tensors, version = load_file(file), "1"
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-40])
    else:
        if how == "version":
            version = "2"
        elif how == "offsets":
            tensors["offsets"] = tensors["offsets"][:-1]
        else:
            del tensors["log_rest"]
        save_file(tensors, file, metadata={"version": version})
    with pytest.raises(CheckpointError, match=file.name):
        CachedTeacher(folder, 2.0)


def test_recipes_cannot_cache_what_is_skipped() -> None:
    fields = {"train": {"teacher": "cached"}, "data": {"on_bad_sample": "skip"}}
    with pytest.raises(RecipeError, match="cached goes by example number"):
        Recipe.parse(fields)
    assert Train().teacher == "live"
