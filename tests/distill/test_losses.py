"""Losses against formulas written out by hand, in float64."""

import math

import pytest
import torch
from torch import nn

from hyperfade.distill.losses import LossTerms, answer_logits, cross_entropy, kl_divergence, mean_reconstruction
from hyperfade.nn import BlendLinear, LightSpec


def test_each_prediction_is_for_the_next_token_and_only_answers_count() -> None:
    logits = torch.randn(2, 5, 7)
    labels = torch.tensor([[-100, -100, 3, 4, -100], [-100, 6, -100, -100, 2]])
    chosen, targets = answer_logits(logits, labels)
    # by hand: the label at position p is predicted at position p - 1
    assert torch.equal(chosen, torch.stack([logits[0, 1], logits[0, 2], logits[1, 0], logits[1, 3]]))
    assert targets.tolist() == [3, 4, 6, 2]


def test_a_label_at_the_first_position_has_no_prediction() -> None:
    chosen, targets = answer_logits(torch.randn(1, 3, 7), torch.tensor([[5, -100, 1]]))
    assert (len(chosen), targets.tolist()) == (1, [1])


def test_logits_that_begin_earlier_than_the_labels_are_aligned_at_the_end() -> None:
    """BLIP-2 puts image tokens before the text: logits are longer than labels."""
    logits, labels = torch.randn(2, 9, 7), torch.tensor([[-100, 3, 4], [-100, -100, 2]])
    chosen, targets = answer_logits(logits, labels)
    assert torch.equal(chosen, torch.stack([logits[0, 6], logits[0, 7], logits[1, 7]]))
    assert targets.tolist() == [3, 4, 2]


def test_answer_logits_are_float32_whatever_the_model_runs_in() -> None:
    chosen, _ = answer_logits(torch.randn(1, 3, 7).bfloat16(), torch.tensor([[-100, 1, 2]]))
    assert chosen.dtype == torch.float32


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_equals_its_formula_and_torch_on_shifted_labels(smoothing: float) -> None:
    logits = torch.randn(2, 5, 7, dtype=torch.float64)
    labels = torch.tensor([[-100, -100, 3, 4, -100], [-100, 6, -100, -100, 2]])
    mine = cross_entropy(*answer_logits(logits, labels), smoothing).item()
    whole = nn.CrossEntropyLoss(ignore_index=-100, label_smoothing=smoothing)
    assert mine == pytest.approx(whole(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).item(), rel=1e-6)
    by_hand = []
    for row, position, target in ((0, 1, 3), (0, 2, 4), (1, 0, 6), (1, 3, 2)):
        scores = logits[row, position].tolist()
        log_probabilities = [s - math.log(sum(math.exp(o) for o in scores)) for s in scores]
        by_hand.append(-(1 - smoothing) * log_probabilities[target] - smoothing * sum(log_probabilities) / 7)
    assert mine == pytest.approx(sum(by_hand) / 4, rel=1e-6)  # observed 6e-8: the logits are cut to float32


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl_equals_torch_distributions_and_carries_t_squared(temperature: float) -> None:
    student, teacher = torch.randn(6, 11, dtype=torch.float64), torch.randn(6, 11, dtype=torch.float64)
    p, q = (torch.distributions.Categorical(logits=x / temperature) for x in (teacher, student))
    expected = temperature**2 * torch.distributions.kl_divergence(p, q).mean()
    torch.testing.assert_close(
        kl_divergence(student, teacher, temperature), expected, rtol=1e-12, atol=0
    )  # observed 2e-15


def test_kl_by_hand_for_two_classes_says_which_way_round() -> None:
    teacher, student = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert kl_divergence(student, teacher, 1.0).item() == pytest.approx(expected, rel=1e-5)
    assert kl_divergence(teacher, student, 1.0).item() != pytest.approx(expected, rel=1e-2)


def test_t_squared_keeps_the_gradient_of_a_hot_kl_at_the_size_of_a_warm_one() -> None:
    norms = []
    for temperature in (20.0, 40.0):  # d/ds T² KL(T) tends to (s - t - their means)/vocabulary as T grows
        student, teacher = torch.linspace(-1, 1, 9)[None].requires_grad_(), torch.linspace(1, 0, 9)[None]
        kl_divergence(student, teacher, temperature).backward()
        assert student.grad is not None
        norms.append(student.grad.norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=0.01)  # observed 0.01 %; a factor 2 without T²


def test_kl_and_its_gradient_vanish_when_student_and_teacher_agree() -> None:
    student = torch.randn(4, 9).requires_grad_()
    loss = kl_divergence(student, student.detach().clone(), 2.0)
    loss.backward()
    assert student.grad is not None
    assert abs(loss.item()) < 1e-6  # observed 0
    assert student.grad.abs().max() < 1e-7  # observed 2e-8


def _terms(*values: float) -> LossTerms:
    return LossTerms(*(torch.tensor(value, requires_grad=True) for value in values))


def test_the_total_is_the_weighted_sum() -> None:
    assert _terms(2.0, 3.0, 5.0).total(0.25, 0.1).item() == pytest.approx(0.75 * 2 + 0.25 * 3 + 0.1 * 5)


@pytest.mark.parametrize(("kd_weight", "bad"), [(0.0, (2.0, math.nan, math.nan)), (1.0, (math.nan, 3.0, math.nan))])
def test_a_term_of_weight_zero_takes_no_part_not_even_in_the_graph(kd_weight: float, bad: tuple[float, ...]) -> None:
    terms = _terms(*bad)
    total = terms.total(kd_weight, 0.0)
    total.backward()
    assert total.item() == (2.0 if kd_weight == 0 else 3.0)
    used = [term.grad is not None for term in (terms.cross_entropy, terms.kl, terms.reconstruction)]
    assert used == [kd_weight == 0, kd_weight == 1, False]


def test_mean_reconstruction_is_over_the_layers_that_measured() -> None:
    layers = [BlendLinear(nn.Linear(4, 4), LightSpec(4, 4, True, None, 1).build()) for _ in range(3)]
    assert mean_reconstruction(layers, torch.device("cpu")).item() == 0
    layers[0].reconstruction, layers[2].reconstruction = torch.tensor(1.0), torch.tensor(4.0)
    assert mean_reconstruction(layers, torch.device("cpu")).item() == 2.5
