"""Algebras: the mixing rules that turn small component weights into a large matrix.

A hypercomplex algebra of dimension n multiplies two vectors of n blocks. Written as a tensor A (t, n, n), component i
of the weight meets block b of the input and lands, scaled by A[i, a, b], in block a of the output:

    W = Σ_i A_i ⊗ S_i            terms form:    A (t, n, n), S (t, k/n, d/n)
    W = Σ_r (P_r Q_rᵀ) ⊗ T_r     products form: P (R, n), Q (R, n), T (R, k/n, d/n)

The two describe the same family. The products form shows the arithmetic: one block product per r, so R/n² of the dense
multiply-adds, where the terms form needs t/n. The smallest R that writes an algebra exactly is its bilinear rank: 3 for
the complex numbers (Gauss), 8 for quaternions, n for the group algebra of Z₂^m (Walsh-Hadamard).

An `Algebra` is a value. It holds no weights: learned algebras give their starting point, layers own what trains.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hyperfade.errors import AlgebraError

NAMED = ("complex", "split_complex", "quaternion", "octonion", "cyclic", "z2")


class BilinearFactors(NamedTuple):
    """A[i, a, b] = Σ_r U[r, i] P[r, a] Q[r, b], float64: U (R, t), P (R, n), Q (R, n)."""

    u: Tensor
    p: Tensor
    q: Tensor


@dataclass(frozen=True)
class Algebra:
    """A mixing rule of dimension `n` with `size` terms (t) or products (R). Make one with the class methods."""

    name: str
    n: int
    size: int

    @classmethod
    def named(cls, name: str, terms: int | None = None, n: int | None = None) -> "Algebra":
        """A fixed algebra: complex, split_complex, quaternion, octonion, cyclic (any n), z2 (n a power of two), or
        `paper`: complex with 2 bases, as in arXiv 2512.08524 (terms=3 for its topmost layers).

        terms: use only the first t bases [default: all n]. complex goes to 4: its bases are I, J, K, L as published.
        Raises `AlgebraError` for an unknown name or an impossible size.
        """
        name = "complex" if name == "paper" else name.replace("-", "_")
        dimensions = {"complex": 2, "split_complex": 2, "quaternion": 4, "octonion": 8, "cyclic": n, "z2": n}
        if name not in dimensions:
            raise AlgebraError(f"There is no algebra called {name!r}.", f"Known: {', '.join(NAMED)}, paper.")
        dimension = dimensions[name]
        if dimension is None or (n is not None and n != dimension):
            wanted = dimension or "2, 4 or 8"
            raise AlgebraError(f"Algebra {name!r} got n={n}, its dimension is {wanted}.", f"Give n={wanted}.")
        if dimension < 2 or (name == "z2" and dimension & (dimension - 1)):
            raise AlgebraError(
                f"Algebra {name!r} cannot have n={n}.", "z2 needs a power of two; every n is at least 2."
            )
        most = 4 if name == "complex" else dimension
        size = dimension if terms is None else terms
        if not 1 <= size <= most:
            raise AlgebraError(f"Algebra {name!r} has 1 to {most} bases, {size} were asked for.", "Change terms.")
        return cls(name, dimension, size)

    @classmethod
    def learned(cls, n: int, terms: int | None = None) -> "Algebra":
        """A learned A (t, n, n) [default t = n]; starts at the cyclic group."""
        size = n if terms is None else terms
        _check_size("terms", n, size)
        return cls("learned", n, size)

    @classmethod
    def products(cls, n: int, products: int | None = None) -> "Algebra":
        """Learned P (R, n), Q (R, n) [default R = n, a diagonal algebra]; starts at Walsh-Hadamard (or cosine) rows."""
        size = n if products is None else products
        _check_size("products", n, size)
        return cls("products", n, size)

    @property
    def form(self) -> Literal["terms", "products"]:
        """Which of the two forms its layers have."""
        return "products" if self.name == "products" else "terms"

    @property
    def trainable(self) -> bool:
        """Whether the mixing is learned, or fixed."""
        return self.name in ("learned", "products")

    @property
    def fraction(self) -> float:
        """Component weights as a fraction of the dense matrix: t/n² or R/n²."""
        return self.size / self.n**2

    def structure(self) -> Tensor:
        """The structure tensor A (t, n, n), float64; for a learned algebra its starting point."""
        n, t = self.n, self.size
        if self.form == "products":
            p, q = self.starting_products()
            return p[:, :, None] * q[:, None, :]
        if self.name == "complex":
            return torch.tensor(
                [[[1, 0], [0, 1]], [[0, -1], [1, 0]], [[1, 0], [0, -1]], [[0, 1], [1, 0]]], dtype=torch.float64
            )[:t]
        if self.name in ("quaternion", "octonion"):
            return _cayley_dickson(n)[:t]
        i, a, b = torch.meshgrid(*[torch.arange(n)] * 3, indexing="ij")
        if self.name in ("split_complex", "z2"):
            return (i == a ^ b).double()[:t]
        shifts = (i == (a - b) % n).double()
        if t <= n:
            return shifts[:t]
        signs = orthogonal_rows(n) * math.sqrt(n)  # shifts times diagonals: n² matrices, orthogonal to each other
        return (signs[:, None, None, :] * shifts).reshape(n * n, n, n)[:t]

    def starting_products(self) -> tuple[Tensor, Tensor]:
        """P and Q (R, n), float64, of a products form before training: distinct pairs of orthonormal rows."""
        rows = orthogonal_rows(self.n)
        r = torch.arange(self.size)
        return rows[r % self.n], rows[(r + r // self.n) % self.n]

    @property
    def num_products(self) -> int:
        """R of `bilinear_factors`; 0 where none are known."""
        if self.form == "products":
            return self.size
        factors = self.bilinear_factors()
        return 0 if factors is None else len(factors.u)

    def bilinear_factors(self) -> BilinearFactors | None:
        """Exact factors with the fewest products known to us, or None; they run at R/n² of the dense multiply-adds."""
        a, t = self.structure(), self.size
        if self.form == "products":
            return BilinearFactors(torch.eye(t, dtype=torch.float64), *self.starting_products())
        if self.name == "complex" and 2 <= t <= 4:
            return _complex_factors(a)
        if self.name == "quaternion" and t == 4:
            return _quaternion_factors()
        if self.name in ("split_complex", "z2") or (self.name == "cyclic" and self.n == 2):
            rows = orthogonal_rows(self.n) * math.sqrt(self.n)
            return BilinearFactors(rows[:, :t], rows / self.n, rows)
        if self.name == "cyclic":
            return _cyclic_factors(self.n, t)
        return None

    def num_parameters(self, in_features: int, out_features: int) -> int:
        """Trainable numbers of a bias-free layer: t·dk/n² (or R·dk/n²), plus the mixing where it is learned."""
        self.check_features(in_features, out_features)
        mixing = self.size * self.n * (self.n if self.form == "terms" else 2) if self.trainable else 0
        return self.size * in_features * out_features // self.n**2 + mixing

    def multiply_adds(self, in_features: int, out_features: int) -> int:
        """Multiply-adds per token, mixes included, of the exact form that needs the fewest: R/n² or t/n of dense."""
        self.check_features(in_features, out_features)
        d, k, n, size = in_features, out_features, self.n, self.size
        by_products = self.num_products * (d * k // n**2 + d + k)
        by_terms = size * (d * k // n + n * min(d, k))
        return by_products if self.form == "products" or 0 < by_products < by_terms else by_terms

    def check_features(self, in_features: int, out_features: int, where: str = "the layer") -> None:
        """Raise `AlgebraError` unless n divides both widths; the hint names dimensions that do."""
        if in_features % self.n or out_features % self.n:
            common = math.gcd(in_features, out_features)
            fitting = [str(n) for n in (2, 3, 4, 5, 6, 8, 12, 16) if common % n == 0]
            hint = f"n = {', '.join(fitting)} would fit." if fitting else "No n up to 16 fits: exclude this layer."
            raise AlgebraError(
                f"n={self.n} does not divide {where}: in_features={in_features}, out_features={out_features}.", hint
            )


def orthogonal_rows(n: int) -> Tensor:
    """An orthonormal (n, n) float64 matrix: Walsh-Hadamard where n is a power of two, else the cosine transform."""
    if n & (n - 1) == 0:
        h = torch.ones(1, 1, dtype=torch.float64)
        while h.shape[0] < n:
            h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
        return h / math.sqrt(n)
    j = torch.arange(n, dtype=torch.float64)
    rows = torch.cos(math.pi / n * (j[None, :] + 0.5) * j[:, None]) * math.sqrt(2 / n)
    rows[0] /= math.sqrt(2)
    return rows


def _check_size(what: str, n: int, size: int) -> None:
    if n < 2 or not 1 <= size <= n * n:
        raise AlgebraError(
            f"n={n} with {what}={size} is impossible.", f"n is at least 2, {what} between 1 and n² = {n * n}."
        )


def _cayley_dickson(n: int) -> Tensor:
    """Left multiplications (n, n, n) by the units of the Cayley-Dickson algebra: A[i, :, j] = e_i e_j."""
    if n == 1:
        return torch.ones(1, 1, 1, dtype=torch.float64)
    half = n // 2
    small = _cayley_dickson(half)
    conjugate = torch.diag(torch.tensor([1.0] + [-1.0] * (half - 1), dtype=torch.float64))
    product = torch.zeros(n, n, n, dtype=torch.float64)
    # (a, b)(c, d) = (ac − d*b, da + bc*)
    product[:half, :half, :half] = small
    product[half:, :half, half:] = -torch.einsum("dxi,dj->ixj", small, conjugate)
    product[:half, half:, half:] = torch.einsum("dxi->ixd", small)
    product[half:, half:, :half] = torch.einsum("ixc,cj->ixj", small, conjugate)
    return product


def _complex_factors(a: Tensor) -> BilinearFactors:
    """Three products for I, J and for I, J, K; four (one per block) for all four bases."""
    t = a.shape[0]
    if t == 4:
        unit = torch.eye(2, dtype=torch.float64)
        return BilinearFactors(a.reshape(4, 4).T, unit.repeat_interleave(2, 0), unit.repeat(2, 1))
    if t == 2:  # (s₀+s₁)x₀, s₀(x₁−x₀), s₁(x₀+x₁): Gauss
        u, p, q = [[1, 1], [1, 0], [0, 1]], [[1, 1], [0, 1], [-1, 0]], [[1, 0], [-1, 1], [1, 1]]
    else:  # [[a, −b], [b, c]] is a symmetric matrix with its second row negated; symmetric 2×2 has rank 3
        u, p, q = [[0, -1, 0], [1, 1, 1], [-1, 1, 1]], [[1, -1], [1, 0], [0, -1]], [[1, 1], [1, 0], [0, 1]]
    return BilinearFactors(*(torch.tensor(x, dtype=torch.float64) for x in (u, p, q)))


def _cyclic_factors(n: int, t: int) -> BilinearFactors:
    """The real Fourier transform: one product for each real frequency, Gauss' three for each complex pair."""
    gauss = _complex_factors(Algebra.named("complex").structure())
    position = torch.arange(n, dtype=torch.float64)
    u, p, q = [], [], []
    for frequency in range(n // 2 + 1):
        angle = 2 * math.pi / n * frequency * position
        wave = torch.stack([angle.cos(), -angle.sin()])
        if 2 * frequency % n == 0:  # its own conjugate: the wave has no imaginary part
            real = wave[:1]
            u, p, q = [*u, real], [*p, real / n], [*q, real]
        else:
            u, p, q = [*u, gauss.u @ wave], [*p, gauss.p @ wave * (2 / n)], [*q, gauss.q @ wave]
    return BilinearFactors(torch.cat(u)[:, :t], torch.cat(p), torch.cat(q))


def _quaternion_factors() -> BilinearFactors:
    """Eight products: the Z₂² group algebra (four), first row negated, and one correction per wrong sign (four)."""
    group = Algebra.named("z2", n=4)
    factors = group.bilinear_factors()
    assert factors is not None
    flip = torch.tensor([-1.0, 1, 1, 1], dtype=torch.float64)
    unit = torch.eye(4, dtype=torch.float64)
    wrong = Algebra.named("quaternion").structure() - flip[None, :, None] * group.structure()
    i, a, b = wrong.nonzero(as_tuple=True)
    return BilinearFactors(
        torch.cat([factors.u, wrong[i, a, b][:, None] * unit[i]]),
        torch.cat([factors.p * flip, unit[a]]),
        torch.cat([factors.q, unit[b]]),
    )
