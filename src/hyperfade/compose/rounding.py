"""Calibrated rounding to int4: the numbers that make a matrix's output error small, not those nearest to its weights.

    E ‖ΔW x‖² = tr(ΔW C ΔWᵀ),  C = E[x xᵀ]

GPTQ (Frantar et al., arXiv 2210.17323): round one column after the other; what a column was rounded by is made up for
by the columns still to come, as far as their inputs go along with its own. With C⁻¹ = Rᵀ R, R upper triangular, that is
a step along a row of R. A group's scale is chosen when its first column's turn comes, on the weights as they then are.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperfade.algebra import in_float64
from hyperfade.nn import PHMLinear

_DAMPING = 0.1  # of the inputs' mean energy, added to each: with less, weak inputs make up for a massive one
_MOST = 15  # the largest number of four bits
Grid = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Weights (k, g) of one group of columns → scale and zero point, (k, 1) each; a number q of 0 to 15 stands for
(q − zero point) · scale."""


@dataclass(frozen=True)
class Rounded:
    """numbers (k, d), 0 to 15; scale and zero_point (k, groups)."""

    numbers: Tensor
    scale: Tensor
    zero_point: Tensor


@torch.no_grad()
def rounded_for(weight: Tensor, moment: Tensor, group: int, grid: Grid) -> Rounded:
    """weight (k, d) in groups of `group` columns, the last one narrower where d is no multiple, for inputs whose second
    moment is `moment` C (d, d)."""
    root = _root_of_inverse(moment)
    left = in_float64(weight).to(root.device, copy=True)
    numbers = torch.empty_like(left, dtype=torch.uint8)
    scales, zero_points = [], []
    for first in range(0, left.shape[1], group):
        last = min(first + group, left.shape[1])
        scale, zero_point = grid(left[:, first:last].float())
        scales.append(scale)
        zero_points.append(zero_point)
        steps, zeros = scale.to(root)[:, 0], zero_point.to(root)[:, 0]
        errors = torch.empty_like(left[:, first:last])
        for column in range(first, last):
            exact = left[:, column]
            number = ((exact / steps).round() + zeros).clamp(0, _MOST)
            numbers[:, column] = number.to(torch.uint8)
            error = errors[:, column - first] = (exact - (number - zeros) * steps) / root[column, column]
            left[:, column + 1 : last] -= error[:, None] * root[column, column + 1 : last]
        left[:, last:] -= errors @ root[first:last, last:]
    return Rounded(numbers, torch.cat(scales, 1), torch.cat(zero_points, 1))


def _root_of_inverse(moment: Tensor) -> Tensor:
    """R (d, d), upper triangular, with Rᵀ R = C⁻¹, C damped."""
    damped = moment.detach().double().clone()
    energy = damped.diagonal().mean().item()
    damped.diagonal().add_(_DAMPING * energy if energy > 0 else 1.0)  # where nothing comes in, nothing is made up for
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


def moments_in_core(layer: PHMLinear, moment: Tensor) -> list[Tensor]:
    """What counts for a layer's core, from the second moment C (d, d) of the layer's input: for a core that reads mixed
    blocks, their second moment; else for every component S_i or T_i (k/n of the core's rows each)

        E ‖(A_i ⊗ ΔS_i) x‖² = tr(ΔS_i C_i ΔS_iᵀ),  C_i = Σ_bc (A_iᵀ A_i)[b, c] C[b, c]

    C[b, c] (d/n, d/n) is the block of C where block b of the input meets block c. Errors of different components are
    taken as unrelated.
    """
    n, width = layer.algebra.n, layer.in_features // layer.algebra.n
    blocks = moment.double().view(n, width, n, width)
    by_products = layer.algebra.form == "products"
    mixing = in_float64(layer.P)[:, :, None] * in_float64(layer.Q)[:, None, :] if by_products else in_float64(layer.A)
    mixing = mixing.to(blocks.device)
    if layer.mixes_in and not by_products:
        whole = torch.einsum("iab,jac,bpcq->ipjq", mixing, mixing, blocks)
        return [whole.reshape(len(mixing) * width, -1)]
    return list(torch.einsum("iab,iac,bpcq->ipq", mixing, mixing, blocks))
