"""The output folder of a run: ours or refused, and always able to continue.

output/
  recipe.yaml        the complete recipe
  model/             the finished checkpoint
  results.json       everything measured
  answers/           every model's answers, for paired comparisons
  report.md  plots/  the same for people
  teacher/           a cached teacher's answers
  work/              what an interrupted run continues from, and metrics.jsonl
  rivals/NAME/       model/ and work/ of every rival
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyperfade.errors import OutputError
from hyperfade.recipe import Fit, Recipe, Replace, Train

_RECIPE = "recipe.yaml"
_HEADER = "# The recipe of this hyperfade output folder.\n"


@dataclass(frozen=True)
class Variant:
    """One model to make: the recipe's own, or a rival. `model` and `work` are its folders."""

    name: str
    replace: Replace
    fit: Fit
    train: Train
    model: Path
    work: Path


def variants(recipe: Recipe) -> list[Variant]:
    """The recipe's own model first, then its rivals."""
    out = recipe.output
    own = Variant("compressed", recipe.replace, recipe.fit, recipe.train, out / "model", out / "work")
    rivals = [
        Variant(
            name,
            rival.replace,
            rival.fit or recipe.fit,
            rival.train or recipe.train,
            out / "rivals" / name / "model",
            out / "rivals" / name / "work",
        )
        for name, rival in recipe.rivals.items()
    ]
    return [own, *rivals]


def open_output(recipe: Recipe) -> bool:
    """Make the output folder, or recognise it as this recipe's; True where there is earlier work to continue.

    Raises `OutputError` for a folder that is not ours, belongs to another recipe, or cannot be written.
    """
    folder, text = recipe.output, _HEADER + recipe.to_yaml()
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            file = folder / _RECIPE
            if not file.is_file() or not file.read_text(encoding="utf-8").startswith(_HEADER):
                raise OutputError(
                    f"{folder} exists and is not a hyperfade output folder.",
                    "Choose another --output; nothing was touched.",
                )
            if file.read_text(encoding="utf-8") != text:
                raise OutputError(
                    f"{folder} holds a run of another recipe ({file}).",
                    "Choose another --output, or delete that folder if you are done with it.",
                )
            return True
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder.with_name(f".{folder.name}.partial")  # beside it: until the recipe is there, it is not ours
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, folder / _RECIPE)
    except (OSError, ValueError) as error:  # ValueError: no name a folder can have, or a recipe.yaml that is no text
        raise OutputError(f"Cannot write {folder}: {error}.", "Choose another --output.") from error
    return False


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, with the folders it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_json(path: Path) -> Any:
    """Read JSON that `write_json` wrote. Raises `OutputError` that names the file where it is no longer that."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise OutputError(f"{path} cannot be read: {error}.", "Delete that file, and run the command again.") from error
