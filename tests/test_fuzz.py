"""Whatever a file holds that we read, nothing but an error of ours comes out, and nothing is written elsewhere."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from hyperfade.cli.shared import chosen_recipe
from hyperfade.data import open_source
from hyperfade.data.examples import open_image, read_row
from hyperfade.distill import CachedTeacher, latest_step
from hyperfade.distill.calibrate import _restore
from hyperfade.distill.journal import Journal
from hyperfade.distill.state import load_state
from hyperfade.errors import CheckpointError, DataError, OutputError, RecipeError, TrainingError
from hyperfade.hub import HyperfadeConfig, verify_checkpoint
from hyperfade.hub.integrity import verify_safetensors
from hyperfade.recipe import Data, Fit, Layer, Recipe, Replace, Train
from hyperfade.workspace import open_output, read_json, variants

# every example overwrites its file; how long inputs take to make depends on what else the machine does
here = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
DEEP = "[" * 20_000


def mostly(*keys: str) -> st.SearchStrategy[Any]:
    """JSON objects that have some of the keys a reader looks for, with anything in them."""
    return st.dictionaries(st.sampled_from(keys) | st.text(max_size=4), JSON, max_size=len(keys)) | JSON


# --- recipes ---------------------------------------------------------------------------------------------------------


@here
@given(st.binary(max_size=60))
@example(b"\xff")
@example(b"model: 2026-13-41")
@example(b"!!int x")
@example(b"!!timestamp x")
@example(b"!!float ''")
@example(b"!!python/object/apply:os.system [exit]")
@example(b"&a {rivals: *a}")
@example(b"&a [*a]")
@example(b"{[1]: 2}")
@example(b"1: 2")
@example(DEEP[:2000].encode())
@example(b"train: {learning_rate: .inf}")
def test_a_recipe_file_of_anything(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    with suppress(RecipeError):
        Recipe.load(file)


VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-2, 9)
    | st.floats()
    | st.sampled_from(["dense", "low_rank", "no", "x", "1e-5"])
)
KEYS = sorted({*Layer.model_fields, *Replace.model_fields, *Fit.model_fields, *Train.model_fields, *Data.model_fields})
SECTION = st.dictionaries(
    st.sampled_from(KEYS), VALUES | st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=2), max_size=3
)


@here
@given(st.dictionaries(st.sampled_from(sorted(Recipe.model_fields)), VALUES | SECTION, max_size=3))
@example({"replace": {"budget": 0.5, "language": {"kind": ["dense"]}}})
@example({"replace": {"budget": "x", "language": {"kind": "dense"}}})
def test_recipe_fields_of_anything(fields: dict[str, Any]) -> None:
    try:
        recipe = Recipe.parse(fields)
    except RecipeError:
        return
    assert Recipe.parse(json.loads(recipe.model_dump_json())) == recipe


@given(st.text(max_size=20))
@example("seed=2026-13-41")
@example("train.=1")
@example("..=1")
@example("model=\0")
def test_changes_of_anything(change: str) -> None:
    with suppress(RecipeError):
        chosen_recipe("quarter", [change])


@given(st.text(max_size=12) | st.sampled_from(["..", "../x", "/etc", "a/b", ".", "a\n", "~", "model", ""]))
def test_no_rival_is_written_outside_of_the_output_folder(name: str) -> None:
    fields = {"output": "runs/out", "rivals": {name: {"replace": {"language": {"n": 2}}}}}
    try:
        recipe = Recipe.parse(fields)
    except RecipeError:
        return
    inside = recipe.output.resolve()
    for variant in variants(recipe):
        assert variant.model.resolve().is_relative_to(inside)
        assert variant.work.resolve().is_relative_to(inside)
    assert len({variant.model for variant in variants(recipe)}) == 2


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"model: x", DEEP.encode()])
def test_an_output_folder_with_any_recipe_is_left_alone(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "recipe.yaml").write_bytes(content)
    with pytest.raises(OutputError):
        open_output(Recipe(output=tmp_path / "out"))
    assert (tmp_path / "out" / "recipe.yaml").read_bytes() == content


def test_an_output_folder_that_cannot_be_named_is_refused() -> None:
    with pytest.raises(OutputError):
        open_output(Recipe(output=Path("runs/\0")))


# --- data ------------------------------------------------------------------------------------------------------------

PARTS = st.lists(mostly("type", "text", "path", "image", "url") | st.just({"type": "image"}), max_size=3)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system"]) | JSON, "content": st.text(max_size=5) | PARTS | JSON}
    ),
    max_size=3,
)


@given(
    mostly("messages", "images")
    | st.fixed_dictionaries({"messages": MESSAGES}, optional={"images": JSON, "task": JSON})
)
def test_a_row_of_anything(row: Any) -> None:
    with suppress(DataError):
        found = read_row(row, "here", Path("nowhere"))
        assert found.references
        for image in found.images:
            with suppress(DataError):
                open_image(image, found.where)


@here
@given(st.binary(max_size=80))
@example(b"1" * 5000)
@example(DEEP.encode())
@example(b'{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "x"}]}')
def test_a_file_of_rows_of_anything(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "train.jsonl"
    file.write_bytes(content)
    with suppress(DataError):
        list(open_source(str(file)))
    with suppress(DataError):
        list(open_source(str(file), on_bad="skip"))


@given(st.text(max_size=12).map(lambda text: text + ".jsonl"))
@example("\0.jsonl")
def test_a_source_of_any_name(spec: str) -> None:
    with pytest.raises(DataError):
        open_source(spec)


# --- checkpoints and what a run leaves -------------------------------------------------------------------------------


@here
@given(st.binary(max_size=60), st.binary(max_size=60) | st.none())
@example(DEEP.encode(), None)
@example(b"{}", DEEP.encode())
@example(b"{}", b'{"weight_map": {"a": "../../x", "b": "", "c": "\\u0000"}}')
def test_a_checkpoint_folder_of_anything(tmp_path: Path, config: bytes, index: bytes | None) -> None:
    (tmp_path / "config.json").write_bytes(config)
    (tmp_path / "model.safetensors.index.json").unlink(missing_ok=True)
    if index is not None:
        (tmp_path / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(CheckpointError):  # there are no weights
        verify_checkpoint(tmp_path)


@here
@given(mostly("quant_method", "version", "layers", "inner"))
@example({"version": 1, "layers": {"a": {"algebra": []}}, "inner": None})
@example({"version": 1, "layers": {"a": {"in_features": 1e400, "out_features": 4, "rank": 1, "bias": True}}})
def test_a_quantization_config_of_anything(fields: Any) -> None:
    if isinstance(fields, dict):
        with suppress(CheckpointError):
            HyperfadeConfig.from_dict(fields)


SAFETENSORS = save(
    {"a": torch.ones(3), "examples": torch.arange(2), "offsets": torch.tensor([0, 1, 2])}, {"version": "1"}
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A safetensors file with some bytes changed, or cut, or anything."""
    content = bytearray(SAFETENSORS[: draw(st.integers(0, len(SAFETENSORS)))])
    for place, value in draw(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=4)):
        content[place : place + 1] = bytes([value])
    return bytes(content)


