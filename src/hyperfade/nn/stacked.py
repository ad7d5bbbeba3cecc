"""Products in few bits: the T_r of a layer lie under one another in one core, d/n → R·k/n.

A quantizer meets one linear, and torch's kernels one matrix: they run it in one call for all products, or part by part
where matrices are large (`execution.kernel_calls`). With many tokens, and where there is no kernel, T is rebuilt and
runs as the batched product that it was.
"""

from functools import partial

import torch
from torch import Tensor, nn

from hyperfade.nn.forms import in_one_call, part_by_part
from hyperfade.nn.low_bit import LowBitLinear

_ONE_CALL_TOKENS = 2  # with more, a call for each product is faster wherever the layout allows it


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


def by_core(x: Tensor, p: Tensor, q: Tensor, core: nn.Module, kept: KeptMixing) -> Tensor | None:
    """x (M, n, d/n), P and Q (R, n), core d/n → R·k/n: y (M, k); None where the batched product is the faster way."""
    if type(core) is nn.Linear:
        return None
    if not isinstance(core, LowBitLinear):  # an adapter around one
        return in_one_call(x, kept.of(p, q), core)
    if torch.compiler.is_exporting():
        return None
    count, tokens = len(p), x.shape[0]
    if (core.parts > 1 or tokens > _ONE_CALL_TOKENS) and core.in_kernel(x, tokens, count):
        return part_by_part(x, p, q, partial(core.by_kernel, parts=count))
    if core.parts == 1 and core.in_kernel(x, tokens * x.shape[1]):
        return in_one_call(x, kept.of(p, q), core.by_kernel)
    return None


def products_of(core: nn.Module, count: int, dtype: torch.dtype) -> Tensor:
    """T (count, k/n, d/n) out of a core that `by_core` leaves alone."""
    weight = core.rebuilt(dtype) if isinstance(core, LowBitLinear) else core.weight
    return weight.unflatten(0, (count, -1))  # type: ignore[operator]


def _mixing(p: Tensor, q: Tensor) -> Tensor:
    return torch.einsum("ra,rb->abr", p.float(), q.float()).reshape(p.shape[1], -1)
