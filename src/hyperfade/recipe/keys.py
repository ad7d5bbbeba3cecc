"""The keys of a recipe, for people: what `hyperfade recipe --keys` prints."""

from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from hyperfade.recipe.recipe import Recipe


def describe() -> list[str]:
    """Every key of a recipe with its default and its meaning, one per line; keys of a section that comes again (what a
    layer becomes, say) are listed where it comes first."""
    return list(_described(Recipe, "", set()))


def _described(section: type[BaseModel], prefix: str, known: set[type[BaseModel]]) -> Iterator[str]:
    for name, field in section.model_fields.items():
        if field.description is not None:
            default = field.get_default()
            shown = default.model_dump(exclude_defaults=True) if isinstance(default, BaseModel) else default
            note = " [required]" if field.is_required() else f" [default: {shown}]"
            yield f"{prefix}{name}: {field.description}{'' if '[default' in field.description else note}"
        inner, place = _section_in(field.annotation)
        if inner is not None and inner not in known:
            known.add(inner)
            yield from _described(inner, f"{prefix}{name}{place}.", known)


def _section_in(annotation: Any) -> tuple[type[BaseModel] | None, str]:
    """The section that a key of this type holds, if any, and how its place in a list or mapping is written."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, ""
    place = {tuple: "[]", dict: ".NAME"}.get(get_origin(annotation), "")
    sections = [section for section, _ in map(_section_in, get_args(annotation)) if section]
    return (sections[0], place) if sections else (None, "")
