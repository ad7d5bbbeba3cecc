"""What the reference model's parcel brings is what was sent; and cells that run side by side lose nothing."""

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "reference"))
import agreement
import comparison
import packed_model
import parcel
import planes
import side_by_side

from hyperfade.errors import CheckpointError, OutputError
from hyperfade.measure import quality
from hyperfade.recipe import Recipe
from hyperfade.workspace import read_json, write_json

# --- weights ------------------------------------------------------------------------------------------------------


@given(data=st.data(), kind=st.sampled_from(sorted(planes.CUTS)))
def test_records_come_back_from_their_planes(data: st.DataObject, kind: str) -> None:
    shape = (data.draw(st.integers(1, 40)), planes.CUTS[kind][-1])
    records = data.draw(arrays.arrays(np.uint8, shape))
    assert np.array_equal(planes.from_planes(planes.to_planes(records, kind), kind), records)


def _quantized(kind: str, rows: int, blocks: int, seed: int) -> np.ndarray:
    """Rows of random blocks with finite scales."""
    chance = np.random.default_rng(seed)
    records = chance.integers(0, 256, (rows * blocks, planes.CUTS[kind][-1]), np.uint8)
    scales = 4 if kind == "q4_1" else 2
    records[:, :scales] = chance.normal(size=(len(records), scales // 2)).astype(np.float16).view(np.uint8)
    return records.reshape(rows, -1)


def _by_the_book(row: np.ndarray, kind: str) -> list[float]:
    """ggml's blocks of 32, weight by weight: in q4_1 the first 16 are in the low halves of the bytes."""
    found = []
    for block in row.reshape(-1, planes.CUTS[kind][-1]):
        scale, *rest = (np.float32(x) for x in block[: 4 if kind == "q4_1" else 2].copy().view(np.float16))
        if kind == "q8_0":
            found += [scale * np.float32(np.int8(code)) for code in block[2:].view(np.int8)]
        else:
            codes = [code & 15 for code in block[4:]] + [code >> 4 for code in block[4:]]
            found += [scale * np.float32(code) + rest[0] for code in codes]
    return [float(x) for x in found]


@pytest.mark.parametrize("kind", ["q4_1", "q8_0"])
def test_quantized_rows_give_the_numbers_that_their_blocks_hold(kind: str) -> None:
    rows = _quantized(kind, 3, 2, 0)
    expected = torch.tensor([_by_the_book(row, kind) for row in rows]).to(torch.bfloat16)
    tensors = {"matrix": expected, "norm": torch.randn(5).to(torch.bfloat16)}
    files = planes.pack_tensors(tensors, {"matrix": rows})
    back = planes.unpack_tensors(files)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    assert {"bf16.0", f"{kind}.0"} < set(files)


def test_rows_that_are_not_the_tensors_are_refused_and_so_are_planes_that_were_lost() -> None:
    rows = _quantized("q8_0", 3, 2, 0)
    with pytest.raises(CheckpointError, match="do not hold the numbers"):
        planes.pack_tensors({"matrix": torch.zeros(3, 64, dtype=torch.bfloat16)}, {"matrix": rows})
    files = planes.pack_tensors({"norm": torch.ones(5, dtype=torch.bfloat16)}, {})
    with pytest.raises(CheckpointError, match="do not fit together"):
        planes.unpack_tensors({name: content for name, content in files.items() if name != "bf16.1"})
    with pytest.raises(CheckpointError, match="damaged"):
        planes.unpack_tensors(files | {"bf16.1": files["bf16.1"][:-3]})


@pytest.mark.parametrize("has", ["attention.o_proj", "attention.output.dense"])
def test_the_adapter_speaks_of_layers_by_the_names_they_have_here(has: str) -> None:
    assert packed_model.local_name("tower.attention.o_proj.lora", {f"tower.{has}"}) == f"tower.{has}.lora"
    assert (
        packed_model.local_name("text.self_attn.o_proj.lora", {"text.self_attn.o_proj"}) == "text.self_attn.o_proj.lora"
    )


# --- parts --------------------------------------------------------------------------------------------------------

ARCHIVES = {"first": bytes(range(256)) * 20, "more": b"pictures" * 200}


def test_parts_are_small_and_come_together_again_in_any_order(tmp_path: Path) -> None:
    parts = parcel.cut(ARCHIVES, tmp_path, 3000)
    assert [part.name for part in parts] == ["0", "1", "2", "3"]  # 5,120 bytes in pieces of 2,000; 1,600 in one
    assert all(sum(file.stat().st_size for file in part.iterdir()) <= 3000 for part in parts)
    assert parcel.join(reversed(parts)) == ARCHIVES
    assert parcel.join(parts[:3]) == {"first": ARCHIVES["first"]}


def test_a_part_that_is_missing_damaged_or_of_another_parcel_is_named(tmp_path: Path) -> None:
    parts = parcel.cut(ARCHIVES, tmp_path / "one", 3000)
    with pytest.raises(parcel.ParcelError, match="Archive first lacks its part 1; given were 0, 2"):
        parcel.join([parts[0], parts[2]])
    with pytest.raises(parcel.ParcelError, match="9 is no part of a parcel"):
        parcel.join([tmp_path / "one" / "9"])
    others = parcel.cut({"first": b"something else"}, tmp_path / "two", 3000)
    with pytest.raises(parcel.ParcelError, match="different parcels"):
        parcel.join([*parts, *others])
    (parts[1] / "piece").write_bytes((parts[1] / "piece").read_bytes()[:-1])
    with pytest.raises(parcel.ParcelError, match=r"piece \(1,999 bytes\) is not what was packed"):
        parcel.join(parts)


# --- data ---------------------------------------------------------------------------------------------------------


def _row(image: str, task: str, answer: str = "a") -> dict[str, Any]:
    asked = [{"type": "image"}, {"type": "text", "text": "what?"}]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": [f"images/{image}.png"], "references": [answer], "task": task}


def test_every_beginning_of_the_images_has_the_mix_of_the_whole() -> None:
    rows = [_row(f"r{i}", "reading") for i in range(700)]
    rows += [_row(f"p{i}", task) for i in range(200) for task in ("question", "caption", "question")]
    rows += [_row(f"q{i}", "question") for i in range(100)]
    order = parcel.in_mixed_order(rows)
    assert len(order) == len(set(order)) == 1000
    for size in (50, 100, 400, 1000):
        kinds = Counter(Path(image).stem[0] for image in order[:size])
        assert all(abs(kinds[kind] / size - share) <= 1 / size for kind, share in (("r", 0.7), ("p", 0.2), ("q", 0.1)))
    assert order == parcel.in_mixed_order(rows[::-1]) != sorted(order)


def test_the_test_rows_whose_images_come_along_are_those_that_are_asked() -> None:
    defaults = comparison.arguments("", Path(), Path()).parse_args([])
    seed = Recipe.model_fields["seed"].default
    assert (defaults.examples, agreement.EXAMPLES) == parcel.ASKED
    drawn = random.Random(seed).sample(range(3847), agreement.EXAMPLES)
    assert parcel.asked_rows(3847) == {*quality._chosen(3847, defaults.examples, seed), *drawn}


def test_unpacked_data_hold_every_test_row_and_the_pixels_of_those_asked(tmp_path: Path) -> None:
    chance, here = np.random.default_rng(0), tmp_path / "here"
    (here / "images").mkdir(parents=True)
    rows = {
        "test": [_row(f"t{i}", "reading", "ü") for i in range(500)],
        "train": [_row(f"r{i}", "reading") for i in range(9)],
    }
    for split, own in rows.items():
        (here / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
        for row in own:
            Image.fromarray(chance.integers(0, 256, (8, 8, 3), np.uint8)).save(here / row["images"][0])
    first, more = (parcel.contents(parcel.archive(files)) for files in parcel.data_files(here, 3, 7))
    sent = [json.loads(line) for line in first["data/test.jsonl"].decode().splitlines()]
    assert [row["messages"] for row in sent] == [row["messages"] for row in rows["test"]]
    for row in parcel.asked_rows(500):
        held = tmp_path / "held.webp"
        held.write_bytes(first[f"data/{sent[row]['images'][0]}"])
        with Image.open(held) as there, Image.open(here / rows["test"][row]["images"][0]) as original:
            assert np.array_equal(np.asarray(there.convert("RGB")), np.asarray(original))
    for files, count in ((first, 3), (first | more, 7)):
        train = [json.loads(line) for line in files["data/train.jsonl"].decode().splitlines()]
        assert len(train) == count
        assert all(f"data/{row['images'][0]}" in files for row in train)
    assert "data/test.jsonl" not in more


# --- side by side -------------------------------------------------------------------------------------------------


def _results(path: Path, steps: int, *cells: str) -> Path:
    write_json(path, {"settings": {"steps": steps}, "cells": {cell: {} for cell in cells}, "dense": {}})
    return path


def test_cells_of_all_parts_come_together_and_other_settings_are_refused(tmp_path: Path) -> None:
    main = tmp_path / "main.json"
    parts = [_results(tmp_path / "a.json", 2, "a"), _results(tmp_path / "b.json", 2, "a", "b"), tmp_path / "none.json"]
    assert side_by_side.merge(main, parts) == 2
    assert read_json(main)["settings"] == {"steps": 2}
    with pytest.raises(OutputError, match="other settings"):
        side_by_side.merge(main, [_results(tmp_path / "c.json", 3, "c")])
    assert set(read_json(main)["cells"]) == {"a", "b"}


def test_every_job_has_files_of_its_own_and_the_papers_recipe_is_run_once() -> None:
    jobs = side_by_side.jobs_of(["paper", "products", "width by budget"], [0.5, 0.25])
    assert [job.name for job in jobs] == [
        "products-at-0.5",
        "width-by-budget-at-0.5",
        "products-at-0.25",
        "width-by-budget-at-0.25",
        "paper",
    ]


def test_what_runs_too_long_is_ended(tmp_path: Path) -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    side_by_side.stop([sleeper])
    assert sleeper.returncode


def test_the_dense_answers_are_taken_over_in_whole_and_handed_over_once(tmp_path: Path) -> None:
    one, two, kept = tmp_path / "one", tmp_path / "two", tmp_path / "dense"
    for folder in (one, two):
        for part in comparison._DENSE:
            (folder / part).parent.mkdir(parents=True, exist_ok=True)
            (folder / part).write_text(folder.name)
    comparison._take_over(kept, tmp_path / "early")
    assert not (tmp_path / "early").exists()
    comparison._hand_over(one, kept)
    comparison._hand_over(two, kept)
    comparison._take_over(kept, tmp_path / "late")
    assert {(tmp_path / "late" / part).read_text() for part in comparison._DENSE} == {"one"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "late", "one", "two"]


def test_settings_name_the_teacher_where_it_is_not_the_usual_one() -> None:
    parser = comparison.arguments("", Path(), Path())
    usual, live = (comparison.settings_of(parser.parse_args(given)) for given in ([], ["--teacher", "live"]))
    assert live == usual | {"teacher": "live"} != usual
    assert usual.keys() == read_json(comparison.RESULTS)["settings"].keys()
