"""Send the reference model and its data to a machine without network, in folders of limited size.

    python benchmarks/reference/parcel.py pack --output FOLDER --images 24000
    python benchmarks/reference/parcel.py unpack FOLDER/0 FOLDER/1 [FOLDER/2] --output runs/reference

`pack` needs what `make reference` made; `unpack` needs what hyperfade and `adapter.py` need. There are two archives,
each cut into as many folders as it takes:

| archive | holds |
|---|---|
| first | the untrained model, as `packed_model.py` packs it; test.jsonl; a training set of a few images |
| more | the training set of all images that go along; a first try needs none of it |

Training images are WebP of quality 92, 2.4 kB instead of 8; an image comes with all its rows. Test rows keep their
numbers, so that the evaluation and `agreement.py` draw the very examples they draw here; the images of these come
along, lossless, and of no other test row.
"""

import argparse
import hashlib
import io
import json
import random
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from packed_model import model_files, under, write_model
from PIL import Image

from hyperfade.errors import HyperfadeError
from hyperfade.hub import write_folder

REFERENCE = Path("runs/reference")
FORMAT = "hyperfade-parcel-1"
ARCHIVES = ("first", "more")
ASKED = (450, 144)  # test examples that comparison.py and agreement.py draw with the recipe's seed, 0
_INDEX, _PIECE, _INDEX_BYTES = "part.json", "piece", 1000
_FIELDS = {"parcel", "archive", "number", "of", "sha256"}
_AGAIN = "Send that folder again; `pack` writes the same bytes for the same files."


class ParcelError(HyperfadeError):
    """A part of a parcel is missing, damaged, or of another parcel."""


# --- parts --------------------------------------------------------------------------------------------------------


def cut(archives: Mapping[str, bytes], folder: Path, part_bytes: int) -> list[Path]:
    """Write archives as folders 0, 1, … of at most `part_bytes` bytes each; no folder holds two archives."""
    if part_bytes <= _INDEX_BYTES:
        raise ParcelError(f"--part-bytes {part_bytes} leaves no room for a piece.", f"Give more than {_INDEX_BYTES}.")
    if folder.exists() and any(folder.iterdir()):
        raise ParcelError(f"{folder} is not empty.", "Give a new folder: old parts among new ones would mislead.")
    room, written = part_bytes - _INDEX_BYTES, []
    parcel = hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in archives.values())).hexdigest()
    for name, content in archives.items():
        pieces = [content[i : i + room] for i in range(0, len(content), room)]
        for number, piece in enumerate(pieces):
            part = folder / str(len(written))
            part.mkdir(parents=True, exist_ok=True)
            (part / _PIECE).write_bytes(piece)
            own = {"number": number, "of": len(pieces), "sha256": hashlib.sha256(piece).hexdigest()}
            (part / _INDEX).write_text(json.dumps({"format": FORMAT, "parcel": parcel, "archive": name, **own}) + "\n")
            written.append(part)
    return written


def join(parts: Iterable[Path]) -> dict[str, bytes]:
    """The archives that these folders hold, whole. Raises `ParcelError` that names the folder, or what is missing."""
    found: dict[str, dict[int, tuple[int, bytes]]] = defaultdict(dict)
    parcels = set()
    for part in parts:
        try:
            index, piece = json.loads((part / _INDEX).read_text(encoding="utf-8")), (part / _PIECE).read_bytes()
        except (OSError, ValueError) as error:
            raise ParcelError(f"{part} is no part of a parcel: {error}.", _AGAIN) from error
        if not isinstance(index, dict) or index.get("format") != FORMAT or not index.keys() >= _FIELDS:
            raise ParcelError(f"{part / _INDEX} is not of format {FORMAT}.", "Pack and unpack by the same version.")
        if hashlib.sha256(piece).hexdigest() != index["sha256"]:
            raise ParcelError(f"{part / _PIECE} ({len(piece):,} bytes) is not what was packed.", _AGAIN)
        found[index["archive"]][index["number"]] = index["of"], piece
        parcels.add(index["parcel"])
    if len(parcels) > 1:
        raise ParcelError("The parts belong to different parcels.", _AGAIN)
    archives: dict[str, bytes] = {}
    for name, pieces in found.items():
        missing = sorted(set(range(next(iter(pieces.values()))[0])) - set(pieces))
        if missing:
            raise ParcelError(
                f"Archive {name} lacks its part {missing[0]}; given were {', '.join(map(str, sorted(pieces)))}.",
                "Give all folders of an archive: part.json in each says which it is, and of how many.",
            )
        archives[name] = b"".join(pieces[number][1] for number in sorted(pieces))
    return archives


