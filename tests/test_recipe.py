"""Recipes: read completely, refused with the key's name, and written back without loss."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from hyperfade.errors import RecipeError
from hyperfade.recipe import SHIPPED_RECIPES, Fit, Layer, Quantize, Recipe, Replace, Rival, Rule, Train
from hyperfade.recipe.keys import describe

SHIPPED = sorted(path.stem for path in SHIPPED_RECIPES.glob("*.yaml"))


def test_the_recipes_ship() -> None:
    assert SHIPPED == ["demo", "eighth", "eighth-width", "half", "half-width", "paper", "quarter", "quarter-width"]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_survives_being_written_and_read(name: str, tmp_path: Path) -> None:
    recipe = Recipe.load(name)
    path = tmp_path / "again.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.load(path) == recipe
    assert Recipe.load(SHIPPED_RECIPES / f"{name}.yaml") == recipe


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_says_what_its_file_says(name: str) -> None:
    """Every value of the file arrives, read by plain YAML."""

    def check(given: Any, got: Any, where: str) -> None:
        if isinstance(given, dict):
            for key, value in given.items():
                inner = got[key] if isinstance(got, dict) else getattr(got, key)
                check(value, inner, f"{where}.{key}")
        elif isinstance(given, list):
            assert len(given) == len(got), where
            for one, other in zip(given, got, strict=True):
                check(one, other, where)
        else:
            assert (str(got) == str(given)) or float(got) == float(given), where

    fields = yaml.safe_load((SHIPPED_RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    check(fields, Recipe.load(name), name)


@pytest.mark.parametrize(("name", "fraction"), [("half", 1 / 2), ("quarter", 1 / 4), ("eighth", 1 / 8)])
def test_the_shipped_sizes_are_what_their_names_say(name: str, fraction: float) -> None:
    replace = Recipe.load(name).replace
    for layer in (replace.language, replace.vision):
        assert layer is not None
        assert (layer.products or 0) / (layer.n or 0) ** 2 * (layer.width or 1) == pytest.approx(fraction, abs=1e-4)
    assert replace.budget == (fraction if name == "eighth" else None)
    plain = Recipe.load(f"{name}-width").replace
    assert plain.language == plain.vision == Layer(kind="dense", width=fraction)
    assert plain.budget == fraction


@pytest.mark.parametrize("text", ["1e-5", "1.0e-5", "'1e-5'", "0.00001"])
def test_numbers_may_be_written_as_people_write_them(text: str) -> None:
    recipe = Recipe.parse(yaml.safe_load(f"train: {{learning_rate: {text}, clip_norm: 2}}"))
    assert recipe.train.learning_rate == 1e-5
    assert isinstance(recipe.train.learning_rate, float)
    assert recipe.train.clip_norm == 2.0


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"train": {"learning_rate": "abc"}}, "train.learning_rate"),
        ({"train": {"learning_rate": 0}}, "train.learning_rate"),
        ({"train": {"learning_rate": "nan"}}, "train.learning_rate"),
        ({"train": {"fade_steps": -1}}, "train.fade_steps"),
        ({"train": {"fade_steps": 1.5}}, "train.fade_steps"),
        ({"train": {"batch_size": 0}}, "train.batch_size"),
        ({"train": {"kd_weight": 1.1}}, "train.kd_weight"),
        ({"train": {"fade_shape": "cubic"}}, "train.fade_shape"),
        ({"train": {"steps": 5}}, "train.steps"),
        ({"trian": {}}, "trian"),
        ({"train": 5}, "train"),
        ({"train": {"train_also": "lm_head.*"}}, "train.train_also"),
        ({"dtype": "float8"}, "dtype"),
        ({"seed": "one"}, "seed"),
        ({"data": {"on_bad_sample": "ignore"}}, "data.on_bad_sample"),
        ({"data": {"evaluation_limit": 0}}, "data.evaluation_limit"),
        ({"fit": {"ridge": -1}}, "fit.ridge"),
        ({"replace": {"language": {"kind": "fourier"}}}, "replace.language.kind"),
        ({"replace": {"rules": [{}, {"layer": {"n": 1}}]}}, "replace.rules.1.layer.n"),
        ({"rivals": {"other": {}}}, "rivals.other.replace"),
        ([1, 2], "the top level"),
        ("quarter", "the top level"),
    ],
    ids=str,
)
def test_what_cannot_be_names_the_key(fields: Any, key: str) -> None:
    with pytest.raises(RecipeError) as error:
        Recipe.parse(fields, where="my.yaml")
    assert error.value.message.startswith(f"my.yaml: {key}: ")
    assert "\n" not in error.value.message
    assert "hyperfade recipe" in error.value.hint


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        ({"kind": "products"}, "needs n"),
        ({"kind": "learned"}, "needs n"),
        ({"kind": "complex", "n": 2}, "takes no n"),
        ({"kind": "low_rank"}, "needs fraction"),
        ({"kind": "products", "n": 4, "fraction": 0.5, "companion_rank": 3}, "leave companion_rank out"),
        ({"kind": "dense"}, "needs a width"),
        ({"kind": "dense", "width": 0.5, "n": 2}, "takes no n"),
        ({"kind": "dense", "width": 0.5, "fraction": 0.5}, "kind 'dense' has none"),
        ({"kind": "products", "n": 4, "terms": 2}, "has no terms"),
        ({"kind": "low_rank", "fraction": 0.5, "terms": 2}, "has no terms"),
        ({"kind": "learned", "n": 4, "products": 2}, "products is the size of kind 'products'"),
        ({"kind": "low_rank", "fraction": 0.5, "companion_rank": 2}, "leave companion_rank out"),
    ],
    ids=str,
)
def test_a_layer_that_contradicts_itself_is_refused(layer: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        Recipe.parse({"replace": {"vision": layer}})


@pytest.mark.parametrize(
    "layer",
    [
        {"n": 8},
        {"kind": "products", "n": 4, "products": 8, "companion_rank": 4},
        {"kind": "learned", "n": 4, "terms": 2},
        {"kind": "paper", "terms": 3},
        {"kind": "quaternion"},
        {"kind": "low_rank", "fraction": "1e-1"},
    ],
    ids=str,
)
def test_layers_that_make_sense_are_taken(layer: dict[str, Any]) -> None:
    assert Recipe.parse({"replace": {"vision": layer}}).replace.vision == Layer(**layer)


@pytest.mark.parametrize("replace", [{"patterns": ["*.x"]}, {"other": {"n": 4}}], ids=str)
def test_patterns_and_other_come_together(replace: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="come together"):
        Recipe.parse({"replace": replace})


def test_a_budget_gives_layers_without_a_size_a_start() -> None:
    layers = {
        "language": {"kind": "dense"},
        "vision": {"kind": "low_rank"},
        "projector": {"kind": "dense", "width": 0.5},
    }
    recipe = Recipe.parse({"replace": {"budget": "2e-1", **layers}})
    assert recipe.replace.budget == 0.2
    assert recipe.replace.language == Layer(kind="dense", width=0.2)
    assert recipe.replace.vision == Layer(kind="low_rank", fraction=0.2)
    assert recipe.replace.projector == Layer(kind="dense", width=0.5)
    assert Recipe.parse(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"replace": {"budget": 1}}, r"replace\.budget"),
        ({"replace": {"budget": 2, "language": {"kind": "dense"}}}, r"replace\.budget"),
        ({"replace": {"budget": 0.5, "rules": [{"layer": None}]}}, "leave out rules"),
        ({"replace": {"budget": 0.5, "vision": {"kind": "quaternion"}}}, "no size to choose for kind 'quaternion'"),
        ({"replace": {"budget": 0.5}, "fit": {"method": "frobenius"}}, "only fit.method calibrated gathers"),
        ({"rivals": {"r": {"replace": {"budget": 0.5}, "fit": {"method": "random"}}}}, "fit.method calibrated gathers"),
    ],
    ids=str,
)
def test_a_budget_that_cannot_be_distributed_is_refused(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        Recipe.parse(fields)


def test_a_file_that_is_missing_or_no_yaml_says_so(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"Cannot read recipe 'quartet'") as error:
        Recipe.load("quartet")
    assert "demo, eighth, eighth-width, half, half-width, paper, quarter, quarter-width" in error.value.hint
    broken = tmp_path / "broken.yaml"
    broken.write_text("train: [1, 2", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"broken\.yaml is not YAML") as error:
        Recipe.load(broken)
    assert "\n" not in error.value.message
    broken.write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(RecipeError, match="Cannot read recipe"):
        Recipe.load(broken)


def test_an_empty_file_is_the_default_recipe_and_a_list_is_none(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("# nothing yet\n", encoding="utf-8")
    assert Recipe.load(path) == Recipe()
    path.write_text("[]\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="the top level"):
        Recipe.load(path)


def test_a_folder_does_not_hide_the_recipe_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert Recipe.load("demo").model == "embedded"


def test_describe_lists_every_key_of_every_section_with_its_meaning() -> None:
    described = {line.partition(": ")[0]: line.partition(": ")[2] for line in describe()}
    assert len(described) == len(describe())
    assert all(len(text.partition("[")[0].strip()) > 8 for text in described.values())

    def keys(section: type[BaseModel], prefix: str) -> set[str]:
        return {f"{prefix}{name}" for name in section.model_fields}

    expected = keys(Recipe, "") - {"replace", "fit", "train", "data"}
    for section in ("replace", "fit", "train", "data"):
        expected |= keys(type(getattr(Recipe(), section)), f"{section}.")
    expected |= keys(Layer, "replace.language.") | keys(Rule, "replace.rules[].") | keys(Rival, "rivals.NAME.")
    expected |= keys(Quantize, "quantize.")
    assert set(described) == expected


def test_described_defaults_are_the_defaults() -> None:
    described = {line.partition(": ")[0]: line for line in describe()}
    assert described["train.batch_size"].endswith(f"[default: {Train().batch_size}]")
    assert described["fit.method"].endswith(f"[default: {Fit().method}]")
    assert described["replace.min_weight_elements"].endswith(f"[default: {Replace().min_weight_elements}]")
    assert described["rivals.NAME.replace"].endswith("[required]")


@pytest.mark.parametrize("name", ["dense", "compressed", "../escape", "a/b", ""])
def test_a_rival_cannot_take_a_name_that_is_taken_or_leaves_the_folder(name: str) -> None:
    with pytest.raises(RecipeError, match="rivals"):
        Recipe.parse({"rivals": {name: {"replace": {}}}})


@pytest.mark.parametrize(
    ("fields", "problem"),
    [({"dtype": "float16"}, "loss scaling"), ({"fit": {"basis": "energy", "method": "frobenius"}}, "activations")],
)
def test_what_cannot_work_is_refused(fields: dict, problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        Recipe.parse(fields)


def test_an_unquoted_no_is_a_word(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("train: {mixed_precision: no}")
    assert Recipe.load(tmp_path / "r.yaml").train.mixed_precision == "no"


NARROW = {"kind": "dense", "width": 0.5}


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"replace": {"language": NARROW}, "fit": {"method": "frobenius"}}, "fit.method"),
        ({"replace": {"vision": {"n": 4, "width": 0.5}}, "fit": {"method": "random"}}, "fit.method"),
        ({"replace": {"rules": [{"layer": NARROW}]}, "fit": {"method": "frobenius"}}, "fit.method"),
        (
            {"rivals": {"thin": {"replace": {"language": NARROW}, "fit": {"method": "frobenius"}}}},
            "rivals.thin.fit.method",
        ),
        (
            {"rivals": {"thin": {"replace": {"language": NARROW}}}, "fit": {"method": "random"}},
            "rivals.thin.fit.method",
        ),
    ],
    ids=["language", "vision", "a rule", "a rival's own fit", "a rival with the recipe's fit"],
)
def test_a_width_without_activations_is_refused_naming_the_fit(fields: Any, key: str) -> None:
    with pytest.raises(RecipeError, match=rf"only {key} calibrated gathers"):
        Recipe.parse(fields)


@pytest.mark.parametrize("prefix", ["compressed", "dense"])
def test_a_width_and_another_fits_rival_go_together(prefix: str) -> None:
    rival = {"replace": {"language": {"n": 4}}, "fit": {"method": "frobenius"}}
    fields = {"replace": {"language": NARROW}, "fit": {"prefix": prefix}, "rivals": {"plain": rival}}
    recipe = Recipe.parse(fields)
    assert recipe.replace.language == Layer(kind="dense", width=0.5)
    assert recipe.fit.refit_writer


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"replace": {"language": {"kind": "dense", "width": 0}}}, "replace.language.width"),
        ({"replace": {"language": {"kind": "dense", "width": 1}}}, "replace.language.width"),
        ({"replace": {"language": {"n": 4, "fraction": 1}}}, "replace.language.fraction"),
        ({"fit": {"prefix": "both"}}, "fit.prefix"),
        ({"attention": "flash_attention_2"}, "attention"),
    ],
    ids=str,
)
def test_keys_of_widths_and_attention_take_what_there_is(fields: Any, key: str) -> None:
    with pytest.raises(RecipeError, match=rf"recipe: {key}: "):
        Recipe.parse(fields)


def test_a_word_is_a_format() -> None:
    word, section = Recipe.parse({"quantize": "int4"}), Recipe.parse({"quantize": {"to": "int4"}})
    assert word == section
    assert Recipe.parse(yaml.safe_load(word.to_yaml())) == word
    with pytest.raises(RecipeError, match=r"quantize\.to"):
        Recipe.parse({"quantize": "int3"})


def test_hidden_states_need_a_live_teacher() -> None:
    with pytest.raises(RecipeError, match="hidden_weight needs the teacher's hidden states"):
        Recipe.parse({"train": {"hidden_weight": 1, "teacher": "cached"}}, where="here")
