"""Tensor parallelism: the share of a layer that one of several processes holds, and when shares add up to the layer.

An FFN is split along its hidden units: readers (gate, up, fc1) by their outputs, the writer (down, fc2) by its inputs,
and the processes' outputs are summed. Any set of units will do, as long as readers and writer agree on it.

A hypercomplex layer mixes n blocks, so a process cannot take some of the blocks and leave the rest of the weights. It
takes a part of every block:

    units of block a    a·w + r·w/ranks … a·w + (r+1)·w/ranks − 1        w = hidden/n, process r

Then T_r or S_i are cut along one side like any matrix, A or P and Q are small and whole, and every process holds and
computes 1/ranks. For n = 1 (dense, low-rank, narrow) this is the usual contiguous split. Within one FFN all matrices
need the same n.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from hyperfade.errors import ServingError
from hyperfade.nn import Light, LightSpec, LowRankLinear, NarrowLinear, PHMLinear


@dataclass(frozen=True)
class Share:
    """Part number `rank` of `ranks` of a layer's outputs (side `out`) or inputs (side `in`)."""

    side: Literal["out", "in"]
    rank: int
    ranks: int

    def of(self, tensor: Tensor, dim: int, blocks: int = 1) -> Tensor:
        """This part of every one of the `blocks` blocks along `dim`; a view where there is one block."""
        parts = tensor.unflatten(dim, (blocks, self.ranks, tensor.shape[dim] // (blocks * self.ranks)))
        return parts.select(dim + 1, self.rank).flatten(dim, dim + 1)


def num_blocks(spec: LightSpec | None) -> int:
    """Blocks that a matrix's features come in: n of its algebra, 1 where it has none (None: a dense matrix)."""
    return 1 if spec is None or spec.algebra is None else spec.algebra.n


def check_share(name: str, features: int, partners: dict[str, int], share: Share) -> None:
    """Raise `ServingError` unless the matrix `name`, with so many `features` on the split side, has equal shares that
    all matrices of its FFN understand alike. partners: those matrices, itself included, and their blocks."""
    n = partners[name]
    other = next((item for item in partners.items() if item[1] != n), None)
    if other is not None:
        raise ServingError(
            f"Tensor parallelism over {share.ranks}: {name} comes in {n} blocks, {other[0]} in {other[1]}, so they "
            "would split the hidden units differently.",
            "Serve with --tensor-parallel-size 1, or compress all matrices of an FFN with the same n.",
        )
    if features % (n * share.ranks):
        raise ServingError(
            f"Tensor parallelism over {share.ranks}: {name} has {features} features in {n} blocks, and {share.ranks} "
            f"does not divide {features // n}.",
            "Serve with a --tensor-parallel-size that divides it.",
        )


@torch.no_grad()
def cut(layer: Light | nn.Linear, share: Share) -> Light | nn.Linear:
    """A layer of its own that computes this share of `layer`, which has no bias.

    Side `out`: the outputs are this share of the outputs. Side `in`: for this share of the inputs, and the outputs of
    all shares add up to the layer's.
    """
    if isinstance(layer, PHMLinear):
        return _cut_phm(layer, share)
    if isinstance(layer, LowRankLinear):
        return _cut_low_rank(layer, share, 1)
    dim = 0 if share.side == "out" else 1
    if isinstance(layer, NarrowLinear):
        local = _smaller(layer, share)
        assert isinstance(local, NarrowLinear)
        local.core.weight.copy_(share.of(layer.weight, dim))
        return local
    weight = share.of(layer.weight, dim)
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
    plain.weight.copy_(weight)
    return plain


def _cut_phm(layer: PHMLinear, share: Share) -> PHMLinear:
    local = _smaller(layer, share)
    assert isinstance(local, PHMLinear)
    for name in ("P", "Q") if layer.algebra.form == "products" else ("A",):
        getattr(local, name).copy_(getattr(layer, name))
    local.components.copy_(share.of(layer.components, 1 if share.side == "out" else 2))
    if layer.companion is not None:
        local.companion = _cut_low_rank(layer.companion, share, layer.algebra.n)
    return local


def _cut_low_rank(layer: LowRankLinear, share: Share, blocks: int) -> LowRankLinear:
    local = _smaller(layer, share)
    assert isinstance(local, LowRankLinear)
    out = share.side == "out"
    local.reduce.weight.copy_(layer.reduce.weight if out else share.of(layer.reduce.weight, 1, blocks))
    local.expand.weight.copy_(share.of(layer.expand.weight, 0, blocks) if out else layer.expand.weight)
    return local


def _smaller(layer: Light, share: Share) -> Light:
    spec = LightSpec.of(layer)
    side = "out_features" if share.side == "out" else "in_features"
    local = replace(spec, replaced=None, **{side: getattr(spec, side) // share.ranks})
    like = next(layer.parameters())
    return local.build(device=like.device, dtype=like.dtype)
