"""The exact forms of one hypercomplex product that do not build W. All compute y = x Wᵀ with W = Σ_i A_i ⊗ S_i.

    mix in     u[a,i] = Σ_b A[i,a,b] x[b]     y[a] = core(u[a])                    one product of n·M rows
    mix out    z[b,i] = core(x[b])            y[a] = Σ_ib A[i,a,b] z[b,i]          one product of n·M rows
    batched    u[r] = Σ_b Q[r,b] x[b]         z[r] = T_r u[r]    y[a] = Σ_r P[r,a] z[r]     R products in one call
    in few bits  the same with all T_r stacked in one core: in one call, or part by part (`nn/low_bit.py`)
    kernel     the same for one token in one kernel of our own, on a GPU (`nn/kernel.py`)
    separate   product by product as well, for algebras with known factors: T_r = Σ_i U[r,i] S_i is made on the way

A core may also run in slices of its outputs, as one batched product: what has few rows is slow in some libraries.

Sizes are read from shapes: `len` of a tensor would fix the number of tokens in an exported graph.

Mixing moves M·n small blocks and is bound by memory and by the cost of a call, not by arithmetic. Two ways: one tiny
matrix product over the blocks, or a running sum over them. Where the coefficients are known numbers (`Rows`), the sum
leaves out zeros and is a mere view where one coefficient of 1 is all there is. For training there is a third, one
product over the blocks of all tokens: it copies x and y, but its gradients are such products again, where the others'
are sums over M tiny ones. Under `torch.compile` sums are written out block by block: a compiler makes one pass of them.
On a GPU a kernel of our own takes large mixes (`nn/kernel.py`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from operator import add
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperfade.algebra import Algebra
from hyperfade.nn.kernel_use import mixes_in_kernel

_SLICES = 8  # with more, a slice gets too small to be read at full speed
_FEW_ELEMENTS = 2**16  # up to which a mix in half precision takes less by way of float32, on a CPU
_WRITTEN_OUT = 256  # coefficients up to which a compiler gets a mix as sums
_HALF = torch.bfloat16, torch.float16
Mixing = Literal["matmul", "sums", "blocks", "fused", "kernel"]
Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class FixedFactors:
    """Bilinear factors as plain numbers: U (R, t), P as (n, R), Q (R, n). A row of U with one entry has it equal 1."""

    u: Rows
    p: Rows
    q: Rows


@lru_cache
def fixed_rows(algebra: Algebra, mix_in: bool) -> Rows | None:
    """The mixing of a fixed algebra's core: (n·t, n) for mix in, (n, n·t) for mix out; None where A is learned."""
    if algebra.trainable:
        return None
    n = algebra.n
    with torch.device("cpu"):  # also where a caller builds a layer on the meta device
        structure = algebra.structure()
        mixing = structure.transpose(0, 1).reshape(-1, n) if mix_in else structure.permute(1, 2, 0).reshape(n, -1)
        return _rows(mixing)


@lru_cache
def fixed_factors(algebra: Algebra) -> FixedFactors | None:
    """The products that a fixed algebra's core can be run as, or None where none are known or A is learned."""
    with torch.device("cpu"):  # also where a caller builds a layer on the meta device
        factors = None if algebra.trainable else algebra.bilinear_factors()
        if factors is None:
            return None
        alone = (factors.u.abs() > 1e-12).sum(1) == 1
        scale = torch.where(alone, factors.u.sum(1), 1.0)  # W is the same with a factor moved from U to P
        return FixedFactors(_rows(factors.u / scale[:, None]), _rows((factors.p * scale[:, None]).T), _rows(factors.q))


