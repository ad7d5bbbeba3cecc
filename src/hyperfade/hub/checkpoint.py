"""Saving and loading. A compressed model is a normal Hugging Face folder; nothing is ever half-written.

A folder is written beside its final place and renamed, so a full disk or a kill leaves what was there before.
"""

import json
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from hyperfade.errors import CheckpointError, OutputError
from hyperfade.hub.integrity import AGAIN, verify_checkpoint
from hyperfade.hub.quantizer import (
    METHOD,
    HyperfadeConfig,
    HyperfadeQuantizer,
    align_,
    inner_of,
    install_low_bit_,
)
from hyperfade.nn import LightSpec, light_modules, low_bit_modules
from hyperfade.surgery import drop_dense_, install_, join_readers_

EMBEDDED = "embedded"
EMBEDDED_FOLDER = Path(__file__).parent.parent / "assets" / "easy-vqa-llava"


def fold_(model: nn.Module) -> None:
    """Drop the dense branches of a faded model and mark it: `save_pretrained` then writes a loadable checkpoint."""
    drop_dense_(model)
    join_readers_(model)
    mark_(model)


def mark_(model: nn.Module) -> None:
    """Write what the model's layers are into its config, where `from_pretrained` looks for it."""
    if not isinstance(model, PreTrainedModel):
        return  # a plain nn.Module has no config: its owner saves the state dict
    config = HyperfadeConfig(
        layers={name: LightSpec.of(layer).to_dict() for name, layer in light_modules(model).items()},
        inner=inner_of({name: layer.held for name, layer in low_bit_modules(model).items()}),
    )
    model.config.quantization_config = config
    model.hf_quantizer = HyperfadeQuantizer(config)  # type: ignore[assignment]
    model.is_quantized = True  # type: ignore[assignment]
    model.quantization_method = config.quant_method  # type: ignore[assignment]


def save(
    model: PreTrainedModel,
    folder: Path,
    processor: Any = None,
    *,
    storage_dtype: torch.dtype | None = None,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Write model and processor to `folder`, atomically: it is complete or it is as it was.

    storage_dtype: what a compressed model's weights are stored in [default: what they are]. Loading gives the model's
    present dtype back, so call `round_` with it first where the saved model must equal this one bit for bit.
    Raises `OutputError` where the disk is full or the folder cannot be written.
    """

    def write(target: Path) -> None:
        model.save_pretrained(target, max_shard_size=shard_bytes)
        if processor is not None:
            processor.save_pretrained(target)

    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, HyperfadeQuantizer):
        quantizer.storage_dtype = storage_dtype
    write_folder(folder, write)


@torch.no_grad()
def round_(model: nn.Module, storage_dtype: torch.dtype) -> None:
    """Round every floating-point weight to what `storage_dtype` can hold, keeping its present dtype."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(storage_dtype))


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Call `write` on a temporary folder and rename it to `folder`; on failure `folder` is as it was.

    Raises `OutputError` that names the folder where the system refuses (full disk, no permission).
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"Cannot write {folder}: it is a file.", "Choose another folder.")
    temporary = partial_of(folder)
    replaced = folder.with_name(f".{folder.name}.replaced")
    try:
        with clear_write_errors(folder):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            write(temporary)
            usual_modes_(temporary)
            shutil.rmtree(replaced, ignore_errors=True)
            if folder.exists():
                folder.rename(replaced)
            temporary.rename(folder)
            shutil.rmtree(replaced, ignore_errors=True)
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        raise


def usual_modes_(folder: Path) -> None:
    """Give the folder's files the permissions of new files here: safetensors keeps its own to their owner, and a server
    may be somebody else."""
    probe = folder / ".mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)


def partial_of(folder: Path) -> Path:
    """Where `write_folder` writes before it renames."""
    return folder.with_name(f".{folder.name}.partial")


@contextmanager
def clear_write_errors(folder: Path) -> Iterator[None]:
    """Turn what the system raises where `folder` cannot be written into an `OutputError` that names it."""
    try:
        yield
    except Exception as error:
        # safetensors reports a full disk in its own type
        if not (isinstance(error, OSError) or "No space left" in str(error)):
            raise
        raise OutputError(
            f"Cannot write {folder}: {error}.", "Free space, or choose another folder; nothing was lost."
        ) from error


