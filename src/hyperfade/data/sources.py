"""Where examples come from.

    source = open_source("easy-vqa:test")
    source = open_source("my/train.jsonl", needs_images=True)
    source = open_source("datasets:my/saved-folder:validation")
    source[0].references

Opening a source reads every row once and checks it, because a bad line should be known before training starts, not in
its third hour. Only positions are kept in memory: `source[i]` reads row `i` again. Images are opened by whoever needs
the pixels (`examples.open_image`), so broken ones show up then.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import easy_vqa

from hyperfade.data.examples import ROW_HINT, Example, Skipped, read_row
from hyperfade.data.watch import reading
from hyperfade.errors import DataError

__all__ = ["Example", "Skipped", "Source", "open_source"]

SPEC_HINT = "Give easy-vqa, easy-vqa:train, easy-vqa:test, a .jsonl file, or datasets:NAME_OR_FOLDER[:SPLIT]."
_ROWS_PER_CHECK = 1000
_GONE = "Look whether the file was moved, or its disk or network folder has gone; then run the same command again."


@dataclass(frozen=True)
class Source:
    """A sequence of `Example`s. It holds no open file, so it can be pickled and shared between processes."""

    name: str
    """The origin, e.g. "easy-vqa train" or "train.jsonl"."""
    rows: Sequence[int]
    """The numbers of the usable rows, as `read` takes them."""
    read: Callable[[int], Example]
    """Reads one row."""
    skipped: tuple[Skipped, ...] = ()
    """Bad rows that were passed over; empty unless the source was opened with on_bad="skip"."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        return self.read(self.rows[index])

    def __iter__(self) -> Iterator[Example]:
        return map(self.read, self.rows)


def open_source(spec: str, *, needs_images: bool = False, on_bad: Literal["error", "skip"] = "error") -> Source:
    """The examples that `spec` names.

    `spec` is `easy-vqa[:train|:test]` (train by default), a `.jsonl` file, or `datasets:ARG[:SPLIT]`, where ARG is a
    folder written by `Dataset.save_to_disk` or anything `datasets.load_dataset` takes (split train by default).
    `needs_images` makes an example without an image a bad row. `on_bad="skip"` drops bad rows and lists them in
    `.skipped`; by default the first one raises `DataError`, naming file and line (lines count from 1; rows of
    `datasets` and questions of easy-vqa from 0, as they are indexed).
    """
    if spec == "easy-vqa" or spec.startswith("easy-vqa:"):
        return _open_easy_vqa(spec.partition(":")[2] or "train")
    if spec.startswith("datasets:"):
        name, number_of_rows, read, rows = _open_dataset(spec.removeprefix("datasets:"))
        checks = _checks(rows, needs_images)
    elif spec.endswith(".jsonl"):
        name, places = Path(spec).name, _line_places(Path(spec))
        number_of_rows = len(places)
        read = partial(_read_line, Path(spec), places)
        checks = _checks((partial(read, row) for row in range(number_of_rows)), needs_images)
    else:
        raise DataError(f"{spec!r} is no data source.", SPEC_HINT)

    usable, skipped = [], []
    for row, problem in enumerate(checks):
        if problem is None:
            usable.append(row)
        elif on_bad == "error":
            raise problem
        else:
            skipped.append(Skipped.because(problem))
    if not usable:
        raise DataError(f"{spec}: there are no usable examples among {number_of_rows} rows.", ROW_HINT)
    return Source(name, usable, read, tuple(skipped))


def fingerprint(source: Source) -> str:
    """SHA-256 of what a source's examples say and show. Of an image file path, size and time of change count, not its
    pixels."""
    found = hashlib.sha256()
    for example in source:
        found.update(json.dumps([example.messages, example.references]).encode())
        for image in example.images:
            if isinstance(image, bytes):
                found.update(image)
            elif isinstance(image, Path):
                try:
                    stat = image.stat()
                except OSError as error:
                    raise DataError(f"{example.where}: image {image} cannot be read: {error}.", _GONE) from error
                found.update(f"{image} {stat.st_size} {stat.st_mtime_ns}".encode())
            else:
                found.update(image.tobytes())
    return found.hexdigest()


def _checks(readers: Iterable[Callable[[], Example]], needs_images: bool) -> Iterator[DataError | None]:
    """For every row, what is wrong with it, or None."""
    for read in readers:
        try:
            example = read()
        except DataError as error:
            yield error
            continue
        if needs_images and not example.images:
            message = f"{example.where}: the example has no image, and a vision-language model is to be trained on it."
            yield DataError(message, 'Name its file in "images" and place it with an {"type": "image"} part.')
        else:
            yield None


# --- easy-vqa -----------------------------------------------------------------------------------------------------


def _open_easy_vqa(split: str) -> Source:
    if split == "train":
        questions, images = easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()
    elif split == "test":
        questions, images = easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()
    else:
        raise DataError(f"easy-vqa has no split {split!r}.", "Its splits are train and test.")
    name = f"easy-vqa {split}"
    rows = list(zip(*questions, strict=True))
    return Source(name, range(len(rows)), partial(_read_easy_vqa, name, rows, images))


