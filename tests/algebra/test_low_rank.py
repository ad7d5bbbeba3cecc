"""The whitened low-rank rival against the analytic optimum."""

import pytest
import torch

from hyperfade.algebra import low_rank, rank_for
from hyperfade.errors import FitError


def _tail(matrix: torch.Tensor, rank: int) -> float:
    values = torch.linalg.svdvals(matrix)
    return (values[rank:].norm() / values.norm()).item()


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_frobenius_error_is_the_singular_value_tail(rank: int) -> None:
    w = torch.randn(12, 9).double()
    result = low_rank(w, rank)
    assert result.error == pytest.approx(_tail(w, rank), rel=1e-10)  # seen 3e-16
    assert (w - result.dense()).norm() / w.norm() == pytest.approx(result.error, rel=1e-10)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_calibrated_error_is_the_tail_of_the_outputs(rank: int) -> None:
    """The best rank-q outputs X Wᵀ; C^½ need not be formed: X/√N is as good a root."""
    w, x = torch.randn(12, 9).double(), torch.randn(60, 9).double() * torch.logspace(0, -2, 9).double()
    result = low_rank(w, rank, x.T @ x / 60, ridge=0)
    assert result.error == pytest.approx(_tail(w @ x.T, rank), rel=1e-9)  # seen 3e-16
    assert torch.linalg.norm(x @ (w - result.dense()).T) / torch.linalg.norm(x @ w.T) == pytest.approx(
        result.error, rel=1e-9
    )
    assert result.expand.shape == (12, rank)
    assert result.reduce.shape == (rank, 9)


def test_rank_deficient_moment_is_finite_and_exact_in_its_span() -> None:
    w, x = torch.randn(12, 9).double(), torch.randn(60, 2).double() @ torch.randn(2, 9).double()
    result = low_rank(w, 2, x.T @ x / 60)
    assert torch.isfinite(result.dense()).all()
    assert result.error < 5e-3  # seen 8e-4: the ridge is all that is left


def test_zero_moment_counts_as_none() -> None:
    w = torch.randn(6, 5)
    assert torch.equal(low_rank(w, 2, torch.zeros(5, 5)).dense(), low_rank(w, 2).dense())


@pytest.mark.parametrize("rank", [0, 6])
def test_impossible_ranks_are_refused(rank: int) -> None:
    with pytest.raises(FitError, match=r"1\.\.5"):
        low_rank(torch.randn(7, 5), rank)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_numbers_are_refused(bad: float) -> None:
    w, c = torch.randn(4, 4), torch.eye(4)
    with pytest.raises(FitError, match="second moment"):
        low_rank(w, 2, c * bad)
    w[0, 0] = bad
    with pytest.raises(FitError, match="weight"):
        low_rank(w, 2)


@pytest.mark.parametrize(
    ("num_parameters", "rank"),
    [(2000, 10), (2199.9, 10), (2200, 11), (1, 1), (25400, 127), (25600, 128), (27199, 128), (27200, 136)],
)
def test_rank_for_fills_but_never_exceeds(num_parameters: float, rank: int) -> None:
    assert rank_for(150, 50, num_parameters) == rank
