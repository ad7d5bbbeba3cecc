"""Named algebras against independent definitions, their products, and their costs."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hyperfade.algebra import NAMED, Algebra
from hyperfade.algebra.bases import orthogonal_rows
from hyperfade.errors import AlgebraError
from hyperfade.nn import LightSpec, PHMLinear
from hyperfade.nn.execution import candidates

FIXED = [
    *(Algebra.named("complex", terms=t) for t in (1, 2, 3, 4)),
    Algebra.named("split_complex"),
    Algebra.named("quaternion"),
    Algebra.named("quaternion", terms=3),
    Algebra.named("octonion"),
    *(Algebra.named("cyclic", n=n) for n in (2, 3, 5)),
    *(Algebra.named("z2", n=n) for n in (2, 4, 8)),
    Algebra.named("z2", terms=3, n=4),
]
LEARNED = [
    *(Algebra.learned(n, t) for n, t in ((2, 1), (2, 2), (2, 4), (3, 5), (4, 4))),
    *(Algebra.products(n, r) for n, r in ((2, 1), (2, 2), (2, 4), (3, 3), (4, 7), (4, 16))),
]
ALL = FIXED + LEARNED


def _name(algebra: Algebra) -> str:
    return f"{algebra.name}-{algebra.n}-{algebra.size}"


def _multiply(algebra: Algebra, x: Tensor, y: Tensor) -> Tensor:
    """x · y with coordinates (..., n)."""
    return torch.einsum("iab,...i,...b->...a", algebra.structure(), x, y)


def _hamilton(x: Tensor, y: Tensor) -> Tensor:
    """The quaternion product, written out."""
    a, b, c, d = x
    e, f, g, h = y
    return torch.stack(
        [
            a * e - b * f - c * g - d * h,
            a * f + b * e + c * h - d * g,
            a * g - b * h + c * e + d * f,
            a * h + b * g - c * f + d * e,
        ]
    )


def test_complex_bases_are_those_published() -> None:
    published = torch.tensor(
        [
            [[1, 0], [0, 1]],  # I
            [[0, -1], [1, 0]],  # J
            [[1, 0], [0, -1]],  # K
            [[0, 1], [1, 0]],  # L
        ]
    ).double()
    for t in (1, 2, 3, 4):
        assert torch.equal(Algebra.named("complex", terms=t).structure(), published[:t])


def test_complex_product_is_pythons() -> None:
    x, y = torch.randn(2, 20, 2, dtype=torch.float64)
    expected = torch.view_as_real(torch.view_as_complex(x) * torch.view_as_complex(y))
    torch.testing.assert_close(_multiply(Algebra.named("complex"), x, y), expected, rtol=1e-12, atol=0)  # seen 0


def test_split_complex_squares_its_unit_to_one() -> None:
    j = torch.tensor([0.0, 1.0]).double()
    assert _multiply(Algebra.named("split_complex"), j, j).tolist() == [1, 0]


def test_quaternion_product_is_hamiltons() -> None:
    x, y = torch.randn(2, 4, dtype=torch.float64)
    torch.testing.assert_close(_multiply(Algebra.named("quaternion"), x, y), _hamilton(x, y))  # seen 4e-16
    one, i, j, k = torch.eye(4, dtype=torch.float64)
    for a, b, c in ((i, j, k), (j, k, i), (k, i, j)):
        assert torch.equal(_multiply(Algebra.named("quaternion"), a, b), c)
        assert torch.equal(_multiply(Algebra.named("quaternion"), b, a), -c)
        assert torch.equal(_multiply(Algebra.named("quaternion"), a, a), -one)


def test_octonion_product_doubles_hamiltons() -> None:
    """(a, b)(c, d) = (ac − d*b, da + bc*)."""
    x, y = torch.randn(2, 8, dtype=torch.float64)
    star = torch.tensor([1, -1, -1, -1]).double()
    a, b, c, d = *x.split(4), *y.split(4)
    expected = torch.cat([_hamilton(a, c) - _hamilton(d * star, b), _hamilton(d, a) + _hamilton(b, c * star)])
    torch.testing.assert_close(_multiply(Algebra.named("octonion"), x, y), expected)  # seen 9e-16
    e = torch.eye(8, dtype=torch.float64)
    octonion = Algebra.named("octonion")
    assert torch.equal(_multiply(octonion, e[0], y), y)
    for unit in e[1:]:
        assert torch.equal(_multiply(octonion, unit, unit), -e[0])
    z = torch.randn(8, dtype=torch.float64)
    left = _multiply(octonion, _multiply(octonion, x, y), z)
    assert (left - _multiply(octonion, x, _multiply(octonion, y, z))).norm() > 0.1  # not associative: seen 15


@pytest.mark.parametrize("name", ["complex", "quaternion", "octonion"])
def test_division_algebras_multiply_norms(name: str) -> None:
    algebra = Algebra.named(name)
    x, y = torch.randn(2, 50, algebra.n, dtype=torch.float64)
    product = _multiply(algebra, x, y)
    torch.testing.assert_close(product.norm(dim=1), x.norm(dim=1) * y.norm(dim=1), rtol=1e-13, atol=0)  # seen 3e-16


@given(st.integers(2, 9), st.integers(0, 100))
def test_cyclic_product_is_polynomials_modulo_x_to_the_n_minus_1(n: int, seed: int) -> None:
    x, y = np.random.default_rng(seed).normal(size=(2, n))
    full = np.append(np.convolve(x, y), 0)
    actual = _multiply(Algebra.named("cyclic", n=n), torch.from_numpy(x), torch.from_numpy(y))
    np.testing.assert_allclose(actual.numpy(), full[:n] + full[n:], atol=1e-13)  # seen 2e-15


@pytest.mark.parametrize("n", [2, 4, 8, 16])
def test_z2_product_is_xor_convolution(n: int) -> None:
    x, y = torch.randn(2, n, dtype=torch.float64)
    expected = torch.zeros(n, dtype=torch.float64)
    for i, j in itertools.product(range(n), repeat=2):
        expected[i ^ j] += x[i] * y[j]
    torch.testing.assert_close(_multiply(Algebra.named("z2", n=n), x, y), expected)  # seen 2e-15


@pytest.mark.parametrize("algebra", ALL, ids=_name)
def test_bilinear_factors_reconstruct_the_structure(algebra: Algebra) -> None:
    factors = algebra.bilinear_factors()
    if factors is None:
        assert algebra.name in ("complex", "octonion", "cyclic", "learned", "quaternion")
        return
    u, p, q = factors
    rebuilt = torch.einsum("ri,ra,rb->iab", u, p, q)
    assert (rebuilt - algebra.structure()).abs().max() < 1e-14  # seen 0


@pytest.mark.parametrize(
    ("algebra", "count"),
    [
        (Algebra.named("complex", terms=2), 3),
        (Algebra.named("complex", terms=3), 3),
        (Algebra.named("complex", terms=4), 4),
        (Algebra.named("split_complex"), 2),
        (Algebra.named("cyclic", n=2), 2),
        (Algebra.named("cyclic", n=3), 4),
        (Algebra.named("cyclic", n=4), 5),
        (Algebra.named("cyclic", n=8), 11),
        (Algebra.named("quaternion"), 8),
        *((Algebra.named("z2", n=n), n) for n in (2, 4, 8, 16)),
        (Algebra.products(4, 7), 7),
    ],
    ids=str,
)
def test_number_of_products(algebra: Algebra, count: int) -> None:
    factors = algebra.bilinear_factors()
    assert factors is not None
    assert (factors.u.shape[0], factors.p.shape[0], factors.q.shape[0]) == (count, count, count)


@pytest.mark.parametrize("algebra", LEARNED, ids=_name)
def test_learned_algebras_start_independent(algebra: Algebra) -> None:
    """No term or product of the start lies in the span of the others: all capacity is reachable."""
    flat = algebra.structure().reshape(algebra.size, -1)
    values = torch.linalg.svdvals(flat)
    assert values[-1] > 0.99 * values[0]  # the start is orthogonal: seen 1.0000


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6, 8, 12])
def test_orthogonal_rows_are_orthonormal(n: int) -> None:
    rows = orthogonal_rows(n)
    assert (rows @ rows.T - torch.eye(n)).abs().max() < 1e-14  # seen 1.4e-15


@given(st.sampled_from(ALL), st.integers(1, 4), st.integers(1, 4))
def test_num_parameters_are_the_layers(algebra: Algebra, d_block: int, k_block: int) -> None:
    d, k = algebra.n * d_block, algebra.n * k_block
    layer = PHMLinear(d, k, algebra, bias=False)
    assert algebra.num_parameters(d, k) == sum(p.numel() for p in layer.parameters())
    assert algebra.fraction * d * k == layer.components.numel()


@given(st.sampled_from(ALL), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_multiply_adds_are_those_of_the_leanest_form(algebra: Algebra, d_block: int, k_block: int, m: int) -> None:
    d, k = algebra.n * d_block, algebra.n * k_block
    layer = PHMLinear(d, k, algebra, bias=False)
    counts = {}
    for how in candidates(algebra):
        with FlopCounterMode(display=False) as counter:
            layer.run(torch.randn(m, d), how)
        counts[how.form, how.mixing] = counter.get_total_flops() / 2 / m
    if algebra.form == "products":
        assert counts["products", "matmul"] == algebra.multiply_adds(d, k)
        return
    by_terms = counts["core", "matmul"]
    if ("products", "sums") in counts:  # whose sums the counter does not see
        by_products = counts["products", "sums"] + algebra.num_products * (d + k)
        assert counts["products", "sums"] == algebra.num_products * d_block * k_block
        assert algebra.multiply_adds(d, k) == min(by_terms, by_products)
    else:
        assert by_terms == algebra.multiply_adds(d, k)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_companion_adds_its_multiply_adds(rank: int) -> None:
    layer = PHMLinear(8, 12, Algebra.products(4), companion_rank=rank)
    assert LightSpec.of(layer).multiply_adds == Algebra.products(4).multiply_adds(8, 12) + rank * (8 + 12)


def test_paper_is_complex_with_two_bases() -> None:
    assert Algebra.named("paper") == Algebra.named("complex") == Algebra("complex", 2, 2)
    assert Algebra.named("paper", terms=3).size == 3
    assert Algebra.named("paper").fraction == 0.5


def test_every_known_name_can_be_made() -> None:
    for name in NAMED:
        n = 4 if name in ("cyclic", "z2") else None
        assert Algebra.named(name, n=n).structure().dtype == torch.float64
    assert Algebra.named("split-complex") == Algebra.named("split_complex")


def test_an_algebra_is_a_value() -> None:
    assert len({Algebra.products(4), Algebra.products(4, 4), Algebra.learned(4)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        Algebra.products(4).n = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Algebra.named("sedenion"), "sedenion"),
        (lambda: Algebra.named("quaternion", n=2), "Give n=4"),
        (lambda: Algebra.named("cyclic"), "n=None"),
        (lambda: Algebra.named("cyclic", n=1), "at least 2"),
        (lambda: Algebra.named("z2", n=6), "power of two"),
        (lambda: Algebra.named("z2", n=0), "n=0"),
        (lambda: Algebra.named("complex", terms=5), "1 to 4 bases"),
        (lambda: Algebra.named("quaternion", terms=0), "1 to 4 bases"),
        (lambda: Algebra.learned(1), "at least 2"),
        (lambda: Algebra.learned(2, 5), "terms=5"),
        (lambda: Algebra.products(3, 10), "products=10"),
        (lambda: Algebra.products(3, 0), "products=0"),
    ],
)
def test_impossible_algebras_are_refused(make, says: str) -> None:
    with pytest.raises(AlgebraError) as caught:
        make()
    assert says in str(caught.value)


@pytest.mark.parametrize("call", ["num_parameters", "multiply_adds", "check_features"])
def test_unfit_features_name_dimensions_that_fit(call: str) -> None:
    with pytest.raises(AlgebraError, match="in_features=30, out_features=45") as caught:
        getattr(Algebra.products(4), call)(30, 45)
    assert caught.value.hint == "n = 3, 5 would fit."
    with pytest.raises(AlgebraError) as caught:
        getattr(Algebra.products(4), call)(7, 13)
    assert "exclude" in caught.value.hint
