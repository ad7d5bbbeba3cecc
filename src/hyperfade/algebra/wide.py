"""The two statistics of `fit.py` for layers too wide for one joint solve.

A joint solve for all components needs a second and a third matrix of C's size, and time cubic in d. Here each component
is solved for while the others rest (block coordinate descent): systems of size d/n, and no memory of C's size beyond C.
Where P's rows are orthogonal, as they are at the start, one pass is the joint optimum.
"""

import torch
from torch import Tensor

from hyperfade.algebra.moments import solve_psd

_PASSES = 2


def sweep_components(mixing: Tensor, components: Tensor, moment4: Tensor, cross: Tensor) -> Tensor:
    """Better components (r, k/n, d/n) for mixing matrices (r, n, n), one after the other, never worse.

    moment4: C as (n, d/n, n, d/n); cross: W C as (n, k/n, n, d/n).
    """
    pairs = torch.einsum("rab,sac->rsbc", mixing, mixing)
    result = components.clone()
    for _ in range(_PASSES):
        for r in range(len(result)):
            right_side = torch.einsum("ab,aobi->io", mixing[r], cross)
            for s in range(len(result)):
                if s != r and pairs[r, s].any():
                    right_side -= _weighted_sum(pairs[r, s], moment4) @ result[s].T
            result[r] = solve_psd(_weighted_sum(pairs[r, r], moment4), right_side).T
    return result


def mixing_gram(components: Tensor, moment4: Tensor) -> Tensor:
    """M[r, b, s, c] = Σ_oij T[r,o,i] C[b,i,c,j] T[s,o,j], (r, n, r, n)."""
    r, n = len(components), len(moment4)
    gram = components.new_empty(r, n, r, n)
    for i in range(r):
        for j in range(r):
            overlap = components[i].T @ components[j]
            for b in range(n):
                for c in range(n):
                    gram[i, b, j, c] = (overlap * moment4[b, :, c]).sum()
    return gram


def _weighted_sum(weights: Tensor, moment4: Tensor) -> Tensor:
    """Σ_bc weights[b, c] C[b, :, c, :], (d/n, d/n)."""
    n = len(moment4)
    total = torch.zeros_like(moment4[0, :, 0])
    for b in range(n):
        for c in range(n):
            total.add_(moment4[b, :, c], alpha=weights[b, c].item())
    return total
