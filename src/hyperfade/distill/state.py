"""The state of a training run on disk, complete enough that a killed run continued equals one that was never killed.

Parameters that train, AdamW's moments and the step: safetensors and JSON, no pickle. The data order and everything
random are pure functions of seed and step (`order.py`, `seed_step`), so the step is all there is to know of them. Of a
divided model (`divide.py`) every process writes its part, with where it belongs, so other processes in another number
can continue.
"""

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from hyperfade.distill.divide import is_divided
from hyperfade.errors import CheckpointError
from hyperfade.hub import partial_of, write_folder
from hyperfade.processes import is_first, wait

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
    """Write the state after `step` optimizer steps to `folder`/step-N, atomically. All processes call it."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in trained_parameters(model).items():
        tensors[f"parameter/{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{key}/{name}"] = value.detach()
    place, divided = _place(folder, step), is_divided(model)

    def write(target: Path) -> None:
        if divided:
            wait()  # the folder is there
            _save_parts(tensors, target)
        else:
            save_file({k: v.cpu().contiguous().clone() for k, v in tensors.items()}, target / _TENSORS)
        (target / _PROGRESS).write_text(json.dumps({"step": step}), encoding="utf-8")

    if is_first():
        write_folder(place, write)
    elif divided:
        wait()
        _save_parts(tensors, partial_of(place))


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
    parameters = trained_parameters(model)
    try:
        tensors = _load_parts(target, parameters) if is_divided(model) else load_file(target / _TENSORS)
    except (SafetensorError, OSError, ValueError, CheckpointException) as error:
        raise CheckpointError(f"{target} cannot be read: {error}.", _OTHER_RUN) from error
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


def _save_parts(tensors: dict[str, Tensor], target: Path) -> None:
    """This process's parts; what is no parameter's size (AdamW's step) is whole in all, and one of them writes it."""
    flat = {key: value.reshape(-1) if value.dim() == 0 else value for key, value in tensors.items()}
    save(flat, storage_writer=HuggingFaceStorageWriter(str(target), save_distributed=True))


def _load_parts(target: Path, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """This process's parts of all that is saved in `target`, laid out like `parameters` where they are like them."""
    reader = HuggingFaceStorageReader(str(target))
    tensors: dict[str, Tensor] = {}
    for key, entry in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)  # safetensors hold nothing else
        like = parameters.get(key.split("/")[-1])
        alike = like is not None and like.shape == entry.size
        tensors[key] = torch.zeros_like(like.detach()) if like is not None and alike else torch.zeros(entry.size)
    load(tensors, storage_reader=reader)
    return {key: value[0] if key.startswith("optimizer/step/") else value for key, value in tensors.items()}


def _place(folder: Path, step: int) -> Path:
    return folder / f"step-{step:07d}"
