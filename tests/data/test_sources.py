"""Examples from every kind of source, and errors that name the line."""

import io
import json
import pickle
import socket
from pathlib import Path

import datasets
import pytest
from PIL import Image

from hyperfade.data import Example, Skipped, open_image, open_source
from hyperfade.errors import DataError

USER = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}
ANSWER = {"role": "assistant", "content": "a cat"}
GOOD = {"messages": [USER, ANSWER], "images": ["pictures/cat.png"], "references": ["cat", "a cat"], "kind": "animal"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a picture, in a world without a network."""
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 6), (200, 10, 10)).save(tmp_path / "pictures" / "cat.png")

    def refuse(*args: object) -> None:
        raise AssertionError("reading data must not touch the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tmp_path


def write(folder: Path, *rows: object) -> str:
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    (folder / "train.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return str(folder / "train.jsonl")


# --- easy-vqa ---------------------------------------------------------------------------------------------------------


def test_easy_vqa() -> None:
    test = open_source("easy-vqa:test", needs_images=True)
    assert (test.name, len(test)) == ("easy-vqa test", 9673)
    first = test[0]
    assert [message["role"] for message in first.messages] == ["user", "assistant"]
    assert first.messages[0]["content"][0] == {"type": "image"}
    assert first.references == (first.messages[1]["content"][0]["text"],)
    assert first.where == "easy-vqa test question 0"
    assert open_image(first.images[0], first.where).size == (64, 64)
    assert {example.kind for example in test} == {"yes/no", "shape", "color"}
    assert {example.task for example in test} == {"question"}
    assert {e.references[0] for e in test if e.kind == "shape"} == {"circle", "rectangle", "triangle"}


def test_easy_vqa_trains_by_default_and_has_two_splits() -> None:
    assert open_source("easy-vqa").name == "easy-vqa train"
    assert len(open_source("easy-vqa")) == 38575
    with pytest.raises(DataError, match="no split 'dev'"):
        open_source("easy-vqa:dev")


# --- JSON lines -------------------------------------------------------------------------------------------------------


def test_jsonl(folder: Path) -> None:
    plain = {"messages": [{"role": "system", "content": "Short."}, {"role": "user", "content": "Hé? 🙂"}, ANSWER]}
    source = open_source(write(folder, GOOD, b"", b"  ", plain))
    assert (source.name, len(source)) == ("train.jsonl", 2)
    assert source[0] == Example(
        messages=(USER, {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}),
        images=(folder / "pictures" / "cat.png",),
        where="train.jsonl line 1",
        references=("a cat", "cat"),
        kind="animal",
    )
    assert source[1].where == "train.jsonl line 4"
    assert source[-1].messages[1] == {"role": "user", "content": [{"type": "text", "text": "Hé? 🙂"}]}
    assert [example.where for example in source] == ["train.jsonl line 1", "train.jsonl line 4"]
    with pytest.raises(IndexError):
        source[2]


@pytest.mark.parametrize(
    ("listed", "references"),
    [
        (["cat", "cat", "a cat", "a cat", "dog"], ("a cat", "cat", "cat", "a cat", "dog")),
        (["cat", "cat"], ("a cat", "cat", "cat")),
        ([], ("a cat",)),
    ],
    ids=["the answer is listed", "it is not", "nothing is"],
)
def test_an_answer_counts_as_often_as_it_was_given(folder: Path, listed: list, references: tuple) -> None:
    assert open_source(write(folder, GOOD | {"references": listed}))[0].references == references


@pytest.mark.parametrize(("given", "task"), [({"task": "caption"}, "caption"), ({"task": None}, ""), ({}, "")])
def test_a_row_may_name_its_task(folder: Path, given: dict, task: str) -> None:
    assert open_source(write(folder, GOOD | given))[0].task == task


@pytest.mark.parametrize("task", [3, ["caption"], {"name": "caption"}, False])
def test_a_task_that_is_no_text_is_refused(folder: Path, task: object) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl line 1: task must be a text"):
        open_source(write(folder, GOOD | {"task": task}))


def test_sources_can_be_pickled(folder: Path) -> None:
    source = open_source(write(folder, GOOD, GOOD))
    assert pickle.loads(pickle.dumps(source))[1] == source[1]


@pytest.mark.parametrize("key", ["path", "image", "url"])
def test_image_parts_may_name_their_file(folder: Path, key: str) -> None:
    content = [{"type": "image", key: "pictures/cat.png"}, {"type": "image"}, {"type": "text", "text": "Same?"}]
    row = {"messages": [{"role": "user", "content": content}, ANSWER], "images": [str(folder / "other.png")]}
    example = open_source(write(folder, row))[0]
    assert example.images == (folder / "pictures" / "cat.png", folder / "other.png")
    assert example.messages[0]["content"][0] == {"type": "image"}, "a template must not see files"


def _messages(*messages: dict, **more: object) -> dict:
    return {"messages": list(messages), **more}


BAD_ROWS = {
    "not JSON": (b'{"messages": [', "not JSON"),
    "not UTF-8": (b'{"messages": "\xff\xfe"}', "not JSON"),
    "deep": (b"[" * 100_000, "not JSON"),
    "no object": ([1, 2], "a row must be an object, not list"),
    "no messages": ({"images": []}, "there are no messages"),
    "empty messages": (_messages(), "there are no messages"),
    "messages is text": ({"messages": "hello"}, "there are no messages"),
    "message is text": ({"messages": ["hello"]}, "a message must be an object"),
    "no content": (_messages({"role": "user"}, ANSWER), "content of a message must be text or a list"),
    "unknown part": (
        _messages({"role": "user", "content": [{"type": "video"}]}, ANSWER),
        "part of type 'video' cannot be used",
    ),
    "unknown role": (_messages({"role": "critic", "content": "?"}, ANSWER), "unknown role 'critic'"),
    "empty answer": (_messages(USER, {"role": "assistant", "content": " "}, images=["a"]), "message is empty"),
    "no answer": (_messages(USER, images=["a.png"]), "last message must be the assistant's answer"),
    "no question": (_messages(ANSWER), "answers before anything was asked"),
    "system last": (
        _messages({"role": "user", "content": "?"}, ANSWER, {"role": "system", "content": "!"}),
        "last message must be the assistant's answer",
    ),
    "image in answer": (
        _messages(
            {"role": "user", "content": "?"}, {"role": "assistant", "content": [{"type": "image"}]}, images=["a"]
        ),
        "an image stands in an assistant message",
    ),
    "too many images": (
        _messages(USER, ANSWER, images=["a.png", "b.png"]),
        "2 images are given, but the messages place",
    ),
    "too few images": (_messages(USER, ANSWER), "place more images than there are"),
    "images is text": (_messages(USER, ANSWER, images="a.png"), "images must be a list, not str"),
    "image is a number": (_messages(USER, ANSWER, images=[3]), "an image must be a path, not 3"),
    "URL": (_messages(USER, ANSWER, images=["https://example.org/a.png"]), "is a URL"),
    "data URL": (_messages(USER, ANSWER, images=["data:image/png;base64,AAAA"]), "is a URL"),
    "file URL": (_messages(USER, ANSWER, images=["file:///etc/a.png"]), "is a URL"),
    "references": (_messages(USER, ANSWER, images=["a.png"], references="cat"), "references must be a list"),
}


@pytest.mark.parametrize(("row", "message"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_bad_line_is_named(folder: Path, row: object, message: str) -> None:
    spec = write(folder, GOOD, b"", row, GOOD)
    with pytest.raises(DataError) as caught:
        open_source(spec)
    assert caught.value.message.startswith("train.jsonl line 3: ")
    assert message in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(("row", "message"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_bad_line_can_be_skipped(folder: Path, row: object, message: str) -> None:
    source = open_source(write(folder, GOOD, b"", row, GOOD), on_bad="skip")
    assert [example.where for example in source] == ["train.jsonl line 1", "train.jsonl line 4"]
    (skipped,) = source.skipped
    assert skipped.where == "train.jsonl line 3"
    assert message in skipped.reason


def test_vision_model_needs_images(folder: Path) -> None:
    text_only = _messages({"role": "user", "content": "?"}, ANSWER)
    assert len(open_source(write(folder, GOOD, text_only))) == 2
    with pytest.raises(DataError, match=r"^train.jsonl line 2: the example has no image"):
        open_source(write(folder, GOOD, text_only), needs_images=True)
    kept = open_source(write(folder, GOOD, text_only), needs_images=True, on_bad="skip")
    assert kept.skipped[0].where == "train.jsonl line 2"


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_empty_file(folder: Path, content: bytes) -> None:
    (folder / "empty.jsonl").write_bytes(content)
    with pytest.raises(DataError, match="no usable examples"):
        open_source(str(folder / "empty.jsonl"))


@pytest.mark.parametrize("spec", ["nothing.jsonl", "pictures/", "photos.csv", "", "easyvqa"])
def test_unknown_source(folder: Path, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(DataError) as caught:
        open_source(spec)
    assert "easy-vqa" in caught.value.hint


# --- images -----------------------------------------------------------------------------------------------------------


def test_images_come_upright_and_in_rgb(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held sideways
    Image.new("L", (8, 6)).save(folder / "photo.jpg", exif=exif)
    opened = open_image(folder / "photo.jpg", "line 1")
    assert (opened.mode, opened.size) == ("RGB", (6, 8))
    assert open_image(Image.new("RGBA", (2, 2)), "line 1").mode == "RGB"


def test_formats_that_run_programs_are_not_opened(folder: Path) -> None:
    (folder / "figure.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(DataError, match=r"^line 9: image .*figure.eps cannot be read"):
        open_image(folder / "figure.eps", "line 9")


def test_image_bombs_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(DataError, match=r"^line 9: image .*cannot be read: .*exceeds limit"):
        open_image(folder / "pictures" / "cat.png", "line 9")


# --- datasets ---------------------------------------------------------------------------------------------------------


def _table(rows: list[dict], image: object) -> datasets.Dataset:
    messages = [
        [
            {"role": "user", "content": [{"type": "image", "text": None}] * len(row["images"]) + [text("Which?")]},
            {"role": "assistant", "content": [text(row["answer"])]},
        ]
        for row in rows
    ]
    part = {"type": datasets.Value("string"), "text": datasets.Value("string")}
    features = datasets.Features(
        messages=datasets.List({"role": datasets.Value("string"), "content": datasets.List(part)}),
        images=datasets.List(image),
    )
    return datasets.Dataset.from_dict({"messages": messages, "images": [row["images"] for row in rows]}, features)


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def test_saved_dataset_with_images(folder: Path) -> None:
    red, blue = Image.new("RGB", (4, 4), (255, 0, 0)), Image.new("RGB", (4, 4), (0, 0, 255))
    data = _table([{"images": [red, blue], "answer": "red"}, {"images": [], "answer": "none"}], datasets.Image())
    data.save_to_disk(folder / "saved")
    spec = f"datasets:{folder / 'saved'}"
    source = open_source(spec)
    assert len(source) == 2
    assert [open_image(i, "").getpixel((0, 0)) for i in source[0].images] == [(255, 0, 0), (0, 0, 255)]
    assert source[0].messages[0]["content"] == [{"type": "image"}, {"type": "image"}, text("Which?")]
    assert source[1].references == ("none",)
    assert pickle.loads(pickle.dumps(source))[1] == source[1]
    with pytest.raises(DataError, match=r"saved train row 1: the example has no image"):
        open_source(spec, needs_images=True)
    kept = open_source(spec, needs_images=True, on_bad="skip")
    assert len(kept) == 1
    assert isinstance(kept.skipped[0], Skipped)


def test_saved_splits_with_paths(folder: Path) -> None:
    rows = [{"images": ["../pictures/cat.png"], "answer": "red"}]
    table = _table(rows, datasets.Value("string"))
    datasets.DatasetDict(train=table, dev=table).save_to_disk(folder / "saved")
    example = open_source(f"datasets:{folder / 'saved'}:dev")[0]
    assert open_image(example.images[0], example.where).size == (8, 6)
    assert example.where.endswith("saved dev row 0")
    with pytest.raises(DataError, match="no split 'test'") as caught:
        open_source(f"datasets:{folder / 'saved'}:test")
    assert caught.value.hint == "Its splits are train, dev."


def test_dataset_rows_are_checked_and_fetch_nothing(folder: Path) -> None:
    rows = [{"images": [], "answer": "yes"}, {"images": [], "answer": ""}]
    _table(rows, datasets.Value("string")).save_to_disk(folder / "saved")
    with pytest.raises(DataError, match=r"saved train row 1: an assistant message is empty"):
        open_source(f"datasets:{folder / 'saved'}")
    path = "http://example.org/a.png"
    for number, image in enumerate(
        (datasets.Value("string"), {"bytes": datasets.Value("binary"), "path": datasets.Value("string")})
    ):
        given = path if number == 0 else {"bytes": None, "path": path}
        _table([{"images": [given], "answer": "yes"}], image).save_to_disk(folder / f"remote{number}")
        with pytest.raises(DataError, match=r"remote. train row 0: .*is a URL"):
            open_source(f"datasets:{folder / f'remote{number}'}")


def test_dataset_folder_of_parquet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    encoded = io.BytesIO()
    Image.new("RGB", (5, 4)).save(encoded, "PNG")
    (folder / "parquet").mkdir()
    image = {"bytes": encoded.getvalue(), "path": None}
    _table([{"images": [image], "answer": "red"}], datasets.Image()).to_parquet(folder / "parquet" / "train.parquet")
    example = open_source(f"datasets:{folder / 'parquet'}", needs_images=True)[0]
    assert open_image(example.images[0], "").size == (5, 4)


def test_dataset_that_cannot_be_used(folder: Path) -> None:
    datasets.Dataset.from_dict({"text": ["hello"]}).save_to_disk(folder / "saved")
    with pytest.raises(DataError, match=r"no column messages \(it has text\)"):
        open_source(f"datasets:{folder / 'saved'}")
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match="cannot be loaded"):
        open_source(f"datasets:{folder / 'empty'}")
