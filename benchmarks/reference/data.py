"""Makes the reference data set: questions, captions and reading at 112 pixels, split by groups of near-duplicates.

    python benchmarks/reference/data.py CACHE OUTPUT

CACHE holds the unpacked packages: `openclipart/` (Debian openclipart-png and -svg), `emoji/` (npm
emoji-datasource-google) and `fonts/` (Debian fonts). OUTPUT gets `train.jsonl`, `validation.jsonl`, `test.jsonl` and
`images/`. The same seed writes the same lines.
"""

import argparse
import json
import multiprocessing
import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import easy_vqa
import numpy as np
from drawings import read_drawings
from emoji import read_emoji
from pictures import MARGIN, MAX_PIXELS, SIDE, Picture, difference_hash, num_pixels, on_white, square_of
from PIL import Image
from questions import ask_categories, ask_names
from reading import QUESTIONS, Text, draw_text, find_fonts, make_texts, without_forms_of, words_drawn, words_to_draw
from splits import assign, group_names

NAME_EMOJI = ("Name this emoji.", "What is shown?", "What is this emoji called?", "What does this emoji show?")
DESCRIBE_DRAWING = (
    "Describe the drawing in a few words.",
    "What is shown?",
    "What does the drawing show?",
    "Give a short caption.",
)


@dataclass(frozen=True)
class Sizes:
    """Rows per task of one split; a third of the questions is easy-VQA."""

    question: int
    caption: int
    reading: int


SIZES = {
    "train": Sizes(24_000, 15_000, 21_000),
    "validation": Sizes(600, 600, 600),
    "test": Sizes(1_500, 1_000, 1_500),
}
EASY_VQA_VALIDATION_IMAGES = 300