def _read_easy_vqa(name: str, rows: list[tuple[str, str, int]], images: dict[int, str], row: int) -> Example:
    question, answer, image = rows[row]
    messages = (
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    )
    where = f"{name} question {row}"
    return Example(messages, (Path(images[image]),), where, (answer,), _easy_vqa_kind(answer), "question")


def _easy_vqa_kind(answer: str) -> str:
    """The package does not label its questions, but its thirteen answers tell them apart."""
    if answer in ("yes", "no"):
        return "yes/no"
    return "shape" if answer in ("circle", "rectangle", "triangle") else "color"


# --- JSON lines ---------------------------------------------------------------------------------------------------


def _line_places(path: Path) -> list[tuple[int, int]]:
    """(offset in bytes, line number from 1) of every line of the file that is not blank."""
    places, offset = [], 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    places.append((offset, number))
                offset += len(line)
    except (OSError, ValueError) as error:  # ValueError: no name that a file can have
        raise DataError(f"Cannot read {path}: {getattr(error, 'strerror', None) or error}.", SPEC_HINT) from error
    return places


def _read_line(path: Path, places: list[tuple[int, int]], row: int) -> Example:
    offset, number = places[row]
    where = f"{path.name} line {number}"
    reading(f"{where} ({path})")
    try:
        with path.open("rb") as file:
            file.seek(offset)
            line = file.readline()
    except OSError as error:
        raise DataError(f"{where}: {path} cannot be read any more: {error.strerror or error}.", _GONE) from error
    try:
        fields = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are both ValueErrors
        raise DataError(
            f"{where}: the line is not JSON: {error}", "Write one JSON object per line, in UTF-8."
        ) from error
    return read_row(fields, where, path.parent)


# --- datasets -----------------------------------------------------------------------------------------------------


def _open_dataset(argument: str) -> tuple[str, int, Callable[[int], Example], Iterator[Callable[[], Example]]]:
    """Name, number of rows, reader, and a reader per row that leaves the images' bytes where they are."""
    place, colon, split = argument.rpartition(":")
    if not colon or Path(argument).is_dir():
        place, split = argument, "train"
    data = _load_dataset(place, split)
    name = f"datasets:{place} {split}"
    missing = {"messages"} - set(data.column_names)
    if missing:
        raise DataError(f"{name} has no column messages (it has {', '.join(data.column_names)}).", ROW_HINT)
    # In Arrow format an image stays {"bytes", "path"}: decoding is left to `open_image`, which fetches nothing.
    table = data.with_format("arrow")
    folder = Path(place) if Path(place).is_dir() else Path()
    return name, len(table), partial(_read_table_row, table, name, folder), _rows_without_pixels(table, name, folder)


def _load_dataset(place: str, split: str) -> Any:
    # Imported here, because it takes a second that other sources need not pay.
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        if not (Path(place) / "state.json").exists() and not (Path(place) / "dataset_dict.json").exists():
            return datasets.load_dataset(place, split=split)
        saved = datasets.load_from_disk(place)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        hint = (
            "Give a folder written by save_to_disk or a name that datasets.load_dataset knows, and one of its splits."
        )
        raise DataError(f"datasets:{place} (split {split}) cannot be loaded: {error}", hint) from error
    if not isinstance(saved, datasets.DatasetDict):
        return saved
    if split not in saved:
        raise DataError(f"datasets:{place} has no split {split!r}.", f"Its splits are {', '.join(map(str, saved))}.")
    return saved[split]


def _read_table_row(table: Any, name: str, folder: Path, row: int) -> Example:
    where = f"{name} row {row}"
    reading(where)
    try:
        fields = table[row].to_pylist()[0]
    except (OSError, ValueError) as error:  # Arrow's errors are ValueErrors
        raise DataError(f"{where}: the table cannot be read any more: {error}", _GONE) from error
    return read_row(fields, where, folder)


def _rows_without_pixels(table: Any, name: str, folder: Path) -> Iterator[Callable[[], Example]]:
    """A reader per row with a stand-in for every embedded image: checking need not copy gigabytes of pixels."""
    texts = [column for column in table.column_names if column != "images"]
    number = 0
    for batch in table.iter(_ROWS_PER_CHECK):
        lists = batch.column("images") if "images" in batch.column_names else [None] * len(batch)
        for fields, images in zip(batch.select(texts).to_pylist(), lists, strict=True):
            fields["images"] = _without_pixels(images)
            yield partial(read_row, fields, f"{name} row {number}", folder)
            number += 1


def _without_pixels(images: Any) -> list[Any]:
    """The entries of an Arrow list of images: paths as they are, one byte for the bytes of an embedded image."""
    if images is None or not images.is_valid:
        return []
    entries = images.values
    if not hasattr(entries, "field"):  # not {"bytes", "path"} but, say, text
        return entries.to_pylist()
    paths, embedded = entries.field("path").to_pylist(), entries.field("bytes").is_valid().to_pylist()
    return [{"bytes": b"-" if inside else None, "path": path} for inside, path in zip(embedded, paths, strict=True)]
