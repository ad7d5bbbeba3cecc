"""Where experts are stored as tensors, and how their module is opened so that each tensor becomes a layer.

transformers holds the experts of a layer in one module, with a parameter (experts, …, …) for gate and up together
(`gate_up_proj`; `up_proj` where there is no gate) and one for `down_proj`. Nearly all follow one contract, the one of
its decorator `use_experts_implementation`: called with tokens, chosen experts and weights, the gate applied by
`_apply_gate`, each matrix (out, in), or (in, out) where the module `is_transposed`. Llama 4 has its own. A module of
experts that follows neither stays dense, and the plan says so.
"""

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from hyperfade.nn import ArrangedExperts, ExpertsLinear, RoutedExperts

WRITER = "down_proj"
READERS = ("gate_up_proj", "up_proj")
_MATRIX = re.compile(r"(gate|up|down|w\d|wi|wo|fc\d)(_|$)")


@dataclass(frozen=True)
class Experts:
    """FFNs of one shape, stored together: parameters `tensors` (experts, …, …) of the module `name`.

    matrices: the reader's and the writer's as dense layers, sharing storage, by the tensor's name; none where the
    module is of an unknown make.
    """

    name: str
    tensors: tuple[str, ...]
    number: int
    matrices: dict[str, ExpertsLinear]


def find_experts(model: nn.Module) -> tuple[Experts, ...]:
    """Every module of `model` that holds the matrices of many FFNs in tensors of three dimensions, in module order."""
    found = []
    for name, module in model.named_modules():
        own = {key: p for key, p in module.named_parameters(recurse=False) if p.dim() == 3 and _MATRIX.search(key)}
        counts = {len(p) for p in own.values()}
        if len(own) >= 2 and len(counts) == 1:
            found.append(Experts(name, tuple(own), counts.pop(), _matrices(module, own)))
    return tuple(found)


def _matrices(module: nn.Module, tensors: dict[str, nn.Parameter]) -> dict[str, ExpertsLinear]:
    """The module's matrices, reader first, or none where its make is not known."""
    arranged = isinstance(module, Llama4TextExperts)
    known = arranged or hasattr(type(module), "_apply_gate")
    names = [*(reader for reader in READERS if reader in tensors), *({WRITER} & tensors.keys())]
    if not known or len(names) != 2 or not all(tensors[name].is_floating_point() for name in names):
        return {}
    transposed = arranged or getattr(module, "is_transposed", False)
    found = {}
    for name in names:
        weight, bias = tensors[name], module._parameters.get(f"{name}_bias")
        if transposed:
            weight = nn.Parameter(weight.detach().transpose(1, 2), requires_grad=weight.requires_grad)
        found[name] = ExpertsLinear(weight, bias).train(module.training)
    reader, writer = found.values()
    hidden = writer.in_features * (2 if names[0] == READERS[0] else 1)
    return found if (reader.in_features, reader.out_features) == (writer.out_features, hidden) else {}


def open_experts_(model: nn.Module, names: Iterable[str]) -> None:
    """Make the tensors of the named modules of experts layers of their own, by the same names, sharing storage. The
    model computes what it did before."""
    wanted = set(names)
    for experts in find_experts(model):
        if experts.name not in wanted:
            continue
        module = model.get_submodule(experts.name)
        rest = copy.copy(module)
        gone = {part for name in experts.matrices for part in (name, f"{name}_bias")}
        rest._parameters = {name: p for name, p in module._parameters.items() if name not in gone}
        rest._is_hf_initialized = True  # type: ignore[assignment]  (transformers would look for the matrices)
        kind = ArrangedExperts if isinstance(module, Llama4TextExperts) else RoutedExperts
        opened = kind(rest, dict(experts.matrices), experts.number)
        model.set_submodule(experts.name, opened.train(module.training))


def close_experts_(model: nn.Module) -> list[str]:
    """Undo `open_experts_`: every tensor is one of numbers again, those of light layers materialised. Their names."""
    found = []
    for name, mixture in opened_experts(model).items():
        module = mixture.rest
        for key in (mixture.reader, mixture.writer):
            matrix: Any = mixture.get_submodule(key)
            weight = matrix.weight.detach()
            if isinstance(mixture, ArrangedExperts) or getattr(module, "is_transposed", False):
                weight = weight.transpose(1, 2).contiguous()
            module.register_parameter(key, nn.Parameter(weight, requires_grad=False))
            if matrix.bias is not None:
                module.register_parameter(f"{key}_bias", matrix.bias)
            found.append(f"{name}.{key}")
        model.set_submodule(name, module)
    return found


def opened_experts(model: nn.Module) -> dict[str, ArrangedExperts | RoutedExperts]:
    """The opened modules of experts by name."""
    kinds = (ArrangedExperts, RoutedExperts)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def tensor_names(module: str) -> tuple[str, ...]:
    """What the tensors of a module of experts may be called."""
    return tuple(f"{module}.{key}" for key in (*READERS, WRITER))
