"""The PHM layer against x Wᵀ with W built by `torch.kron`, and as the `nn.Linear` it stands in for."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kron_oracle import TOLERANCE, kron_weight, random_layer
from torch import Tensor, nn

from hyperfade.algebra import Algebra, fit
from hyperfade.errors import AlgebraError
from hyperfade.nn import PHMLinear

ALGEBRAS = [
    Algebra.named("paper"),
    Algebra.named("paper", terms=3),
    Algebra.named("quaternion"),
    Algebra.named("octonion"),
    Algebra.named("cyclic", n=3),
    Algebra.learned(2, 3),
    Algebra.learned(4),
    Algebra.products(2),
    Algebra.products(3, 5),
    Algebra.products(4),
]
FORMS = [Algebra.named("quaternion"), Algebra.learned(4, 3), Algebra.products(4)]
WIDTHS = [(8, 16), (16, 8), (8, 8)]


def _name(algebra: Algebra) -> str:
    return f"{algebra.name}-{algebra.n}-{algebra.size}"


@given(
    st.sampled_from(ALGEBRAS),
    st.integers(1, 4),
    st.integers(1, 4),
    st.lists(st.integers(0, 3), max_size=3),
    st.booleans(),
    st.sampled_from([0, 2]),
    st.sampled_from(list(TOLERANCE)),
)
def test_output_is_the_product_with_a_kron_built_weight(
    algebra: Algebra, d_block: int, k_block: int, batch: list[int], bias: bool, rank: int, dtype: torch.dtype
) -> None:
    d, k = algebra.n * d_block, algebra.n * k_block
    layer = random_layer(d, k, algebra, bias=bias, companion_rank=rank, dtype=dtype)
    x = torch.randn(*batch, d).to(dtype)
    y = layer(x)
    expected = x.double() @ kron_weight(layer).T
    if bias:
        expected = expected + layer.bias.double()
    assert y.dtype == dtype
    assert y.shape == (*batch, k)
    scale = (x.double().abs() @ kron_weight(layer).abs().T + 1).max().item() if x.numel() else 1
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=TOLERANCE[dtype] * scale)


@given(st.sampled_from(ALGEBRAS), st.integers(1, 4), st.integers(1, 4), st.sampled_from([0, 2]))
def test_weight_is_kron_built(algebra: Algebra, d_block: int, k_block: int, rank: int) -> None:
    layer = random_layer(algebra.n * d_block, algebra.n * k_block, algebra, companion_rank=rank, dtype=torch.float64)
    torch.testing.assert_close(layer.weight, kron_weight(layer), rtol=1e-12, atol=1e-12)  # seen 2e-15


@pytest.mark.parametrize("algebra", FORMS, ids=_name)
@pytest.mark.parametrize(("d", "k"), WIDTHS)
def test_strided_inputs_give_the_same(algebra: Algebra, d: int, k: int) -> None:
    layer, x = random_layer(d, k, algebra), torch.randn(d, 5).T
    for strided in (x, torch.randn(5, 2, d)[:, 1], torch.randn(1, d).expand(5, d), torch.randn(5, 2 * d)[:, ::2]):
        torch.testing.assert_close(layer(strided), layer(strided.contiguous()), rtol=1e-5, atol=1e-5)  # seen 0


@pytest.mark.parametrize("algebra", FORMS, ids=_name)
@pytest.mark.parametrize(("d", "k"), WIDTHS)
def test_wrong_widths_fail(algebra: Algebra, d: int, k: int) -> None:
    with pytest.raises(RuntimeError):
        random_layer(d, k, algebra)(torch.randn(3, 2 * d))
    with pytest.raises(AlgebraError, match="n=4"):
        PHMLinear(d + 1, k, algebra)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("algebra", FORMS, ids=_name)
@pytest.mark.parametrize(("d", "k"), WIDTHS)
def test_autocast_gives_half_precision_as_linear_does(algebra: Algebra, d: int, k: int, rank: int) -> None:
    layer, x = PHMLinear(d, k, algebra, companion_rank=rank), torch.randn(5, d)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == nn.Linear(d, k)(x).dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0, atol=0.05)  # seen 0.009
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


@pytest.mark.parametrize("algebra", FORMS, ids=_name)
@pytest.mark.parametrize(("d", "k"), WIDTHS[:2])
def test_compiles_without_graph_breaks(algebra: Algebra, d: int, k: int) -> None:
    torch._dynamo.reset()
    layer = random_layer(d, k, algebra, companion_rank=2)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for x in (torch.randn(3, d), torch.randn(7, d), torch.randn(2, 5, d)):
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-4)  # seen 0
    torch._dynamo.reset()


@pytest.mark.parametrize("algebra", FORMS, ids=_name)
@pytest.mark.parametrize(("d", "k"), [(4, 8), (8, 4)])
def test_gradients_are_right(algebra: Algebra, d: int, k: int) -> None:
    layer = random_layer(d, k, algebra, companion_rank=1, dtype=torch.float64)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    mixing = {"terms": {"A", "core.weight"} if algebra.trainable else {"core.weight"}, "products": {"P", "Q", "T"}}
    assert set(names) == mixing[algebra.form] | {"bias", "companion.reduce.weight", "companion.expand.weight"}

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    x = torch.randn(3, d, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *parameters))


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("algebra", FORMS, ids=_name)
@pytest.mark.parametrize(("d", "k"), WIDTHS)
def test_from_linear_reproduces_a_hypercomplex_linear(
    algebra: Algebra, d: int, k: int, bias: bool, calibrated: bool
) -> None:
    source = PHMLinear(d, k, algebra)
    linear = nn.Linear(d, k, bias=bias)
    with torch.no_grad():
        linear.weight.copy_(source.weight)
    inputs = torch.randn(40, d)
    layer = PHMLinear.from_linear(linear, algebra, inputs.T @ inputs / 40 if calibrated else None)
    x = torch.randn(6, d)
    torch.testing.assert_close(layer(x), linear(x), rtol=0, atol=1e-5)  # seen 2.4e-7
    assert (layer.bias is None) == (not bias)
    if bias:
        assert torch.equal(layer.bias, linear.bias)
        assert layer.bias.data_ptr() != linear.bias.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("algebra", FORMS, ids=_name)
@pytest.mark.parametrize(("d", "k"), WIDTHS)
def test_from_linear_holds_what_the_fit_found(algebra: Algebra, d: int, k: int, dtype: torch.dtype) -> None:
    linear = nn.Linear(d, k, dtype=dtype)
    layer = PHMLinear.from_linear(linear, algebra, companion_rank=2, sweeps=1)
    expected = fit(linear.weight, algebra, sweeps=1, companion_rank=2).dense()
    assert layer.weight.dtype == dtype
    assert {p.dtype for p in layer.parameters()} == {dtype}
    error = (kron_weight(layer) - expected).norm() / expected.norm()
    assert error < {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]  # seen 9e-8, 5e-3, 5e-4


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("algebra", ALGEBRAS, ids=_name)
def test_state_dict_round_trip(algebra: Algebra, rank: int) -> None:
    d, k, x = 2 * algebra.n, 3 * algebra.n, torch.randn(3, 2 * algebra.n)
    one, two = (random_layer(d, k, algebra, companion_rank=rank) for _ in range(2))
    assert not torch.equal(one(x), two(x))
    state = one.state_dict()
    assert ("A" in state) == (algebra.form == "terms")  # fixed algebras travel with the weights
    two.load_state_dict(state)
    assert torch.equal(one(x), two(x))


@pytest.mark.parametrize("algebra", ALGEBRAS, ids=_name)
def test_builds_on_the_meta_device(algebra: Algebra) -> None:
    d, k = 2 * algebra.n, 3 * algebra.n
    with torch.device("meta"):
        inside = PHMLinear(d, k, algebra, companion_rank=2)
    for layer in (inside, PHMLinear(d, k, algebra, companion_rank=2, device="meta")):
        assert all(tensor.is_meta for tensor in layer.state_dict().values())
        assert layer(torch.randn(3, d, device="meta")).shape == (3, k)
    source, x = random_layer(d, k, algebra, companion_rank=2), torch.randn(3, d)
    inside.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(inside(x), source(x))


@pytest.mark.parametrize("algebra", ALGEBRAS, ids=_name)
def test_fresh_weights_have_a_linears_variance(algebra: Algebra) -> None:
    d, k = 40 * algebra.n, 30 * algebra.n
    layer = PHMLinear(d, k, algebra)
    ratio = (layer.weight.std() / nn.Linear(d, k).weight.std()).item()
    assert ratio == pytest.approx(1, abs=0.06)  # seen 0.96 to 1.03
    assert not layer.bias.any()


@pytest.mark.parametrize("algebra", [a for a in ALGEBRAS if a.form == "terms"], ids=_name)
def test_the_core_is_exactly_a_linear(algebra: Algebra) -> None:
    """A subclass would not do: quantizers and adapters look at the type."""
    for d, k in ((2 * algebra.n, 3 * algebra.n), (3 * algebra.n, 2 * algebra.n)):
        core = PHMLinear(d, k, algebra).core
        assert type(core) is nn.Linear
        assert core.bias is None


def test_components_carry_gradients_and_follow_the_layout() -> None:
    for d, k in WIDTHS:
        for algebra in FORMS:
            layer = random_layer(d, k, algebra)
            assert layer.components.shape == (algebra.size, k // 4, d // 4)
            layer.weight.square().sum().backward()
            assert all(p.grad.any() for name, p in layer.named_parameters() if name != "bias")


@pytest.mark.parametrize("algebra", FORMS, ids=_name)
def test_a_deep_copy_is_independent(algebra: Algebra) -> None:
    layer, x = random_layer(8, 16, algebra, companion_rank=2), torch.randn(3, 8)
    layer(x)
    twin, before = copy.deepcopy(layer), layer(x)
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.mul_(2)
    assert torch.equal(layer(x), before)
    assert twin.algebra == algebra
    assert _name(algebra).split("-")[0] in repr(layer)
