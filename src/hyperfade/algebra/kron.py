"""The one layout: features are split into n contiguous blocks, A is the outer (block) index of the Kronecker product.

`torch.kron(A_i, S_i)` defines it; nothing in hyperfade uses another order.
"""

from torch import Tensor


def blocks(weight: Tensor, n: int) -> Tensor:
    """W (k, d) as (n, k/n, n, d/n): block row a, row in it, block column b, column in it. A view where possible."""
    k, d = weight.shape
    return weight.reshape(n, k // n, n, d // n)


def kron_sum(mixing: Tensor, components: Tensor) -> Tensor:
    """Σ_i A_i ⊗ S_i: mixing A (t, n, n), components S (t, k/n, d/n) → W (k, d)."""
    t, n, _ = mixing.shape
    _, rows, columns = components.shape
    flat = mixing.reshape(t, n * n).T @ components.reshape(t, rows * columns)
    return flat.view(n, n, rows, columns).permute(0, 2, 1, 3).reshape(n * rows, n * columns)


def rearranged(weight: Tensor, n: int) -> Tensor:
    """W (k, d) → (n², dk/n²), one row per block: a sum of t Kronecker products has rank t (Van Loan 1993)."""
    return blocks(weight, n).permute(0, 2, 1, 3).reshape(n * n, -1)
