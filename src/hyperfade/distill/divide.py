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
from hyperfade.nn import light_modules
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


class Reached:
    """Which trained weights of a divided model the examples of a step have reached: those of modules that ran.

    With one process what they do not reach has no gradient, and AdamW passes over it; FSDP2 gives it zeros.
    """

    def __init__(self, model: nn.Module) -> None:
        self._ran: set[nn.Module] = set()
        self._users: dict[nn.Parameter, set[nn.Module]] = {}
        lights = light_modules(model)
        within = {part: layer for layer in lights.values() for part in layer.modules()}
        for module in model.modules():
            user = within.get(module, module)  # a light layer may read its core's weight without calling the core
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad:
                    self._users.setdefault(parameter, set()).add(user)
        for user in set().union(*self._users.values()):
            user.register_forward_hook(lambda module, *_: self._ran.add(module))

    def leave_out_others_(self, parameters: list[nn.Parameter]) -> None:
        """Take the gradients of what no process's examples have reached since the last call."""
        counts = torch.tensor([float(bool(self._users[p] & self._ran)) for p in parameters])
        self._ran.clear()
        sum_([counts])
        for parameter, processes in zip(parameters, counts.tolist(), strict=True):
            if not processes:
                parameter.grad = None


def _dense_within(layers: Mapping[str, nn.Module]) -> list[nn.Module]:
    return [blend.dense for layer in layers.values() for blend in blends(layer).values()]


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
