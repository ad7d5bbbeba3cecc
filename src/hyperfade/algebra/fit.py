"""From a dense matrix to hypercomplex components, in closed form.

Two optima. With W (k, d) and, for the second, the second moment C = E[x xᵀ] (d, d) of the layer's inputs:

    Frobenius    min ‖W − Ŵ‖²             truncated SVD of the rearranged W (Van Loan and Pitsianis 1993) where A is
                                          free, least squares where A is fixed
    calibrated   min ‖(W − Ŵ) C^½‖²       = the expected squared error of the layer's output

The calibrated objective is quadratic in each factor while the others rest, so every update below is one exact linear
solve (alternating least squares) and the objective never rises. With B_r the mixing matrix of component r (A_r in terms
form, P_r Q_rᵀ in products form) and T_r the component, everything is built from two statistics of the fixed side:

    given B:  G[(r,i),(s,j)] = Σ_abc B[r,a,b] B[s,a,c] C[b,i,c,j]     H[r,o,i] = Σ_ab B[r,a,b] (WC)[a,o,b,i]
    given T:  M[(r,b),(s,c)] = Σ_oij T[r,o,i] C[b,i,c,j] T[s,o,j]     N[a,r,b] = Σ_oi  T[r,o,i] (WC)[a,o,b,i]

    T = H G⁻¹      A[·,a,·] = M⁻¹ N[a]      P, Q: M and N contracted with the other one

The error falls out of the same statistics, tr(W C Wᵀ) − 2 ⟨N, B⟩ + ⟨B, M B⟩, so W C is the only product with all of C.
The mixing has few numbers and the components follow it, so a sweep may go further than its own solution: twice as far
as the last one did, until that fails and the plain step is taken. Eight such sweeps end below thirty plain ones
on the down projection of the encoder that the tests use.

Everything runs in float64, where the weight lies: normal equations of few tokens have no digits to spare. The rival,
whitened low-rank (SVD-LLM), is in `low_rank.py`, under the same objective.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hyperfade.algebra.bases import Algebra
from hyperfade.algebra.kron import blocks, kron_sum, rearranged
from hyperfade.algebra.low_rank import LowRankFit, low_rank
from hyperfade.algebra.moments import conditioned, in_float64, output_error, relative, solve_psd
from hyperfade.algebra.wide import mixing_gram, sweep_components, weighted_sums
from hyperfade.errors import FitError

_NO_GAIN = 1e-5  # a sweep that lowers the error by a smaller share than this is the last
_SMALL_GAIN = 5e-4  # and so is one below this that gains less than the one before, once the sweeps reach far
_CANCELLED = 1e-7  # an error below this share of the energies it is the difference of is not taken from them
_JOINT_SOLVE_LIMIT = 4096  # unknowns per output row up to which all components are solved for at once


@dataclass(frozen=True)
class Fit:
    """The factors of Ŵ, float64, and how good they are.

    components (t or R, k/n, d/n); mixing A (t, n, n) in terms form; left P and right Q (R, n) in products form;
    companion: the low-rank addition or None. errors: relative output error ‖(W−Ŵ)C^½‖ / ‖W C^½‖ after each sweep.
    """

    algebra: Algebra
    components: Tensor
    mixing: Tensor | None
    left: Tensor | None
    right: Tensor | None
    companion: LowRankFit | None
    errors: tuple[float, ...]

    @property
    def error(self) -> float:
        """Relative output error of the finished fit (relative weight error where no second moment was given)."""
        return self.errors[-1]

    @property
    def mixing_matrices(self) -> Tensor:
        """B (t or R, n, n): A, or P_r Q_rᵀ."""
        if self.left is None or self.right is None:
            assert self.mixing is not None
            return self.mixing
        return self.left[:, :, None] * self.right[:, None, :]

    def dense(self) -> Tensor:
        """Ŵ (k, d), the companion included."""
        weight = kron_sum(self.mixing_matrices, self.components)
        return weight if self.companion is None else weight + self.companion.dense()


def fit(
    weight: Tensor,
    algebra: Algebra,
    second_moment: Tensor | None = None,
    *,
    sweeps: int = 12,
    companion_rank: int = 0,
    ridge: float = 1e-6,
) -> Fit:
    """The best hypercomplex approximation of `weight` (k, d) we can find in `sweeps` alternating sweeps.

    second_moment: C (d, d) of the inputs; None asks for the Frobenius optimum. ridge: added to C's diagonal, relative
    to its mean, so that rank-deficient C gives finite factors. companion_rank: rank of a low-rank addition fitted
    together with the hypercomplex part.
    Raises `AlgebraError` where n does not divide the widths, `FitError` for NaN or infinite numbers.
    """
    k, d = weight.shape
    algebra.check_features(d, k)
    target = in_float64(weight)
    if not torch.isfinite(target).all():
        raise FitError(f"The weight ({k}, {d}) holds NaN or infinite values.", "Check the checkpoint it came from.")
    moment = conditioned(second_moment, d, ridge, target.device)
    if not companion_rank:
        return _fit_alone(target, algebra, moment, sweeps)
    return _fit_with_companion(target, algebra, moment, sweeps, companion_rank)


def _fit_alone(target: Tensor, algebra: Algebra, moment: Tensor | None, sweeps: int) -> Fit:
    if moment is None:
        return _frobenius(target, algebra, 20 * sweeps)
    starts = [_start(algebra, target)]
    if algebra.trainable:  # the plain optimum may leave blocks of the input out, so it is one start of two
        starts.insert(0, _frobenius_start(target, algebra, 20 * sweeps))
    return _alternate(target, moment, starts, sweeps)


def _fit_with_companion(target: Tensor, algebra: Algebra, moment: Tensor | None, sweeps: int, rank: int) -> Fit:
    """Each part is refitted to what the other leaves, from where it stood: the joint error never rises."""
    companion = low_rank(target, rank, moment, ridge=0)
    current = _fit_alone(target - companion.dense(), algebra, moment, sweeps)
    errors = []
    for _ in range(4):
        companion = low_rank(target - kron_sum(current.mixing_matrices, current.components), rank, moment, ridge=0)
        rest = target - companion.dense()
        if moment is None:
            current = _frobenius(rest, algebra, 20 * sweeps, current)
        else:
            current = _alternate(rest, moment, [current], sweeps)
        joint = replace(current, companion=companion)
        errors.append(output_error(target, joint.dense(), moment))
    return replace(current, companion=companion, errors=tuple(errors))


def _frobenius(target: Tensor, algebra: Algebra, sweeps: int, start: Fit | None = None) -> Fit:
    """The optimum in plain weight distance, on a compressed copy of the problem. Only P and Q need, and use, a start.

    Only the row space of the rearranged W (n², dk/n²) matters, and that has at most n² dimensions: for its principal
    directions V, W's coordinates in V are themselves a tiny matrix (n·n², n) in our layout, with the same optimum.
    """
    left, values, right = torch.linalg.svd(rearranged(target, algebra.n), full_matrices=False)
    tiny = _frobenius_tiny(left, values, algebra, sweeps, start)
    components = tiny.components.squeeze(-1) @ right
    components = components.reshape(algebra.size, target.shape[0] // algebra.n, target.shape[1] // algebra.n)
    result = replace(tiny, components=components)
    return replace(result, errors=(output_error(target, result.dense(), None),))


def _frobenius_start(target: Tensor, algebra: Algebra, sweeps: int) -> Fit:
    """The Frobenius optimum's mixing alone: for a start the Gram matrix of W's blocks (n², n²) tells enough."""
    rows = rearranged(target, algebra.n)
    values, left = torch.linalg.eigh(rows @ rows.T)
    tiny = _frobenius_tiny(left.flip(1), values.flip(0).clamp_min(0).sqrt(), algebra, sweeps)
    return replace(tiny, components=torch.empty(0))


def _frobenius_tiny(left: Tensor, values: Tensor, algebra: Algebra, sweeps: int, start: Fit | None = None) -> Fit:
    """The optimum in coordinates of the principal directions: components (t or R, count, 1).

    left (n², count) and values (count,) are of the singular value decomposition of the rearranged W.
    """
    n, count = algebra.n, len(values)
    if algebra.form == "terms" and algebra.trainable:
        missing = max(0, algebra.size - count)  # a matrix with fewer blocks than terms is exact already
        mixing = torch.nn.functional.pad(left[:, : algebra.size], (0, missing)).T.reshape(-1, n, n)
        components = torch.nn.functional.pad(torch.diag(values)[: algebra.size], (0, 0, 0, missing))
        return Fit(algebra, components.unsqueeze(-1), mixing, None, None, None, ())
    matrix = (left * values).view(n, n, count).permute(0, 2, 1).reshape(n * count, n)
    identity = torch.eye(n, dtype=left.dtype, device=left.device)
    return _alternate(matrix, identity, [start or _start(algebra, matrix)], sweeps)


def _start(algebra: Algebra, target: Tensor) -> Fit:
    """The algebra's own starting point for the mixing, with no components yet."""
    like = {"dtype": target.dtype, "device": target.device}
    if algebra.form == "products":
        p, q = algebra.starting_products()
        return Fit(algebra, torch.empty(0), None, p.to(**like), q.to(**like), None, ())
    return Fit(algebra, torch.empty(0), algebra.structure().to(**like), None, None, None, ())


