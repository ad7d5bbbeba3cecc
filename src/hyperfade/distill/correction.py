"""A fit that mends what it broke: a writer is aimed at the dense model's residual stream, not at its own old output.

Behind compressed layers the stream r differs from the dense model's. An FFN's writer adds to it, so it can bring it
back as far as what it reads foretells. For a layer that gives out r + γ ⊙ (W h + b) (`landing.py`), with o what the
dense model's gives out for the same token, it ought to add u = o − r:

    γ ⊙ W h  ≈  u − γ ⊙ b

With h the hidden units behind the compressed layers, V = γ ⊙ W by rows, sums over tokens M = Σ h hᵀ and B = Σ (u − γ ⊙
b) hᵀ, and G = B − V M what is left to gain, the damped least-squares correction is Δ = G (M + δ diag M)⁻¹. Unlike W h,
u is foretold only in part, so few tokens would be learnt by heart. Hence two halves of the batches, each with its own
Δ_i: what a correction is worth shows on the other half. The damping δ, of a few, and the share s ∈ [0, 1] of the
correction that together lower the error there most make

    V + s Δ,    error there = const − 2 s Σ ⟨Δ_i, G_j⟩ + s² Σ ⟨Δ_i M_j, Δ_i⟩,    (i, j) = (1, 2), (2, 1).

Divided by γ it takes the place of the dense writer, and the fit goes on as ever. GPTAQ (arXiv 2504.02692) aims its
rounding at the dense model's activations in a like way.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hyperfade.algebra import SecondMoment, in_float64, relative, ridge_, solve_psd
from hyperfade.distill.activations import Batch, Reached, Run, input_hooks, real_rows
from hyperfade.errors import FitError
from hyperfade.nn import BlendLinear
from hyperfade.processes import numbered, sum_

_DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True)
class Aim:
    """added: u of a batch, (..., k) with as many rows as the writer reads; out: o alike; scale: γ (k,), None for 1."""

    added: Callable[[Batch], Tensor]
    out: Callable[[Batch], Tensor]
    scale: Tensor | None = None


@dataclass(frozen=True)
class Corrected:
    """writer: what takes the place of W (k, hidden), float64; share: s; moment: C = M / tokens, (hidden, hidden), with
    a ridge."""

    writer: Tensor
    share: float
    moment: Tensor
    _scale: Tensor
    _cross: Tensor
    _wanted: float

    def error(self, writer: Tensor) -> float:
        """What `writer` (k, hidden) leaves of u − γ ⊙ b, relative to it, over the calibration tokens."""
        scaled = self._scale * in_float64(writer)
        left = ((scaled @ self.moment) * scaled).sum() - 2 * (scaled * self._cross).sum()
        return relative(self._wanted + left.item(), self._wanted)


def corrected_writer(
    model: nn.Module, name: str, writer: BlendLinear, batches: Sequence[Batch], ridge: float, send: Run, aim: Aim
) -> Corrected:
    """The correction of the dense matrix of `writer`, which is called `name` in `model`.

    Of several processes each gives its own batches, and all get the same. Raises `FitError` where numbers are not
    finite.
    """
    whole = in_float64(writer.dense.weight)
    k, hidden = whole.shape
    scale = whole.new_ones(k, 1) if aim.scale is None else in_float64(aim.scale)[:, None]
    bias = None if writer.bias is None else scale[:, 0] * in_float64(writer.bias)
    moments = [SecondMoment(hidden, whole.device) for _ in range(2)]
    crosses = [torch.zeros_like(whole) for _ in range(2)]
    wanted = torch.zeros(1, dtype=torch.float64)
    for number, batch in numbered(batches)[0].items():
        h = _read(model, name, writer, batch, send)
        u = in_float64(real_rows(name, aim.added(batch), batch.get("attention_mask")))
        if bias is not None:
            u = u - bias
        moments[number % 2].add_(h)
        crosses[number % 2].addmm_(u.T, h)
        wanted += u.square().sum().cpu()
    for moment, cross in zip(moments, crosses, strict=True):
        moment.merge_(sum_)
        sum_([cross])
    sum_([wanted])
    if not all(cross.isfinite().all() for cross in crosses):
        raise FitError(
            f"{name}: what it reads, or what its layer gives out, is not finite.",
            "Check the model's activations in this dtype.",
        )
    num_tokens = sum(moment.num_tokens for moment in moments)
    halves = [moment.take() for moment in moments]
    slopes = [cross - (scale * whole) @ half for half, cross in zip(halves, crosses, strict=True)]
    damping, share = _tried(halves, slopes)
    total = halves[0].add_(halves.pop())
    found = whole
    if share:
        change = share * _solved(total, slopes[0].add_(slopes.pop()), damping)
        found = whole + torch.where(scale == 0, 0.0, change / scale)
    moment = ridge_(total.div_(num_tokens), ridge)
    return Corrected(
        found, share, moment, scale, crosses[0].add_(crosses[1]).div_(num_tokens), wanted.item() / num_tokens
    )


def _read(model: nn.Module, name: str, writer: nn.Module, batch: Batch, send: Run) -> Tensor:
    """What `writer` reads of a batch: (tokens, hidden), float64."""
    read: list[Tensor] = []

    def look(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        read.append(args[0])
        raise Reached

    with input_hooks({writer: look}):
        send(model, batch)
    return in_float64(real_rows(name, read[0], batch.get("attention_mask")))


def _tried(halves: Sequence[Tensor], slopes: Sequence[Tensor]) -> tuple[float, float]:
    """δ and s: the damped correction from one half of the batches, and how much of it, that pay most on the other half,
    and the other way round. s is 0 where none does, or one half has no tokens."""
    best, found = 0.0, (_DAMPINGS[0], 0.0)
    if not all(half.diagonal().sum() > 0 for half in halves):
        return found
    for damping in _DAMPINGS:
        gained = costs = 0.0
        for here, there in ((0, 1), (1, 0)):
            change = _solved(halves[here], slopes[here], damping)
            gained += (change * slopes[there]).sum().item()
            costs += ((change @ halves[there]) * change).sum().item()
        share = min(max(gained / costs, 0.0), 1.0) if costs > 0 else 0.0
        gain = 2 * share * gained - share**2 * costs
        if gain > best:
            best, found = gain, (damping, share)
    return found


def _solved(moment: Tensor, slope: Tensor, damping: float) -> Tensor:
    """slope · (M + δ diag M)⁻¹; a unit that never fires has no slope, and gets a diagonal that lets M be factored."""
    damped = moment.clone()
    diagonal = damped.diagonal()
    diagonal.mul_(1 + damping).masked_fill_(diagonal == 0, 1.0)
    return solve_psd(damped, slope.T).T
