"""Is a checkpoint whole? Asked before a byte of it is used, so that damage is named and not half-loaded."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from hyperfade.errors import CheckpointError

AGAIN = "Copy or download the checkpoint again."


def verify_checkpoint(folder: Path) -> None:
    """Raise `CheckpointError` unless `folder` has a config and every safetensors file it needs, whole."""
    config = folder / "config.json"
    if not config.is_file():
        raise CheckpointError(
            f"{folder} has no config.json: it is not a checkpoint folder.", "Give the folder that holds it."
        )
    try:
        if not isinstance(json.loads(config.read_text(encoding="utf-8")), dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{config} cannot be read: {error!r}.", AGAIN) from error
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        verify_safetensors([folder / "model.safetensors"])
        return
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = [folder / Path(name).name for name in sorted(names)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} cannot be read: {error!r}.", AGAIN) from error
    verify_safetensors(files)


def verify_safetensors(files: list[Path]) -> None:
    """Raise `CheckpointError` for a safetensors file that is missing or truncated. Reads headers only."""
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file.name} is missing from {file.parent}.", AGAIN)
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError, ValueError) as error:
            size = file.stat().st_size
            raise CheckpointError(f"{file} ({size:,} bytes) is damaged or truncated: {error}.", AGAIN) from error
