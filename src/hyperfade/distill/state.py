"""The state of a training run on disk, complete enough that a killed run continued equals one that was never killed.

Parameters that train, AdamW's moments and the step: safetensors and JSON, no pickle. The data order and everything
random are pure functions of seed and step (`order.py`, `seed_step`), so the step is all there is to know of them.
"""

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hyperfade.errors import CheckpointError
from hyperfade.hub import write_folder

_TENSORS, _PROGRESS = "state.safetensors", "progress.json"
_NAME = re.compile(r"step-(\d+)")
_OTHER_RUN = "Start in a new output folder."


def seed_step(seed: int, step: int, process: int) -> None:
    """Seed what is drawn during a step (dropout), anew in every step and differently in every process."""
    torch.manual_seed((seed * 1_000_003 + step) * 1_009 + process)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains, under names that stay the same when the dense branches are dropped."""
    return {name.replace(".light.", "."): p for name, p in model.named_parameters() if p.requires_grad}


def save_state(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write the state after `step` optimizer steps to `folder`/step-N, atomically."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in trained_parameters(model).items():
        tensors[f"parameter/{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{key}/{name}"] = value
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}

    def write(target: Path) -> None:
        save_file(tensors, target / _TENSORS)
        (target / _PROGRESS).write_text(json.dumps({"step": step}), encoding="utf-8")

    write_folder(_place(folder, step), write)


def saved_steps(folder: Path) -> list[int]:
    """The steps after which `folder` has a state, ascending."""
    found = (_NAME.fullmatch(path.name) for path in folder.glob("step-*"))
    return sorted(int(match[1]) for match in found if match)


def latest_step(folder: Path) -> int:
    """The step of the newest state in `folder`; 0 where there is none."""
    return max(saved_steps(folder), default=0)


def remove_state(folder: Path, step: int) -> None:
    """Remove the state after `step` steps."""
    shutil.rmtree(_place(folder, step), ignore_errors=True)


@torch.no_grad()
def load_state(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restore what `save_state` wrote after `step`. Raises `CheckpointError`, before anything is changed, where it does
    not fit this model or cannot be read."""
    target = _place(folder, step)
    try:
        tensors = load_file(target / _TENSORS)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{target / _TENSORS} cannot be read: {error}.", _OTHER_RUN) from error
    parameters = trained_parameters(model)
    saved = {key.removeprefix("parameter/") for key in tensors if key.startswith("parameter/")}
    odd = sorted(saved ^ set(parameters))
    odd += [n for n, p in parameters.items() if n in saved and tensors[f"parameter/{n}"].shape != p.shape]
    if odd:
        raise CheckpointError(
            f"{target} holds the state of another model or recipe ({len(odd)} parameters differ, e.g. {odd[0]}).",
            _OTHER_RUN,
        )
    optimizer.state.clear()
    for name, parameter in parameters.items():
        parameter.copy_(tensors[f"parameter/{name}"])
        state = {}
        for key in [key for key in tensors if key.startswith("optimizer/") and key.endswith(f"/{name}")]:
            kind = key.split("/")[1]
            value = tensors[key]
            state[kind] = value if kind == "step" else value.to(parameter.device)
        if state:
            optimizer.state[parameter] = state


def _place(folder: Path, step: int) -> Path:
    return folder / f"step-{step:07d}"
