"""Pictures with names: the common form of emoji and drawings, and how their files become 112-pixel squares."""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 112
MARGIN = 4
HASH_SIDE = 16
# seventeen files (most of them food) have 100 to 230 million pixels and would take most of
# the time and memory
MAX_PIXELS = 16_000_000


@dataclass(frozen=True)
class Picture:
    """One image file and what is known about it."""

    file: Path
    name: str
    """Where its square goes, relative to the folder of images and without suffix; also its identity."""
    source: str
    """"emoji" or "drawing"."""
    titles: tuple[str, ...]
    """Accepted captions, the best first; empty if there is none to trust."""
    category: str
    """A word or three that tell its kind, or "" where the metadata's category says nothing about the picture."""
    near: str
    """A finer category: pictures that share it make hard wrong answers."""
    keys: tuple[str, ...]
    """Pictures that share a key are near-duplicates and stay in one split."""
    words: frozenset[str]
    """Words that are true of it, so that no wrong answer uses them."""
    variant: bool = False
    """A recoloured copy of another picture (a skin tone)."""
    spoilt: bool = False
    """Part of it is missing: a model may train on it, but is not tested on it."""


def on_white(image: Image.Image) -> Image.Image:
    """`image` in RGB, with white where it is transparent."""
    if image.mode in ("P", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode != "RGBA":
        return image.convert("RGB")
    ground = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(ground, image).convert("RGB")


def square(image: Image.Image, *, crop: bool) -> Image.Image | None:
    """`image` (RGB on white) centred on a white square of SIDE pixels, its aspect kept; None if it is blank.

    `crop` removes the empty page around a drawing first.
    """
    # drawings for print have thousands of pixels; a draft is enough to find what is on the page
    if max(image.size) > 8 * SIDE:
        image.thumbnail((8 * SIDE, 8 * SIDE), Image.Resampling.BOX)
    ink = np.asarray(image).min(axis=2) < 244
    if not ink.any():
        return None
    if crop:
        rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
        image = image.crop((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))
    room = SIDE - 2 * MARGIN
    scale = room / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # a hairline has no drawing in it, and a very small one only its pixels
    if min(size) < 8 or scale > 5:
        return None
    image = image.resize(size, Image.Resampling.LANCZOS)
    result = Image.new("RGB", (SIDE, SIDE), "white")
    result.paste(image, ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2))
    values = np.asarray(result.convert("L"))
    # less than one pixel in a hundred drawn, or hardly any contrast
    if (values < 235).mean() < 0.01 or values.std() < 6:
        return None
    return result


def difference_hash(image: Image.Image) -> np.ndarray:
    """Bits (HASH_SIDE²,): whether brightness rises from each cell of a coarse grid to its right neighbour."""
    cells = np.asarray(image.convert("L").resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.BOX), dtype=np.int16)
    return (cells[:, 1:] > cells[:, :-1] + 2).ravel()


def num_pixels(file: Path) -> int:
    """Width times height of a PNG file, from its header alone."""
    with file.open("rb") as opened:
        width, height = struct.unpack(">II", opened.read(24)[16:])
    return width * height


def square_of(picture: Picture) -> Image.Image | None:
    """The square of a picture's file, or None if it is blank."""
    with Image.open(picture.file, formats=["PNG"]) as image:
        return square(on_white(image), crop=True)
