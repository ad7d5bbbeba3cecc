"""What the vision tower learns before the language model is asked: which letter is where, and what a picture shows.

A language model's loss tells a vision tower little: one answer a sample, and nothing of where the letters are. Here
they were drawn by us, so every patch of a text says which letters have their middle in it, and a picture says which
words its captions and answers hold. Without the language model a CPU takes 64 images a second, with it eight samples.

Four predictions, of what is known, by what training needs anyway:

- the letters of a patch, in order, from the tower's features (a linear head that is thrown away);
- its first letter, from the projector's output for the patch;
- the colour of a picture's patch, from the same;
- the words of a picture, from the mean of the projector's outputs.

The latter three are compared with the language model's own embeddings by cosine, so the projector learns to
say "c", "red" and "bicycle" in the language model's words.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pictures import SIDE
from PIL import Image
from reading import Letter, draw_text, find_fonts, make_texts
from torch import Tensor, nn

PATCH = 14
ACROSS = SIDE // PATCH
PATCHES = ACROSS * ACROSS
SLOTS = 3  # letters that have their middle in one patch, at most
NONE = 0
CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789$€£%/:."
COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 160, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "gray": (128, 128, 128),
    "brown": (139, 69, 19),
    "black": (0, 0, 0),
    "teal": (0, 128, 128),
    "white": (255, 255, 255),
    "orange": (255, 150, 0),
    "pink": (255, 160, 200),
    "purple": (128, 0, 128),
}
PATCHES_A_COLOUR = 2  # asked for in one picture, at most
TEXTS_A_PICTURE = 2
MIN_PICTURES = 4  # a word has to be in the answers about so many pictures
WORDS_A_PICTURE = 5
WORD_WEIGHT = 8  # a word counts so many times: a text asks for twenty letters, a picture for one or two words
FAR = -1e4


class Examples:
    """Pictures of the training data, after each of them two texts that are drawn when asked for."""

    def __init__(self, train: Path, cache: Path, processor: Any, seed: int) -> None:
        self._processor = processor.image_processor
        self.fonts = find_fonts(cache)
        self._folder = train.parent
        texts: set[str] = set()
        said: dict[str, set[str]] = {}
        for line in train.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            answers = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
            words = set(re.findall(r"[a-z]{3,}", " ".join(answers).lower()))
            if row.get("task") == "reading":
                texts |= words
            else:
                said.setdefault(row["images"][0], set()).update(words - {"yes"})
        counts = Counter(word for words in said.values() for word in words)
        self.words = sorted(word for word, count in counts.items() if count >= MIN_PICTURES)
        numbers = {word: number for number, word in enumerate(self.words)}
        self._pictures = [
            (image, sorted(numbers[word] for word in words if word in numbers)) for image, words in sorted(said.items())
        ]
        # other texts than the data's, of the same words
        self.texts = make_texts("train", TEXTS_A_PICTURE * len(self._pictures), sorted(texts), [], seed + 1)

    def __len__(self) -> int:
        return len(self._pictures) + len(self.texts)

    def batch(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """The images with these numbers; which of their slots, patches and means to predict from; and the labels."""
        chance = np.random.default_rng(list(numbers))
        images: list[Image.Image] = []
        slots: list[tuple[int, int]] = []
        firsts: list[tuple[int, int]] = []
        colours: list[tuple[int, int]] = []
        means: list[tuple[int, int]] = []
        a_word = 1 + len(CHARACTERS)
        a_colour = a_word + len(self.words)
        for place, number in enumerate(numbers):
            which, kind = divmod(number, TEXTS_A_PICTURE + 1)
            if kind == 0:
                file, words = self._pictures[which]
                with Image.open(self._folder / file) as image:
                    images.append(image.convert("RGB"))
                asked = chance.permutation(words)[:WORDS_A_PICTURE]
                means += WORD_WEIGHT * [(place, a_word + int(word)) for word in asked]
                named = colours_of(images[-1])
                for colour in np.unique(named):
                    asked = chance.permutation(np.flatnonzero(named == colour))[:PATCHES_A_COLOUR]
                    colours += [(place * PATCHES + int(patch), a_colour + int(colour)) for patch in asked]
                continue
            image, letters = draw_text(self.texts[TEXTS_A_PICTURE * which + kind - 1], self.fonts)
            images.append(image)
            found = in_patches(letters)
            for patch, inside in found.items():
                first = (place * PATCHES + patch) * SLOTS
                slots += [(first + slot, label) for slot, label in enumerate([*inside, NONE][:SLOTS])]
                firsts.append((place * PATCHES + patch, inside[0]))
            empty = chance.permutation([patch for patch in range(PATCHES) if patch not in found])[: len(found)]
            slots += [((place * PATCHES + int(patch)) * SLOTS, NONE) for patch in empty]
        kinds = {"slots": slots, "firsts": firsts, "colours": colours, "means": means}
        places = {name: torch.tensor([place for place, _ in kind], dtype=torch.long) for name, kind in kinds.items()}
        labels = torch.tensor([[-100, *(label for kind in kinds.values() for _, label in kind)]])
        pixels = self._processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": labels} | places


def colours_of(image: Image.Image) -> np.ndarray:
    """The number (PATCHES,) in COLOURS that is nearest to the mean colour of each patch."""
    pixels = np.asarray(image.resize((SIDE, SIDE)), dtype=np.float32)
    means = pixels.reshape(ACROSS, PATCH, ACROSS, PATCH, 3).mean(axis=(1, 3)).reshape(PATCHES, 1, 3)
    return np.square(means - np.array(list(COLOURS.values()), dtype=np.float32)).sum(axis=2).argmin(axis=1)


def in_patches(letters: Sequence[Letter]) -> dict[int, list[int]]:
    """The labels of the letters with their middle in each patch, from left to right; patches without are left out."""
    found: dict[int, list[int]] = {}
    for letter in sorted(letters, key=lambda letter: letter.x):
        across, down = (min(max(int(at // PATCH), 0), ACROSS - 1) for at in (letter.x, letter.y))
        inside = found.setdefault(down * ACROSS + across, [])
        if len(inside) < SLOTS:
            inside.append(1 + CHARACTERS.index(letter.character))
    return found


class Seeing(nn.Module):
    """Tower and projector of `model`, with heads; answers like a language model, so that the same loop trains it."""

    def __init__(self, model: Any, tokenizer: Any, words: Sequence[str]) -> None:
        super().__init__()
        self.tower = model.model.vision_tower
        self.projector = model.model.multi_modal_projector
        self._layer = model.config.vision_feature_layer
        features, dtype = self.tower.config.hidden_size, model.dtype
        self.letters = nn.Linear(features, SLOTS * (1 + len(CHARACTERS)), dtype=dtype)
        self.sharpness = nn.Parameter(torch.tensor(2.5, dtype=dtype))
        tokens = [tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in CHARACTERS]
        spoken = [f" {word}" for word in (*words, *COLOURS)]
        tokens += [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in spoken]
        kinds = torch.tensor([0] * len(CHARACTERS) + [1] * len(words) + [2] * len(COLOURS))
        self.register_buffer("kinds", kinds)
        embeddings = model.get_input_embeddings().weight.detach()[tokens]
        self.register_buffer("known", F.normalize(embeddings.float(), dim=-1))

    def forward(
        self, pixel_values: Tensor, slots: Tensor, firsts: Tensor, colours: Tensor, means: Tensor
    ) -> SimpleNamespace:
        """`logits` (1, predictions + 1, 1 + known words): the prediction at a position is the next one's label."""
        dtype = self.tower.embeddings.cls_token.dtype
        hidden = self.tower(pixel_values.to(dtype), output_hidden_states=True).hidden_states[self._layer][:, 1:]
        projected = self.projector(hidden).float()
        by_head = self.letters(hidden).float().reshape(-1, 1 + len(CHARACTERS))[slots]
        known: Tensor = self.known  # type: ignore[assignment]
        kinds: Tensor = self.kinds  # type: ignore[assignment]
        by_head = F.pad(by_head, (0, len(known) - len(CHARACTERS)), value=FAR)
        patches = projected.flatten(0, 1)
        said = torch.cat([patches[firsts], patches[colours], projected.mean(dim=1)[means]])
        likeness = self.sharpness.float().exp() * F.normalize(said, dim=-1) @ known.T
        # a letter is one of the letters, a word one of the words, a colour one of the colours
        asked = torch.tensor([len(firsts), len(colours), len(means)], device=known.device)
        kind = torch.tensor([0, 2, 1], device=known.device).repeat_interleave(asked)
        likeness = likeness.masked_fill(kind[:, None] != kinds, FAR)
        logits = torch.cat([by_head, F.pad(likeness, (1, 0), value=FAR)])
        return SimpleNamespace(logits=F.pad(logits, (0, 0, 0, 1))[None])