def archive(files: Mapping[str, bytes]) -> bytes:
    """A zip of these files. Text is compressed; weights and images are already. The same files give the same bytes."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as writing:
        for name, content in files.items():
            packed = zipfile.ZIP_LZMA if name.endswith((".json", ".jsonl", ".jinja")) else zipfile.ZIP_STORED
            writing.writestr(zipfile.ZipInfo(name), content, packed)
    return held.getvalue()


def contents(packed: bytes) -> dict[str, bytes]:
    """What `archive` was given."""
    with zipfile.ZipFile(io.BytesIO(packed)) as reading:
        return {name: reading.read(name) for name in reading.namelist()}


# --- the data -----------------------------------------------------------------------------------------------------


def in_mixed_order(rows: Sequence[Mapping[str, Any]], seed: int = 0) -> list[str]:
    """All images of rows, so that of every beginning of the list the tasks have about the same share.

    Images that are asked about for the same tasks are shuffled, then dealt out evenly.
    """
    tasks: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        for image in row["images"]:
            tasks[image].add(row["task"])
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for image in sorted(tasks):
        groups[tuple(sorted(tasks[image]))].append(image)
    chance, placed = random.Random(seed), []
    for group in sorted(groups):
        own = groups[group]
        chance.shuffle(own)
        placed += [((rank + 0.5) / len(own), image) for rank, image in enumerate(own)]
    return [image for _, image in sorted(placed)]


def asked_rows(count: int, seed: int = 0) -> set[int]:
    """The test rows that the evaluation or `agreement.py` draws, of `count`."""
    return {row for asked in ASKED for row in random.Random(seed).sample(range(count), min(asked, count))}


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a data file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def as_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """The rows as a data file, their images in WebP."""
    renamed = (dict(row) | {"images": [_webp(image) for image in row["images"]]} for row in rows)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in renamed).encode()


def _webp(image: str) -> str:
    return str(Path(image).with_suffix(".webp"))


def image_files(folder: Path, images: Iterable[str], *, lossless: bool) -> dict[str, bytes]:
    """By path in the data folder, images in WebP, at the size they have: the processor's, 112×112."""
    files = {}
    for name in images:
        held = io.BytesIO()
        with Image.open(folder / name) as image:
            quality = {"lossless": True, "quality": 100, "method": 6, "exact": True} if lossless else {"quality": 92}
            image.convert("RGB").save(held, "WEBP", **quality)
        files[f"data/{_webp(name)}"] = held.getvalue()
    return files


def data_files(folder: Path, first_images: int, num_images: int) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """What archives first and more hold of the data."""
    test, train = (read_rows(folder / f"{split}.jsonl") for split in ("test", "train"))
    asked = sorted({image for row in asked_rows(len(test)) for image in test[row]["images"]})
    first = {"data/test.jsonl": as_lines(test)} | image_files(folder, asked, lossless=True)
    order, more = in_mixed_order(train)[:num_images], {}
    for files, images, new in (
        (first, order[:first_images], order[:first_images]),
        (more, order, order[first_images:]),
    ):
        chosen = set(images)
        files["data/train.jsonl"] = as_lines(row for row in train if chosen.issuperset(row["images"]))
        files |= image_files(folder, new, lossless=False)
    return first, more


# --- both ---------------------------------------------------------------------------------------------------------


def pack(args: argparse.Namespace) -> None:
    """Write the parts and say how large they are."""
    model = model_files(args.reference)
    print(f"model: {sum(map(len, model.values())):,} bytes", flush=True)
    first, more = data_files(args.reference / "data", args.first_images, args.images)
    archives = dict(zip(ARCHIVES, (archive(model | first), archive(more)), strict=True))
    for part in cut(archives, args.output, args.part_bytes):
        name = json.loads((part / _INDEX).read_text())["archive"]
        print(f"{part}: {sum(file.stat().st_size for file in part.iterdir()):,} bytes of archive {name}")


def unpack(args: argparse.Namespace) -> None:
    """Write data and model; a model that is there already stays."""
    archives = join(args.parts)
    if "first" not in archives:
        raise ParcelError("The parts hold no archive first, with the model.", "Give folders 0 and 1 as well.")
    files = {
        name: content for part in ARCHIVES if part in archives for name, content in contents(archives[part]).items()
    }

    def write_data(target: Path) -> None:
        for name, content in under("data/", files).items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(content)

    write_folder(args.output / "data", write_data)
    print(f"{args.output / 'data'}: {sum(name.endswith('.webp') for name in files):,} images", flush=True)
    if not (args.output / "model").exists():
        write_model(files, args.output)
    print(args.output / "model")


def main() -> None:
    """Pack or unpack."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    packing = commands.add_parser("pack", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    packing.set_defaults(do=pack)
    packing.add_argument("--reference", type=Path, default=REFERENCE, help="what make reference made")
    packing.add_argument("--output", type=Path, required=True, help="folder of the parts")
    packing.add_argument("--part-bytes", type=int, default=60_000_000, help="size of a part")
    packing.add_argument("--images", type=int, default=24_000, help="training images in all")
    packing.add_argument("--first-images", type=int, default=400, help="training images that go with the model")
    unpacking = commands.add_parser("unpack", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    unpacking.set_defaults(do=unpack)
    unpacking.add_argument("parts", type=Path, nargs="+", help="folders that pack wrote")
    unpacking.add_argument("--output", type=Path, default=REFERENCE, help="folder to write model and data to")
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    main()
