"""Hidden units may change places: the function stays, and tensors that someone else shares stay as they are."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import FAMILIES, logits
from torch import Tensor, nn

from hyperfade.distill import teacher_of
from hyperfade.surgery import (
    contribution_order,
    energy_order,
    find_ffns,
    permute_hidden_,
    pruned_error,
    refitted_writer,
)

ALL = pytest.mark.parametrize("name", FAMILIES)


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {k: v for k, v in model.named_modules() if isinstance(v, nn.Linear)}


def _permute_all_(model: nn.Module) -> None:
    """Another random order in every FFN that has hidden units."""
    for ffn in find_ffns(model):
        if ffn.readers:
            permute_hidden_(_linears(model), ffn, torch.randperm(model.get_submodule(ffn.writer).in_features))


@ALL
def test_the_model_keeps_its_function(name: str) -> None:
    family = FAMILIES[name]
    model = family.build(dtype=torch.float64)
    before = logits(model, family, torch.float64)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    _permute_all_(model)
    # observed: 3e-15 at the most; RMS norms compute in float32, so that one flipped rounding would be 1e-7
    torch.testing.assert_close(logits(model, family, torch.float64), before, rtol=0, atol=1e-5)
    changed = {k.rpartition(".")[0] for k, v in model.state_dict().items() if not torch.equal(v, weights[k])}
    assert changed == {linear for ffn in find_ffns(model) if ffn.readers for linear in ffn.linears}


def test_rows_and_columns_move_together() -> None:
    """By hand: unit 2 of three comes first."""
    model = nn.ModuleDict({"fc1": nn.Linear(2, 3), "fc2": nn.Linear(3, 2)})
    fc1, fc2 = model["fc1"], model["fc2"]
    w1, b1, w2, b2 = fc1.weight.clone(), fc1.bias.clone(), fc2.weight.clone(), fc2.bias.clone()
    permute_hidden_(_linears(model), find_ffns(model)[0], torch.tensor([2, 0, 1]))
    assert torch.equal(fc1.weight, torch.stack([w1[2], w1[0], w1[1]]))
    assert torch.equal(fc1.bias, torch.stack([b1[2], b1[0], b1[1]]))
    assert torch.equal(fc2.weight, torch.stack([w2[:, 2], w2[:, 0], w2[:, 1]], dim=1))
    assert torch.equal(fc2.bias, b2)


def test_a_twin_that_shares_the_tensors_keeps_its_own() -> None:
    family = FAMILIES["llava_siglip"]
    model = family.build()
    twin = teacher_of(model)
    before = {k: v.clone() for k, v in twin.state_dict().items()}
    shared = {k: v.data_ptr() for k, v in model.state_dict().items()}
    assert all(v.data_ptr() == shared[k] for k, v in twin.state_dict().items())
    expected = logits(twin, family)
    _permute_all_(model)
    assert all(torch.equal(v, before[k]) for k, v in twin.state_dict().items())
    assert torch.equal(logits(twin, family), expected)
    touched = {linear for ffn in find_ffns(model) for linear in ffn.linears}
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[0] not in touched:
            assert tensor.data_ptr() == shared[name], f"{name} was copied without need"


def test_energy_orders_by_falling_second_moment_and_leaves_ties_alone() -> None:
    moment = torch.diag(torch.tensor([1.0, 3.0, 2.0, 3.0])) + 0.5  # off the diagonal: does not count
    assert energy_order(moment).tolist() == [1, 3, 2, 0]


# --- units that are left out -----------------------------------------------------------------------------------------


def _samples(count: int, hidden: int) -> Tensor:
    """Correlated hidden units of very different size: (count, hidden) float64."""
    mixing = torch.randn(hidden, hidden, dtype=torch.float64) * torch.logspace(0, 1.5, hidden, dtype=torch.float64)
    return torch.randn(count, hidden, dtype=torch.float64) @ mixing


def test_the_refitted_writer_is_the_least_squares_solution() -> None:
    h, writer, kept = _samples(200, 24), torch.randn(10, 24), torch.tensor([3, 17, 0, 9, 22, 5, 11, 14])
    wanted = h @ writer.double().T
    refitted, error = refitted_writer(writer, h.T @ h / len(h), kept)
    expected = torch.linalg.lstsq(h[:, kept], wanted).solution.T
    assert refitted.dtype == torch.float64
    torch.testing.assert_close(refitted, expected, rtol=1e-9, atol=1e-9)  # observed 2e-14
    measured = ((wanted - h[:, kept] @ refitted.T).norm() / wanted.norm()).item()
    assert error == pytest.approx(measured, rel=1e-9)  # observed 2e-16
    plain = ((wanted - h[:, kept] @ writer.double()[:, kept].T).norm() / wanted.norm()).item()
    assert pruned_error(writer, h.T @ h / len(h), kept) == pytest.approx(plain, rel=1e-9)  # observed 0
    assert 0 < error < plain  # observed 0.66 and 0.79


@given(st.integers(0, 2**20), st.integers(2, 20), st.integers(1, 40), st.floats(0, 1))
def test_refitting_never_does_worse_than_pruning(seed: int, hidden: int, samples: int, share: float) -> None:
    """Also where C is singular: fewer samples than units."""
    torch.manual_seed(seed)
    h, writer = _samples(samples, hidden), torch.randn(6, hidden, dtype=torch.float64)
    moment, kept = h.T @ h / samples, torch.randperm(hidden)[: max(1, int(share * hidden))]
    refitted, error = refitted_writer(writer, moment, kept)
    assert refitted.shape == (6, len(kept))
    assert error <= pruned_error(writer, moment, kept) + 1e-6  # observed 1e-8 above it, over 3000 seeds


def test_units_that_the_kept_ones_foretell_cost_nothing() -> None:
    own = _samples(100, 8)
    h = torch.cat([own @ torch.randn(8, 5, dtype=torch.float64), own], dim=1)
    writer, kept = torch.randn(7, 13), torch.arange(5, 13)
    moment = h.T @ h / len(h)
    refitted, error = refitted_writer(writer, moment, kept)
    assert error < 1e-6  # observed 1e-8
    torch.testing.assert_close(own @ refitted.T, h @ writer.double().T, rtol=1e-8, atol=1e-8)  # observed 4e-12
    assert pruned_error(writer, moment, kept) > 0.1  # observed 0.84


def test_all_units_kept_give_the_writer_back_in_their_order() -> None:
    h, writer, order = _samples(100, 12), torch.randn(5, 12), torch.randperm(12)
    refitted, error = refitted_writer(writer, h.T @ h, order)
    torch.testing.assert_close(refitted, writer.double()[:, order], rtol=1e-9, atol=1e-9)  # observed 1e-13
    assert error < 1e-6  # observed 7e-16
    assert pruned_error(writer, h.T @ h, order) == 0


def test_contribution_is_energy_times_the_columns_square() -> None:
    writer, moment = torch.randn(5, 9), _samples(50, 9)
    moment = moment.T @ moment
    scores = [sum(float(writer[row, unit]) ** 2 for row in range(5)) * float(moment[unit, unit]) for unit in range(9)]
    order = contribution_order(writer, moment).tolist()
    assert order == sorted(range(9), key=lambda unit: -scores[unit])
    assert order != energy_order(moment).tolist()
    assert contribution_order(torch.ones(2, 3), torch.eye(3)).tolist() == [0, 1, 2]  # ties stay as they are


def test_units_that_an_order_leaves_out_are_gone() -> None:
    model = nn.ModuleDict({"fc1": nn.Linear(2, 4), "fc2": nn.Linear(4, 3)})
    fc1, fc2 = model["fc1"], model["fc2"]
    w1, b1, w2, b2 = (tensor.detach().clone() for tensor in (fc1.weight, fc1.bias, fc2.weight, fc2.bias))
    permute_hidden_(_linears(model), find_ffns(model)[0], torch.tensor([3, 1]))
    assert (fc1.in_features, fc1.out_features, fc2.in_features, fc2.out_features) == (2, 2, 2, 3)
    x = torch.randn(6, 2)
    expected = torch.stack([x @ w1[unit] + b1[unit] for unit in (3, 1)], dim=1)
    torch.testing.assert_close(fc1(x), expected)
    torch.testing.assert_close(fc2(expected), expected @ w2[:, [3, 1]].T + b2)
