"""Dense → components: against singular values, against least squares on the samples, and with bad inputs."""

import itertools
import sys

import pytest
import torch
from torch import Tensor

from hyperfade.algebra import Algebra, Fit, fit, kron_sum, output_error
from hyperfade.errors import AlgebraError, FitError

FIXED = [
    Algebra.named("paper"),
    Algebra.named("paper", terms=3),
    Algebra.named("split_complex"),
    Algebra.named("quaternion"),
    Algebra.named("cyclic", n=3),
    Algebra.named("z2", terms=3, n=4),
]
LEARNED = [
    Algebra.learned(2),
    Algebra.learned(3, 2),
    Algebra.learned(4),
    Algebra.products(2),
    Algebra.products(4),
    Algebra.products(4, 8),
]


def _name(algebra: Algebra) -> str:
    return f"{algebra.name}-{algebra.n}-{algebra.size}"


def _problem(n: int = 4, num_samples: int = 90) -> tuple[Tensor, Tensor, Tensor]:
    """W (k, d), correlated inputs X (N, d) of falling scale, and their C, float64."""
    k, d = 3 * n, 5 * n
    x = torch.randn(num_samples, d).double() @ torch.randn(d, d).double() * torch.logspace(0, -1.5, d).double()
    return torch.randn(k, d).double(), x, x.T @ x / num_samples


def _sample_error(w: Tensor, approximation: Tensor, x: Tensor) -> float:
    return (torch.linalg.norm(x @ (w - approximation).T) / torch.linalg.norm(x @ w.T)).item()


