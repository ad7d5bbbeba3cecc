"""The basis is ours to choose: hidden units of an FFN may be permuted freely, and those that matter little left out.

Rows of the readers (gate and up) move together with columns of the writer (down). The FFN computes the same function,
but which units share a block, and so a component, changes. Where units are left out (width pruning), what they
contributed can be foretold from the others as far as they are correlated: with C = E[h hᵀ] of the hidden units h and S
those that stay, the writer W becomes

    D = W C[:, S] C[S, S]⁻¹        the minimiser of E‖W h − D h_S‖²

and what is left of the error cannot be reached by any linear map of h_S.
"""

import torch
from torch import Tensor, nn

from hyperfade.algebra import in_float64, output_error, solve_psd, square_root, tail_errors
from hyperfade.surgery.families import FFN


def energy_order(second_moment: Tensor) -> Tensor:
    """Hidden units by falling energy E[h²]: an order (hidden,) for `permute_hidden_`; C is (hidden, hidden)."""
    return torch.argsort(second_moment.diagonal(), descending=True, stable=True)


def contribution_order(writer: Tensor, second_moment: Tensor) -> Tensor:
    """Hidden units by falling E[h²] ‖column of W‖², what each adds to the output by itself: an order (hidden,).

    writer W (k, hidden), C (hidden, hidden). The score of Minitron (arXiv 2407.14679) and, squared and summed over
    rows, of Wanda (2306.11695). Choosing one unit after the other for what it adds to those chosen gained nothing.
    """
    score = second_moment.diagonal() * in_float64(writer).square().sum(0)
    return torch.argsort(score, descending=True, stable=True)


def permute_hidden_(linears: dict[str, nn.Linear], ffn: FFN, order: Tensor) -> None:
    """Reorder the hidden units of `ffn`; those that `order` leaves out are gone.

    Its parameters become new tensors: a teacher keeps the old ones.
    """
    writer = linears[ffn.writer]
    rows = torch.cat([order, order + writer.in_features]) if ffn.fused else order
    for name in ffn.readers:
        reader = linears[name]
        reader.weight = _frozen(reader.weight[rows])
        reader.out_features = len(rows)
        if reader.bias is not None:
            reader.bias = _frozen(reader.bias[rows])
    writer.weight = _frozen(writer.weight[:, order])
    writer.in_features = len(order)


def refitted_writer(writer: Tensor, second_moment: Tensor, kept: Tensor) -> tuple[Tensor, float]:
    """D (k, kept), float64, and its relative output error, from W (k, hidden) and C (hidden, hidden).

    C should carry a small ridge already: units may be linearly dependent.
    """
    whole = in_float64(writer)
    cross = whole @ second_moment[:, kept]
    refitted = solve_psd(second_moment[kept][:, kept].clone(), cross.T).T
    return refitted, output_error(whole, _spread(refitted, kept, whole), second_moment)


def pruned_error(writer: Tensor, second_moment: Tensor, kept: Tensor) -> float:
    """The relative output error of leaving out all units but `kept` and changing nothing else."""
    whole = in_float64(writer)
    return output_error(whole, _spread(whole[:, kept], kept, whole), second_moment)


def kept_errors(writer: Tensor, second_moment: Tensor) -> Tensor:
    """The error of `refitted_writer` for the first 0, 1, … hidden units at once: (hidden + 1,), float64.

    writer W (k, hidden) and C (hidden, hidden), both with the units in the order in which they are kept. With C = L Lᵀ,
    L lower triangular, h = L z for uncorrelated z, and the first m units know just the first m of z: what is lost is
    the energy of the other columns of W L.
    """
    root = square_root(second_moment)
    if root.triu(1).any():  # C is only semidefinite, and this root is not triangular: of the same C, one that is
        root = torch.linalg.qr(root.T).R.T
    return tail_errors((in_float64(writer) @ root).square().sum(0))


def _spread(columns: Tensor, kept: Tensor, like: Tensor) -> Tensor:
    """Columns at their places among zeros."""
    return torch.zeros_like(like).index_copy_(1, kept, columns)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(), requires_grad=False)
