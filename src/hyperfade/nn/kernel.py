"""Products for few tokens in one Triton kernel: mixes in, all products, mixes out, weights read once.

    y[l, m, a] = Σ_r P[l, r, a] · T_{l,r} · Σ_b Q[l, r, b] x[m, b]          l: layers that read the same input

With one token a GPU waits for the weights, and for the start of every kernel: two mixes and a batched product take
longer to start than the weights to arrive (`docs/speed.md`). Here a program makes a few outputs of every block: it
mixes the input as it goes, multiplies it by these rows of all R products, and mixes the results, all in float32.
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

MANY_OUTPUTS = 2048  # of a block, of all layers together; with fewer a GPU has too few programs to do
_FEWEST_COLUMNS = 32


class Tile(NamedTuple):
    """What one program does: `rows` outputs of every block, with so many `weights` at work at a time."""

    rows: int
    weights: int
    warps: int


@lru_cache
def tile_for(tokens: int, outputs: int) -> Tile:
    """The tile that was fastest, as `benchmarks/kernel_tiles.py` measured it; outputs: of a block, of all layers."""
    table = json.loads((files("hyperfade.nn") / "tiles.json").read_text(encoding="utf-8"))
    return Tile(**table["one token" if tokens == 1 else "few tokens"]["many" if outputs >= MANY_OUTPUTS else "few"])


@triton.jit
def _few_tokens(
    x,  # (M, N, width_in)
    p,  # (L, R, N)
    q,  # (L, R, N)
    t,  # (L, R, width_out, width_in)
    y,  # (L, M, N, width_out)
    width_in,
    width_out,
    M: tl.constexpr,
    M_PADDED: tl.constexpr,  # the next power of two, as every tile's side has to be
    N: tl.constexpr,
    R: tl.constexpr,
    R_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    layer = tl.program_id(1)
    r = tl.arange(0, R_PADDED)
    product = layer * R + r
    row = (product[:, None] * width_out + i[None, :]) * width_in  # where rows of T begin: (R, ROWS)
    is_row = (r < R)[:, None] & (i < width_out)[None, :]
    token = tl.arange(0, M_PADDED)
    if M == 1:
        summed = tl.zeros((R_PADDED, ROWS, COLUMNS), tl.float32)  # over columns at the very end
    else:
        summed = tl.zeros((M_PADDED, R_PADDED, ROWS), tl.float32)
    for first in range(0, width_in, COLUMNS):
        j = first + tl.arange(0, COLUMNS)
        is_column = j < width_in
        weights = tl.load(t + row[:, :, None] + j, mask=is_row[:, :, None] & is_column, other=0.0).to(tl.float32)
        for m in range(M):
            u = tl.zeros((R_PADDED, COLUMNS), tl.float32)
            for b in tl.static_range(N):
                block = tl.load(x + (m * N + b) * width_in + j, mask=is_column, other=0.0).to(tl.float32)
                u += tl.load(q + product * N + b, mask=r < R, other=0.0).to(tl.float32)[:, None] * block[None, :]
            if M == 1:
                summed += weights * u[:, None, :]
            else:
                z = tl.sum(weights * u[:, None, :], axis=2)
                summed += tl.where((token == m)[:, None, None], z[None, :, :], 0.0)
    for a in tl.static_range(N):
        factor = tl.load(p + product * N + a, mask=r < R, other=0.0).to(tl.float32)
        if M == 1:
            z = tl.sum(summed, axis=2)
            out = tl.sum(factor[:, None] * z, axis=0)
            tl.store(y + (layer * N + a) * width_out + i, out.to(y.dtype.element_ty), mask=i < width_out)
        else:
            out = tl.sum(factor[None, :, None] * summed, axis=1)
            place = ((layer * M + token) * N + a)[:, None] * width_out + i[None, :]
            tl.store(y + place, out.to(y.dtype.element_ty), mask=(token < M)[:, None] & (i < width_out)[None, :])


def few_tokens(x: Tensor, p: Tensor, q: Tensor, t: Tensor, layers: int = 1, tile: Tile | None = None) -> Tensor:
    """x (M, n, d/n); P and Q (layers·R, n), T (layers·R, k/n, d/n), contiguous: y (layers, M, k) in x's dtype.

    No gradients.
    """
    x = x.contiguous()
    tokens, n, width_in = x.shape
    width_out, count = t.shape[1], t.shape[0] // layers
    padded = triton.next_power_of_2(count)
    rows, weights, warps = tile or tile_for(tokens, layers * width_out)
    columns = min(max(weights // (padded * rows), _FEWEST_COLUMNS), triton.next_power_of_2(width_in))
    y = x.new_empty(layers, tokens, n * width_out)
    with torch.cuda.device_of(x):
        _few_tokens[(triton.cdiv(width_out, rows), layers)](
            *(x, p, q, t, y, width_in, width_out),
            *(tokens, triton.next_power_of_2(tokens), n, count, padded, rows, columns),
            num_warps=warps,
        )
    return y
