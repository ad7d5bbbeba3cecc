"""Round to nearest, written out: what quantizers do to a matrix, for any number of bits."""

import torch
from torch import Tensor


def nearest(weight: Tensor, bits: int, group: int = 0, symmetric: bool = False) -> Tensor:
    """weight (k, d) rounded to 2^bits levels between the extremes of each group of neighbours in a row (0: of the row).

    symmetric: levels lie around zero, and the extreme of either sign sets the step; else the step comes from the two
    extremes, and a level is exactly zero. Computed in the weight's dtype: give float32 or more.
    """
    rows = weight.reshape(len(weight), -1, group or weight.shape[1])
    low, high = rows.amin(2, keepdim=True).clamp_max(0), rows.amax(2, keepdim=True).clamp_min(0)
    tiny = torch.finfo(weight.dtype).smallest_normal
    if symmetric:
        step = (torch.maximum(-low, high) / ((2**bits - 1) / 2)).clamp_min(tiny)
        return ((rows / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step).view_as(weight)
    step = ((high - low) / (2**bits - 1)).clamp_min(tiny)
    zero = (-low / step).round()
    return (((rows / step + zero).round().clamp(0, 2**bits - 1) - zero) * step).view_as(weight)


def kurtosis(numbers: Tensor) -> float:
    """E[(x − μ)⁴] / σ⁴ over all elements: 3 for a normal distribution, 1.8 for a uniform one."""
    centred = numbers.double() - numbers.double().mean()
    return (centred.pow(4).mean() / centred.square().mean().square()).item()


def largest(numbers: Tensor) -> float:
    """max |x| / σ over all elements."""
    return (numbers.abs().max() / numbers.std()).item()
