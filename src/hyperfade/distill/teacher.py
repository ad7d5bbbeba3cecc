"""The teacher: the untouched base model. It never trains and costs no second copy of the weights."""

import copy

from torch import nn


def teacher_of(model: nn.Module) -> nn.Module:
    """A frozen twin of `model` whose parameters share storage with it. Take it before the model is changed.

    Swapping layers in `model` leaves the twin alone. Parameters that will train must stop sharing: `unshare_`.
    """
    return twin_of(model).requires_grad_(False).eval()


def twin_of(model: nn.Module) -> nn.Module:
    """A copy of `model` whose parameters share storage with it."""
    memo = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()}
    memo |= {id(b): b.detach() for b in model.buffers()}
    return copy.deepcopy(model, memo)


def unshare_(parameter: nn.Parameter) -> None:
    """Give a parameter storage of its own."""
    parameter.data = parameter.data.clone()
