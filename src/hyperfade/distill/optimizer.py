"""What trains, in which dtype, and by which optimizer."""

import torch
from torch import nn

from hyperfade.nn import light_modules
from hyperfade.recipe import Train


def to_float32_(student: nn.Module) -> dict[nn.Parameter, torch.dtype]:
    """Make what trains float32, because steps are smaller than bfloat16 can add; returns the dtypes it had."""
    dtypes = {p: p.dtype for p in student.parameters() if p.requires_grad}
    for parameter in dtypes:
        parameter.data = parameter.data.float()
    return dtypes


def optimizer_of(student: nn.Module, train: Train) -> tuple[torch.optim.AdamW, list[float]]:
    """AdamW over the light layers and over whatever else trains, with the two peak learning rates."""
    light = {id(p) for layer in light_modules(student).values() for p in layer.parameters()}
    trained = [p for p in student.parameters() if p.requires_grad]
    groups = [
        ([p for p in trained if id(p) in light], train.learning_rate),
        ([p for p in trained if id(p) not in light], train.dense_learning_rate),
    ]
    groups = [(parameters, peak) for parameters, peak in groups if parameters]
    optimizer = torch.optim.AdamW([{"params": parameters} for parameters, _ in groups], weight_decay=train.weight_decay)
    return optimizer, [peak for _, peak in groups]
