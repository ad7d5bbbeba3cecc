"""Products in few bits: one call, part by part and rebuilt all give what a kron-built weight gives."""

import pytest
import torch
from torch import Tensor, nn

from hyperfade.algebra import Algebra
from hyperfade.nn import LowBit, LowBitLinear, PHMLinear, pack_
from hyperfade.nn.execution import kernel_calls
from hyperfade.nn.int4 import one_to_a_byte, two_to_a_byte
from hyperfade.nn.kept import state_of

D, K = 48, 64  # per block: K is what the int4 kernel's layout can be cut at
BFLOAT16_ERROR = 8e-3  # relative in norm; observed 2.0e-3 to 4.9e-3


def _layer(algebra: Algebra, held: LowBit) -> tuple[PHMLinear, Tensor]:
    """A layer whose products are random in few bits, and its W (k, d) in float64 by `torch.kron`."""
    generator = torch.Generator().manual_seed(0)
    n, count = algebra.n, algebra.size
    layer = PHMLinear(n * D, n * K, algebra, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    for mix in (layer.P, layer.Q):
        nn.init.normal_(mix, generator=generator)
    layer.stack_()
    core = LowBitLinear(D, count * K, held, dtype=torch.bfloat16)
    core.scale.copy_(torch.rand(core.scale.shape, generator=generator) * 0.02 + 0.01)
    numbers = torch.randint(0, 16, (count * K, D), generator=generator)
    zero = torch.randint(0, 16, core.scale.shape, generator=generator)
    if core.zero_point is not None:
        core.qdata = two_to_a_byte(numbers)
        core.zero_point.copy_(zero)
    else:
        zero.zero_()
        core.qdata.copy_(numbers - 8)
    stored = one_to_a_byte(core.qdata, D) if held.to == "int4" else core.qdata
    group = torch.arange(D) // (held.group_size or D)
    products = ((stored.double() - zero[:, group]) * core.scale.double()[:, group]).view(count, K, D)
    layer.core = core  # type: ignore[assignment]
    kron = zip(layer.P.double(), layer.Q.double(), products, strict=True)
    return layer, torch.stack([torch.kron(torch.outer(p, q), t) for p, q, t in kron]).sum(0)


@torch.no_grad()
@pytest.mark.parametrize("held", [LowBit("int8"), LowBit("int8", 48), LowBit("int4", 32)], ids=str)
@pytest.mark.parametrize("algebra", [Algebra.products(2), Algebra.products(4), Algebra.products(2, 3)], ids=str)
@pytest.mark.parametrize("by_parts", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 40, 100])
def test_every_form_is_the_product_with_a_kron_built_weight(
    held: LowBit, algebra: Algebra, by_parts: bool, tokens: int
) -> None:
    layer, weight = _layer(algebra, held)
    x = torch.randn(tokens, layer.in_features, generator=torch.Generator().manual_seed(1)).bfloat16()
    layer.core.parts = algebra.size if by_parts else 1  # type: ignore[assignment]
    layer.core.pack_()  # type: ignore[operator]
    wanted = x.double() @ weight.T
    assert (layer(x).double() - wanted).norm() < BFLOAT16_ERROR * wanted.norm()
    assert torch.allclose(layer.weight.double(), weight, atol=0.05)  # observed .01, at sizes of 1


@torch.no_grad()
def test_what_is_kept_of_p_and_q_follows_them() -> None:
    layer, weight = _layer(Algebra.products(4), LowBit("int4", 32))
    pack_(layer)
    x = torch.ones(1, layer.in_features, dtype=torch.bfloat16)
    before = layer(x)
    layer.P.mul_(-2)
    assert torch.equal(layer(x), -2 * before)
    layer.Q.data = layer.Q.data * 0.5
    assert torch.equal(layer(x), -before)
    assert (before.double() - x.double() @ weight.T).norm() < BFLOAT16_ERROR * before.norm()


@torch.no_grad()
def test_tensors_of_inference_mode_count_too() -> None:
    with torch.inference_mode():
        layer, _ = _layer(Algebra.products(2), LowBit("int4", 32))
        x = torch.ones(1, layer.in_features, dtype=torch.bfloat16)
        pack_(layer)
        assert torch.equal(layer(x), layer(x))
        assert state_of(layer.P)[-1] is None


def test_gradients_reach_p_and_q() -> None:
    layer, _ = _layer(Algebra.products(4), LowBit("int4", 32))
    pack_(layer)
    layer.P.requires_grad_(True)
    layer(torch.ones(1, layer.in_features, dtype=torch.bfloat16)).sum().backward()
    assert layer.P.grad is not None
    assert layer.P.grad.abs().min() > 0


def test_large_products_have_calls_of_their_own() -> None:
    assert kernel_calls(Algebra.products(4), 576, 1536) == 1
    assert kernel_calls(Algebra.products(2), 1536, 576) == 1
    assert kernel_calls(Algebra.products(4), 2048, 11008) == 4
    assert kernel_calls(Algebra.products(2), 11008, 2048) == 2


@torch.no_grad()
def test_a_stacked_layer_computes_the_same_before_it_is_quantized() -> None:
    torch.manual_seed(0)
    layer = PHMLinear(64, 96, Algebra.products(4, 5))
    x = torch.randn(3, 64)
    before = layer(x)
    layer.stack_()
    assert type(layer.core) is nn.Linear
    assert torch.equal(layer(x), before)
    layer.core = nn.Sequential(layer.core)  # type: ignore[assignment]  # as an adapter wraps it
    assert torch.allclose(layer(x), before, atol=1e-6)  # observed 2e-7
