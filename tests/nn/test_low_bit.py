"""The low-bit linear: its layouts hold what they were given, and every way to compute gives W x."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hyperfade.nn import LowBit, LowBitLinear, fitting_group
from hyperfade.nn.int4 import for_the_kernel, from_the_kernel, one_to_a_byte, two_to_a_byte


def _numbers(rows: int, width: int, most: int = 16) -> Tensor:
    return torch.randint(0, most, (rows, width), generator=torch.Generator().manual_seed(rows + width))


def _filled(held: LowBit, in_features: int, out_features: int, dtype: torch.dtype = torch.float32) -> LowBitLinear:
    """A low-bit linear with random numbers in it, laid out as they would be after loading."""
    generator = torch.Generator().manual_seed(0)
    layer = LowBitLinear(in_features, out_features, held, bias=True, dtype=dtype)
    layer.scale.copy_(torch.rand(layer.scale.shape, generator=generator) * 0.02 + 0.01)
    if held.to == "int4":
        layer.qdata = two_to_a_byte(_numbers(out_features, in_features))
        assert layer.zero_point is not None
        layer.zero_point.copy_(_numbers(*layer.zero_point.shape))
    else:
        layer.qdata.copy_((_numbers(out_features, in_features, 255) - 127).to(layer.qdata.dtype))
    torch.nn.init.normal_(layer.bias, generator=generator)  # type: ignore[arg-type]
    return layer.requires_grad_(False)


@given(st.integers(1, 9), st.integers(1, 33))
def test_two_to_a_byte_is_undone(rows: int, width: int) -> None:
    numbers = _numbers(rows, width)
    data = two_to_a_byte(numbers)
    assert data.shape == (rows, (width + 1) // 2)
    assert data.dtype == torch.uint8
    assert torch.equal(one_to_a_byte(data, width), numbers)
    assert data[0, 0] % 16 == numbers[0, 0]


@pytest.mark.parametrize("rows", [16, 32, 48, 64, 80, 144, 192])
def test_the_kernels_layout_is_undone(rows: int) -> None:
    numbers = _numbers(3 * rows, 96).view(3, rows, 96)
    found = for_the_kernel(numbers)
    assert found is not None or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512")
    if found is not None:
        assert torch.equal(from_the_kernel(*found).transpose(1, 2), numbers)


def test_shapes_that_the_kernel_does_not_take() -> None:
    assert for_the_kernel(_numbers(24, 64)[None]) is None
    assert for_the_kernel(_numbers(32, 40)[None]) is None


FITS = [
    (("int4", 1280, 64), 64),
    (("int4", 1440, 128), 32),  # 120 divides, but no kernel takes it
    (("int4", 3420, 64), 64),  # nothing does: 54 groups, the last of 28
    (("int4", 144, 64), 32),  # 5 groups take fewer bits than 3 of 64
    (("int4", 4304, 128), 128),
    (("int4", 1076, 64), 64),
    (("int4", 24, 64), None),
    (("nf4", 855, 64), None),  # bitsandbytes reads other groups wrongly on a CPU
    (("nf4", 96, 64), 32),
    (("int8", 1076, 64), 0),
    (("int8", 855, 64), 57),
    (("int8", 855, 0), 0),
]


@pytest.mark.parametrize(("asked", "group"), FITS)
def test_the_largest_group_that_fits(asked: tuple, group: int | None) -> None:
    assert fitting_group(*asked) == group


@given(st.sampled_from(["int8", "int4", "nf4"]), st.integers(1, 5000), st.sampled_from([32, 64, 100, 128, 256]))
def test_a_group_divides_the_width_or_saves_bits(to: Any, width: int, wanted: int) -> None:
    group = fitting_group(to, width, wanted)
    if group:
        assert 32 <= group <= wanted
        assert width % group == 0 or (to == "int4" and all(width % size for size in (32, 64, 128, 256)))
        assert 4 * width + 24 * -(-width // group) < 5.5 * width
    elif to == "int8":
        assert all(width % size for size in range(32, wanted + 1))
    else:
        assert width < 32 or (to == "nf4" and width % 32)


@pytest.mark.parametrize("held", [LowBit("int8"), LowBit("int8", 32), LowBit("int4", 32), LowBit("int4", 64)])
@pytest.mark.parametrize("tokens", [1, 7, 96, 130])
@pytest.mark.parametrize("parts", [1, 3])
def test_every_way_gives_the_same(held: LowBit, tokens: int, parts: int) -> None:
    """In bfloat16 few tokens take torch's kernels, many rebuild W; the oracle is the formula in float64."""
    width = 171 if held.group_size == 64 else 192  # 171: odd, and the last group is shorter
    layer = _filled(held, width, 144, torch.bfloat16)
    numbers = layer.qdata if held.to == "int8" else one_to_a_byte(layer.qdata, width)
    zero = torch.zeros(144, layer.scale.shape[1]) if layer.zero_point is None else layer.zero_point
    group = torch.arange(width) // (held.group_size or width)
    weight = (numbers.double() - zero.double()[:, group]) * layer.scale.double()[:, group]
    x = torch.randn(2, tokens, width, generator=torch.Generator().manual_seed(1)).bfloat16()[:1]
    assert layer.bias is not None
    wanted = x.double() @ weight.T + layer.bias.double()
    layer.parts = parts
    layer.pack_()
    got = layer(x)
    assert got.dtype == torch.bfloat16
    assert got.shape == (1, tokens, 144)
    assert (got.double() - wanted).norm() < 6e-3 * wanted.norm()  # 3e-3 is what bfloat16 rounding costs
    assert torch.allclose(layer.rebuilt(torch.float32).double(), weight, rtol=5e-3, atol=1e-3)


@pytest.mark.parametrize("parts", [1, 3])
def test_packing_shows_neither_in_the_state_dict_nor_after_a_change_of_dtype(parts: int) -> None:
    layer = _filled(LowBit("int4", 32), 192, 144, torch.bfloat16)
    layer.parts = parts
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.pack_()
    assert layer.block is not None or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512")
    after = layer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    layer.float()
    assert layer.block is None
    layer.bfloat16()
    layer.load_state_dict(before)
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())


@pytest.mark.parametrize("to", ["int8", "fp8"])
def test_a_change_of_dtype_leaves_numbers_and_scales_alone(to: Any) -> None:
    layer = _filled(LowBit(to), 40, 24)
    qdata, scale = layer.qdata.clone(), layer.scale.clone()
    layer.to(torch.bfloat16)
    assert layer.bias is not None
    assert layer.bias.dtype == torch.bfloat16
    assert layer.qdata.dtype == qdata.dtype
    assert torch.equal(layer.qdata.view(torch.uint8), qdata.view(torch.uint8))
    assert torch.equal(layer.scale, scale)


def test_gradients_reach_the_input() -> None:
    layer = _filled(LowBit("int4", 32), 64, 32, torch.bfloat16)
    layer.pack_()
    x = torch.ones(3, 64, dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad[0].float(), layer.rebuilt(torch.float32).sum(0), rtol=2e-2, atol=2e-2)
