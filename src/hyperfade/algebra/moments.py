"""Second moments of layer inputs, and the two numerical tools every fit shares."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from hyperfade.errors import FitError

_LEAST_ROWS = 128  # of a strip: narrower ones gain little or lose (docs/log.md)
_MOMENTS_BYTES = 2 << 30
_ROWS = 512  # rows of W handled at a time where a temporary of W's size would be in the way


class SecondMoment:
    """Accumulates C = E[x xᵀ] over tokens in float64, whatever the model's dtype.

    float32 sums of a language model's massive activations come out indefinite; float64 sums do not. Below the diagonal
    C is the mirror of what is above, so only strips from the diagonal on are summed.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self._sum = torch.zeros(features, features, dtype=torch.float64, device=_float64_device(torch.device(device)))
        self.num_tokens = 0

    def add_(self, inputs: Tensor) -> None:
        """Add tokens: inputs (..., features)."""
        tokens = in_float64(inputs).reshape(-1, inputs.shape[-1]).to(self._sum.device)
        for first, last in self._strips():
            self._sum[first:last, first:].addmm_(tokens[:, first:last].T, tokens[:, first:])
        self.num_tokens += tokens.shape[0]

    def merge_(self, sum_: Callable[[Sequence[Tensor]], None]) -> None:
        """Add what other processes have gathered: `sum_` replaces tensors by their sums over processes."""
        tokens = torch.tensor([float(self.num_tokens)], dtype=torch.float64)
        sum_([self._sum])
        sum_([tokens])
        self.num_tokens = round(tokens.item())

    def mean(self) -> Tensor:
        """C (features, features), float64. Takes the accumulator's memory: the object is empty afterwards."""
        num_tokens = self.num_tokens
        if not num_tokens:
            raise FitError("No input reached the layer during calibration.", "Exclude the layer, or give other data.")
        return self.take().div_(num_tokens)

    def take(self) -> Tensor:
        """The sum over tokens, whole: (features, features), float64. The object is empty afterwards."""
        for first, last in self._strips():
            own = self._sum[first:last, first:last]
            own.copy_(own.triu() + own.triu(1).T)
            self._sum[last:, first:last] = self._sum[first:last, last:].T
        whole, self._sum, self.num_tokens = self._sum, self._sum.new_zeros(0, len(self._sum)), 0
        return whole

    def _strips(self) -> Iterator[tuple[int, int]]:
        """Rows that are summed together, an eighth of all: their first, and the one after their last."""
        features, rows = len(self._sum), max(_LEAST_ROWS, math.ceil(len(self._sum) / 8))
        for first in range(0, features, rows):
            yield first, min(first + rows, features)


def together(features: Mapping[str, int]) -> list[list[str]]:
    """Names of layers in order, in lists whose second moments are in memory together: as many as 2 GiB hold, or one.
    features: what each of them reads."""
    lists: list[list[str]] = []
    left = 0
    for name, count in features.items():
        size = 8 * count**2
        if not lists or size > left:
            lists.append([])
            left = _MOMENTS_BYTES
        lists[-1].append(name)
        left -= size
    return lists


def shrunk(moments: Sequence[SecondMoment], prior_tokens: float) -> list[Tensor]:
    """The means of several second moments, (N C + κ C̄) / (N + κ) each, as if κ = `prior_tokens` of their average C̄ had
    come to it as well. Takes the accumulators' memory. Raises `FitError` where none of them has a token."""
    total = sum(moment.num_tokens for moment in moments)
    if not total:
        raise FitError("No input reached any expert during calibration.", "Exclude them, or give other data.")
    tokens = [moment.num_tokens for moment in moments]
    sums = [moment.take() for moment in moments]
    average = torch.zeros_like(sums[0])
    for each in sums:
        average.add_(each, alpha=1 / total)
    return [
        each.add_(average, alpha=prior_tokens).div_(count + prior_tokens) if count + prior_tokens else average
        for each, count in zip(sums, tokens, strict=True)
    ]


def in_float64(x: Tensor) -> Tensor:
    """x, detached, in float64 where it lies, or on the CPU where its device has no float64 (Apple's)."""
    return x.detach().to(_float64_device(x.device)).double()


def _float64_device(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "mps" else device


def conditioned(second_moment: Tensor | None, features: int, ridge: float, device: torch.device) -> Tensor | None:
    """C (d, d) in float64, symmetric, with `ridge` · mean(diag C) on its diagonal; None and ridge 0 change nothing.

    Raises `FitError` where C has another shape, or holds NaN or infinite values. Inputs that are zero throughout tell
    nothing, so they count as None.
    """
    if second_moment is None:
        return None
    if second_moment.shape != (features, features):
        raise FitError(
            f"The second moment has shape {tuple(second_moment.shape)}, the layer reads {features} features.",
            f"Give E[x xᵀ] of shape ({features}, {features}).",
        )
    moment = in_float64(second_moment).to(device)
    if not torch.isfinite(moment).all():
        raise FitError(
            "The second moment holds NaN or infinite values.", "Check the model's activations in this dtype."
        )
    scale = moment.diagonal().mean()
    if scale <= 0:
        return None
    return ridge_((moment + moment.T).div_(2), ridge) if ridge else moment


def ridge_(moment: Tensor, ridge: float) -> Tensor:
    """Add `ridge` · mean(diag C) to the diagonal of C (d, d), in place; returns C."""
    moment.diagonal().add_(ridge * moment.diagonal().mean())
    return moment


def output_error(weight: Tensor, approximation: Tensor, moment: Tensor | None) -> float:
    """‖(W − Ŵ) C^½‖ / ‖W C^½‖ (0 for W = 0); plain Frobenius where `moment` is None."""
    error = whole = 0.0
    for dense, light in zip(weight.split(_ROWS), approximation.split(_ROWS), strict=True):
        error += energy(dense - light, moment)
        whole += energy(dense, moment)
    return relative(error, whole)


def relative(error: float, whole: float) -> float:
    """The square root of error over whole, both energies; 0 where there is nothing to be wrong about."""
    return math.sqrt(max(error, 0.0) / whole) if whole > 0 else 0.0


def energy(rows: Tensor, moment: Tensor | None) -> float:
    """tr(rows · C · rowsᵀ)."""
    return (rows.square() if moment is None else (rows @ moment) * rows).sum().item()


def solve_psd(gram: Tensor, right_side: Tensor) -> Tensor:
    """X with gram · X = right_side, gram (p, p) positive semidefinite, right_side (p, q). Uses up `gram`.

    Cholesky where the (diagonally scaled) system allows it; else the minimum-norm solution from its eigenvectors, which
    is still a minimiser because normal equations are always consistent.
    """
    scale = gram.diagonal().clamp_min(0).sqrt()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    scaled = gram.div_(scale[:, None]).div_(scale[None, :])
    factor, info = torch.linalg.cholesky_ex(scaled)
    if info == 0 and factor.diagonal().min() > 1e-7:
        return torch.cholesky_solve(right_side / scale[:, None], factor) / scale[:, None]
    values, vectors = torch.linalg.eigh(scaled)
    keep = values > values[-1] * 1e-13
    coordinates = vectors[:, keep].T @ (right_side / scale[:, None])
    return vectors[:, keep] @ (coordinates / values[keep, None]) / scale[:, None]
