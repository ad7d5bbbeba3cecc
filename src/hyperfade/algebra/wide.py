"""The two statistics of `fit.py` for layers too wide for one joint solve.

A joint solve for all components needs a second and a third matrix of C's size, and time cubic in d. Here each component
is solved for while the others rest (block coordinate descent), and the alternation with the mixing around it does the
rest: n systems of size d/n, which is n² times less arithmetic, and the memory of one row of blocks, R/n² of C's size.
Where P's rows are orthogonal, as they are at the start, one pass is the joint optimum.

Both statistics contract C with something small from both sides, so what they cost is reading C: it is read once, in
strips that fit the cache.
"""

import torch
from torch import Tensor

from hyperfade.algebra.moments import solve_psd

_STRIP = 64  # rows of every block of C handled at a time
_ORTHOGONAL = 1e-12  # mixing matrices whose overlap is below this share of their norms do not touch each other


def sweep_components(mixing: Tensor, components: Tensor, moment4: Tensor, cross: Tensor) -> Tensor:
    """Better components (r, k/n, d/n) for mixing matrices (r, n, n), one after the other, never worse.

    moment4: C as (n, d/n, n, d/n); cross: W C as (n, k/n, n, d/n).
    """
    result = components.clone()
    passes = 1 if len(mixing) <= len(moment4) else 2  # more than n components cannot but overlap
    for r in [*range(len(mixing))] * passes:
        overlaps = torch.einsum("ab,sac->sbc", mixing[r], mixing)
        others = [s for s in _touching(overlaps, mixing, r) if s != r and result[s].any()]
        gram, *beside = weighted_sums(overlaps[[r, *others]], moment4).transpose(0, 1)
        right_side = weighted_sums(mixing[r : r + 1], cross)[:, 0].T.contiguous()
        for s, block in zip(others, beside, strict=True):
            right_side.addmm_(block, result[s].T, alpha=-1)
        result[r] = solve_psd(gram, right_side).T
    return result


def mixing_gram(components: Tensor, moment4: Tensor) -> Tensor:
    """M[r, b, s, c] = Σ_oij T[r,o,i] C[b,i,c,j] T[s,o,j], (r, n, r, n).

    M is symmetric: what i < j contributes, transposed, is what i > j does. So only half of it is worked out.
    """
    r, n = len(components), len(moment4)
    half = components.new_zeros(n, r * r, n)
    for first in range(0, components.shape[2], _STRIP):
        strip = slice(first, first + _STRIP)
        rows = components[:, :, strip].transpose(1, 2).flatten(0, 1)
        overlap = (rows @ components[:, :, first:]).unflatten(1, (r, -1))  # (s, r, i, j)
        overlap[..., :_STRIP] /= 2  # i and j both in the strip: counted twice below
        overlap = overlap.flatten(0, 1).transpose(0, 1)
        for b, band in enumerate(moment4):
            half[b] += (overlap @ band[strip, :, first:].transpose(1, 2)).sum(0)
    half = half.view(n, r, r, n).permute(2, 0, 1, 3)
    return half + half.permute(2, 3, 0, 1)


def _touching(overlaps: Tensor, mixing: Tensor, r: int) -> list[int]:
    """The s whose mixing matrices overlap with those of r: A_rᵀ A_s ≠ 0."""
    norms = mixing.flatten(1).norm(dim=1)
    return (overlaps.flatten(1).norm(dim=1) > _ORTHOGONAL * norms[r] * norms).nonzero().flatten().tolist()


def weighted_sums(weights: Tensor, blocks: Tensor) -> Tensor:
    """Σ_ab weights[s, a, b] blocks[a, :, b, :], (rows, s, columns), of weights (s, n, n), blocks (n, rows, n, columns).

    Contracts the outer indices of C or W C, which it reads once and never copies, as an einsum over both would.
    """
    rows, columns = blocks.shape[1], blocks.shape[3]
    sums = blocks.new_empty(rows, len(weights), columns)
    for first in range(0, rows, _STRIP):
        strip = sums[first : first + _STRIP]
        for a, band in enumerate(blocks):
            strip.baddbmm_(weights[:, a].expand(len(strip), -1, -1), band[first : first + _STRIP], beta=min(a, 1))
    return sums
