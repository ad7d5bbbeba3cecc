"""Checkpoints: save, load, and the Hugging Face plug-in."""

from hyperfade.hub.card import card, footnote, is_share, metric_label, score_rows, score_text, table, tasks_of
from hyperfade.hub.checkpoint import (
    EMBEDDED,
    EMBEDDED_FOLDER,
    fold_,
    load,
    load_config,
    load_processor,
    mark_,
    partial_of,
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
    "is_share",
    "load",
    "load_config",
    "load_processor",
    "mark_",
    "metric_label",
    "partial_of",
    "resolve",
    "round_",
    "save",
    "score_rows",
    "score_text",
    "skeleton",
    "table",
    "takes_images",
    "tasks_of",
    "verify_checkpoint",
    "verify_safetensors",
    "write_folder",
]
