"""Whitened low-rank factors (SVD-LLM, arXiv 2403.07378): the rival every PHM fit is printed beside."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hyperfade.algebra.moments import conditioned, in_float64, output_error, relative
from hyperfade.errors import FitError

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
    k, d = target.shape
    if k <= d:
        outer = target @ target.T if moment is None else target @ moment @ target.T
        values, vectors = torch.linalg.eigh(outer)
        return vectors[:, -rank:].flip(1), values.clamp_min(0)
    root = target if moment is None else target @ _square_root(moment)
    values, vectors = torch.linalg.eigh(root.T @ root)
    return torch.linalg.qr(root @ vectors[:, -rank:].flip(1)).Q, values.clamp_min(0)


def _square_root(moment: Tensor) -> Tensor:
    """L with L Lᵀ = C: Cholesky, or from eigenvectors where C is only semidefinite."""
    factor, info = torch.linalg.cholesky_ex(moment)
    if info == 0:
        return factor
    values, vectors = torch.linalg.eigh(moment)
    return vectors * values.clamp_min(0).sqrt()


def rank_for(in_features: int, out_features: int, num_parameters: float) -> int:
    """The largest rank q ≥ 1 with q·(d + k) ≤ num_parameters."""
    return max(1, int(num_parameters // (in_features + out_features)))
