"""Losses against formulas written out by hand, in float64."""

import math

import pytest
import torch
from tiny_models import FAMILIES, VOCAB
from torch import Tensor, nn

from hyperfade.distill.losses import (
    LossTerms,
    answer_logits,
    answers_only,
    cross_entropy,
    hidden_error,
    kl_divergence,
    mean_reconstruction,
)
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


ANSWERS = {
    "one place": [[(4, 6)], [(4, 6)]],
    "each row its own place": [[(3, 5)], [(7, 9)]],
    "several answers in a row": [[(2, 3), (5, 8)], [(4, 5), (8, 9)]],
    "up to the last token": [[(8, 10)], [(1, 2)]],
    "none in one row": [[], [(6, 8)]],
    "everything": [[(0, 10)], [(0, 10)]],
}


def _conversation(answers: list[list[tuple[int, int]]]) -> dict[str, Tensor]:
    """A batch of rows with answers at these places; the last row ends in a token of padding."""
    ids = torch.randint(3, 90, (len(answers), 10))
    mask = torch.ones_like(ids)
    mask[-1, -1] = 0
    labels = torch.full_like(ids, -100)
    for row, places in enumerate(answers):
        for start, end in places:
            labels[row, start:end] = ids[row, start:end]
    labels[mask == 0] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("where", ANSWERS)
def test_logits_of_the_answers_alone_give_the_same_losses_and_gradients(where: str) -> None:
    model, teacher = FAMILIES["llama"].build(0), FAMILIES["llama"].build(1)
    batch = _conversation(ANSWERS[where])
    found = []
    for given in (batch, answers_only(batch)):
        inputs = {key: value for key, value in given.items() if key != "labels"}
        logits, targets = answer_logits(model(**inputs).logits, given["labels"])
        with torch.no_grad():
            wanted, _ = answer_logits(teacher(**inputs).logits, given["labels"])
        loss = cross_entropy(logits, targets, 0.1) + kl_divergence(logits, wanted, 2.0)
        model.zero_grad()
        loss.backward()
        found.append((logits.detach(), targets, loss.detach(), [p.grad.clone() for p in model.parameters()]))
    (logits, targets, loss, gradients), (few, same, cheap, others) = found
    assert torch.equal(targets, same)
    torch.testing.assert_close(few, logits, rtol=0, atol=1e-5)  # observed 0
    torch.testing.assert_close(cheap, loss, rtol=1e-5, atol=0)  # observed 0
    for one, other in zip(gradients, others, strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm()  # observed 0


def test_only_positions_before_answers_and_the_last_keep_logits() -> None:
    batch = _conversation(ANSWERS["several answers in a row"])
    before = {key: value.clone() for key, value in batch.items()}
    few = answers_only(batch)
    assert few["logits_to_keep"].tolist() == [1, 3, 4, 5, 6, 7, 9]
    assert few["labels"].shape == (2, 7)
    assert FAMILIES["llama"].build()(**{k: v for k, v in few.items() if k != "labels"}).logits.shape == (2, 7, VOCAB)
    assert batch.keys() == before.keys()
    assert all(torch.equal(batch[key], before[key]) for key in before)  # the batch itself stays


def test_a_batch_without_an_answer_keeps_one_position_and_no_prediction() -> None:
    few = answers_only(_conversation([[], []]))
    assert few["logits_to_keep"].tolist() == [9]
    logits, targets = answer_logits(torch.randn(2, 1, 7), few["labels"])
    assert (logits.shape, targets.shape) == ((0, 7), (0,))


@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith("blip2")])
def test_every_family_that_takes_logits_to_keep_keeps_those(name: str) -> None:
    model, inputs = FAMILIES[name].build(), FAMILIES[name].inputs()
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, -1] = 5
    few = answers_only(inputs | {"labels": labels})
    with torch.no_grad():
        whole, _ = answer_logits(model(**inputs).logits, labels)
        own, targets = answer_logits(model(**{k: v for k, v in few.items() if k != "labels"}).logits, few["labels"])
    assert targets.tolist() == [5]
    torch.testing.assert_close(own, whole, rtol=0, atol=1e-5)  # observed 1e-6


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
    assert _terms(2.0, 3.0, 5.0, 7.0).total(0.25, 0.1, 0.2).item() == pytest.approx(1.5 + 0.75 + 0.5 + 1.4)


@pytest.mark.parametrize(("kd_weight", "bad"), [(0.0, (2.0, *[math.nan] * 3)), (1.0, (math.nan, 3.0, *[math.nan] * 2))])
def test_a_term_of_weight_zero_takes_no_part_not_even_in_the_graph(kd_weight: float, bad: tuple[float, ...]) -> None:
    terms = _terms(*bad)
    total = terms.total(kd_weight, 0.0, 0.0)
    total.backward()
    assert total.item() == (2.0 if kd_weight == 0 else 3.0)
    used = [term.grad is not None for term in (terms.cross_entropy, terms.kl, terms.reconstruction, terms.hidden)]
    assert used == [kd_weight == 0, kd_weight == 1, False, False]


def test_hidden_error_is_relative_at_every_position_and_blind_to_padding() -> None:
    student, teacher = torch.randn(2, 3, 2, 5, 4).unbind()  # three layers of two rows of five positions
    teacher[:, 0, 0] *= 1e3  # as where massive activations sit
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    errors = [
        sum((student[layer, row, at, i] - teacher[layer, row, at, i]).item() ** 2 for i in range(4))
        / sum(teacher[layer, row, at, i].item() ** 2 for i in range(4))
        for layer in range(3)
        for row, at in mask.nonzero().tolist()
    ]
    given = hidden_error(student.unbind(), teacher.unbind(), mask)
    assert given.item() == pytest.approx(sum(errors) / 24, rel=1e-5)  # observed 2e-7
    student[:, 1, 3:] = math.inf
    assert hidden_error(teacher.unbind(), teacher.unbind(), mask).item() == 0
    assert hidden_error(student.unbind(), teacher.unbind(), mask[:, :4]).isinf()  # of another shape: not used


def test_hidden_error_keeps_no_copies_of_states_for_its_gradient() -> None:
    states = [torch.randn(2, 50, 64, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    wanted = [torch.randn(2, 50, 64, dtype=torch.bfloat16) for _ in range(3)]
    kept = list[Tensor]()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor), tensor)[1], lambda kept: kept):
        error = hidden_error(states, wanted, None)
    states_and_wanted = {tensor.data_ptr() for tensor in states + wanted}
    assert all(tensor.numel() < 2 * 50 * 64 or tensor.data_ptr() in states_and_wanted for tensor in kept)
    error.backward()
    expected = (
        sum(
            ((s.float() - t.float()).square().sum(-1) / t.float().square().sum(-1)).mean()
            for s, t in zip(states, wanted, strict=True)
        )
        / 3
    )
    for state, gradient in zip(states, torch.autograd.grad(expected, states), strict=True):
        torch.testing.assert_close(state.grad, gradient, rtol=0.01, atol=0)  # observed 1/128, bfloat16's last digit


def test_mean_reconstruction_is_over_the_layers_that_measured() -> None:
    layers = [BlendLinear(nn.Linear(4, 4), LightSpec(4, 4, True, None, 1).build()) for _ in range(3)]
    assert mean_reconstruction(layers, torch.device("cpu")).item() == 0
    layers[0].reconstruction, layers[2].reconstruction = torch.tensor(1.0), torch.tensor(4.0)
    assert mean_reconstruction(layers, torch.device("cpu")).item() == 2.5
