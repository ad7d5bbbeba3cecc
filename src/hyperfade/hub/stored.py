"""A checkpoint as it lies on disk, read one tensor at a time: what a model larger than memory is made from.

Keys of a file are not always names of the model: transformers renames while loading, and joins or splits some tensors.
`names` follows those rules for a model on the meta device, so that a key is known by the parameter that it fills.

Files are mapped to memory, and what was read of them stays with the process for as long as they are open. So every
read opens its file anew: a header is parsed in a moment, and no more than one tensor of a file is held.
"""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from hyperfade.errors import CheckpointError
from hyperfade.hub.integrity import AGAIN, verify_checkpoint


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is, and its shape and dtype: `like` is a tensor on the meta device."""

    file: Path
    key: str
    like: Tensor

    def read(self) -> Tensor:
        """The tensor, in memory of its own. Raises `CheckpointError` where the file has changed or cannot be read."""
        with _opened(self.file) as opened:
            tensor = opened.get_tensor(self.key).clone()
        if (tensor.shape, tensor.dtype) != (self.like.shape, self.like.dtype):
            raise CheckpointError(f"{self.key} in {self.file} has changed while it was in use.", AGAIN)
        return tensor


@dataclass(frozen=True)
class Stored:
    """All tensors of a checkpoint folder that the model has a place for.

    tensors: by key, in the order of keys. by_name: those that are a parameter or buffer of the model as they are, by
    its name there, tied ones by all of theirs. left_out: keys that the model has no place for, as loading leaves them.
    """

    tensors: dict[str, StoredTensor]
    by_name: dict[str, StoredTensor]
    left_out: tuple[str, ...]


def stored(folder: Path, model: PreTrainedModel) -> Stored:
    """What lies in `folder`, a checkpoint of `model` (on any device). Reads headers only.

    Raises `CheckpointError` where a file is missing or damaged, a tensor has another shape than the model's, or the
    model has a parameter that no tensor fills.
    """
    verify_checkpoint(folder)
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state, prefix = model.state_dict(keep_vars=True), model.base_model_prefix
    found, by_name, left_out, converted = {}, {}, [], False
    for tensor in _tensors(folder):
        name, converter = rename_source_key(tensor.key, renamings, converters, prefix, state)
        if name not in state and tensor.key in state:
            name, converter = rename_source_key(tensor.key, [], [], prefix, state)
        if name not in state:
            left_out.append(tensor.key)
            continue
        found[tensor.key] = tensor
        if converter is not None:
            converted = True
        elif tensor.like.shape != state[name].shape:
            raise CheckpointError(
                f"{tensor.key} has shape {tuple(tensor.like.shape)} in {tensor.file}, {tuple(state[name].shape)} by "
                "config.json.",
                AGAIN,
            )
        else:
            by_name[name] = tensor
    parameters = dict(model.named_parameters(remove_duplicate=False))
    filled = {id(state[name]): tensor for name, tensor in by_name.items()}  # tied ones are one parameter
    by_name = {name: filled[id(p)] for name, p in parameters.items() if id(p) in filled} | by_name
    missing = [name for name in parameters if name not in by_name]
    if missing and not converted:  # a converter fills parameters whose names it alone knows
        raise CheckpointError(f"{folder} holds no weights for {missing[0]}.", AGAIN)
    return Stored(found, by_name, tuple(left_out))


def stored_dtype(folder: Path) -> torch.dtype | None:
    """The dtype that most floating-point numbers of a checkpoint folder have on disk, whatever its config.json says."""
    numbers: Counter[torch.dtype] = Counter()
    for tensor in _tensors(folder):
        if tensor.like.is_floating_point():
            numbers[tensor.like.dtype] += tensor.like.numel()
    return max(numbers, key=numbers.__getitem__, default=None)


def _tensors(folder: Path) -> Iterator[StoredTensor]:
    """Every tensor of a folder, in the order of keys."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {key: folder / Path(name).name for key, name in weight_map.items()}
    else:
        with _opened(folder / "model.safetensors") as opened:
            files = dict.fromkeys(opened.keys(), folder / "model.safetensors")
    likes: dict[str, Tensor] = {}
    for file in sorted(set(files.values())):
        with _opened(file) as opened:
            own = set(opened.keys())
            for key in (key for key, place in files.items() if place == file):
                if key not in own:
                    raise CheckpointError(f"{file} holds no {key}, which the index of its folder says.", AGAIN)
                likes[key] = opened.get_tensor(key).to("meta")
    return (StoredTensor(files[key], key, likes[key]) for key in sorted(files))


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A safetensors file, mapped to memory for the time of a with block."""
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}.", AGAIN) from error


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype` if it holds floating-point numbers, else as it is."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
