"""Every exact form gives the same product, and the choice between them is a pure function that follows the costs."""

import copy
import json
import pickle
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from kron_oracle import TOLERANCE, kron_weight, random_layer
from torch import nn

from hyperfade.algebra import Algebra
from hyperfade.compose.quantize import quantize_
from hyperfade.nn import PHMLinear, keep_derived_, phm
from hyperfade.nn.execution import Execution, Prices, candidates, execution, prices, processor, seconds

ALGEBRAS = [
    Algebra.named("complex"),
    Algebra.named("split_complex"),
    Algebra.named("paper", terms=3),
    Algebra.named("quaternion"),
    Algebra.named("z2", n=4),
    Algebra.named("z2", n=8),
    Algebra.named("cyclic", n=3),
    Algebra.named("cyclic", n=4),
    Algebra.learned(4, 3),
    Algebra.products(2),
    Algebra.products(3, 5),
    Algebra.products(8),
]
TABLE = json.loads((files("hyperfade.nn") / "prices.json").read_text(encoding="utf-8"))
PRODUCTS = Algebra.products(4)
TRAINING = {"products": [Execution("products", "blocks")]}


def _name(algebra: Algebra) -> str:
    return f"{algebra.name}-{algebra.n}-{algebra.size}"


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("widths", [(2, 3), (3, 2)], ids=str)
@pytest.mark.parametrize("algebra", ALGEBRAS, ids=_name)
def test_every_form_is_the_product_with_a_kron_built_weight(
    algebra: Algebra, widths: tuple[int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    d, k = (algebra.n * width for width in widths)
    layer = random_layer(d, k, algebra, bias=False, dtype=dtype)
    weight = kron_weight(layer)
    for tokens in (1, 2, 7):
        x = torch.randn(tokens, d).to(dtype)
        scale = (x.double().abs() @ weight.abs().T + 1).max().item()
        for how in [*candidates(algebra), *TRAINING.get(algebra.form, [])]:
            for chunk in (None, 3):
                y = layer.run(x, replace(how, chunk=chunk))
                torch.testing.assert_close(
                    y.double(), x.double() @ weight.T, rtol=0, atol=TOLERANCE[dtype] * scale, msg=str(how)
                )  # seen, of scale: float64 3.9e-16, float32 1.3e-7, float16 1.3e-3, bfloat16 8.2e-3


@torch.no_grad()
def test_chunks_change_nothing() -> None:
    layer, x = random_layer(16, 24, PRODUCTS, bias=False), torch.randn(10, 16)
    for how in candidates(PRODUCTS):
        for chunk in (1, 4, 10, 99):
            # seen 4e-6 at outputs up to 45: a lone token takes another way through the matrix library
            torch.testing.assert_close(layer.run(x, replace(how, chunk=chunk)), layer.run(x, how), rtol=1e-5, atol=1e-5)


def test_the_choice_is_what_costs_least() -> None:
    for algebra in ALGEBRAS:
        d, k = 24 * algebra.n, 48 * algebra.n
        for tokens in (1, 64, 4096):
            for kind in TABLE:
                price = prices(kind, torch.float32)
                chosen = execution(algebra, d, k, tokens, torch.float32, kind)
                cost = {how: seconds(how, algebra, d, k, tokens, torch.float32, price) for how in candidates(algebra)}
                assert cost[replace(chosen, chunk=None)] == min(cost.values())


def test_slices_run_where_few_rows_are_dear_and_only_there() -> None:
    dear = Prices(1e-5, 1e-11, 1e-10, 3e-10, 1e-10, 1e-10, 1e-5, 1e-10, None, 1e-5, 1e-10, None)
    learned = Algebra.learned(4)

    def form(tokens: int) -> str:
        cost = {h: seconds(h, learned, 2048, 11008, tokens, torch.float32, dear) for h in candidates(learned)}
        return min(cost, key=cost.__getitem__).form

    assert [form(tokens) for tokens in (1, 8, 9, 512)] == ["slices", "slices", "core", "core"]


def test_the_same_arguments_give_the_same_choice() -> None:
    arguments = (PRODUCTS, 2048, 11008, 512, torch.bfloat16, "cpu AVX2")
    first = execution(*arguments)
    with torch.inference_mode(), torch.device("meta"):
        execution.cache_clear()
        prices.cache_clear()
        assert execution(*arguments) == first


def test_arithmetic_decides_with_many_tokens_and_calls_with_few() -> None:
    arithmetic = Prices(1e-5, 1e-11, 1e-10, 1e-10, 1e-10, 1e-10, 1e-5, 1e-10, None, 1e-5, 1e-10, None)
    complex_ = Algebra.named("complex")

    def choice(tokens: int) -> Execution:
        options = candidates(complex_)
        cost = {how: seconds(how, complex_, 2048, 11008, tokens, torch.float32, arithmetic) for how in options}
        return min(cost, key=cost.__getitem__)

    assert choice(1).form == "core"  # one call, and the same bytes
    assert choice(2048) == Execution("products", "sums")  # Gauss: three products for four


@pytest.mark.parametrize("kind", ["cpu NEON", "cpu DEFAULT", "mps", "xpu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16])
def test_processors_and_dtypes_that_were_not_measured_have_a_choice(kind: str, dtype: torch.dtype) -> None:
    assert execution(PRODUCTS, 2048, 11008, 512, dtype, kind).form == "products"


def test_this_processor_has_a_name() -> None:
    vectors = torch.backends.cpu.get_cpu_capability()
    assert processor("cpu") == processor("meta")
    assert processor("cpu").removesuffix(" AMX") == f"cpu {vectors}"
    known = Path("/proc/cpuinfo")
    if vectors == "AVX512" and hasattr(torch.cpu, "get_capabilities") and known.exists():
        assert processor("cpu").endswith(" AMX") == ("amx_bf16" in known.read_text(encoding="utf-8"))


def test_the_weight_is_built_where_mixing_is_dear_and_there_are_tokens_enough_and_a_price() -> None:
    dear = Prices(1e-5, 1e-11, 1e-10, 1e-10, 1e-10, 1e-10, 1e-5, 1e-9, None, 1e-5, 1e-9, None, weight_element=1e-9)
    algebra = Algebra.products(4, 12)

    def form(tokens: int, price: Prices) -> str:
        cost = {h: seconds(h, algebra, 384, 512, tokens, torch.float32, price) for h in candidates(algebra)}
        return min(cost, key=cost.__getitem__).form

    assert [form(tokens, dear) for tokens in (1, 16, 256, 4096)] == ["products", "products", "weight", "weight"]
    assert form(4096, replace(dear, weight_element=None)) == "products"
    assert form(4096, replace(dear, small_product_element=1e-11)) == "products"
    assert form(256, replace(dear, cache_bytes=500_000, derived_byte=1e-7)) == "products"  # 786 kB: out of the cache


@pytest.mark.parametrize("kind", TABLE)
def test_prices_are_positive_and_say_where_they_come_from(kind: str) -> None:
    assert TABLE[kind]["source"]
    for dtype in TABLE[kind].keys() - {"source"}:
        for name, price in TABLE[kind][dtype].items():
            assert (name in ("cache_bytes", "kernel_element") and price is None) or price > 0


def test_training_is_never_chunked_and_many_tokens_without_gradients_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phm, "processor", lambda _: "cpu AVX2")
    layer = PHMLinear(64, 64, PRODUCTS, bias=False)
    tokens = torch.randn(200_000, 64)
    assert layer._execution(tokens) == Execution("products", "blocks")
    with torch.no_grad():
        assert layer._execution(tokens).chunk is not None


def test_training_builds_the_weight_where_its_products_run_in_a_dtype_for_which_that_pays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(phm, "processor", lambda _: "cpu AVX512 AMX")
    layer, tokens = PHMLinear(384, 512, Algebra.products(4, 12), bias=False), torch.randn(512, 384)
    assert layer._execution(tokens) == Execution("products", "blocks")
    with torch.autocast("cpu", torch.bfloat16):
        assert layer._execution(tokens) == Execution("weight", "matmul")
        assert layer(tokens).dtype == torch.bfloat16


@pytest.mark.parametrize("how", [Execution("products", "blocks"), Execution("weight", "matmul")], ids=str)
def test_gradients_in_training_are_those_of_the_product_with_a_kron_built_weight(how: Execution) -> None:
    layer, x = random_layer(16, 24, PRODUCTS, bias=False, dtype=torch.float64), torch.randn(10, 16).double()
    found, expected = (x.clone().requires_grad_() for _ in range(2))
    weight = sum(
        torch.kron(torch.outer(p, q), t) for p, q, t in zip(layer.P, layer.Q, layer.T, strict=True)
    )  # W = Σ_r (P_r Q_rᵀ) ⊗ T_r
    factors = [layer.P, layer.Q, layer.T]
    own = torch.autograd.grad(layer.run(found, how).square().sum(), [found, *factors])
    oracle = torch.autograd.grad((expected @ weight.T).square().sum(), [expected, *factors])
    for a, b in zip(own, oracle, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)  # observed 5e-16 of the largest


@pytest.mark.parametrize(
    ("algebra", "how", "maker"),
    [
        (Algebra.named("complex"), Execution("products", "sums"), "combined"),
        (Algebra.named("complex"), Execution("weight", "matmul"), "kron_sum"),
        (PRODUCTS, Execution("weight", "matmul"), "kron_sum"),
    ],
    ids=str,
)
def test_kept_weights_are_made_once_and_follow_the_layer(
    algebra: Algebra, how: Execution, maker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, make = [], getattr(phm, maker)
    layer, x = random_layer(16, 24, algebra, bias=False), torch.randn(5, 16)
    monkeypatch.setattr(phm, maker, lambda *arguments: made.append(1) or make(*arguments))
    with torch.inference_mode():
        plain = [layer.run(x, how) for _ in range(2)]
        assert len(made) == 2
        keep_derived_(layer)
        kept = [layer.run(x, how) for _ in range(3)]
        assert len(made) == 3
        assert all(torch.equal(y, plain[0]) for y in kept)
    with torch.no_grad():
        for factor in layer.parameters():  # W is linear in each, and a fixed algebra has but one
            factor.mul_(2)
            expected = x.double() @ kron_weight(layer).T
            # observed 4e-6 at outputs up to 200
            torch.testing.assert_close(layer.run(x, how).double(), expected, rtol=1e-5, atol=1e-5)
        layer.to(torch.float64)
        assert layer.run(x.double(), how).dtype == torch.float64
    trained = torch.autograd.grad(layer.run(x.double(), how).sum(), list(layer.parameters()))  # nothing kept takes part
    assert all(gradient.any() for gradient in trained)


@pytest.mark.parametrize("kind", TABLE)
def test_a_weight_that_is_kept_costs_no_building(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phm, "processor", lambda _: kind)
    learned = Algebra.learned(4)  # as many multiply-adds as dense, and mixes beside them
    layer, tokens = PHMLinear(64, 64, learned, bias=False), torch.randn(512, 64)
    with torch.no_grad():
        before = layer._execution(tokens).form
        keep_derived_(layer)
        assert (before, layer._execution(tokens).form) == ("weight" if "AMX" in kind else "core", "weight")
        with torch.autocast("cpu", torch.bfloat16):
            assert layer._execution(tokens).form == before
    assert layer._execution(tokens).form == before
    if kind.startswith("cpu"):  # where a token waits for bytes, more than for calls
        large = Algebra.products(4), 2048, 11008
        assert execution(*large, 1, torch.bfloat16, kind, keeps=True).form == "products"


def test_few_tokens_pay_for_a_kept_weight_what_they_pay_for_a_core() -> None:
    learned, price = Algebra.learned(4), prices("cpu AVX512", torch.float32)
    for tokens in (2, 8):
        core, weight = (
            seconds(Execution(form, "matmul"), learned, 512, 2048, tokens, torch.float32, price, keeps=True)
            for form in ("core", "weight")
        )
        assert core < weight  # of four blocks' weights four times as many bytes


@pytest.mark.parametrize("algebra", [PRODUCTS, Algebra.learned(4)], ids=_name)
def test_what_is_kept_leaves_with_the_weights_and_does_not_travel(algebra: Algebra) -> None:
    layer = PHMLinear(64, 128, algebra, bias=False)
    model, x, how = nn.Sequential(layer), torch.randn(5, 64), Execution("weight", "matmul")
    assert keep_derived_(model) == ["0"]
    with torch.inference_mode():
        layer.run(x, how)
        assert layer.derived
        assert copy.deepcopy(layer).derived == pickle.loads(pickle.dumps(layer)).derived == {}
        assert layer.state_dict().keys() == dict(layer.named_parameters()).keys()
        other = PHMLinear(64, 128, algebra, bias=False)
        layer.load_state_dict(other.state_dict())
        assert torch.equal(layer.run(x, how), other.run(x, how))
        with torch.autocast("cpu", torch.bfloat16):
            assert layer.run(x, how).dtype == torch.bfloat16
        assert torch.equal(layer.run(x, how), other.run(x, how))
        layer.to(torch.bfloat16)
        assert layer.derived == {}
        layer.run(x.bfloat16(), how)
        quantize_(model, "int8")
        layer.run(x.bfloat16(), Execution("products" if algebra is PRODUCTS else "core", "matmul"))
        assert layer.derived == {}
    assert keep_derived_(model) == []
    assert keep_derived_(model, keep=False) == []
    assert layer.derived is None
