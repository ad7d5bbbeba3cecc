"""The basis is ours to choose: hidden units of an FFN may be permuted freely.

Rows of the readers (gate and up) move together with columns of the writer (down). The FFN computes the same function,
but which units share a block, and so a component, changes.
"""

import torch
from torch import Tensor, nn

from hyperfade.surgery.families import FFN


def energy_order(second_moment: Tensor) -> Tensor:
    """Hidden units by falling energy E[h²]: an order (hidden,) for `permute_hidden_`; C is (hidden, hidden)."""
    return torch.argsort(second_moment.diagonal(), descending=True, stable=True)


def permute_hidden_(linears: dict[str, nn.Linear], ffn: FFN, order: Tensor) -> None:
    """Reorder the hidden units of `ffn`. Its parameters become new tensors: a teacher keeps the old ones."""
    for name in ffn.readers:
        reader = linears[name]
        reader.weight = _frozen(reader.weight[order])
        if reader.bias is not None:
            reader.bias = _frozen(reader.bias[order])
    writer = linears[ffn.writer]
    writer.weight = _frozen(writer.weight[:, order])


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(), requires_grad=False)