def _load_state(folder: Path) -> None:
    model = torch.nn.Linear(2, 2)
    load_state(folder, 0, model, torch.optim.AdamW(model.parameters()))


FFN = cast(Any, SimpleNamespace(name="f"))
READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "state": ("step-0000000/state.safetensors", _load_state),
    "fit": (
        "f.safetensors",
        lambda folder: _restore(folder / "f.safetensors", FFN, {}),
    ),
    "answers": ("answers-0-1.safetensors", lambda folder: CachedTeacher(folder, 1.0)),
    "weights": ("model.safetensors", lambda folder: verify_safetensors([folder / "model.safetensors"])),
}


@here
@pytest.mark.parametrize("kind", READERS)
@given(content=damaged() | st.binary(max_size=40))
@example(content=SAFETENSORS)
def test_tensors_of_anything(tmp_path: Path, kind: str, content: bytes) -> None:
    name, read = READERS[kind]
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    with suppress(CheckpointError):
        read(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]


@here
@given(
    st.binary(max_size=60) | mostly("step", "loss", "fault", "back_to", "parts").map(lambda v: json.dumps(v).encode())
)
@example(DEEP.encode() + b"\n")
@example(b'{"fault": "x", "step": 1, "parts": 2}\n')
def test_metrics_of_anything(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(content)
    try:
        Journal(file, 0).close()
    except TrainingError:
        assert file.read_bytes() == content  # nothing was lost


@here
@given(st.binary(max_size=40))
@example(DEEP.encode())
def test_json_of_anything(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "built.json"
    file.write_bytes(content)
    with suppress(OutputError):
        read_json(file)


def test_folders_that_only_look_like_states_are_none(tmp_path: Path) -> None:
    for name in ("step-", "step-x", "step--1", "step-1.partial", "step-0000002"):
        (tmp_path / name).mkdir()
    assert latest_step(tmp_path) == 2
