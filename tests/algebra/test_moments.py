"""Second moments and the solver under every fit."""

import pytest
import torch

from hyperfade.algebra import SecondMoment, output_error, shrunk
from hyperfade.algebra.moments import conditioned, solve_psd
from hyperfade.errors import FitError


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_accumulates_the_mean_outer_product_in_float64(dtype: torch.dtype) -> None:
    parts = [torch.randn(*shape, 6).to(dtype) for shape in ((5,), (2, 3), (1, 2, 4), (0,))]
    moment = SecondMoment(6)
    for part in parts:
        moment.add_(part)
    x = torch.cat([part.reshape(-1, 6) for part in parts]).double()
    assert moment.num_tokens == 19
    mean = moment.mean()
    assert mean.dtype == torch.float64
    torch.testing.assert_close(mean, x.T @ x / 19, rtol=1e-13, atol=1e-15)  # seen 0


@pytest.mark.parametrize("features", [127, 300, 1100])
def test_strips_give_the_whole_symmetric_sum(features: int) -> None:
    x = torch.randn(50, features, dtype=torch.float64)
    moment = SecondMoment(features)
    moment.add_(x[:20])
    moment.add_(x[20:])
    mean = moment.mean()
    assert torch.equal(mean, mean.T)
    torch.testing.assert_close(mean, x.T @ x / 50, rtol=1e-12, atol=1e-14)  # seen 1e-15 absolute


def test_the_average_of_all_counts_as_tokens_of_each() -> None:
    inputs = [torch.randn(tokens, 300, dtype=torch.float64) for tokens in (7, 0, 5)]
    moments = [SecondMoment(300) for _ in inputs]
    for moment, x in zip(moments, inputs, strict=True):
        moment.add_(x)
    average = sum(x.T @ x for x in inputs) / 12
    for mean, x in zip(shrunk(moments, 4.0), inputs, strict=True):
        torch.testing.assert_close(mean, (x.T @ x + 4 * average) / (len(x) + 4), rtol=1e-12, atol=1e-14)  # seen 1e-15


def test_small_inputs_survive_massive_ones() -> None:
    """A float32 sum would lose 1e-4² beside 1e3²."""
    moment = SecondMoment(1)
    moment.add_(torch.full((1, 1), 1e3))
    for _ in range(10):
        moment.add_(torch.full((1, 1), 1e-2))
    extra = moment.mean().item() * 11 - 1e6
    assert extra == pytest.approx(10 * 1e-4, rel=1e-5)  # seen 5e-7 relative, from 1e6's last bits


def test_mean_empties_the_accumulator() -> None:
    moment = SecondMoment(3)
    moment.add_(torch.randn(4, 3, requires_grad=True))
    assert not moment.mean().requires_grad
    with pytest.raises(FitError, match="No input"):
        moment.mean()


def test_no_tokens_is_an_error() -> None:
    with pytest.raises(FitError, match="calibration"):
        SecondMoment(3).mean()


def test_conditioning_leaves_the_callers_moment_alone() -> None:
    c = torch.diag(torch.tensor([1.0, 3.0])).double()
    c[0, 1] = 0.5
    before = c.clone()
    result = conditioned(c, 2, 0.1, c.device)
    assert torch.equal(c, before)
    torch.testing.assert_close(result, torch.tensor([[1.2, 0.25], [0.25, 3.2]]).double())


def test_output_error_is_the_one_on_the_samples() -> None:
    w, approximation, x = torch.randn(4, 6).double(), torch.randn(4, 6).double(), torch.randn(50, 6).double()
    expected = torch.linalg.norm(x @ (w - approximation).T) / torch.linalg.norm(x @ w.T)
    assert output_error(w, approximation, x.T @ x / 50) == pytest.approx(expected.item(), rel=1e-12)  # seen 2e-16
    assert output_error(w, approximation, None) == pytest.approx(((w - approximation).norm() / w.norm()).item())
    assert output_error(w * 0, w * 0, None) == 0


def test_solver_agrees_with_torch_where_well_posed() -> None:
    root = torch.randn(8, 8).double()
    gram, right = root @ root.T + torch.eye(8), torch.randn(8, 3).double()
    torch.testing.assert_close(
        solve_psd(gram.clone(), right), torch.linalg.solve(gram, right), rtol=1e-9, atol=1e-11
    )  # seen 5e-16


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_solver_satisfies_singular_but_consistent_systems(scale: float) -> None:
    root = torch.randn(8, 3).double() * scale
    gram = root @ root.T
    right = gram @ torch.randn(8, 2).double()
    solution = solve_psd(gram.clone(), right)
    assert torch.linalg.norm(gram @ solution - right) <= 1e-10 * torch.linalg.norm(right)  # seen 5e-16
    assert torch.equal(solve_psd(gram * 0, right * 0), right * 0)
