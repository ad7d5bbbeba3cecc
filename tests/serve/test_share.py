"""Shares of a layer against the dense matrix cut by hand: they must add up, and readers and writer must agree."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hyperfade.algebra import Algebra
from hyperfade.errors import ServingError
from hyperfade.nn import LightSpec
from hyperfade.serve.share import Share, check_share, cut, num_blocks

HIDDEN, OUTSIDE = 48, 16
ALGEBRAS = {
    "products": Algebra.products(4, 5),
    "learned": Algebra.learned(2, 3),
    "quaternion": Algebra.named("quaternion"),
    "low_rank": None,
}


def reader(kind: str, rank: int) -> LightSpec:
    return LightSpec(OUTSIDE, HIDDEN, False, ALGEBRAS[kind], rank)


def writer(kind: str, rank: int) -> LightSpec:
    return LightSpec(HIDDEN, OUTSIDE, False, ALGEBRAS[kind], rank)


def filled(spec: LightSpec) -> Any:
    layer: Any = spec.build(dtype=torch.float64)
    for tensor in layer.state_dict().values():
        tensor.normal_()
    if spec.algebra is not None and not spec.algebra.trainable:  # a fixed mixing is known to the layer as numbers
        layer.A.copy_(spec.algebra.structure())
    return layer


def units(n: int, rank: int, ranks: int) -> Tensor:
    """The hidden units of a process, by the formula of the module's docstring."""
    width = HIDDEN // n
    return torch.tensor([a * width + rank * width // ranks + j for a in range(n) for j in range(width // ranks)])


@given(st.sampled_from(list(ALGEBRAS)), st.sampled_from([0, 3]), st.sampled_from([2, 3]), st.integers(0, 99))
@torch.no_grad()
def test_shares_are_rows_and_columns_of_the_dense_matrix(kind: str, companion: int, ranks: int, seed: int) -> None:
    torch.manual_seed(seed)
    rank = companion if ALGEBRAS[kind] else 5
    up, down = filled(reader(kind, rank)), filled(writer(kind, rank))
    n = num_blocks(reader(kind, rank))
    total = torch.zeros(OUTSIDE, OUTSIDE, dtype=torch.float64)
    x = torch.randn(7, OUTSIDE, dtype=torch.float64)
    y = torch.zeros_like(x)
    for process in range(ranks):
        own_up, own_down = cut(up, Share("out", process, ranks)), cut(down, Share("in", process, ranks))
        own = units(n, process, ranks)
        torch.testing.assert_close(own_up.weight, up.weight[own])
        torch.testing.assert_close(own_down.weight, down.weight[:, own])
        total += own_down.weight @ own_up.weight
        y += own_down(F.silu(own_up(x)))
    torch.testing.assert_close(total, down.weight @ up.weight)
    torch.testing.assert_close(y, down(F.silu(up(x))))  # through the layers' own forward, with the nonlinearity


def test_a_share_holds_its_part_of_the_weights_only() -> None:
    layer = filled(reader("products", 0))
    own: Any = cut(layer, Share("out", 1, 2))
    assert own.T.numel() == layer.T.numel() // 2


@torch.no_grad()
def test_dense_and_narrow_layers_are_split_contiguously() -> None:
    narrow, dense = filled(LightSpec(8, 6, False, None, 0, (8, 12))), nn.Linear(8, 6, bias=False)
    assert torch.equal(cut(narrow, Share("out", 1, 2)).weight, narrow.weight[3:])
    assert torch.equal(cut(dense, Share("in", 1, 2)).weight, dense.weight[:, 4:])


def test_different_blocks_within_one_ffn_are_refused_by_name() -> None:
    with pytest.raises(ServingError, match=r"mlp\.up_proj comes in 4 blocks, mlp\.down_proj in 2.*\n.*parallel-size 1"):
        check_share("mlp.up_proj", HIDDEN, {"mlp.up_proj": 4, "mlp.down_proj": 2}, Share("out", 0, 2))


def test_blocks_that_do_not_divide_are_refused_with_the_numbers() -> None:
    with pytest.raises(ServingError, match="48 features in 4 blocks, and 5 does not divide 12"):
        check_share("mlp.up_proj", HIDDEN, {"mlp.up_proj": 4}, Share("out", 0, 5))
