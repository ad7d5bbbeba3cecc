"""Sources that are slow, or that vanish while they are used: the example and its file are named."""

import json
import time
import warnings
from pathlib import Path

import datasets
import pytest
from PIL import Image

from hyperfade.data import SlowDataWarning, named_when_slow, open_image, open_source
from hyperfade.errors import DataError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Two rows with an image each."""
    path = tmp_path / "train.jsonl"
    rows = []
    for name in ("one.png", "two.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
        question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
        rows.append({"messages": [question, {"role": "assistant", "content": "A square."}], "images": [name]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_what_takes_long_is_named_while_it_does(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(str(file))
    real = Image.open

    def slow(*args: object, **options: object) -> Image.Image:
        time.sleep(0.3)
        return real(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Image, "open", slow)

    def read() -> None:
        with named_when_slow(0.1):
            example = source[1]
            open_image(example.images[0], example.where)

    with pytest.warns(SlowDataWarning) as caught:
        read()
    message = str(caught[0].message)
    assert "train.jsonl line 2" in message
    assert str(file.parent / "two.png") in message


def test_what_is_quick_is_not_mentioned_and_nothing_goes_on_afterwards(file: Path) -> None:
    source = open_source(str(file))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with named_when_slow(5):
            assert source[0].where == "train.jsonl line 1"
        with named_when_slow(0.05):
            pass
        time.sleep(0.15)


def test_a_file_that_vanished_is_named_with_its_line(file: Path) -> None:
    source = open_source(str(file))
    file.rename(file.with_name("moved.jsonl"))
    with pytest.raises(DataError, match=r"train\.jsonl line 2: .*train\.jsonl cannot be read any more: No such file"):
        source[1]


def test_a_file_that_was_cut_short_is_named_with_its_line(file: Path) -> None:
    source = open_source(str(file))
    file.write_text("", encoding="utf-8")
    with pytest.raises(DataError, match=r"train\.jsonl line 2: the line is not JSON"):
        source[1]


def test_an_image_that_vanished_is_named_with_its_example(file: Path) -> None:
    example = open_source(str(file))[0]
    (file.parent / "one.png").unlink()
    with pytest.raises(DataError, match=r"train\.jsonl line 1: image .*one\.png does not exist"):
        open_image(example.images[0], example.where)


def test_a_table_that_cannot_be_read_any_more_is_named_with_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = [[{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]] * 3
    datasets.Dataset.from_dict({"messages": messages}).save_to_disk(tmp_path / "saved")
    source = open_source(f"datasets:{tmp_path / 'saved'}")

    def gone(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(datasets.Dataset, "__getitem__", gone)
    with pytest.raises(DataError, match=r"saved train row 2: the table cannot be read any more: .*Input/output"):
        source[2]
