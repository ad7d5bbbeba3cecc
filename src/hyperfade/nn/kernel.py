"""What torch has no good way for on a GPU, as Triton kernels: the products of one token, and large mixes.

    y[l, a] = Σ_r P[l, r, a] · T_{l,r} · Σ_b Q[l, r, b] x[b]          l: layers that read the same input

With one token a GPU waits for the weights and for the start of every kernel, and two mixes and a batched product take
longer to start than the weights to arrive (`docs/speed.md`). Here a program makes a few outputs of every block: it
mixes the input as it goes, multiplies it by these rows of all R products, and mixes the results, all in float32. With
eight tokens torch's own products are faster again.

    y[a] = Σ_b W[a, b] x[b]

With many tokens torch runs a mix as thousands of products of 4 × 4 or so, at a tenth of the speed of memory. Here every
program mixes a stretch of elements, reads each of them once and writes each output once.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# (what Triton compiles only looks like Python: its loops, tiles and launches)

import json
from functools import lru_cache
from importlib.resources import files
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_MANY_OUTPUTS = 2048  # of a block, of all layers together; with fewer a GPU has too few programs to do
_FEWEST_COLUMNS = 32
_MIXED_AT_ONCE = 2048  # elements that one program writes


class Tile(NamedTuple):
    """What one program does: `rows` outputs of every block, with so many `weights` at work at a time."""

    rows: int
    weights: int
    warps: int


@lru_cache
def tile_for(outputs: int) -> Tile:
    """The tile that was fastest, as `benchmarks/kernel_tiles.py` measured it; outputs: of a block, of all layers."""
    table = json.loads((files("hyperfade.nn") / "tiles.json").read_text(encoding="utf-8"))
    return Tile(**table[tile_kind(outputs)])


def tile_kind(outputs: int) -> str:
    """Where the tile for so many outputs stands in tiles.json."""
    return "many outputs" if outputs >= _MANY_OUTPUTS else "few outputs"


@triton.jit
def _one_token(
    x,  # (N, width_in)
    p,  # (L, R, N)
    q,  # (L, R, N)
    t,  # (L, R, width_out, width_in)
    y,  # (L, N, width_out)
    width_in,
    width_out,
    N: tl.constexpr,
    R: tl.constexpr,
    R_PADDED: tl.constexpr,  # the next power of two, as every tile's side has to be
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    layer = tl.program_id(1)
    r = tl.arange(0, R_PADDED)
    product = layer * R + r
    row = (product[:, None] * width_out + i[None, :]) * width_in  # where rows of T begin: (R, ROWS)
    is_row = (r < R)[:, None] & (i < width_out)[None, :]
    terms = tl.zeros((R_PADDED, ROWS, COLUMNS), tl.float32)  # of the results, added up over columns at the very end
    for first in range(0, width_in, COLUMNS):
        j = first + tl.arange(0, COLUMNS)
        is_column = j < width_in
        weights = tl.load(t + row[:, :, None] + j, mask=is_row[:, :, None] & is_column, other=0.0).to(tl.float32)
        u = tl.zeros((R_PADDED, COLUMNS), tl.float32)
        for b in tl.static_range(N):
            block = tl.load(x + b * width_in + j, mask=is_column, other=0.0).to(tl.float32)
            u += tl.load(q + product * N + b, mask=r < R, other=0.0).to(tl.float32)[:, None] * block[None, :]
        terms += weights * u[:, None, :]
    z = tl.sum(terms, axis=2)
    for a in tl.static_range(N):
        factor = tl.load(p + product * N + a, mask=r < R, other=0.0).to(tl.float32)
        out = tl.sum(factor[:, None] * z, axis=0)
        tl.store(y + (layer * N + a) * width_out + i, out.to(y.dtype.element_ty), mask=i < width_out)


def one_token(x: Tensor, p: Tensor, q: Tensor, t: Tensor, layers: int = 1, tile: Tile | None = None) -> Tensor:
    """x (1, n, d/n); P and Q (layers·R, n), T (layers·R, k/n, d/n), contiguous: y (layers, 1, k) in x's dtype.

    No gradients.
    """
    x = x.contiguous()
    n, width_in = x.shape[1:]
    width_out, count = t.shape[1], t.shape[0] // layers
    padded = triton.next_power_of_2(count)
    rows, weights, warps = tile or tile_for(layers * width_out)
    columns = min(max(weights // (padded * rows), _FEWEST_COLUMNS), triton.next_power_of_2(width_in))
    y = x.new_empty(layers, 1, n * width_out)
    with torch.cuda.device_of(x):  # Triton launches on the current device, torch.accelerator has no such context
        _one_token[(triton.cdiv(width_out, rows), layers)](
            x, p, q, t, y, width_in, width_out, n, count, padded, rows, columns, num_warps=warps
        )
    return y


@triton.jit
def _mix(
    x,  # (M, READ, width), any strides but the last
    weights,  # (WRITTEN, READ), any strides
    y,  # (M, WRITTEN, width)
    count,  # M · width
    width,
    token_stride,
    block_stride,
    row_stride,
    column_stride,
    READ: tl.constexpr,
    WRITTEN: tl.constexpr,
    WRITTEN_PADDED: tl.constexpr,  # the next power of two, as every tile's side has to be
    ELEMENTS: tl.constexpr,
):
    element = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)  # of a block, over all tokens
    token, j = (element // width).to(tl.int64), element % width  # tokens may lie far apart
    a = tl.arange(0, WRITTEN_PADDED)
    total = tl.zeros((WRITTEN_PADDED, ELEMENTS), tl.float32)
    for b in tl.static_range(READ):
        block = tl.load(x + token * token_stride + b * block_stride + j, mask=element < count, other=0.0).to(tl.float32)
        factor = tl.load(weights + a * row_stride + b * column_stride, mask=a < WRITTEN, other=0.0).to(tl.float32)
        total += factor[:, None] * block[None, :]
    place = (token * WRITTEN * width + j)[None, :] + (a * width)[:, None]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=(a < WRITTEN)[:, None] & (element < count)[None, :])


def mix(x: Tensor, weights: Tensor) -> Tensor:
    """Σ_b weights[a, b] x[:, b] for x (M, b, w) and weights (a, b): (M, a, w) in x's dtype.

    Summed in float32. No gradients.
    """
    x = x if x.stride(2) == 1 else x.contiguous()
    tokens, read, width = x.shape
    padded = triton.next_power_of_2(len(weights))
    elements = max(_MIXED_AT_ONCE // padded, _FEWEST_COLUMNS)
    y = x.new_empty(tokens, len(weights), width)
    with torch.cuda.device_of(x):
        _mix[(triton.cdiv(tokens * width, elements),)](
            x,
            weights,
            y,
            tokens * width,
            width,
            *x.stride()[:2],
            *weights.stride(),
            read,
            len(weights),
            padded,
            elements,
        )
    return y
