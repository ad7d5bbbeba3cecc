"""A fit that mends what it broke: a writer is aimed at the dense model's residual stream, not at its own old output.

Behind compressed layers the stream r differs from the dense model's. An FFN's writer adds to it, so it can bring it
back as far as what it reads foretells: for a layer that gives out r + γ ⊙ y (`landing.py`) it ought to write

    y* = (o − r) / γ,    o what the dense model's layer gives out for the same token.

With h the hidden units behind the compressed layers, sums over tokens M = Σ h hᵀ and B = Σ y* hᵀ, W the writer as it
is, and G = B − W M what is left to gain, the damped least-squares correction is Δ = G (M + δ diag M)⁻¹. Unlike W h, y*
is foretold only in part, so few tokens would be learnt by heart. Hence two halves of the batches, each with its own
Δ_i: what a correction is worth shows on the other half. The damping δ, of a few, and the share s ∈ [0, 1] of the
correction that together lower the error there most make

    D = W + s Δ,    error there = const − 2 s Σ ⟨Δ_i, G_j⟩ + s² Σ ⟨Δ_i M_j, Δ_i⟩,    (i, j) = (1, 2), (2, 1).

D takes the place of the dense writer, and the fit goes on as ever. GPTAQ (arXiv 2504.02692) aims its rounding at the
dense model's activations in a like way.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hyperfade.algebra import SecondMoment, in_float64, ridge_, solve_psd
from hyperfade.distill.activations import Batch, Reached, Run, input_hooks, real_rows
from hyperfade.errors import FitError
from hyperfade.nn import BlendLinear
from hyperfade.processes import join, sum_

_DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0)
Aim = Callable[[Batch], Tensor]
"""What a writer ought to write for a batch, its bias included: (..., k) with as many rows as it reads."""


@dataclass(frozen=True)
class Corrected:
    """writer: D (k, hidden), float64; moment: C (hidden, hidden) of what it reads, with a ridge; share: s. lost: what D
    leaves of y*, relative; kept: ‖D h‖ / ‖y*‖."""

    writer: Tensor
    moment: Tensor
    share: float
    lost: float
    kept: float

    def error(self, of_writer: float) -> float:
        """The relative error against y* of what approximates D h with the relative error `of_writer`."""
        return math.hypot(self.lost, of_writer * self.kept)


def corrected_writer(
    model: nn.Module, name: str, writer: BlendLinear, batches: Sequence[Batch], ridge: float, send: Run, aim: Aim
) -> Corrected:
    """D from W, the dense matrix (k, hidden) of `writer`, which is called `name` in `model`.

    Of several processes each gives its own batches, and all get the same D. Raises `FitError` where numbers are not
    finite.
    """
    whole, bias = in_float64(writer.dense.weight), writer.bias
    k, hidden = whole.shape
    moments = [SecondMoment(hidden, whole.device) for _ in range(2)]
    crosses = [torch.zeros(k, hidden, dtype=torch.float64, device=whole.device) for _ in range(2)]
    wanted_energy = torch.zeros(1, dtype=torch.float64)
    for number, batch in enumerate(batches, start=_before(len(batches))):
        read: list[Tensor] = []

        def look(_: nn.Module, args: tuple[Tensor, ...], into: list[Tensor] = read) -> None:
            into.append(args[0])
            raise Reached

        with input_hooks({writer: look}):
            send(model, batch)
        mask = batch.get("attention_mask")
        h = in_float64(real_rows(name, read[0], mask))
        y = in_float64(real_rows(name, aim(batch), mask))
        if bias is not None:
            y = y - in_float64(bias)
        moments[number % 2].add_(h)
        crosses[number % 2].addmm_(y.T, h)
        wanted_energy += y.square().sum().cpu()
    for moment, cross in zip(moments, crosses, strict=True):
        moment.merge_(sum_)
        sum_([cross])
    sum_([wanted_energy])
    if not all(cross.isfinite().all() for cross in crosses):
        raise FitError(
            f"{name}: what it reads, or what its layer gives out, is not finite.",
            "Check the model's activations in this dtype.",
        )
    num_tokens = sum(moment.num_tokens for moment in moments)
    halves = [moment.take() for moment in moments]
    slopes = [cross - whole @ half for half, cross in zip(halves, crosses, strict=True)]
    damping, share = _tried(halves, slopes)
    total = halves[0] + halves[1]
    found = whole + share * _solved(total, slopes[0] + slopes[1], damping) if share else whole
    written = ((found @ total) * found).sum().item()
    wanted = wanted_energy.item()
    left = wanted - 2 * (found * (crosses[0] + crosses[1])).sum().item() + written
    return Corrected(
        found,
        ridge_(total.div_(num_tokens), ridge),
        share,
        math.sqrt(max(left, 0.0) / wanted) if wanted else 0.0,
        math.sqrt(written / wanted) if wanted else 0.0,
    )


def _before(batches: int) -> int:
    """How many batches earlier processes have, so that the halves are the same however many there are."""
    counts = torch.zeros(join().num_processes)
    counts[join().process_index] = batches
    sum_([counts])
    return round(counts[: join().process_index].sum().item())


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
    """slope · (M + δ diag M)⁻¹."""
    damped = moment.clone()
    damped.diagonal().mul_(1 + damping)
    return solve_psd(damped, slope.T).T
