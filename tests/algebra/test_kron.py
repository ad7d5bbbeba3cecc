"""The one layout against `torch.kron`."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperfade.algebra import blocks, kron_sum, rearranged

sizes = st.integers(1, 5)


def _draw(t: int, n: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(t, n, n, dtype=torch.float64), torch.randn(t, rows, columns, dtype=torch.float64)


@given(sizes, sizes, sizes, sizes)
def test_kron_sum_is_a_sum_of_krons(t: int, n: int, rows: int, columns: int) -> None:
    a, s = _draw(t, n, rows, columns)
    expected = sum(torch.kron(a[i], s[i]) for i in range(t))
    torch.testing.assert_close(kron_sum(a, s), expected, rtol=1e-13, atol=1e-13)  # seen 2e-15


@given(sizes, sizes, sizes, sizes)
def test_blocks_follow_the_published_formula(t: int, n: int, rows: int, columns: int) -> None:
    """W.view(n, k/n, n, d/n)[a, :, b, :] = Σ_i A[i, a, b] S[i]."""
    a, s = _draw(t, n, rows, columns)
    w = sum(torch.kron(a[i], s[i]) for i in range(t))
    view = blocks(w, n)
    for row in range(n):
        for column in range(n):
            expected = (a[:, row, column, None, None] * s).sum(0)
            torch.testing.assert_close(view[row, :, column, :], expected, rtol=1e-13, atol=1e-13)  # seen 9e-16
    assert view.data_ptr() == w.data_ptr()


@given(st.integers(2, 4), sizes, sizes)
def test_rearranging_makes_a_kron_an_outer_product(n: int, rows: int, columns: int) -> None:
    a, s = _draw(1, n, rows, columns)
    torch.testing.assert_close(rearranged(torch.kron(a[0], s[0]), n), torch.outer(a.flatten(), s.flatten()))


def test_rearranging_keeps_rows_in_block_order() -> None:
    w = torch.arange(24.0).view(4, 6)
    expected = torch.stack([w[:2, :3].flatten(), w[:2, 3:].flatten(), w[2:, :3].flatten(), w[2:, 3:].flatten()])
    assert torch.equal(rearranged(w, 2), expected)


def test_a_sum_of_krons_has_the_rank_of_its_terms() -> None:
    a, s = _draw(3, 4, 5, 6)
    assert torch.linalg.matrix_rank(rearranged(kron_sum(a, s), 4)) == 3