def _least_squares(w: Tensor, algebra: Algebra, x: Tensor) -> Tensor:
    """The best Σ A_i ⊗ S_i on the samples X: `lstsq` over the outputs of every A_i ⊗ E_pq."""
    a, (k, d) = algebra.structure(), w.shape
    basis = []
    for i, p, q in itertools.product(range(algebra.size), range(k // algebra.n), range(d // algebra.n)):
        unit = torch.zeros(k // algebra.n, d // algebra.n, dtype=torch.float64)
        unit[p, q] = 1
        basis.append(torch.kron(a[i], unit))
    stacked = torch.stack(basis)
    outputs = (stacked @ x.T).flatten(1).T
    solution = torch.linalg.lstsq(outputs, (w @ x.T).flatten()[:, None], driver="gelsd").solution
    return torch.einsum("b,bkd->kd", solution[:, 0], stacked)


def _is_finite(result: Fit) -> bool:
    parts = [result.components, result.mixing_matrices, result.dense(), torch.tensor(result.errors)]
    return all(bool(torch.isfinite(part).all()) for part in parts)


@pytest.mark.parametrize(("n", "terms"), [(2, 1), (2, 2), (2, 4), (3, 2), (4, 1), (4, 4), (4, 11)])
def test_learned_frobenius_error_is_the_singular_value_tail(n: int, terms: int) -> None:
    w, _, _ = _problem(n)
    rows = [row for band in w.chunk(n, 0) for row in (block.flatten() for block in band.chunk(n, 1))]
    values = torch.linalg.svdvals(torch.stack(rows))
    result = fit(w, Algebra.learned(n, terms))
    expected = (values[terms:].norm() / values.norm()).item()
    assert result.error == pytest.approx(expected, rel=1e-9, abs=1e-12)  # seen 5e-16
    assert ((w - result.dense()).norm() / w.norm()).item() == pytest.approx(result.error, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("algebra", FIXED, ids=_name)
def test_fixed_frobenius_is_least_squares(algebra: Algebra) -> None:
    w, _, _ = _problem(algebra.n)
    expected = _least_squares(w, algebra, torch.eye(w.shape[1], dtype=torch.float64))
    torch.testing.assert_close(fit(w, algebra).dense(), expected, rtol=0, atol=1e-12)  # seen 5e-15


@pytest.mark.parametrize("algebra", FIXED, ids=_name)
def test_fixed_calibrated_is_least_squares_on_the_samples(algebra: Algebra) -> None:
    w, x, c = _problem(algebra.n)
    result = fit(w, algebra, c, ridge=0)
    expected = _sample_error(w, _least_squares(w, algebra, x), x)
    assert 0.05 < expected < 1
    assert result.error == pytest.approx(expected, rel=1e-10)  # seen 6e-16


@pytest.mark.parametrize("algebra", LEARNED, ids=_name)
def test_components_are_optimal_for_the_mixing_found(algebra: Algebra) -> None:
    """The gradient of the calibrated objective in the components vanishes."""
    w, _, c = _problem(algebra.n)
    result = fit(w, algebra, c, ridge=0)
    refit = torch.einsum("tab,tkd->akbd", result.mixing_matrices, result.components).reshape(w.shape)
    torch.testing.assert_close(refit, result.dense())
    gradient_target = (w - result.dense()) @ c
    blocks = gradient_target.view(algebra.n, -1, algebra.n, w.shape[1] // algebra.n)
    gradient = torch.einsum("tab,aobi->toi", result.mixing_matrices, blocks)
    whole = torch.einsum("tab,aobi->toi", result.mixing_matrices, (w @ c).view(blocks.shape))
    assert gradient.norm() < 1e-9 * whole.norm()  # seen 2e-15


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("algebra", [*FIXED, Algebra.learned(2), Algebra.learned(3, 2), Algebra.learned(4)], ids=_name)
def test_exactly_hypercomplex_weights_are_recovered(algebra: Algebra, calibrated: bool) -> None:
    w, _, c = _problem(algebra.n)
    mixing = torch.randn(algebra.size, algebra.n, algebra.n).double() if algebra.trainable else algebra.structure()
    s = torch.randn(algebra.size, w.shape[0] // algebra.n, w.shape[1] // algebra.n).double()
    exact = kron_sum(mixing, s)
    result = fit(exact, algebra, c if calibrated else None)
    assert (result.dense() - exact).norm() < 1e-8 * exact.norm()  # seen 5e-14


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_exact_products_near_the_start_are_recovered(n: int, noise: float, calibrated: bool) -> None:
    """For products the problem is not convex: from far off, alternating steps may stop short of an exact fit."""
    w, _, c = _problem(n)
    algebra = Algebra.products(n)
    p, q = (rows + noise * torch.randn(n, n).double() for rows in algebra.starting_products())
    exact = kron_sum(p[:, :, None] * q[:, None, :], torch.randn(n, w.shape[0] // n, w.shape[1] // n).double())
    result = fit(exact, algebra, c if calibrated else None, sweeps=50)
    assert result.error < 1e-10  # seen 8e-16 and, with noise, 6e-15


@pytest.mark.parametrize("algebra", FIXED + LEARNED, ids=_name)
def test_errors_fall_and_are_those_on_the_samples(algebra: Algebra) -> None:
    w, x, c = _problem(algebra.n)
    result = fit(w, algebra, c, ridge=0)
    assert all(later < earlier for earlier, later in itertools.pairwise(result.errors))
    assert len(result.errors) == 1 if not algebra.trainable else len(result.errors) > 2
    assert result.error == pytest.approx(_sample_error(w, result.dense(), x), rel=1e-9)  # seen 8e-16


@pytest.mark.parametrize("algebra", FIXED + LEARNED, ids=_name)
def test_calibrated_beats_frobenius_in_output_error(algebra: Algebra) -> None:
    w, x, c = _problem(algebra.n)
    plain = _sample_error(w, fit(w, algebra).dense(), x)
    tuned = _sample_error(w, fit(w, algebra, c).dense(), x)
    assert tuned < 0.9 * plain  # seen at most 0.68


def test_a_block_that_frobenius_ignores_is_no_trap() -> None:
    """The larger half of the inputs is nearly silent: the plain optimum keeps it only, the calibrated fit must not."""
    w = torch.randn(12, 16).double()
    w[:, 8:] *= 5
    x = torch.randn(200, 16).double()
    x[:, 8:] *= 0.02
    c = x.T @ x / 200
    learned, products = (fit(w, algebra, c).error for algebra in (Algebra.learned(2), Algebra.products(2)))
    assert learned < 1.05 * products  # a learned A can hold every P Qᵀ: seen 0.1003 and 0.1025


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("algebra", [FIXED[0], *LEARNED], ids=_name)
def test_a_companion_helps_and_its_error_never_rises(algebra: Algebra, calibrated: bool) -> None:
    w, x, c = _problem(algebra.n)
    moment, samples = (c, x) if calibrated else (None, torch.eye(w.shape[1]).double())
    alone, joint = (fit(w, algebra, moment, companion_rank=rank, ridge=0, sweeps=4) for rank in (0, 2))
    assert joint.error < alone.error  # seen at most 0.77 of it
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(joint.errors))
    assert joint.companion is not None
    assert joint.companion.reduce.shape == (2, w.shape[1])
    whole = kron_sum(joint.mixing_matrices, joint.components) + joint.companion.expand @ joint.companion.reduce
    assert joint.error == pytest.approx(_sample_error(w, whole, samples), rel=1e-8)  # seen 1e-15


@pytest.mark.parametrize("seed", [5, 6])
def test_companion_rounds_continue_where_products_stood(seed: int) -> None:
    """Seed 5 rose from .574 to .604 when each round began P and Q anew."""
    torch.manual_seed(seed)
    errors = fit(torch.randn(16, 24), Algebra.products(4), companion_rank=2).errors
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(errors))


def _awkward_moments(d: int) -> dict[str, Tensor]:
    x = torch.randn(60, d).double()
    constant_zero, constant_one = x.clone(), x.clone()
    constant_zero[:, ::3] = 0
    constant_one[:, ::3] = 1
    few, scales = x[:3], torch.logspace(4, -8, d).double()
    return {
        "ill-conditioned": (x * scales).T @ (x * scales) / 60,
        "rank-deficient": few.T @ few / 3,
        "zero features": constant_zero.T @ constant_zero / 60,
        "constant features": constant_one.T @ constant_one / 60,
        "one constant token": torch.ones(d, d).double(),
        "zero": torch.zeros(d, d).double(),
        "tiny": x.T @ x * 1e-30,
        "slightly indefinite": few.T @ few / 3 - 1e-9 * torch.eye(d).double(),
        "float32": (x.T @ x / 60).float(),
    }


@pytest.mark.parametrize("kind", list(_awkward_moments(2)))
@pytest.mark.parametrize("ridge", [0.0, 1e-6])
@pytest.mark.parametrize("algebra", [FIXED[0], FIXED[3], *LEARNED[:5]], ids=_name)
def test_awkward_inputs_give_finite_factors(algebra: Algebra, ridge: float, kind: str) -> None:
    w, _, _ = _problem(algebra.n)
    moment = _awkward_moments(w.shape[1])[kind]
    result = fit(w, algebra, moment, sweeps=2, ridge=ridge)
    assert _is_finite(result)
    assert result.error < 1  # better than no layer at all
    if kind == "zero":
        assert torch.equal(result.dense(), fit(w, algebra, sweeps=2).dense())


@pytest.mark.parametrize("algebra", [FIXED[0], *LEARNED], ids=_name)
def test_awkward_weights_give_finite_factors(algebra: Algebra) -> None:
    w, _, c = _problem(algebra.n)
    for weight in (w.half(), w.bfloat16(), w * 0, torch.eye(*w.shape), w * 1e-20):
        for moment in (None, c):
            result = fit(weight, algebra, moment, sweeps=3)
            assert _is_finite(result)
            assert result.components.dtype == torch.float64
            assert result.error == 0 if not weight.any() else result.error < 1


def test_more_terms_than_block_entries_is_exact() -> None:
    w = torch.randn(4, 4).double()
    for algebra in (Algebra.learned(4, 3), Algebra.products(4, 4)):
        assert fit(w, algebra).error < 1e-10  # one number per block: seen 3e-16


def test_the_weight_is_left_alone_and_needs_no_gradient() -> None:
    w, _, c = _problem(2)
    weight = w.float().requires_grad_()
    before = weight.detach().clone()
    assert not fit(weight, Algebra.products(2), c).dense().requires_grad
    assert torch.equal(weight, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_numbers_are_refused(bad: float) -> None:
    w, _, c = _problem(2)
    broken_weight, broken_moment = w.clone(), c.clone()
    broken_weight[1, 2] = broken_moment[3, 1] = bad
    with pytest.raises(FitError, match="weight"):
        fit(broken_weight, Algebra.products(2), c)
    with pytest.raises(FitError, match="second moment"):
        fit(w, Algebra.products(2), broken_moment)


def test_shapes_that_do_not_fit_are_refused() -> None:
    w, _, c = _problem(2)
    with pytest.raises(FitError, match=r"\(9, 9\).*reads 10"):
        fit(w, Algebra.products(2), c[:9, :9])
    with pytest.raises(AlgebraError, match="n=4"):
        fit(w, Algebra.products(4), c)
    with pytest.raises(FitError, match="Rank 7"):
        fit(w, Algebra.products(2), c, companion_rank=7)


def test_error_is_relative_to_the_conditioned_moment() -> None:
    """With a ridge the reported error counts the ridge's noise too: close to, not equal to, the sample error."""
    w, x, c = _problem(2)
    result = fit(w, Algebra.named("paper"), c)
    assert result.error == pytest.approx(_sample_error(w, result.dense(), x), rel=1e-3)  # seen 4e-5
    assert result.error == pytest.approx(
        output_error(w, result.dense(), c + 1e-6 * c.diagonal().mean() * torch.eye(10)), rel=1e-9
    )


@pytest.mark.parametrize(
    "algebra", [Algebra.products(4), Algebra.products(4, 7), Algebra.learned(4), Algebra.named("complex")], ids=str
)
def test_wide_layers_solved_component_by_component_end_close_to_the_joint_solve(
    algebra: Algebra, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, x = torch.randn(32, 64).double(), torch.randn(500, 64).double() @ torch.randn(64, 64).double()
    moment = x.T @ x / 500
    joint = fit(weight, algebra, moment)
    monkeypatch.setattr(sys.modules["hyperfade.algebra.fit"], "_JOINT_SOLVE_LIMIT", 8)
    wide = fit(weight, algebra, moment)
    assert list(wide.errors) == sorted(wide.errors, reverse=True)
    assert wide.error == pytest.approx(joint.error, rel=0.05)
