"""Whitened low-rank factors (SVD-LLM, arXiv 2403.07378): the rival every PHM fit is printed beside."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hyperfade.algebra.moments import conditioned, in_float64, output_error, relative
from hyperfade.errors import FitError

_ALIGNMENT, _ALIGNED_FROM = 8, 128
_CANCELLED = 1e-4  # a relative error below this is worked out from W − Ŵ: eigenvalues round


@dataclass(frozen=True)
class LowRankFit:
    """Ŵ = expand (k, q) · reduce (q, d), float64; error: relative output error, as for a PHM fit."""

    expand: Tensor
    reduce: Tensor
    error: float

    def dense(self) -> Tensor:
        """Ŵ (k, d)."""
        return self.expand @ self.reduce


def low_rank(weight: Tensor, rank: int, second_moment: Tensor | None = None, *, ridge: float = 1e-6) -> LowRankFit:
    """The rank-`rank` matrix nearest to `weight` (k, d) in output error: the truncated SVD of W C^½, times C^-½.

    Raises `FitError` for a rank outside 1..min(k, d) and for NaN or infinite numbers.
    """
    k, d = weight.shape
    target = in_float64(weight)
    if not 1 <= rank <= min(k, d):
        raise FitError(f"Rank {rank} is outside 1..{min(k, d)} for a ({k}, {d}) weight.", "Ask for another fraction.")
    if not torch.isfinite(target).all():
        raise FitError(f"The weight ({k}, {d}) holds NaN or infinite values.", "Check the checkpoint it came from.")
    moment = conditioned(second_moment, d, ridge, target.device)
    expand, values = _best_outputs(target, moment, rank)
    fit = LowRankFit(expand, expand.T @ target, relative(values[:-rank].sum().item(), values.sum().item()))
    if fit.error > _CANCELLED:
        return fit
    return replace(fit, error=output_error(target, fit.dense(), moment))


def _best_outputs(target: Tensor, moment: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """Orthonormal (k, rank): the left singular vectors of W C^½. Projecting W on them needs no inverse of C.

    They are eigenvectors of W C Wᵀ (k, k); where d < k, a (d, d) problem gives them with less work. The second tensor
    holds the eigenvalues, rising: what the vectors left out are worth is the error, squared.
    """
    gram, root = _smaller_gram(target, moment)
    values, vectors = torch.linalg.eigh(gram)
    best = vectors[:, -rank:].flip(1)
    return best if root is None else torch.linalg.qr(root @ best).Q, values.clamp_min(0)


def _smaller_gram(target: Tensor, moment: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """W C Wᵀ (k, k); where d < k, (W L)ᵀ (W L) (d, d) with L Lᵀ = C, which has the same eigenvalues, and W L beside."""
    k, d = target.shape
    if k <= d:
        return target @ target.T if moment is None else target @ moment @ target.T, None
    root = target if moment is None else target @ square_root(moment)
    return root.T @ root, root


def rank_errors(weight: Tensor, second_moment: Tensor | None) -> Tensor:
    """The relative output error of `low_rank` for every rank 0..min(k, d) at once, float64: the root of the tail of the
    eigenvalues of W C Wᵀ. weight (k, d), C (d, d); ridge 0. Errors near 0 are rounding: eigenvalues carry about 1e-8.
    """
    target = in_float64(weight)
    moment = conditioned(second_moment, target.shape[1], 0, target.device)
    return tail_errors(torch.linalg.eigvalsh(_smaller_gram(target, moment)[0]).flip(0))


def tail_errors(energies: Tensor) -> Tensor:
    """Relative errors (parts + 1,) after the first 0, 1, … parts of an output, from the energy (parts,) of each."""
    energies = energies.clamp_min(0)
    left = torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)])
    return (left / left[0]).sqrt() if left[0] > 0 else left


def square_root(moment: Tensor) -> Tensor:
    """L with L Lᵀ = C: Cholesky, or from eigenvectors where C is only semidefinite."""
    factor, info = torch.linalg.cholesky_ex(moment)
    if info == 0:
        return factor
    values, vectors = torch.linalg.eigh(moment)
    return vectors * values.clamp_min(0).sqrt()


def rank_for(in_features: int, out_features: int, num_parameters: float) -> int:
    """The largest rank q ≥ 1 with q·(d + k) ≤ num_parameters; from 128 on a multiple of 8: GPUs' matrix libraries are
    much slower with others (`docs/log.md`)."""
    rank = max(1, int(num_parameters // (in_features + out_features)))
    return rank if rank < _ALIGNED_FROM else rank // _ALIGNMENT * _ALIGNMENT
