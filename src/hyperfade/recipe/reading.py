"""From text to the fields of a recipe, and what is said where they do not make one."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from hyperfade.errors import RecipeError

SHIPPED_RECIPES = Path(__file__).parents[1] / "recipes"


def read(source: str | Path) -> tuple[Any, str]:
    """The unchecked fields of the recipe called `source` (a YAML file, or the name of one that ships with hyperfade),
    and the path they come from; raises `RecipeError`."""
    path = Path(source)
    if not path.suffix and not path.is_file():
        path = SHIPPED_RECIPES / f"{source}.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # no text, or no name a file can have
        shipped = ", ".join(sorted(p.stem for p in SHIPPED_RECIPES.glob("*.yaml")))
        raise RecipeError(
            f"Cannot read recipe {str(source)!r}: {error}", f"Give a YAML file or one of: {shipped}."
        ) from error
    fields = read_yaml(text, str(path))
    return {} if fields is None else fields, str(path)


def read_yaml(text: str, where: str) -> Any:
    """The value that YAML `text` describes; raises `RecipeError` that begins with `where`."""
    try:
        return yaml.safe_load(text)
    # besides its own errors, PyYAML lets through what the makers of dates and numbers raise at 2026-13-41 or `!!int x`
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"{where} is not YAML: {reason}", "Check indentation, colons and brackets there.") from error


def refusal(error: ValidationError, where: str) -> RecipeError:
    """The first of the problems, by its key and with what was given there, as an error with two lines."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"]) or "the top level"
    given = first.get("input")
    shown = f" (given {given!r})" if not isinstance(given, (dict, BaseModel)) else ""
    return RecipeError(
        f"{where}: {key}: {first['msg']}{shown}",
        f"{error.error_count()} problem(s) in all; `hyperfade recipe --keys` lists every key with its meaning.",
    )
