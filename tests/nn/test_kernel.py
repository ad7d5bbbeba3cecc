"""The kernels, in Triton's interpreter, or on a GPU where there is one: the same product as kron's, the same mix."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from hypothesis import given, settings
from hypothesis import strategies as st
from kron_oracle import TOLERANCE, kron_weight, random_layer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hyperfade.algebra import Algebra
from hyperfade.nn import JointReading, PHMLinear, forms, joint, kernel_use
from hyperfade.nn.execution import Execution, Mix, execution, prices, processor
from hyperfade.nn.kernel_use import has_kernel, kernel_pays, mixes_in_kernel

pytest.importorskip("triton", reason="Triton is made for Linux")
from hyperfade.nn.kernel import Tile, mix, one_token

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@settings(deadline=None, max_examples=12)
@given(
    n=st.integers(2, 5),
    count=st.integers(1, 12),
    blocks=st.tuples(st.integers(1, 40), st.integers(1, 20)),
    layers=st.integers(1, 2),
    tile=st.sampled_from([Tile(2, 64, 4), Tile(8, 4096, 8), Tile(1, 4096, 4)]),
    seed=st.integers(0, 2**31),
)
def test_the_kernel_is_the_product_with_a_kron_built_weight(
    n: int, count: int, blocks: tuple[int, int], layers: int, tile: Tile, seed: int
) -> None:
    torch.manual_seed(seed)
    d, k = n * blocks[0], n * blocks[1]
    made = [random_layer(d, k, Algebra.products(n, min(count, n**2)), bias=False, device=DEVICE) for _ in range(layers)]
    p, q, t = (torch.cat([getattr(layer, name).detach() for layer in made]) for name in ("P", "Q", "T"))
    x = torch.randn(1, d, device=DEVICE)
    y = one_token(x.view(1, n, -1), p, q, t, layers, tile)
    for own, layer in zip(y, made, strict=True):
        weight = kron_weight(layer)
        scale = (x.double().abs() @ weight.abs().T + 1).max().item()
        torch.testing.assert_close(own.double(), x.double() @ weight.T, rtol=0, atol=TOLERANCE[torch.float32] * scale)
        # seen, of scale: 2.6e-7


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_layers_run_in_the_kernel_alone_and_joined(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    in_a_kernel = forms.products_in_a_kernel

    def counted(x, p, q, t, layers=1):
        calls.append(layers)
        return in_a_kernel(x, p, q, t, layers)

    _as_on_a_gpu(monkeypatch)
    for module in (forms, joint):
        monkeypatch.setattr(module, "products_in_a_kernel", counted)
    torch.manual_seed(0)
    algebra = Algebra.products(4)
    wide, narrow = {"d": 48, "k": 96}, {"d": 96, "k": 48}
    gate, up, down = (random_layer(**w, algebra=algebra, dtype=dtype, device=DEVICE) for w in (wide, wide, narrow))
    JointReading(gate, up)
    x, hidden = (torch.randn(2, 1, width, device=DEVICE).to(dtype)[1:] for width in (48, 96))
    outputs = [(layer, read, layer(read)) for layer, read in ((gate, x), (up, x), (down, hidden))]
    assert calls == [2, 1]
    for layer, read, y in outputs:
        weight = kron_weight(layer)
        scale = (read.double().abs() @ weight.abs().T + 1).max().item()
        expected = read.double() @ weight.T + layer.bias.double()
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=TOLERANCE[dtype] * scale)
    gate(torch.randn(2, 48, dtype=dtype, device=DEVICE))
    assert calls == [2, 1]  # with more tokens there are better ways


def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_use, "_DEVICE", DEVICE)
    monkeypatch.setattr(kernel_use, "_triton_works", lambda: True)


@pytest.fixture
def works(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this were a GPU."""
    _as_on_a_gpu(monkeypatch)


def _takes(layer: PHMLinear, x: Tensor) -> bool:
    factors = layer.P, layer.Q, layer.T
    with torch.no_grad():
        return has_kernel(layer.algebra, layer.in_features, layer.out_features, x, *factors)


@pytest.mark.usefixtures("works")
def test_the_kernel_takes_single_tokens_of_plain_calls_only() -> None:
    layer = PHMLinear(8, 8, Algebra.products(4))
    one = torch.randn(1, 8)
    assert _takes(layer, one)
    assert not _takes(layer, torch.randn(2, 8))
    assert not _takes(layer.double(), one.double())  # it sums in float32
    layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert not _takes(layer, one)
    with FlopCounterMode(display=False):
        assert not _takes(layer, one)
    asked = []
    torch.func.vmap(lambda x: asked.append(_takes(layer, x)) or x)(one[None])
    assert asked == [False]
    layer.T.data = layer.T.data.mT
    assert not _takes(layer, one)


@pytest.mark.parametrize(
    ("n", "size", "width", "pays"),
    [(2, 2, 2**14, True), (4, 4, 2**14, True), (8, 8, 2**12, True), (8, 8, 2**14, False), (4, 12, 2**12, False)],
)
def test_the_kernel_is_used_where_it_was_the_fastest_way(n: int, size: int, width: int, pays: bool) -> None:
    assert kernel_pays(Algebra.products(n, size), width, width) == pays
    assert not kernel_pays(Algebra.learned(4), 2**12, 2**12)


