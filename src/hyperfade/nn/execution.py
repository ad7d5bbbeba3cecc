"""Which exact form a layer runs in, chosen by cost: a pure function of algebra, widths, tokens, dtype and device.

The cost of a form is what it moves and multiplies, in the few unit prices of `Prices`. They come from `prices.json`,
which `benchmarks/execution.py` measures on each kind of processor; the same script times every form over a grid of
shapes and keeps how much slower than the best form the choice was.
"""

import json
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import files
from typing import Literal

import torch

from hyperfade.algebra import Algebra
from hyperfade.nn.forms import Mixing, Rows, fixed_factors, fixed_rows
from hyperfade.nn.kernel_use import kernels_run, mix_pays

_COMMON_CPU, _COMMON_ACCELERATOR = "cpu AVX2", "cuda"
_FEW_ROWS = 32  # up to which a product waits for its weights
_ONE_CALL_WEIGHTS = 2_000_000
_FEWEST_TOKENS = 256  # in a chunk: with fewer the matrix products themselves get slower


Form = Literal["core", "slices", "products", "weight"]


@dataclass(frozen=True)
class Execution:
    """core: mix around the one core; slices: the same with the core in slices; products: R products; weight: build Ŵ.
    chunk: tokens handled at a time, None for all at once."""

    form: Form
    mixing: Mixing
    chunk: int | None = None


@dataclass(frozen=True)
class Mix:
    """`read` blocks become `written` blocks of `width` elements over all tokens."""

    width: int
    read: int
    written: int


@dataclass(frozen=True)
class Prices:
    """Unit prices in seconds of one dtype on one kind of processor, and the cache that temporaries should stay in."""

    product_call: float  # fixed price of a matrix product
    multiply_add: float
    weight_byte: float  # streamed from memory
    few_rows_weight_byte: float  # streamed from memory by a product with 2 to 32 rows
    few_rows_sliced_byte: float  # the same in slices
    derived_byte: float  # of a sum of two weights, written to memory of its own
    small_product_call: float  # fixed price of mixing by a matrix product
    small_product_element: float  # written
    kernel_element: float | None  # read or written by our own kernel for large mixes, where there is one
    sum_call: float  # fixed price of an elementwise operation
    sum_element: float  # written
    cache_bytes: int | None  # None: chunks gain nothing
    weight_element: float | None = None  # of Ŵ, built; None where that was not measured

    def products(self, calls: int, multiply_adds: int, weight_bytes: int) -> float:
        """Large matrix products wait for arithmetic or for their weights, whichever takes longer."""
        return calls * self.product_call + max(multiply_adds * self.multiply_add, weight_bytes * self.weight_byte)

    def small_product(self, mix: Mix) -> float:
        """Mixing blocks by a matrix product, or by our kernel where that takes over."""
        if self.kernel_element is not None and mix_pays(mix.width, mix.read, mix.written):
            return self.small_product_call + mix.width * (mix.read + mix.written) * self.kernel_element
        return self.small_product_call + mix.width * mix.written * self.small_product_element

    def sums(self, calls: int, elements: int) -> float:
        """So many elementwise operations that write so many elements in all."""
        return calls * self.sum_call + elements * self.sum_element


def processor(device_type: str) -> str:
    """The kind of processor that prices are kept for: what it can do, right now, matters, not who made it."""
    if device_type in ("cpu", "meta"):
        vectors = torch.backends.cpu.get_cpu_capability()
        return f"cpu {vectors}{' AMX' if vectors == 'AVX512' and _has_amx() else ''}"
    return device_type if kernels_run(device_type) else f"{device_type} without kernels"


@lru_cache
def _has_amx() -> bool:
    """Whether bfloat16 matrices are multiplied by units of their own, as far as this version of torch can tell."""
    told = getattr(torch.cpu, "get_capabilities", None)
    return told is not None and bool(told().get("amx_bf16"))


@lru_cache
def prices(kind: str, dtype: torch.dtype) -> Prices:
    """The prices of a processor kind; one that was not measured, in this dtype, has those of the nearest that was."""
    table = json.loads((files("hyperfade.nn") / "prices.json").read_text(encoding="utf-8"))
    nearest = _COMMON_CPU if kind.startswith("cpu") else _COMMON_ACCELERATOR
    name = "bfloat16" if dtype in (torch.bfloat16, torch.float16) else "float32"
    found = Prices(**(table.get(kind, {}).get(name) or table[nearest][name]))
    return found if kind in table and dtype.itemsize <= 4 else replace(found, kernel_element=None)