@dataclass(frozen=True)
class _Problem:
    """What no sweep changes: W (k, d), C (d, d), the same C as (n, d/n, n, d/n), W C in blocks, tr(W C Wᵀ)."""

    target: Tensor
    moment: Tensor
    moment4: Tensor
    cross: Tensor
    whole: float


@dataclass(frozen=True)
class _State:
    """A fit with the statistics M (r, n, r, n) and N (n, r, n) of its components, and its relative output error."""

    fit: Fit
    gram: Tensor
    right_side: Tensor
    error: float


def _alternate(target: Tensor, moment: Tensor, starts: list[Fit], sweeps: int) -> Fit:
    """Alternating least squares from the best of `starts` (their mixing); stops early when nothing is gained."""
    algebra = starts[0].algebra
    n, m = algebra.n, target.shape[1] // algebra.n
    product = target @ moment
    whole = torch.sum(product * target).item()
    problem = _Problem(target, moment, moment.view(n, m, n, m), blocks(product, n), whole)
    best = min((_state(_update_components(start, problem), problem) for start in starts), key=lambda state: state.error)
    errors = [best.error]
    reach, gain = 1, 1.0
    for _ in range(sweeps if algebra.trainable or algebra.size * m > _JOINT_SOLVE_LIMIT else 0):
        mixed = _update_mixing(best)
        current = _state(_update_components(_beyond(best.fit, mixed, reach), problem), problem)
        if reach > 1 and not current.error < best.error:
            reach = 1
            current = _state(_update_components(mixed, problem), problem)
        if not current.error < best.error:
            break
        best = current
        errors.append(best.error)
        reach *= 2
        last, gain = gain, 1 - errors[-1] / errors[-2]
        if gain <= _NO_GAIN or (len(errors) > 3 and gain <= min(_SMALL_GAIN, last)):
            break
    return replace(best.fit, errors=tuple(errors))