def mix_in(x: Tensor, mixing: Tensor | Rows, core: Callable[[Tensor], Tensor]) -> Tensor:
    """x (M, n, d/n), mixing (n·t, n), core t·d/n → k/n: y (M, k)."""
    m, n, width = x.shape
    u = mixed(x, mixing) if isinstance(mixing, Tensor) else torch.stack(combined(x.unbind(1), mixing), 1)
    return core(u.view(m, n, u.shape[1] // n * width)).flatten(1)


def mix_out(x: Tensor, mixing: Tensor | Rows, core: Callable[[Tensor], Tensor]) -> Tensor:
    """x (M, n, d/n), core d/n → t·k/n, mixing (n, n·t): y (M, k)."""
    z = core(x)
    rows = len(mixing[0]) // len(mixing)
    z = z.reshape(z.shape[0], x.shape[1] * rows, z.shape[2] // rows)
    return mixed(z, mixing).flatten(1) if isinstance(mixing, Tensor) else torch.cat(combined(z.unbind(1), mixing), 1)


def sliced(u: Tensor, weight: Tensor) -> Tensor:
    """What `F.linear(u, weight)` gives for u (..., d) and weight (k, d), as a batch of products."""
    rows, count = u.reshape(-1, u.shape[-1]), math.gcd(len(weight), _SLICES)
    slices = weight.view(count, len(weight) // count, -1).transpose(1, 2)
    return torch.bmm(rows.expand(count, *rows.shape), slices).transpose(0, 1).reshape(*u.shape[:-1], len(weight))


def batched(x: Tensor, p: Tensor, q: Tensor, t: Tensor, mixing: Mixing) -> Tensor:
    """x (M, n, d/n), P and Q (R, n), T (R, k/n, d/n): y (M, k)."""
    if mixing == "kernel":
        return products_in_a_kernel(x, p, q, t)[0]
    if mixing == "blocks":
        u = torch.mm(q, x.transpose(0, 1).flatten(1)).view(q.shape[0], x.shape[0], x.shape[2])
        z = torch.bmm(u, t.transpose(1, 2))
        y = torch.mm(p.T, z.flatten(1)).view(p.shape[1], x.shape[0], t.shape[1])
        return y.transpose(0, 1).flatten(1)
    if mixing == "fused":
        z = torch.bmm(torch.stack(_written_out(x.unbind(1), q)), t.transpose(1, 2))
        return torch.cat(_written_out(z.unbind(0), p.T), 1)
    mix = mixed_by_sums if mixing == "sums" else mixed
    z = products(mix(x, q).transpose(0, 1), t)
    return mix(z.transpose(0, 1), p.T).flatten(1)


def products_in_a_kernel(x: Tensor, p: Tensor, q: Tensor, t: Tensor, layers: int = 1) -> Tensor:
    """What `batched` gives for one token on a GPU, for several layers at once: P and Q (layers·R, n), T likewise: y
    (layers, 1, k)."""
    from hyperfade.nn.kernel import one_token  # where there is no GPU there may be no triton

    return one_token(x, p, q, t, layers)


def products(u: Tensor, t: Tensor) -> Tensor:
    """Every product by itself, in one call: u (R, M, d/n), T (R, k/n, d/n): z (R, M, k/n)."""
    if u.shape[1] == 1 and u.dtype == torch.float32 and u.device.type == "cpu":
        return torch.bmm(t, u.transpose(1, 2)).transpose(1, 2)  # T first: in half of the time, see docs/log.md
    return torch.bmm(u, t.transpose(1, 2))


def separate(x: Tensor, factors: FixedFactors, weights: Sequence[Tensor]) -> Tensor:
    """x (M, n, d/n), R weights T_r (k/n, d/n): y (M, k)."""
    products = zip(combined(x.unbind(1), factors.q), weights, strict=True)
    return torch.cat(combined([F.linear(u, t) for u, t in products], factors.p), 1)


def in_one_call(x: Tensor, mixing: Tensor, core: Callable[[Tensor], Tensor]) -> Tensor:
    """What `batched` gives, with every T_r in a core d/n → R·k/n that each block runs through: mix out, A = P ⊗ Q.

    x (M, n, d/n), mixing (n, n·R) in float32: y (M, k).
    """
    z = core(x.flatten(0, 1))
    return mixed_in_float32(z.view(x.shape[0], mixing.shape[1], -1), mixing).flatten(1)


def part_by_part(x: Tensor, p: Tensor, q: Tensor, core: Callable[[Tensor, int], Tensor]) -> Tensor:
    """What `batched` gives, with T_r as part r of a core that is called as core(u[r], r): x (M, n, d/n): y (M, k)."""
    z = [core(u, part) for part, u in enumerate(mixed_in_float32(x, q).unbind(1))]
    return mixed_in_float32(torch.stack(z, 1), p.T).flatten(1)


def mixed(x: Tensor, weights: Tensor) -> Tensor:
    """Σ_b weights[a, b] x[:, b] as a matrix product: x (M, b, w), weights (a, b): (M, a, w)."""
    if torch.compiler.is_compiling():
        if not torch.compiler.is_exporting() and weights.numel() <= _WRITTEN_OUT:
            return torch.stack(_written_out(x.unbind(1), weights), 1)
    elif _better_in_float32(x):
        return mixed_in_float32(x, weights)
    elif mixes_in_kernel(x, weights):
        from hyperfade.nn.kernel import mix  # where there is no GPU there may be no triton

        return mix(x, weights)
    return mixed_by_library(x, weights)


def mixed_by_library(x: Tensor, weights: Tensor) -> Tensor:
    """What `mixed` gives, by torch's matrix products."""
    if x.shape[0] == 1:  # a call for one plain product costs half of one for a batch
        return torch.mm(weights, x[0])[None]
    # not torch.matmul: where weights can have gradients it copies x to fold it, ten times the price of the mix
    return torch.bmm(weights.expand(x.shape[0], *weights.shape), x)


def mixed_each(x: Tensor, weights: Tensor) -> Tensor:
    """What `mixed` gives, with weights of its own for every entry: x (M, b, w), weights (M, a, b): (M, a, w)."""
    if _better_in_float32(x):
        return torch.bmm(weights.float(), x.float()).to(x.dtype)
    return torch.bmm(weights, x)


def _better_in_float32(x: Tensor) -> bool:
    return x.dtype in _HALF and x.device.type == "cpu" and x.numel() <= _FEW_ELEMENTS


def mixed_in_float32(x: Tensor, weights: Tensor) -> Tensor:
    """What `mixed` gives, in x's dtype. In bfloat16 a CPU takes four to ten times as long for products of this size."""
    return mixed(x.float(), weights.float()).to(x.dtype)


def mixed_by_sums(x: Tensor, weights: Tensor) -> Tensor:
    """What `mixed` gives, block by block: no call into a matrix library, whose price a small b does not earn back."""
    weights = weights.to(x.dtype)  # under autocast x is half and the weights are not
    total = x[:, :1] * weights[:, 0, None]
    for b in range(1, x.shape[1]):  # in place: a fresh result per step costs more in page faults than the sum itself
        total.addcmul_(x[:, b : b + 1], weights[:, b, None])
    return total


def combined(blocks: Sequence[Tensor], rows: Rows) -> list[Tensor]:
    """Σ_b row[b] blocks[b] for every row."""
    return [_combination(blocks, row) for row in rows]


def _written_out(blocks: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    """What `combined` gives, for weights (a, b) that are no known numbers."""
    rows = [row.unbind(0) for row in weights.unbind(0)]
    return [reduce(add, (block * factor for block, factor in zip(blocks, row, strict=True))) for row in rows]


def _combination(blocks: Sequence[Tensor], row: tuple[float, ...]) -> Tensor:
    terms = [(block, factor) for block, factor in zip(blocks, row, strict=True) if factor]
    terms.sort(key=lambda term: term[1] != 1)  # begin with what needs no multiplication
    (total, factor), *rest = terms or [(blocks[0], 0.0)]
    total = total if factor == 1 else -total if factor == -1 else total * factor
    for block, factor in rest:
        if torch.compiler.is_compiling():  # inductor (seen in 2.13) forgets alpha where it merges a sum into a product
            total = total + block if factor == 1 else total - block if factor == -1 else total + factor * block
        else:
            total = torch.add(total, block, alpha=factor)
    return total


def _rows(matrix: Tensor) -> Rows:
    return tuple(tuple(0.0 if abs(value) < 1e-12 else value for value in row) for row in matrix.tolist())
