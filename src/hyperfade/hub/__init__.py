"""Checkpoints: save, load, and the Hugging Face plug-in."""

from hyperfade.hub.card import card, footnote, table
from hyperfade.hub.checkpoint import (
    EMBEDDED,
    EMBEDDED_FOLDER,
    fold_,
    load,
    load_config,
    load_processor,
    mark_,
    resolve,
    round_,
    save,
    skeleton,
    takes_images,
    write_folder,
)
from hyperfade.hub.integrity import verify_checkpoint, verify_safetensors
from hyperfade.hub.quantizer import HyperfadeConfig, HyperfadeQuantizer

__all__ = [
    "EMBEDDED",
    "EMBEDDED_FOLDER",
    "HyperfadeConfig",
    "HyperfadeQuantizer",
    "card",
    "fold_",
    "footnote",
    "load",
    "load_config",
    "load_processor",
    "mark_",
    "resolve",
    "round_",
    "save",
    "skeleton",
    "table",
    "takes_images",
    "verify_checkpoint",
    "verify_safetensors",
    "write_folder",
]