def _beyond(old: Fit, new: Fit, reach: int) -> Fit:
    """`new`, its mixing `reach` times as far from the old one: plain steps creep along narrow valleys."""
    if reach == 1 or not new.algebra.trainable:
        return new
    if new.left is None or new.right is None:
        return replace(new, mixing=torch.lerp(old.mixing_matrices, new.mixing_matrices, reach))
    assert old.left is not None
    assert old.right is not None
    left, right = _along(old.left, new.left, reach), _along(old.right, new.right, reach)
    return replace(new, left=left, right=right)


def _along(old: Tensor, new: Tensor, reach: int) -> Tensor:
    """Unit rows, `reach` times as far from the old as the new are; a row and its negative are the same."""
    signs = torch.where((old * new).sum(1, keepdim=True) < 0, -1.0, 1.0).to(old)
    return _unit_rows(torch.lerp(old * signs, new, reach))[0]


def _state(fit: Fit, problem: _Problem) -> _State:
    """The statistics of a fit's components, and its error: tr(W C Wᵀ) − 2 ⟨N, B⟩ + ⟨B, M B⟩.

    Where so little is left that rounding would show in the difference, the error is worked out from W − Ŵ.
    """
    t, b = fit.components, fit.mixing_matrices
    gram = mixing_gram(t, problem.moment4)
    right_side = torch.stack([(t.transpose(0, 1) @ band.transpose(1, 2)).sum(0) for band in problem.cross])
    quadratic = torch.einsum("rab,rbsc,sac->rs", b, gram, b)
    rest = problem.whole - 2 * torch.einsum("arb,rab->", right_side, b).item() + quadratic.sum().item()
    if rest > _CANCELLED * (problem.whole + quadratic.abs().sum().item()):
        return _State(fit, gram, right_side, relative(rest, problem.whole))
    return _State(fit, gram, right_side, output_error(problem.target, kron_sum(b, t), problem.moment))


