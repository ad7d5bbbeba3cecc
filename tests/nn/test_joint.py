"""A gate and an up that run as one give what they give apart, and never anything else."""

import copy

import pytest
import torch
from torch import Tensor

from hyperfade.algebra import Algebra
from hyperfade.nn import JointReading, PHMLinear
from hyperfade.nn.joint import _MOST_TOKENS

# relative to the largest output; seen: 8.0e-8, 5.7e-3 and 1.3e-16
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float64: 1e-14}


def _pair(dtype: torch.dtype = torch.float32, n: int = 4, bias: bool = False, rank: int = 0) -> list[PHMLinear]:
    torch.manual_seed(0)
    options = {"bias": bias, "companion_rank": rank, "dtype": dtype}
    pair = [PHMLinear(32, 48, Algebra.products(n), **options) for _ in range(2)]
    for layer in pair:
        torch.nn.init.normal_(layer.P)
        torch.nn.init.normal_(layer.Q)
        if bias:
            torch.nn.init.normal_(layer.bias)
    return pair


def _calls(pair: list[PHMLinear], x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.inference_mode():
        return pair[0](x), pair[1](x)


class _Count:
    """How many batched products with weights ran; mixes have n rows, weights of these layers d/n = 8."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.products, real = 0, torch.bmm

        def bmm(*arguments: Tensor) -> Tensor:
            self.products += arguments[1].shape[1] == 8
            return real(*arguments)

        monkeypatch.setattr(torch, "bmm", bmm)


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> _Count:
    return _Count(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(32,), (1, 32), (2, 3, 32), (_MOST_TOKENS, 32), (_MOST_TOKENS + 1, 32)])
@pytest.mark.parametrize(("n", "bias", "rank"), [(2, False, 0), (4, True, 0), (8, True, 3)])
def test_together_is_apart(dtype: torch.dtype, shape: tuple[int, ...], n: int, bias: bool, rank: int) -> None:
    pair = _pair(dtype, n, bias, rank)
    x = torch.randn(shape, dtype=dtype)
    apart = _calls(pair, x)
    JointReading(*pair)
    for together, alone in zip(_calls(pair, x), apart, strict=True):
        error = (together - alone).abs().max() / alone.abs().max()
        assert error < TOLERANCE[dtype]


def test_one_product_call_for_both_with_few_tokens(count: _Count) -> None:
    pair = _pair()
    JointReading(*pair)
    _calls(pair, torch.randn(3, 32))
    assert count.products == 1
    _calls(pair, torch.randn(_MOST_TOKENS + 1, 32))
    assert count.products == 3


def test_no_second_copy_and_updates_are_seen() -> None:
    pair = _pair()
    JointReading(*pair)
    for name in "PQT":
        first, second = (getattr(layer, name) for layer in pair)
        storage = first.untyped_storage()
        assert storage.data_ptr() == second.untyped_storage().data_ptr()
        assert storage.nbytes() == first.nbytes + second.nbytes
    x = torch.randn(2, 32)
    before = _calls(pair, x)
    with torch.no_grad():
        pair[1].T.mul_(2)
    after = _calls(pair, x)
    assert torch.equal(after[0], before[0])
    torch.testing.assert_close(after[1], 2 * before[1])


def test_the_second_alone_and_other_inputs_are_right() -> None:
    pair = _pair()
    x, other = torch.randn(2, 2, 32)
    expected = _calls(pair, x)[1], _calls(pair, other)[1]
    JointReading(*pair)
    with torch.inference_mode():
        pair[0](x)
        torch.testing.assert_close(pair[1](other), expected[1])  # not what was kept for x
        torch.testing.assert_close(pair[1](x), expected[0])  # and alone


def test_a_second_that_reads_something_else_ends_the_joint_work(count: _Count) -> None:
    pair = _pair()
    JointReading(*pair)
    with torch.inference_mode():
        for _ in range(3):
            pair[0](torch.randn(2, 32))
    assert pair[0].joint is None
    assert pair[1].joint is None
    assert count.products == 3


def test_gradients_flow_as_without() -> None:
    pair = _pair()
    JointReading(*pair)
    x = torch.randn(2, 32)
    sum(layer(x).sum() for layer in pair).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for layer in pair for p in (layer.P, layer.Q, layer.T))


def test_a_cast_keeps_them_together(count: _Count) -> None:
    pair = torch.nn.ModuleList(_pair())
    JointReading(*pair)
    pair.to(torch.float64)
    _calls(list(pair), torch.randn(1, 32, dtype=torch.float64))
    assert count.products == 1


def test_a_copy_is_joined_and_independent(count: _Count) -> None:
    pair = torch.nn.ModuleList(_pair())
    JointReading(*pair)
    x = torch.randn(1, 32)
    before = _calls(list(pair), x)
    twin = copy.deepcopy(pair)
    assert all(torch.equal(a, b) for a, b in zip(_calls(list(twin), x), before, strict=True))
    assert count.products == 2
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not any(y.any() for y in _calls(list(twin), x))
    assert all(torch.equal(a, b) for a, b in zip(_calls(list(pair), x), before, strict=True))


def test_a_replaced_weight_is_used() -> None:
    pair = _pair()
    JointReading(*pair)
    pair[1].T = torch.nn.Parameter(torch.zeros_like(pair[1].T))
    assert not _calls(pair, torch.randn(1, 32))[1].any()
