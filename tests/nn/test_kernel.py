"""The kernel for one token, in Triton's interpreter, or on a GPU where there is one: the same product as kron's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kron_oracle import TOLERANCE, kron_weight, random_layer
from torch import nn

from hyperfade.algebra import Algebra
from hyperfade.nn import JointReading, forms, joint, phm
from hyperfade.nn.execution import Execution, has_kernel

pytest.importorskip("triton", reason="Triton is made for Linux")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@settings(deadline=None, max_examples=20)
@given(
    n=st.integers(2, 5),
    count=st.integers(1, 4),
    blocks=st.tuples(st.integers(1, 40), st.integers(1, 20)),
    layers=st.integers(1, 2),
    rows=st.sampled_from([2, 8]),
    seed=st.integers(0, 2**31),
)
def test_the_kernel_is_the_product_with_a_kron_built_weight(
    n: int, count: int, blocks: tuple[int, int], layers: int, rows: int, seed: int
) -> None:
    from hyperfade.nn.kernel import Tile, one_token

    torch.manual_seed(seed)
    d, k = n * blocks[0], n * blocks[1]
    made = [random_layer(d, k, Algebra.products(n, count), bias=False, device=DEVICE) for _ in range(layers)]
    p, q, t = (torch.cat([getattr(layer, name).detach() for layer in made]) for name in ("P", "Q", "T"))
    x = torch.randn(1, d, device=DEVICE)
    y = one_token(x.view(1, n, -1), p, q, t, layers, Tile(rows, 64, 4))
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

    for module in (phm, joint):
        monkeypatch.setattr(module, "has_kernel", lambda tokens, dtype, kind: tokens == 1)
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


def test_only_gpus_run_the_kernel_and_only_one_token() -> None:
    assert has_kernel(1, torch.bfloat16, "cuda")
    assert has_kernel(1, torch.float32, "cuda")
    assert not has_kernel(2, torch.bfloat16, "cuda")
    assert not has_kernel(1, torch.float64, "cuda")  # it sums in float32
    assert not has_kernel(1, torch.bfloat16, "cpu AVX512")


def test_a_layer_that_learns_does_not_run_in_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phm, "has_kernel", lambda tokens, dtype, kind: True)
    layer: nn.Module = random_layer(8, 8, Algebra.products(2))
    assert layer._execution(torch.randn(1, 8)) == Execution("products", "blocks")  # type: ignore[operator]
    with torch.inference_mode():
        assert layer._execution(torch.randn(1, 8)) == Execution("products", "kernel")  # type: ignore[operator]