@lru_cache(maxsize=4096)
def execution(
    algebra: Algebra,
    in_features: int,
    out_features: int,
    tokens: int,
    dtype: torch.dtype,
    kind: str,
    keeps: bool = False,
) -> Execution:
    """The cheapest form for `tokens` rows of (in_features → out_features) on a `processor` kind: a pure function.
    keeps: what is derived of the weights is made once, not at every call."""
    price = prices(kind, dtype)
    shape = algebra, in_features, out_features, tokens, dtype
    options = candidates(algebra)
    costs = {option: seconds(option, *shape, price, keeps) for option in options}
    best = min(options, key=costs.__getitem__)
    if price.cache_bytes is None or algebra.form == "terms" or best.form == "weight":
        return best  # a core's large temporaries are its output already, and Ŵ is built once
    chunk = max(_FEWEST_TOKENS, price.cache_bytes // ((in_features + out_features) * dtype.itemsize) // 64 * 64)
    return best if tokens < 1.5 * chunk else replace(best, chunk=chunk)


def kernel_calls(algebra: Algebra, in_features: int, out_features: int) -> int:
    """In how many calls a kernel for few bits runs the products of a layer: 1, or one for each.

    One call spares the fixed price of the others, but runs n rows for every token through all products, where the other
    way runs one. What that costs grows with (n − 1) times the weights (`benchmarks/low_bit_forms.py`).
    """
    weights = algebra.size * (in_features // algebra.n) * (out_features // algebra.n)
    return 1 if (algebra.n - 1) * weights <= _ONE_CALL_WEIGHTS else algebra.size


def candidates(algebra: Algebra) -> tuple[Execution, ...]:
    """Every form that computes layers of this algebra exactly, unchunked."""
    if algebra.form == "products":
        return Execution("products", "matmul"), Execution("products", "sums"), Execution("weight", "matmul")
    ways: tuple[Mixing, ...] = ("matmul",) if algebra.trainable else ("matmul", "sums")
    forms = [Execution(form, mixing) for form in ("core", "slices") for mixing in ways]
    forms.append(Execution("weight", "matmul"))
    if fixed_factors(algebra) is not None:
        forms.append(Execution("products", "sums"))
    return tuple(forms)


def seconds(
    how: Execution,
    algebra: Algebra,
    in_features: int,
    out_features: int,
    tokens: int,
    dtype: torch.dtype,
    price: Prices,
    keeps: bool = False,
) -> float:
    """What a form is expected to take for `tokens` rows; keeps: with derived weights made already."""
    n, size, d, k = algebra.n, algebra.size, in_features // algebra.n, out_features // algebra.n  # per block
    if how.form == "weight":
        whole = in_features * out_features
        multiplied = price.products(1, tokens * whole, whole * dtype.itemsize)
        if 1 < tokens <= _FEW_ROWS:
            multiplied = max(multiplied, price.product_call + whole * dtype.itemsize * price.few_rows_weight_byte)
        if keeps:
            return multiplied
        built = math.inf if price.weight_element is None else whole * price.weight_element
        built += price.product_call + 2 * price.sum_call  # A = P Qᵀ, Σ_i A_i ⊗ S_i block by block, and its layout
        if price.cache_bytes is not None and whole * dtype.itemsize > price.cache_bytes:
            built += 2 * whole * dtype.itemsize * price.derived_byte  # the blocks and Ŵ go to memory, each its own
        return built + multiplied
    stored_bytes = size * d * k * dtype.itemsize
    factors = fixed_factors(algebra)
    if how.form == "products":
        count = algebra.num_products
        total = price.products(1 if factors is None else count, count * tokens * d * k, stored_bytes)
        mixes = [Mix(tokens * d, n, count), Mix(tokens * k, count, n)]
        rows = None if factors is None else (factors.q, factors.p)
        if factors is not None and not keeps:
            total += _operations(factors.u) * (price.sum_call + d * k * dtype.itemsize * price.derived_byte)
    else:
        rows, few = n * tokens, 1 < n * tokens <= _FEW_ROWS
        byte = price.few_rows_weight_byte if how.form == "core" else price.few_rows_sliced_byte
        total = price.products(1, size * rows * d * k, stored_bytes)
        if few:
            total = max(total, price.product_call + stored_bytes * byte)
        elif how.form == "slices":
            return math.inf
        mix_in = in_features <= out_features
        mixes = [Mix(tokens * d, n, n * size) if mix_in else Mix(tokens * k, n * size, n)]
        fixed = fixed_rows(algebra, mix_in)
        rows = None if fixed is None else (fixed,)
    if how.mixing == "matmul":
        return total + sum(price.small_product(mix) for mix in mixes)
    if rows is None:  # a running sum over the blocks, for all outputs at once
        return total + sum(price.sums(mix.read, mix.width * mix.read * mix.written) for mix in mixes)
    for mix, coefficients in zip(mixes, rows, strict=True):  # and at last the blocks are joined
        total += price.sums(_operations(coefficients), _operations(coefficients) * mix.width)
    return total + price.sums(1, mixes[-1].width * mixes[-1].written)


def _operations(rows: Rows) -> int:
    """Elementwise operations that `forms.combined` runs for these rows: one per entry, less what a view gives."""
    return sum(sum(factor != 0 for factor in row) - (1.0 in row) for row in rows)