def resolve(model: str) -> str:
    """The folder or hub name behind what a user typed: `embedded` is the model that ships with hyperfade."""
    return str(EMBEDDED_FOLDER) if model == EMBEDDED else model


@contextmanager
def clear_errors(name: str) -> Iterator[None]:
    """Turn what transformers raises for a missing or unreadable checkpoint into a `CheckpointError`."""
    try:
        yield
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise CheckpointError(f"Weights of {name!r} have other shapes than its config.json says.", AGAIN) from error
    except (OSError, ValueError, KeyError) as error:
        if name.startswith((".", "/", "~")) and not Path(name).exists():
            raise CheckpointError(
                f"There is no {name!r}.", "Give a checkpoint folder, a hub name or `embedded`."
            ) from error
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise CheckpointError(
            f"Cannot load {name!r}: {first_line}", "Give a checkpoint folder, a hub name or `embedded`."
        ) from error


def load_config(name: str) -> PretrainedConfig:
    """The config alone: from a folder, a hub name, `embedded`, or a config.json file."""
    path = Path(resolve(name))
    with clear_errors(name):
        if path.suffix == ".json" and path.is_file():
            fields = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(fields, dict):
                raise ValueError(f"it holds a {type(fields).__name__}, not an object.")
            return AutoConfig.for_model(fields.pop("model_type"), **fields)
        return AutoConfig.from_pretrained(str(path))


def skeleton(name: str, dtype: torch.dtype | None = None, runs_on: torch.device | str | None = None) -> PreTrainedModel:
    """The model of `load_config(name)`, dense or compressed, on the meta device: shapes without memory.

    dtype: what its weights have, as its config then says [default: what its config says]. runs_on: a device for forward
    passes that bring parameters along as they need them. There its buffers are, and there it says it is.
    """
    config, options = load_config(name), {} if dtype is None else {"dtype": dtype}
    empty = torch.device("meta") if runs_on is None else init_empty_weights(include_buffers=False)
    with empty, clear_errors(name):
        chosen = auto_class(config)
        make = chosen._from_config if issubclass(chosen, PreTrainedModel) else chosen.from_config
        model = make(config, **options)
    compression = getattr(config, "quantization_config", None) or {}
    if compression.get("quant_method") == METHOD:
        found = HyperfadeConfig.from_dict(compression)
        install_(model, found.specs)
        install_low_bit_(model, found.low_bits)
    if runs_on is not None:
        _settle_(model, torch.device(runs_on))
    return model


def _settle_(model: nn.Module, device: torch.device) -> None:
    """Move buffers to `device`, and let models within name it as theirs: they would name their first parameter's."""
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            kind = type(module)
            named = {"device": device, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
            module.__class__ = type(kind.__name__, (kind,), named)


def load(name: str, dtype: str = "auto", device_map: Any = None) -> PreTrainedModel:
    """A model, dense or compressed, in evaluation mode. Folders are checked for missing or damaged files first."""
    source = resolve(name)
    if Path(source).is_dir():
        verify_checkpoint(Path(source))
    with clear_errors(name):
        config = AutoConfig.from_pretrained(source)
        options: dict[str, Any] = {"dtype": dtype, "device_map": device_map, "output_loading_info": True}
        model, report = auto_class(config).from_pretrained(source, **options)
    if report["missing_keys"]:
        raise CheckpointError(f"{name!r} holds no weights for {min(report['missing_keys'])}.", AGAIN)
    align_(model)
    join_readers_(model)
    return model.eval()


def load_processor(name: str) -> Any:
    """The checkpoint's processor; for a text-only model its tokenizer."""
    source = resolve(name)
    with clear_errors(name):
        if auto_class(AutoConfig.from_pretrained(source)) is AutoModelForCausalLM:
            return AutoTokenizer.from_pretrained(source)
        return AutoProcessor.from_pretrained(source)


def auto_class(config: PretrainedConfig) -> Any:
    """AutoModelForImageTextToText where the config has a vision side, AutoModelForCausalLM for language models, else
    the class of transformers that the config names. Raises `ValueError` where there is none."""
    if takes_images(config):
        return AutoModelForImageTextToText
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    names = config.architectures or ["no class"]
    found = getattr(transformers, names[0], None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(f"its config names {names[0]} under `architectures`, which is no model of transformers.")
    return found


def takes_images(config: PretrainedConfig) -> bool:
    """Whether models of this config answer in text about images."""
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
