"""What the vision tower learns before the language model is asked: which letter is where, and what a picture shows.

A language model's loss tells a vision tower little: one answer a sample, and nothing of where the letters are. Here
they were drawn by us, so every patch of a text says which letters have their middle in it, and a picture says which
words its captions and answers hold. Without the language model a CPU takes 64 images a second, with it eight samples.

Three predictions, of what is known, by what training needs anyway:

- the letters of a patch, in order, from the tower's features (a linear head that is thrown away);
- its first letter, from the projector's output for the patch;
- the words of a picture, from the mean of the projector's outputs.

The latter two are compared with the language model's own embeddings by cosine, so the projector learns to
say "c" and "bicycle" in the language model's words.
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
TEXTS_A_PICTURE = 3
MIN_PICTURES = 4  # a word has to be in the answers about so many pictures
WORDS_A_PICTURE = 5
FAR = -1e4


class Examples:
    """Pictures of the training data, after each of them three texts that are drawn when asked for."""

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
        means: list[tuple[int, int]] = []
        for place, number in enumerate(numbers):
            which, kind = divmod(number, TEXTS_A_PICTURE + 1)
            if kind == 0:
                file, words = self._pictures[which]
                with Image.open(self._folder / file) as image:
                    images.append(image.convert("RGB"))
                asked = chance.permutation(words)[:WORDS_A_PICTURE]
                means += [(place, 1 + len(CHARACTERS) + int(word)) for word in asked]
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
        asked = [torch.tensor([place for place, _ in kind], dtype=torch.long) for kind in (slots, firsts, means)]
        labels = torch.tensor([[-100, *(label for kind in (slots, firsts, means) for _, label in kind)]])
        pixels = self._processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": labels} | dict(zip(("slots", "firsts", "means"), asked, strict=True))


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
        tokens += [tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in words]
        embeddings = model.get_input_embeddings().weight.detach()[tokens]
        self.register_buffer("known", F.normalize(embeddings.float(), dim=-1))

    def forward(self, pixel_values: Tensor, slots: Tensor, firsts: Tensor, means: Tensor) -> SimpleNamespace:
        """`logits` (1, predictions + 1, 1 + letters + words): the prediction at a position is the next one's label."""
        dtype = self.tower.embeddings.cls_token.dtype
        hidden = self.tower(pixel_values.to(dtype), output_hidden_states=True).hidden_states[self._layer][:, 1:]
        projected = self.projector(hidden).float()
        by_head = self.letters(hidden).float().reshape(-1, 1 + len(CHARACTERS))[slots]
        known: Tensor = self.known  # type: ignore[assignment]
        by_head = F.pad(by_head, (0, len(known) - len(CHARACTERS)), value=FAR)
        said = torch.cat([projected.flatten(0, 1)[firsts], projected.mean(dim=1)[means]])
        likeness = self.sharpness.float().exp() * F.normalize(said, dim=-1) @ known.T
        # a letter is one of the letters, a word one of the words
        letters = torch.arange(len(known), device=known.device) < len(CHARACTERS)
        is_letter = torch.arange(len(said), device=known.device) < len(firsts)
        likeness = likeness.masked_fill(letters[None, :] != is_letter[:, None], FAR)
        logits = torch.cat([by_head, F.pad(likeness, (1, 0), value=FAR)])
        return SimpleNamespace(logits=F.pad(logits, (0, 0, 0, 1))[None])
