"""Products in few bits: the T_r of a layer lie under one another in one core, d/n → R·k/n.

A quantizer meets one linear, and torch's kernels one matrix: they run it in one call for all products, or part by part
where matrices are large (`execution.kernel_calls`). With many tokens, and where there is no kernel, T is rebuilt and
runs as the batched product that it was.
"""

import torch
from torch import Tensor, nn

from hyperfade.nn.forms import Mixing, batched, in_one_call, part_by_part
from hyperfade.nn.low_bit import LowBitLinear


class KeptMixing:
    """P ⊗ Q as (n, n·R) in float32, how a core's outputs are mixed. Kept: making it takes as long as a small core."""

    def __init__(self) -> None:
        self._made_of: tuple[object, ...] = ()
        self._mixing: Tensor | None = None

    def of(self, p: Tensor, q: Tensor) -> Tensor:
        """P and Q (R, n): (n, n·R). Made anew while gradients are asked for."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return _mixing(p, q)
        made_of = (*state_of(p), *state_of(q))
        if self._mixing is None or self._made_of != made_of:
            self._made_of, self._mixing = made_of, _mixing(p, q)
        return self._mixing


def state_of(tensor: Tensor) -> tuple[object, ...]:
    """What changes when a tensor's numbers do, or their place."""
    return tensor.data_ptr(), tensor.dtype, None if tensor.is_inference() else tensor._version


def run_stacked(x: Tensor, p: Tensor, q: Tensor, core: nn.Module, mixing: Mixing, kept: KeptMixing) -> Tensor:
    """x (M, n, d/n), P and Q (R, n), core d/n → R·k/n: y (M, k)."""
    if not isinstance(core, nn.Linear | LowBitLinear):  # an adapter around one
        return in_one_call(x, kept.of(p, q), core)
    if isinstance(core, LowBitLinear) and not torch.compiler.is_exporting():
        if core.parts == 1 and core.in_kernel(x, x.shape[0] * x.shape[1]):
            return in_one_call(x, kept.of(p, q), core)
        if core.parts > 1 and core.in_kernel(x, x.shape[0]):
            return part_by_part(x, p, q, core.by_kernel)
    weight = core.rebuilt(x.dtype) if isinstance(core, LowBitLinear) else core.weight
    return batched(x, p, q, weight.view(len(p), -1, x.shape[2]), mixing)


def _mixing(p: Tensor, q: Tensor) -> Tensor:
    return torch.einsum("ra,rb->abr", p.float(), q.float()).reshape(p.shape[1], -1)
