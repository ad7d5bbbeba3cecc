"""Words, numbers and short lines drawn with real fonts: images whose answer is the text on them."""

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from pictures import SIDE, Picture
from PIL import Image, ImageDraw, ImageFont

QUESTIONS = ("What does the text say?", "Read the text.", "What is written here?", "Which text is in the image?")
UNSEEN_SHARE = 0.15
MIN_HEIGHT, MAX_HEIGHT = 14, 34
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "June", "July", "Aug", "Sept", "Oct", "Nov", "Dec")
MIN_CONTRAST = 95


@dataclass(frozen=True)
class Text:
    """What to draw, and everything needed to draw the same again."""

    rows: tuple[str, ...]
    kind: str
    seed: str

    @property
    def answer(self) -> str:
        """The text in one line."""
        return " ".join(self.rows)


def words_to_draw(pictures: list[Picture]) -> tuple[list[str], list[str]]:
    """Words of 3 to 9 letters from the pictures' captions and keywords: those drawn in training, those never drawn.

    A hash of the word decides, so a word stays on its side whatever else the metadata holds.
    """
    found = {word for picture in pictures for word in picture.words if re.fullmatch(r"[a-z]{3,9}", word)}
    unseen = {word for word in found if _draw(_singular(word)) < UNSEEN_SHARE}
    return sorted(found - unseen), sorted(unseen)


def _singular(word: str) -> str:
    return re.sub(r"e?s$", "", word)


def _draw(word: str) -> float:
    return int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big") / 2**32


def make_texts(split: str, count: int, seen: list[str], unseen: list[str], seed: int) -> list[Text]:
    """`count` texts; the test asks for seen and unseen words, numbers and lines, training never has an unseen word."""
    chance = random.Random(f"texts {split} {seed}")
    kinds = {"word-seen": 0.3, "word-unseen": 0.3, "number": 0.2, "line": 0.2}
    if split == "train":
        kinds = {"word": 0.5, "number": 0.2, "line": 0.3}
    texts = []
    for number in range(count):
        kind = chance.choices(list(kinds), list(kinds.values()))[0]
        if kind == "number":
            rows: tuple[str, ...] = (_number(chance),)
        elif kind == "line":
            rows = _line(chance, seen)
        else:
            rows = (_cased(chance.choice(unseen if kind == "word-unseen" else seen), chance),)
        texts.append(Text(rows, kind, f"{seed} {split} {number}"))
    return texts


def words_drawn(texts: list[Text]) -> list[str]:
    """The words on `texts`, those in dates too, in small letters."""
    return sorted({word for text in texts for word in re.findall(r"[a-z]{3,}", text.answer.lower())})


def without_forms_of(words: list[str], drawn: list[str]) -> list[str]:
    """Those of `words` that are not a drawn word but for their ending, as "faces" is "face"."""
    bare = {re.sub(r"e?s?$", "", word) for word in drawn}
    return [word for word in words if re.sub(r"e?s?$", "", word) not in bare]


def _cased(word: str, chance: random.Random) -> str:
    return chance.choices((word, word.capitalize(), word.upper()), (5, 3, 2))[0]


def _line(chance: random.Random, words: list[str]) -> tuple[str, ...]:
    """Two or three short words, on one row where they fit and else on one row each."""
    count = chance.choice((2, 2, 3))
    longest = 8 if count == 2 else 6
    chosen: list[str] = []
    while len(chosen) < count:
        word = chance.choice(words)
        if len(word) <= longest:
            chosen.append(word)
    case = chance.choices((str.lower, str.capitalize, str.upper), (5, 3, 2))[0]
    chosen = [case(word) for word in chosen]
    if count == 2 and len(" ".join(chosen)) <= 9:
        return (" ".join(chosen),)
    return tuple(chosen)


def _number(chance: random.Random) -> str:
    form = chance.choice(("digits", "digits", "price", "date", "time", "day", "percent"))
    if form == "digits":
        digits = chance.randint(2, 5)
        return str(chance.randint(10 ** (digits - 1), 10**digits - 1))
    if form == "price":
        whole = chance.choice((chance.randint(1, 9), chance.randint(10, 199)))
        return f"{chance.choice('$€£')}{whole}.{chance.randint(0, 99):02}"
    if form == "date":
        return f"{chance.randint(1, 28)}/{chance.randint(1, 12)}/{chance.randint(1, 99):02}"
    if form == "time":
        return f"{chance.randint(0, 23)}:{chance.randint(0, 59):02}"
    if form == "day":
        return f"{chance.randint(1, 28)} {chance.choice(MONTHS)}"
    return f"{chance.randint(1, 100)}%"


# --- drawing ------------------------------------------------------------------------------------------------------


def find_fonts(cache: Path) -> list[Path]:
    """Font files with all the characters that texts use, and small letters that differ from capitals."""
    folders = [cache / "fonts", Path("/usr/share/fonts/truetype/dejavu")]
    for folder in folders:
        files = sorted(
            file for pattern in ("*.ttf", "*.otf") for file in folder.rglob(pattern) if not file.is_symlink()
        )
        usable = [file for file in files if _is_usable(file)]
        if usable:
            return usable
    raise FileNotFoundError(f"no usable fonts under {' or '.join(map(str, folders))}")


