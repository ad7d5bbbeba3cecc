"""The fade: both ends bit-equal, a straight line between them, gradients to the light branch only."""

import copy
import io

import pytest
import torch
from torch import nn

from hyperfade.algebra import Algebra
from hyperfade.nn import BlendLinear, LightSpec


def _blend(algebra: Algebra | None = None, dtype: torch.dtype = torch.float32) -> BlendLinear:
    light = LightSpec(8, 12, True, algebra, rank=0 if algebra else 2).build(dtype=dtype)
    return BlendLinear(nn.Linear(8, 12, dtype=dtype), light)


ALGEBRAS = [Algebra.named("paper"), Algebra.learned(4), Algebra.products(4), None]


@pytest.mark.parametrize("algebra", ALGEBRAS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("measured", [False, True])
def test_both_ends_are_bit_equal(algebra: Algebra | None, dtype: torch.dtype, measured: bool) -> None:
    blend, x = _blend(algebra, dtype), torch.randn(2, 3, 8).to(dtype)
    blend.measure_reconstruction = measured
    for alpha, layer in ((0, blend.dense), (0.0, blend.dense), (1, blend.light), (1.0, blend.light)):
        blend.alpha = alpha
        assert torch.equal(blend(x), layer(x))


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.75])
def test_between_the_ends_is_a_straight_line(alpha: float) -> None:
    blend, x = _blend(Algebra.products(4)), torch.randn(5, 8)
    blend.alpha = alpha
    expected = (1 - alpha) * blend.dense(x) + alpha * blend.light(x)
    torch.testing.assert_close(blend(x), expected, rtol=0, atol=1e-6)  # seen 1.2e-7


def test_only_the_branch_that_counts_runs() -> None:
    blend, x, ran = _blend(Algebra.products(4)), torch.randn(5, 8), []
    blend.dense.register_forward_hook(lambda *_: ran.append("dense"))
    blend.light.register_forward_hook(lambda *_: ran.append("light"))
    for alpha, expected in ((0.0, ["dense"]), (0.5, ["dense", "light"]), (1.0, ["light"])):
        ran.clear()
        blend.alpha = alpha
        blend(x)
        assert ran == expected


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_reconstruction_is_the_relative_mean_square(alpha: float) -> None:
    blend, x = _blend(Algebra.learned(4)), torch.randn(4, 7, 8)
    blend.alpha, blend.measure_reconstruction = alpha, True
    blend(x)
    dense, light = blend.dense(x), blend.light(x)
    expected = (dense - light).square().sum() / dense.square().sum()
    assert blend.reconstruction is not None
    assert blend.reconstruction.item() == pytest.approx(expected.item(), rel=1e-5)  # seen 1e-7


def test_reconstruction_trains_the_light_branch_only() -> None:
    blend, x = _blend(Algebra.products(4)), torch.randn(6, 8, requires_grad=True)
    blend.measure_reconstruction = True
    blend(x)
    assert blend.reconstruction is not None
    blend.reconstruction.backward()
    assert all(p.grad is not None and p.grad.any() for p in blend.light.parameters())
    assert all(p.grad is None and not p.requires_grad for p in blend.dense.parameters())
    # the dense output is a fixed target: x gets its gradient through the light branch alone
    target, light = blend.dense(x).detach(), blend.light(x)
    (expected,) = torch.autograd.grad((light - target).square().sum() / target.square().sum(), x)
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-7)  # seen 1.5e-8


def test_zero_outputs_give_a_finite_reconstruction() -> None:
    blend = _blend(Algebra.products(4))
    nn.init.zeros_(blend.dense.weight)
    nn.init.zeros_(blend.dense.bias)
    blend.measure_reconstruction = True
    blend(torch.randn(3, 8))
    assert blend.reconstruction is not None
    assert torch.isfinite(blend.reconstruction)


@pytest.mark.parametrize("algebra", ALGEBRAS, ids=str)
def test_blends_under_autocast(algebra: Algebra | None) -> None:
    """Both branches must agree on a dtype: a float32 bias must not promote one of them."""
    blend, x = _blend(algebra), torch.randn(5, 8)
    blend.alpha, blend.measure_reconstruction = 0.5, True
    full = blend(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = blend(x)
    assert half.dtype == torch.bfloat16
    assert blend.reconstruction is not None
    assert blend.reconstruction.dtype == torch.float32
    torch.testing.assert_close(half.float(), full, rtol=0, atol=0.03)  # seen 0.005


def test_shows_the_dense_weight_and_bias() -> None:
    blend = _blend(Algebra.products(4), torch.bfloat16)
    assert blend.weight is blend.dense.weight
    assert blend.bias is blend.dense.bias
    assert "alpha=0" in repr(blend)


def test_can_be_copied_and_saved_after_measuring() -> None:
    blend, x = _blend(Algebra.products(4)), torch.randn(3, 8)
    blend.alpha, blend.measure_reconstruction = 0.5, True
    expected = blend(x)
    twin = copy.deepcopy(blend)
    assert twin.reconstruction is None
    assert blend.reconstruction is not None
    torch.save(blend, buffer := io.BytesIO())
    buffer.seek(0)
    for other in (twin, torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), expected)
