"""A model larger than a device: of several processes each holds a part of every parameter (FSDP2), and has a layer
whole only while that layer runs.

A unit, which is gathered at once, is a layer of the language model; within it every fading dense matrix is a unit of
its own, so that it can leave when the fade is over. What trains elsewhere is the last unit. What is frozen elsewhere
(vision tower, embeddings) stays whole in every process: a batch without images must not gather other units than the
next process's batch with images, or both wait for ever, and a unit that runs all the time is whole all the time anyway.

FSDP2 changes modules for good. So a twin of the student is divided and trained, and what it has learnt is collected in
the student at the end.
"""

from collections.abc import Mapping
from itertools import chain

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from hyperfade.distill.teacher import twin_of
from hyperfade.errors import TrainingError
from hyperfade.processes import is_first, join, sum_
from hyperfade.surgery import blends, region_of


def divided_twin(student: nn.Module) -> nn.Module:
    """A twin of `student` in parts; `student` keeps its modules, and gives up its weights until `collect_`.

    Raises `TrainingError` where this PyTorch cannot.
    """
    twin = twin_of(student)
    divide_(twin)
    for parameter in student.parameters():
        parameter.data = parameter.data.new_empty(0)
    return twin


def divide_(model: nn.Module) -> None:
    """Leave every process a part of `model`; for good."""
    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise TrainingError(
            f"train.shard needs PyTorch 2.13, this is {torch.__version__}: older ones wait for ever where one process's"
            " examples reach a weight and another's do not.",
            'pip install "torch>=2.13", or leave train.shard out.',
        )
    device = join().device
    assert device is not None
    mesh = init_device_mesh(device.type, (join().num_processes,))
    layers = layers_of(model)
    for unit in chain(_dense_within(layers), layers.values()):
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params={p for p in model.parameters() if not p.requires_grad})
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the step's weights sum up to 1 over processes already,
            module.set_force_sum_reduction_for_comms(True)  # and gloo can only sum
            module.set_reduce_scatter_unused_params(True)


def is_divided(model: nn.Module) -> bool:
    """Whether each process has a part of `model`."""
    return isinstance(model, FSDPModule)


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The language model's layers by name: what its outermost lists hold, so that a layer's experts are part of it."""
    lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and region_of(f"{n}.0") == "language"]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return {f"{name}.{i}": layer for name in outer for i, layer in model.get_submodule(name).named_children()}


@torch.no_grad()
def collect_(student: nn.Module, twin: nn.Module, dtypes: Mapping[nn.Parameter, torch.dtype]) -> None:
    """Give the first process's `student` the weights of its divided `twin`, those in `dtypes` in that dtype; both have
    the same modules by now. Other processes' students stay empty."""
    whole = dict(student.named_parameters())
    for name, parameter in twin.named_parameters():
        value = _whole(parameter)
        if is_first():
            whole[name].data = value.to(dtypes.get(whole[name], value.dtype))


def free_(dense: nn.Module) -> None:
    """Give back the memory of a dense matrix that has left a divided model: FSDP2 never forgets a unit."""
    for parameter in dense.parameters():
        if isinstance(parameter, DTensor):
            parameter.to_local().untyped_storage().resize_(0)


@torch.no_grad()
def leave_out_unreached_(parameters: list[nn.Parameter]) -> None:
    """Let what no process's examples reached have no gradient, as with one process; FSDP2 gives it zeros."""
    reached = torch.stack([_local(p.grad).any() if p.grad is not None else torch.tensor(False) for p in parameters])
    counts = reached.to(torch.float32)
    sum_([counts])
    for parameter, count in zip(parameters, counts.tolist(), strict=True):
        if not count:
            parameter.grad = None


def _dense_within(layers: Mapping[str, nn.Module]) -> list[nn.Module]:
    return [blend.dense for layer in layers.values() for blend in blends(layer).values()]


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
