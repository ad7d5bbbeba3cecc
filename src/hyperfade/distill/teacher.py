"""The teacher: the untouched base model. It never trains and costs no second copy of the weights."""

import copy

from torch import nn


def teacher_of(model: nn.Module) -> nn.Module:
    """A frozen twin of `model` whose parameters share storage with it. Take it before the model is changed.

    Swapping layers in `model` leaves the twin alone. Parameters that will train must stop sharing: `unshare_`.
    """
    memo = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    memo |= {id(b): b.detach() for b in model.buffers()}
    return copy.deepcopy(model, memo).eval()


def unshare_(parameter: nn.Parameter) -> None:
    """Give a parameter storage of its own."""
    parameter.data = parameter.data.clone()
