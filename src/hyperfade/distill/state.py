"""The state of a training run on disk, complete enough that a killed run continued equals one that was never killed.

Parameters that train, AdamW's moments, the random state and the step: safetensors and JSON, no pickle. The data order
is a pure function of seed and step (`data_order`), so the step is the data position.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hyperfade.errors import CheckpointError
from hyperfade.hub import write_folder

_TENSORS, _PROGRESS = "state.safetensors", "progress.json"
_RANDOM, _DEVICE_RANDOM = "random_state", "device_random_state"


def data_order(num_examples: int, seed: int, first: int) -> Iterator[int]:
    """Endless example numbers from position `first`: every epoch is a fresh permutation seeded by (seed, epoch)."""
    epoch, offset = divmod(first, num_examples)
    while True:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        yield from torch.randperm(num_examples, generator=generator).tolist()[offset:]
        epoch, offset = epoch + 1, 0


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains, under names that stay the same when the dense branches are dropped."""
    return {name.replace(".light.", "."): p for name, p in model.named_parameters() if p.requires_grad}


def save_state(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write the state after `step` optimizer steps to `folder`/step-N, atomically; older steps are then removed."""
    tensors: dict[str, Tensor] = {_RANDOM: torch.get_rng_state()}
    if torch.accelerator.is_available():
        tensors[_DEVICE_RANDOM] = torch.get_device_module().get_rng_state()
    for name, parameter in trained_parameters(model).items():
        tensors[f"parameter/{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{key}/{name}"] = value
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}

    def write(target: Path) -> None:
        save_file(tensors, target / _TENSORS)
        (target / _PROGRESS).write_text(json.dumps({"step": step}), encoding="utf-8")

    target = folder / f"step-{step:07d}"
    write_folder(target, write)
    for old in folder.glob("step-*"):
        if old != target:
            shutil.rmtree(old, ignore_errors=True)


def latest_step(folder: Path) -> int:
    """The step of the newest state in `folder`; 0 where there is none."""
    return max((int(path.name.removeprefix("step-")) for path in folder.glob("step-*")), default=0)


@torch.no_grad()
def load_state(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restore what `save_state` wrote after `step`. Raises `CheckpointError` where it does not fit this model."""
    target = folder / f"step-{step:07d}"
    tensors = load_file(target / _TENSORS)
    torch.set_rng_state(tensors.pop(_RANDOM))
    if torch.accelerator.is_available() and _DEVICE_RANDOM in tensors:
        torch.get_device_module().set_rng_state(tensors.pop(_DEVICE_RANDOM))
    parameters = trained_parameters(model)
    saved = {key.removeprefix("parameter/") for key in tensors if key.startswith("parameter/")}
    if saved != set(parameters):
        odd = sorted(saved ^ set(parameters))
        raise CheckpointError(
            f"{target} holds the state of another model or recipe ({len(odd)} parameters differ, e.g. {odd[0]}).",
            "Start in a new output folder.",
        )
    for name, parameter in parameters.items():
        parameter.copy_(tensors[f"parameter/{name}"])
        state = {}
        for key in [key for key in tensors if key.startswith("optimizer/") and key.endswith(f"/{name}")]:
            kind = key.split("/")[1]
            value = tensors[key]
            state[kind] = value if kind == "step" else value.to(parameter.device)
        if state:
            optimizer.state[parameter] = state