def _is_usable(file: Path) -> bool:
    try:
        font = ImageFont.truetype(str(file), 24)
        missing = bytes(font.getmask("\uffff"))
        shapes = {letter: bytes(font.getmask(letter)) for letter in "abegknorstzABEGKNORSTZ0123456789$€£%/:."}
    except OSError:
        return False
    if missing in shapes.values() or len(set(shapes.values())) < len(shapes) - 1:
        return False
    # small letters of a font for reading are lower than capitals, and none of its letters is very wide
    heights = [box[3] - box[1] for box in map(font.getbbox, "xX")]
    width = font.getlength("homburgefontsiv") / 15
    return 0.5 < heights[0] / max(1, heights[1]) < 0.9 and 7 < width < 17


def _ground(chance: random.Random, dice: np.random.Generator) -> np.ndarray:
    """A ground (SIDE, SIDE, 3) in float32: plain, coloured, with a gradient or noisy."""
    kind = chance.choice(("plain", "coloured", "gradient", "noisy"))
    first = np.array([chance.randint(0, 255) for _ in range(3)], dtype=np.float32)
    if kind == "plain":
        first[:] = chance.choice((255, 255, 250, 235, 20, 0))
    ground = np.broadcast_to(first, (SIDE, SIDE, 3)).copy()
    if kind == "gradient":
        second = np.clip(first + dice.uniform(-70, 70, 3), 0, 255)
        angle = chance.uniform(0, 2 * np.pi)
        across = np.linspace(-0.5, 0.5, SIDE)
        ramp = np.clip(across[None, :] * np.cos(angle) + across[:, None] * np.sin(angle) + 0.5, 0, 1)[..., None]
        ground = (first + (second - first) * ramp).astype(np.float32)
    elif kind == "noisy":
        ground += dice.normal(0, chance.uniform(4, 18), (SIDE, SIDE, 1)).astype(np.float32)
    return ground


def _ink(chance: random.Random, ground: np.ndarray) -> tuple[int, int, int]:
    """A colour that stands out against every part of `ground`."""
    luma = ground @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    low, high = np.percentile(luma, (2, 98))
    for _ in range(60):
        colour = tuple(chance.randint(0, 255) for _ in range(3))
        light = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
        if light < low - MIN_CONTRAST or light > high + MIN_CONTRAST:
            return colour
    return (0, 0, 0) if low + high > 255 else (255, 255, 255)


@dataclass(frozen=True)
class Letter:
    """A drawn character and the middle of its place, in pixels from the left and from the top."""

    character: str
    x: float
    y: float


def draw_text(text: Text, fonts: list[Path]) -> tuple[Image.Image, list[Letter]]:
    """`text` on a square of SIDE pixels, with letters as large as asked for or as fit; and where its letters are."""
    chance = random.Random(f"draw {text.seed}")
    dice = np.random.default_rng(chance.getrandbits(64))
    ground = _ground(chance, dice)
    room = SIDE - 6
    while True:
        file = str(chance.choice(fonts))
        font, box = _fit(text.rows, file, chance.randint(MIN_HEIGHT, MAX_HEIGHT), room)
        if font is not None:
            break
    image = Image.fromarray(np.clip(ground, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    left = chance.randint(3, max(3, SIDE - 3 - (box[2] - box[0]))) - box[0]
    top = chance.randint(3, max(3, SIDE - 3 - (box[3] - box[1]))) - box[1]
    align = chance.choice(("left", "center"))
    pen.multiline_text(
        (left, top), "\n".join(text.rows), font=font, fill=_ink(chance, ground), align=align, spacing=font.size // 5
    )
    return image, list(letters_of(text.rows, font, left, top, centred=align == "center"))


def letters_of(
    rows: tuple[str, ...], font: ImageFont.FreeTypeFont, left: float, top: float, *, centred: bool
) -> Iterator[Letter]:
    """Where Pillow's `multiline_text` at (left, top) put the characters, spaces left out."""
    measure = ImageDraw.Draw(Image.new("L", (1, 1)))
    one, two = (measure.multiline_textbbox((0, 0), lines, font=font, spacing=font.size // 5) for lines in ("x", "x\nx"))
    widths = [font.getlength(row) for row in rows]
    for number, (row, width) in enumerate(zip(rows, widths, strict=True)):
        start = left + ((max(widths) - width) / 2 if centred else 0)
        middle = top + (one[1] + one[3]) / 2 + number * (two[3] - one[3])
        for place, character in enumerate(row):
            if character != " ":
                ends = font.getlength(row[:place]), font.getlength(row[: place + 1])
                yield Letter(character, start + sum(ends) / 2, middle)


@lru_cache(maxsize=2048)
def _font(file: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size)


def _fit(rows: tuple[str, ...], file: str, height: int, room: int) -> tuple[ImageFont.FreeTypeFont | None, tuple]:
    """The font at the size where a capital is `height` pixels tall, or the largest smaller one that fits; or None."""
    capital = _font(file, 100).getbbox("H")
    size = max(8, round(height * 100 / max(1, capital[3] - capital[1])))
    smallest = round(11 * 100 / max(1, capital[3] - capital[1]))
    measure = ImageDraw.Draw(Image.new("L", (1, 1)))
    while size >= smallest:
        font = _font(file, size)
        box = tuple(map(round, measure.multiline_textbbox((0, 0), "\n".join(rows), font=font, spacing=size // 5)))
        if box[2] - box[0] <= room and box[3] - box[1] <= room:
            return font, box
        size -= max(1, size // 12)
    return None, (0, 0, 0, 0)