def _update_components(fit: Fit, problem: _Problem) -> Fit:
    """The best T (or S) for the mixing at hand: one solve of size t·d/n, or one of size d/n for each."""
    b, moment4, cross = fit.mixing_matrices, problem.moment4, problem.cross
    r, m = b.shape[0], moment4.shape[1]
    if r * m > _JOINT_SOLVE_LIMIT:
        known = fit.components if fit.components.numel() else cross.new_zeros(r, cross.shape[1], m)
        return replace(fit, components=sweep_components(b, known, moment4, cross))
    pairs = torch.einsum("rab,sac->rsbc", b, b).flatten(0, 1)
    gram = weighted_sums(pairs, moment4).view(m, r, r, m).transpose(0, 1).reshape(r * m, r * m)
    right_side = weighted_sums(b, cross).permute(1, 2, 0).reshape(r * m, -1)
    solution = solve_psd(gram, right_side)
    return replace(fit, components=solution.view(r, m, -1).transpose(1, 2).contiguous())


def _update_mixing(state: _State) -> Fit:
    """The best mixing for the components at hand: A in one solve of size t·n; Q, then P, in two."""
    fit, m, right_side = state.fit, state.gram, state.right_side
    if not fit.algebra.trainable:
        return fit
    n, r, _ = right_side.shape
    if fit.left is None or fit.right is None:
        solution = solve_psd(m.reshape(r * n, r * n).clone(), right_side.reshape(n, r * n).T)
        return replace(fit, mixing=solution.view(r, n, n).permute(0, 2, 1).contiguous())
    p = fit.left
    gram = (torch.einsum("ra,sa->rs", p, p)[:, None, :, None] * m).reshape(r * n, r * n)
    q = solve_psd(gram, torch.einsum("ra,arb->rb", p, right_side).reshape(r * n, 1)).view(r, n)
    gram = torch.einsum("rb,rbsc,sc->rs", q, m, q)
    p = solve_psd(gram, torch.einsum("rb,arb->ra", q, right_side))
    # scale is free between P, Q and T: unit rows keep all three in range, in any dtype
    p, p_norms = _unit_rows(p)
    q, q_norms = _unit_rows(q)
    return replace(fit, left=p, right=q, components=fit.components * (p_norms * q_norms)[:, :, None])


def _unit_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x with rows of norm 1 (zero stays zero), and the norms (rows, 1)."""
    norms = x.norm(dim=1, keepdim=True)
    return x / torch.where(norms > 0, norms, torch.ones_like(norms)), norms