def test_where_triton_fails_the_kernel_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*tensors: Tensor) -> Tensor:
        raise RuntimeError("Failed to find C compiler")

    kernel_use._triton_works.cache_clear()
    monkeypatch.setattr("hyperfade.nn.kernel.one_token", broken)
    monkeypatch.setattr(torch, "ones", lambda *shape, device: torch.zeros(shape))  # there may be no GPU
    with pytest.warns(UserWarning, match="Failed to find C compiler"):
        assert not kernel_use._triton_works()
    kernel_use._triton_works.cache_clear()


@pytest.mark.usefixtures("works")
def test_a_stacked_layer_does_not_run_in_the_kernel() -> None:
    layer = random_layer(8, 8, Algebra.products(2), device=DEVICE)
    one = torch.randn(1, 8, device=DEVICE)
    with torch.inference_mode():
        expected = layer(one)
        layer.stack_()
        assert layer._execution(one).mixing != "kernel"
        torch.testing.assert_close(layer(one), expected)


@pytest.mark.usefixtures("works")
def test_a_layer_that_learns_does_not_run_in_the_kernel() -> None:
    layer = random_layer(8, 8, Algebra.products(2))
    assert layer._execution(torch.randn(1, 8)) == Execution("products", "blocks")
    with torch.inference_mode():
        assert layer._execution(torch.randn(1, 8)) == Execution("products", "kernel")


@settings(deadline=None, max_examples=12)
@given(
    tokens=st.integers(1, 9),
    blocks=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    width=st.integers(1, 700),
    turned=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_kernel_mixes_blocks_however_they_lie(
    tokens: int, blocks: tuple[int, int], width: int, turned: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    read, written = blocks
    x = torch.randn(read, tokens, width, device=DEVICE).transpose(0, 1) if turned else torch.randn(tokens, read, width)
    weights = torch.randn(read, written, device=DEVICE).T if turned else torch.randn(written, read, device=DEVICE)
    expected = torch.einsum("ab,mbw->maw", weights.double(), x.to(DEVICE).double())
    y = mix(x.to(DEVICE), weights)
    assert y.is_contiguous()
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-5)  # seen: 1.4e-6


@pytest.mark.usefixtures("works")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("algebra", [Algebra.products(4), Algebra.learned(4, 2)], ids=["products", "learned"])
def test_layers_with_many_tokens_mix_in_the_kernel(
    algebra: Algebra, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_use, "_MANY_MIXED", 8 * 96)
    torch.manual_seed(0)
    layer = random_layer(48, 96, algebra, dtype=dtype, device=DEVICE)
    x = torch.randn(16, 48, device=DEVICE).to(dtype)
    calls = []
    in_kernel = mix
    monkeypatch.setattr(f"{mix.__module__}.mix", lambda *arguments: calls.append(1) or in_kernel(*arguments))
    how = Execution("products" if algebra.form == "products" else "core", "matmul")
    with torch.no_grad():
        y = layer.run(x, how).double() + layer.bias.double()
    assert len(calls) == (2 if algebra.form == "products" else 1)
    weight = kron_weight(layer)
    scale = (x.double().abs() @ weight.abs().T + 1).max().item()
    expected = x.double() @ weight.T + layer.bias.double()
    torch.testing.assert_close(y, expected, rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.usefixtures("works")
def test_the_kernel_takes_large_mixes_of_plain_calls_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_use, "_MANY_MIXED", 1000)
    x, weights = torch.randn(50, 4, 5), torch.randn(4, 4)
    assert mixes_in_kernel(x, weights)
    assert not mixes_in_kernel(x[:49], weights)
    assert not mixes_in_kernel(x.double(), weights.double())  # it sums in float32
    assert not mixes_in_kernel(x, weights.half())
    assert not mixes_in_kernel(torch.empty(2**27, 4, 4, device="meta"), weights.to("meta"))  # counted in 32 bits
    with torch.autocast("cpu", torch.bfloat16):
        assert not mixes_in_kernel(x, weights)
    with FlopCounterMode(display=False):
        assert not mixes_in_kernel(x, weights)
    with forward_ad.dual_level():
        assert not mixes_in_kernel(forward_ad.make_dual(x, x), weights)
    assert not mixes_in_kernel(x.as_subclass(type("Other", (Tensor,), {})), weights)
    assert not mixes_in_kernel(torch.randn(50, 65, 5), torch.randn(4, 65))  # too many coefficients for registers
    weights.requires_grad_()
    assert not mixes_in_kernel(x, weights)
    with torch.no_grad():
        assert mixes_in_kernel(x, weights)


def test_a_gpu_mixes_many_tokens_in_the_kernel_by_its_prices() -> None:
    price = prices("cuda", torch.bfloat16)
    few, many = (Mix(tokens * 512, 4, 4) for tokens in (64, 2048))
    assert price.small_product(few) == price.small_product_call + 64 * 512 * 4 * price.small_product_element
    assert price.small_product(many) < price.small_product_call + 2048 * 512 * 4 * price.small_product_element / 4
    shape = Algebra.products(4), 3584, 18944, 2048, torch.bfloat16
    assert execution(*shape, "cuda") == Execution("products", "matmul")
    for kind in ("cuda without kernels", "mps"):
        assert prices(kind, torch.bfloat16).kernel_element is None
        assert execution(*shape, kind) == Execution("products", "sums")
    assert prices("cuda", torch.float64).kernel_element is None


def test_prices_know_whether_the_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    _as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(kernel_use, "_DEVICE", "cuda")
    assert processor("cuda") == "cuda"
    with FlopCounterMode(display=False):
        assert processor("cuda") == "cuda without kernels"
    monkeypatch.setattr(kernel_use, "_triton_works", lambda: False)
    assert processor("cuda") == "cuda without kernels"
