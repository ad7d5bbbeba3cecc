"""The statistics of wide layers against plain einsum, at widths that are no multiple of a strip."""

import itertools
import sys

import pytest
import torch
from torch import Tensor

from hyperfade.algebra import Algebra, blocks, fit, output_error
from hyperfade.algebra.wide import mixing_gram, sweep_components, weighted_sums

N, WIDTH, ROWS = 3, 150, 10  # d/n = 150: two strips and a rest


@pytest.fixture
def moment() -> Tensor:
    """C (450, 450) of few tokens with massive activations: two features, a thousandfold in two tokens."""
    x = torch.randn(200, N * WIDTH).double()
    x[:2, :2] *= 1000
    return x.T @ x / 200 + 1e-3 * torch.eye(N * WIDTH)


def test_weighted_sums_contract_the_outer_indices(moment: Tensor) -> None:
    weights, moment4 = torch.randn(4, N, N).double(), blocks(moment, N)
    expected = torch.einsum("sbc,bicj->isj", weights, moment4)
    torch.testing.assert_close(weighted_sums(weights, moment4), expected, rtol=1e-12, atol=1e-9)  # seen 2e-15


@pytest.mark.parametrize("count", [1, 4])
def test_the_mixing_gram_is_the_whole_sum(count: int, moment: Tensor) -> None:
    t, moment4 = torch.randn(count, ROWS, WIDTH).double(), blocks(moment, N)
    expected = torch.einsum("roi,bicj,soj->rbsc", t, moment4, t)
    torch.testing.assert_close(mixing_gram(t, moment4), expected, rtol=1e-11, atol=1e-7)  # seen 2e-9 of 4e5


@pytest.mark.parametrize("algebra", [Algebra.products(3), Algebra.learned(3), Algebra.products(3, 5)], ids=str)
def test_a_pass_never_raises_the_error(algebra: Algebra, moment: Tensor) -> None:
    weight = torch.randn(N * ROWS, N * WIDTH).double()
    mixing = algebra.structure() + 0.3 * torch.randn(algebra.size, N, N)
    moment4, cross = blocks(moment, N), blocks(weight @ moment, N)
    components = torch.zeros(algebra.size, ROWS, WIDTH).double()
    errors = []
    for _ in range(4):
        approximation = torch.einsum("rab,roi->aobi", mixing, components).reshape(weight.shape)
        errors.append(output_error(weight, approximation, moment))
        components = sweep_components(mixing, components, moment4, cross)
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))


def test_one_pass_is_the_joint_optimum_where_components_do_not_touch(moment: Tensor) -> None:
    weight, algebra = torch.randn(N * ROWS, N * WIDTH).double(), Algebra.products(3)
    moment4, cross = blocks(moment, N), blocks(weight @ moment, N)
    once = sweep_components(algebra.structure(), torch.zeros(3, ROWS, WIDTH).double(), moment4, cross)
    twice = sweep_components(algebra.structure(), once, moment4, cross)
    torch.testing.assert_close(once, twice, rtol=0, atol=1e-9)  # seen 0


@pytest.mark.parametrize("limit", [8, 4096])
@pytest.mark.parametrize("algebra", [Algebra.products(3), Algebra.learned(3), Algebra.named("cyclic", n=3)], ids=str)
def test_the_reported_error_is_that_of_the_weights(
    algebra: Algebra, limit: int, moment: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a difference of energies, and massive activations make them large."""
    monkeypatch.setattr(sys.modules["hyperfade.algebra.fit"], "_JOINT_SOLVE_LIMIT", limit)
    weight = torch.randn(N * ROWS, N * WIDTH).double()
    result = fit(weight, algebra, moment, sweeps=4, ridge=0)
    assert result.error == pytest.approx(output_error(weight, result.dense(), moment), rel=1e-9)  # seen 1e-12
