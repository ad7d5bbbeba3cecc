"""The output folder: ours or refused, untouched where refused."""

import json
import os
from pathlib import Path

import pytest

from hyperfade.errors import OutputError
from hyperfade.recipe import Fit, Layer, Recipe, Replace, Rival
from hyperfade.workspace import open_output, read_json, variants, write_json


def _content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_new_folder_is_made_with_its_recipe(tmp_path: Path) -> None:
    recipe = Recipe(output=tmp_path / "a" / "b")
    assert open_output(recipe) is False
    assert Recipe.load(tmp_path / "a" / "b" / "recipe.yaml") == recipe


def test_an_empty_folder_will_do(tmp_path: Path) -> None:
    assert open_output(Recipe(output=tmp_path)) is False


def test_ones_own_folder_is_continued_and_keeps_its_files(tmp_path: Path) -> None:
    recipe = Recipe(output=tmp_path, seed=4)
    open_output(recipe)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "x").write_text("1", encoding="utf-8")
    before = _content(tmp_path)
    assert open_output(recipe) is True
    assert _content(tmp_path) == before


@pytest.mark.parametrize("name", ["thesis.tex", "recipe.yaml", ".hidden"])
def test_a_foreign_folder_is_refused_untouched(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("model: embedded\n", encoding="utf-8")
    before = _content(tmp_path)
    with pytest.raises(OutputError, match="not a hyperfade output folder") as error:
        open_output(Recipe(output=tmp_path))
    assert "--output" in error.value.hint
    assert _content(tmp_path) == before


def test_a_file_in_the_place_of_the_folder_is_refused_untouched(tmp_path: Path) -> None:
    path = tmp_path / "results"
    path.write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError):
        open_output(Recipe(output=path))
    assert path.read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("change", [{"seed": 1}, {"fit": Fit(sweeps=3)}, {"rivals": {"r": Rival(replace=Replace())}}])
def test_the_folder_of_another_recipe_is_refused_untouched(change: dict, tmp_path: Path) -> None:
    open_output(Recipe(output=tmp_path))
    before = _content(tmp_path)
    with pytest.raises(OutputError, match="another recipe"):
        open_output(Recipe(output=tmp_path, **change))
    assert _content(tmp_path) == before


def test_a_place_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(OutputError, match="Cannot write"):
        open_output(Recipe(output=tmp_path / "file" / "below"))


def test_rivals_inherit_what_they_do_not_say(tmp_path: Path) -> None:
    low_rank = Replace(language=Layer(kind="low_rank", fraction=0.5))
    rival = Rival(replace=low_rank, fit=Fit(method="random"))
    recipe = Recipe(output=tmp_path, rivals={"low_rank": rival})
    own, other = variants(recipe)
    assert (own.name, own.replace, own.fit, own.train) == ("compressed", recipe.replace, recipe.fit, recipe.train)
    assert (own.model, own.work) == (tmp_path / "model", tmp_path / "work")
    assert (other.name, other.replace, other.fit, other.train) == ("low_rank", low_rank, rival.fit, recipe.train)
    assert (other.model, other.work) == (tmp_path / "rivals/low_rank/model", tmp_path / "rivals/low_rank/work")


def test_json_comes_back_and_is_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "x.json"
    write_json(path, {"a": [1, None, 0.1]})
    assert read_json(path) == {"a": [1, None, 0.1]} == json.loads(path.read_text(encoding="utf-8"))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"b": 2})
    assert read_json(path) == {"a": [1, None, 0.1]}