def row(image: str, question: str, references: Iterable[str], task: str, kind: str) -> dict:
    """One line of a data file; the first reference is the answer that is trained."""
    references = list(references)
    asked = [{"type": "image"}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": references[0]}]
    fields = {"messages": messages, "images": [f"images/{image}.png"]}
    return {**fields, "references": references, "task": task, "kind": kind}


# --- writing images, on all cores ---------------------------------------------------------------------------------


def _save(image: Image.Image, output: Path, name: str) -> None:
    file = output / "images" / f"{name}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, compress_level=6)


def _write_picture(picture: Picture, output: Path) -> np.ndarray | None:
    """Writes the picture's square; its hash, or None if it is blank."""
    image = square_of(picture)
    if image is None:
        return None
    _save(image, output, picture.name)
    return difference_hash(image)


def _write_easy_vqa(job: tuple[str, str], output: Path) -> None:
    name, file = job
    with Image.open(file) as image:
        room = SIDE - 2 * MARGIN
        small = on_white(image).resize((room, room), Image.Resampling.BICUBIC)
    ground = Image.new("RGB", (SIDE, SIDE), small.getpixel((0, 0)))
    ground.paste(small, (MARGIN, MARGIN))
    _save(ground, output, name)


def _write_text(job: tuple[str, Text], output: Path, fonts: list[Path]) -> None:
    _save(draw_text(job[1], fonts)[0], output, job[0])


# --- the three tasks ----------------------------------------------------------------------------------------------


def easy_vqa_rows(split: str, count: int, seed: int) -> tuple[list[dict], list[tuple[str, str]]]:
    """`count` questions spread over the split's images, and the (name, file) of those images."""
    own = "test" if split == "test" else "train"
    questions = easy_vqa.get_test_questions() if own == "test" else easy_vqa.get_train_questions()
    images = easy_vqa.get_test_image_paths() if own == "test" else easy_vqa.get_train_image_paths()
    chance = random.Random(f"easy-vqa {own} {seed}")
    held_out = set(chance.sample(sorted(images), EASY_VQA_VALIDATION_IMAGES))
    rows = list(zip(*questions, strict=True))
    if own == "train":
        rows = [one for one in rows if (one[2] in held_out) == (split == "validation")]
    chance.shuffle(rows)
    result, jobs = [], {}
    for question, answer, image in rows[:count]:
        name = f"easy-vqa/{own}-{image:05}"
        jobs[name] = images[image]
        kind = "yes/no" if answer in ("yes", "no") else "color"
        kind = "shape" if answer in ("circle", "rectangle", "triangle") else kind
        result.append(row(name, question[0].upper() + question[1:], [answer], "question", kind))
    return result, sorted(jobs.items())


def picture_rows(pictures: list[Picture], groups: dict[str, str], count: int, seed: str) -> Iterator[dict]:
    """`count` questions about pictures of one split, half about each source, a third of them about categories."""
    chance = random.Random(f"questions {seed}")
    for source in ("emoji", "drawing"):
        own = [picture for picture in pictures if picture.source == source]
        share = count // 2 if source == "emoji" else count - count // 2
        by_category = share // 3
        plain = [picture for picture in own if not picture.variant]
        named = [picture for picture in own if picture.titles and len(picture.titles[0].split()) <= 5]
        # one question is asked once
        seen = set()
        for asked, wanted in (
            (ask_categories(plain, chance), by_category),
            (ask_names(named, groups, chance), share - by_category),
        ):
            for picture, question, answer, kind in islice(asked, wanted):
                if (picture.name, question) not in seen:
                    seen.add((picture.name, question))
                    yield row(picture.name, question, [answer], "question", kind)


def caption_rows(pictures: list[Picture], count: int, seed: str, *, repeat: bool) -> Iterator[dict]:
    """Captions of the named pictures; with `repeat` in further rounds, and other words, until there are `count`."""
    chance = random.Random(f"captions {seed}")
    named = [picture for picture in pictures if picture.titles]
    # skin tones come after all other pictures in a split where every picture is asked for once
    order = sorted(named, key=lambda picture: (picture.variant and not repeat, chance.random()))
    wordings = {picture.name: chance.sample(range(4), 4) for picture in order}
    number = 0
    while order and number < count:
        for picture in order[: count - number]:
            listed = NAME_EMOJI if picture.source == "emoji" else DESCRIBE_DRAWING
            question = listed[wordings[picture.name][number // len(order) % 4]]
            yield row(picture.name, question, picture.titles, "caption", picture.source)
            number += 1
        if not repeat:
            break


def build(cache: Path, output: Path, seed: int = 0, sizes: dict[str, Sizes] = SIZES) -> dict[str, int]:
    """Writes the data set to `output` and returns counts of what was left out and of the rows per kind."""
    output.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    emoji = read_emoji(cache)
    names = {word for picture in emoji for word in picture.words if re.fullmatch(r"[a-z]{3,}", word)}
    pictures = emoji + read_drawings(cache, names)
    small = [picture for picture in pictures if num_pixels(picture.file) <= MAX_PIXELS]
    counts["huge files"], pictures = len(pictures) - len(small), small
    fonts = find_fonts(cache)
    counts["fonts"] = len(fonts)
    with multiprocessing.Pool(os.cpu_count()) as pool:
        hashes = pool.map(partial(_write_picture, output=output), pictures, chunksize=32)
        kept = [(picture, bits) for picture, bits in zip(pictures, hashes, strict=True) if bits is not None]
        counts["blank"] = len(pictures) - len(kept)
        pictures = [picture for picture, _ in kept]
        counts["untitled"] = sum(not picture.titles for picture in pictures)
        listed = group_names([picture.keys for picture in pictures], np.stack([bits for _, bits in kept]))
        groups = dict(zip((picture.name for picture in pictures), listed, strict=True))
        split_of = assign(listed, seed)
        counts["groups"] = len(split_of)
        seen, unseen = words_to_draw(pictures)
        counts["spoilt"] = sum(picture.spoilt for picture in pictures)
        drawn: set[str] = set()
        for split, size in sizes.items():
            label = f"{split} {seed}"
            own = [picture for picture in pictures if split_of[groups[picture.name]] == split]
            if split != "train":
                own = [picture for picture in own if not picture.spoilt]
            rows, jobs = easy_vqa_rows(split, size.question // 3, seed)
            rows += picture_rows(own, groups, size.question - len(rows), label)
            rows += caption_rows(own, size.caption, label, repeat=split == "train")
            pool.map(partial(_write_easy_vqa, output=output), jobs, chunksize=64)
            listed_texts = make_texts(split, size.reading, seen, unseen, seed)
            if split == "train":
                # what the test calls seen has been drawn, not just allowed, and nothing close to what it calls unseen
                seen = words_drawn(listed_texts)
                unseen = without_forms_of(unseen, seen)
            texts = [(f"reading/{split}-{number:05}", text) for number, text in enumerate(listed_texts)]
            pool.map(partial(_write_text, output=output, fonts=fonts), texts, chunksize=64)
            chance = random.Random(f"rows {label}")
            rows += [row(name, chance.choice(QUESTIONS), [text.answer], "reading", text.kind) for name, text in texts]
            chance.shuffle(rows)
            drawn.update(name for one in rows for name in one["images"])
            lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows)
            (output / f"{split}.jsonl").write_text(lines, encoding="utf-8")
            counts.update(f"{split} {one['task']} {one['kind']}" for one in rows)
    counts["words seen"], counts["words unseen"] = len(seen), len(unseen)
    for picture in pictures:
        if f"images/{picture.name}.png" not in drawn:
            (output / "images" / f"{picture.name}.png").unlink()
            counts["pictures not asked for"] += 1
    return dict(counts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(json.dumps(build(arguments.cache, arguments.output, arguments.seed), indent=2))
