"""Products in few bits: the T_r of a layer lie under one another in one core, d/n → R·k/n.

A quantizer meets one linear, and torch's kernels one matrix: they run it in one call for all products, or part by part
where matrices are large (`execution.kernel_calls`). With many tokens, and where there is no kernel, T is rebuilt and
runs as the batched product that it was.
"""

from functools import partial

import torch
from torch import Tensor, nn

from hyperfade.nn.forms import in_one_call, part_by_part
from hyperfade.nn.kept import Kept
from hyperfade.nn.low_bit import LowBitLinear

_ONE_CALL_TOKENS = 2  # with more, a call for each product is faster wherever the layout allows it


def by_core(x: Tensor, p: Tensor, q: Tensor, core: nn.Module, kept: Kept[Tensor]) -> Tensor | None:
    """x (M, n, d/n), P and Q (R, n), core d/n → R·k/n: y (M, k); None where the batched product is the faster way.
    kept: P ⊗ Q as (n, n·R) in float32, how a core's outputs are mixed; making it takes as long as a small core."""
    if type(core) is nn.Linear:
        return None
    mixing = partial(_mixing, p, q)
    if not isinstance(core, LowBitLinear):  # an adapter around one
        return in_one_call(x, kept.of((p, q), mixing), core)
    if torch.compiler.is_exporting():
        return None
    count, tokens = len(p), x.shape[0]
    if (core.parts > 1 or tokens > _ONE_CALL_TOKENS) and core.in_kernel(x, tokens, count):
        return part_by_part(x, p, q, partial(core.by_kernel, parts=count))
    if core.parts == 1 and core.in_kernel(x, tokens * x.shape[1]):
        return in_one_call(x, kept.of((p, q), mixing), core.by_kernel)
    return None


def products_of(core: nn.Module, count: int, dtype: torch.dtype) -> Tensor:
    """T (count, k/n, d/n) out of a core that `by_core` leaves alone."""
    weight = core.rebuilt(dtype) if isinstance(core, LowBitLinear) else core.weight
    return weight.unflatten(0, (count, -1))  # type: ignore[operator]


def _mixing(p: Tensor, q: Tensor) -> Tensor:
    return torch.einsum("ra,rb->abr", p.float(), q.float()).reshape(p.shape[1], -1)
