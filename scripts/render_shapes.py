"""Draw as many easy-VQA images as a training run wants.

easy-VQA shows one flat shape on a pale ground. Its 4,000 train images are soon learned by heart, but the recipe
behind them is plain to see, so this module cooks more: three shapes, eight colours, sizes from an eighth to half of
the frame, any place where the shape fits, a ground whose channels lie between 230 and 255. Each image is drawn at
twice its size and halved with a bilinear filter, which gives the soft edges of the originals.

`python scripts/render_shapes.py --out sheet.png` writes a contact sheet to look at.
"""

import argparse
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}
SIDE = 64


def render(shape: str, colour: str, rng: np.random.Generator) -> Image.Image:
    """One 64 x 64 image of `shape` in `colour`, with place, size and ground drawn from `rng`."""
    canvas = 2 * SIDE
    image = Image.new("RGB", (canvas, canvas), tuple(int(c) for c in rng.integers(230, 256, 3)))
    draw, fill = ImageDraw.Draw(image), COLOURS[colour]
    width, height = (int(s) for s in rng.integers(canvas // 8, canvas // 2 + 1, 2))
    if shape == "triangle":  # equilateral, standing on its base, `width` away from every border
        x, y = (int(p) for p in rng.integers(width, canvas - width + 1, 2))
        draw.polygon([(x, y), (x + width, y), (x + width / 2, y - width * math.sqrt(3) / 2)], fill=fill)
    else:
        height = width if shape == "circle" else height
        x, y = int(rng.integers(canvas - width + 1)), int(rng.integers(canvas - height + 1))
        outline = draw.ellipse if shape == "circle" else draw.rectangle
        outline([x, y, x + width, y + height], fill=fill)
    return image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)


def main() -> None:
    """Write a contact sheet: one row per shape, one column per colour."""
    parser = argparse.ArgumentParser(
        description="Draw a contact sheet of easy-VQA look-alikes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("sheet.png"), help="image file to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of places, sizes and grounds")
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    sheet = Image.new("RGB", (SIDE * len(COLOURS), SIDE * len(SHAPES)))
    for row, shape in enumerate(SHAPES):
        for column, colour in enumerate(COLOURS):
            sheet.paste(render(shape, colour, rng), (SIDE * column, SIDE * row))
    sheet.save(args.out)
    print(f"{args.out}: {len(SHAPES)} shapes x {len(COLOURS)} colours")


if __name__ == "__main__":
    main()
