"""What several commands share: options, the recipe that the options choose, and how a line is said."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hyperfade.errors import OutputError, RecipeError

if TYPE_CHECKING:
    from hyperfade.recipe import Recipe

RecipeOption = Annotated[
    str,
    typer.Option(
        "--recipe", "-r", help="A YAML file, or one that ships: half, quarter, eighth (also with -width), paper, demo."
    ),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", "-s", help="Change one key, e.g. --set train.polish_steps=500. Repeatable.")
]
DataOption = Annotated[
    str, typer.Option(help="Questions with answers: easy-vqa[:train|:test], a .jsonl file, or datasets:NAME[:SPLIT].")
]


def chosen_recipe(source: str, changes: list[str] | None, direct: dict[str, Any] | None = None) -> "Recipe":
    """The recipe with --set changes and direct options applied."""
    from hyperfade.recipe import Recipe, read_yaml

    loaded = Recipe.load(source)
    fields = loaded.model_dump()
    for change in changes or []:
        key, equals, text = change.partition("=")
        *path, last = key.split(".")
        section = fields
        for part in path:
            section = section.get(part) if isinstance(section, dict) else None
        if not equals:
            raise RecipeError(f"--set {change}: the value is missing.", "Write --set section.key=value.")
        if not isinstance(section, dict):
            raise RecipeError(
                f"--set {change}: there is no section {'.'.join(path)!r}.", "Write --set section.key=value."
            )
        section[last] = read_yaml(text, f"--set {change}: {text!r}")
    return Recipe.parse({**fields, **(direct or {})}, where=source)


def say(line: str) -> None:
    """Print a line of progress at once, also into a pipe."""
    typer.echo(line)
    sys.stdout.flush()


def refuse_existing(folder: Path) -> None:
    """Raises `OutputError` where `folder` exists: a finished checkpoint is not written over."""
    if folder.exists():
        raise OutputError(f"{folder} exists.", "Choose another --output; nothing was touched.")
