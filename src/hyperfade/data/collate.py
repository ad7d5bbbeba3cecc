"""Examples → batches, with the loss on the assistant's words and on nothing else.

The mask must be right for every family of models, so nothing here knows one. `chat` says between which characters of
the conversation an answer lies; a processor then blows image placeholders up to as many tokens as the image takes.
Characters become tokens by tokenising the text up to an answer, and up to its end, images expanded, and checking that
these ids begin the ids of the whole. Generation relies on the very same property. Where it fails (an answer whose first
characters merge with the prompt's last token), the sample is bad; nothing is guessed.

The expanded text is what the processor hands to its tokenizer. `_Recorder` listens there, so images are processed once
per batch, and processors need no further interface.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from hyperfade.data.chat import Chat, Written
from hyperfade.data.examples import Example, Skipped, open_image
from hyperfade.errors import DataError

__all__ = ["Collator", "Skipped"]

IGNORED = -100
"""The label that cross-entropy leaves out."""
# What processors raise at input they cannot use, an image of one pixel's width for one.
_PROCESSOR_ERRORS = (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, OSError)


class _Recorder:
    """Stands in for a processor's tokenizer and keeps the texts it was given last."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.texts: list[str] = []

    def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        self.texts = [text] if isinstance(text, str) else list(text)
        return self._tokenizer(text, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


@dataclass(frozen=True)
class _Sample:
    written: Written
    images: list[Image.Image]

    @property
    def where(self) -> str:
        return self.written.example.where


@dataclass(frozen=True)
class _Batch:
    """What the processor made of samples, row by row."""

    tensors: dict[str, Any]
    texts: list[str]
    """The texts it tokenised: images expanded."""
    adds_special_tokens: bool
    """Whether the tokenizer added its own special tokens to them."""


class Collator:
    """Makes batches for one model.

    `processor` is a transformers processor with a chat template, or a tokenizer with one for a text-only model.
    A sample longer than `max_tokens`, image tokens included, is bad. It is never cut: it might lose its answer or
    half an image. `on_bad="skip"` leaves bad samples out of the batch and appends them to `skipped`; by default the
    first one raises `DataError`. `kept` holds the examples of the last batch, row by row.
    """

    def __init__(self, processor: Any, *, max_tokens: int, on_bad: Literal["error", "skip"] = "error") -> None:
        if getattr(processor, "tokenizer", processor).pad_token is None:
            # Padding is masked everywhere, so any token will do. On a copy: the caller's may be saved later.
            processor = copy.deepcopy(processor)
            tokenizer = getattr(processor, "tokenizer", processor)
            tokenizer.pad_token = tokenizer.eos_token
        self._processor = processor
        self._tokenizer = getattr(processor, "tokenizer", processor)
        self._chat = Chat(processor)
        self.max_tokens = max_tokens
        self.on_bad = on_bad
        self.skipped: list[Skipped] = []
        self.kept: list[Example] = []

    def training_batch(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Whole conversations, padded on the right: what the processor makes of them, and labels.

        `input_ids`, `attention_mask` and `labels` are (batch, tokens); `labels` holds the ids of the assistant's
        answers with their end tokens, and -100 elsewhere. Raises `DataError` for a bad sample, or if no sample is left.
        """
        tensors, spans = self._batch(self._chat.whole, examples, "right")
        ids = tensors["input_ids"]
        labels = torch.full_like(ids, IGNORED)
        for row, answers in enumerate(spans):
            for start, end in answers:
                labels[row, start:end] = ids[row, start:end]
        return tensors | {"labels": labels}

    def prompt_batch(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Conversations up to their last answer, padded on the left for `generate`; no labels.

        With on_bad="skip" rows may be missing: `kept` holds the examples of those that are there.
        """
        return self._batch(self._chat.prompt, examples, "left")[0]

    def _batch(
        self, write: Callable[[Example], Written], examples: Sequence[Example], padding_side: str
    ) -> tuple[dict[str, Tensor], list[list[tuple[int, int]]]]:
        """The tensors of the good examples, and the (from, to) tokens of each one's answers."""
        samples = []
        for example in examples:
            try:
                written = write(example)
                images = [open_image(image, example.where) for image in example.images[: written.num_images]]
            except DataError as error:
                self._pass_over(error)
            else:
                samples.append(_Sample(written, images))
        # Whether a sample is too long is known afterwards. That is rare, so the others simply go through again.
        while samples:
            spans: list[list[tuple[int, int]]] = []
            try:
                batch = self._process(samples, padding_side)
            except _PROCESSOR_ERRORS as error:
                problems = self._culprits(samples, error)
            else:
                problems = self._too_long(samples, batch)
                if not problems:
                    spans, problems = self._answer_tokens(samples, batch)
                if not problems:
                    self.kept = [sample.written.example for sample in samples]
                    return _only_tensors(batch.tensors, self._processor), spans
            for problem in problems.values():
                self._pass_over(problem)
            samples = [sample for row, sample in enumerate(samples) if row not in problems]
        last = f" The last, {self.skipped[-1].where}: {self.skipped[-1].reason}" if self.skipped else ""
        raise DataError(
            f"None of the {len(examples)} samples of a batch can be used.{last}",
            "If too many samples are bad, mend the data; data.on_bad_sample: error stops at the first.",
        )

    def _process(self, samples: list[_Sample], padding_side: str) -> _Batch:
        """All samples through the processor, once."""
        texts = [sample.written.text for sample in samples]
        images = [sample.images for sample in samples]
        # Like transformers: a tokenizer's template writes all special tokens; a processor's may leave them to it.
        bos = self._tokenizer.bos_token
        adds = self._chat.reads_images and not (bos is not None and texts[0].startswith(bos))
        options = {"padding": True, "padding_side": padding_side, "return_tensors": "pt", "add_special_tokens": adds}
        if not self._chat.reads_images:
            return _Batch(dict(self._tokenizer(texts, **options)), texts, adds)
        processor = copy.copy(self._processor)
        processor.tokenizer = recorder = _Recorder(self._tokenizer)
        tensors = processor(text=texts, images=images if any(images) else None, **options)
        return _Batch(dict(tensors), recorder.texts, adds)

    def _answer_tokens(
        self, samples: list[_Sample], batch: _Batch
    ) -> tuple[list[list[tuple[int, int]]], dict[int, DataError]]:
        """The (from, to) tokens of every sample's answers, and the rows where they cannot be told."""
        problems: dict[int, DataError] = {}
        heads: list[tuple[int, str]] = []
        for row, sample in enumerate(samples):
            try:
                answers = self._chat.expanded_answers(sample.written, batch.texts[row])
            except DataError as error:
                problems[row] = error
                continue
            heads += [(row, batch.texts[row][:position]) for answer in answers for position in answer]
        if not heads:
            return [], problems
        texts = [text for _, text in heads]
        heads_ids = self._tokenizer(texts, add_special_tokens=batch.adds_special_tokens)["input_ids"]
        ids = batch.tensors["input_ids"].tolist()
        ends: list[list[int]] = [[] for _ in samples]
        for (row, _), head in zip(heads, heads_ids, strict=True):
            ends[row].append(len(head))
            if ids[row][: len(head)] != head:
                problems[row] = DataError(
                    f"{samples[row].where}: the ends of an answer merge with the text around it into one token, so the"
                    " answer's tokens cannot be told from the prompt's.",
                    "Remove white space from the beginning of the answer.",
                )
        return [list(zip(row[::2], row[1::2], strict=True)) for row in ends], problems

    def _too_long(self, samples: list[_Sample], batch: _Batch) -> dict[int, DataError]:
        return {
            row: DataError(
                f"{samples[row].where}: the sample has {length} tokens, those of its images included;"
                f" max_tokens is {self.max_tokens}.",
                "Raise data.max_tokens, shorten the sample, or set data.on_bad_sample to skip.",
            )
            for row, length in enumerate(batch.tensors["attention_mask"].sum(dim=1).tolist())
            if length > self.max_tokens
        }

    def _culprits(self, samples: list[_Sample], error: Exception) -> dict[int, DataError]:
        """Which samples the processor refuses, each tried alone after all of them together raised `error`."""
        name = type(self._processor).__name__
        problems: dict[int, DataError] = {}
        for row, sample in enumerate(samples):
            try:
                self._process([sample], "right")
            except _PROCESSOR_ERRORS as alone:
                message = f"{sample.where}: {name} cannot use the sample: {alone}"
                problems[row] = DataError(
                    message, "Look at the size of its images and for control tokens in its texts."
                )
        if not problems:
            where = f"{samples[0].where} to {samples[-1].where}"
            hint = "Give samples the same number of images, or set the batch size to 1."
            raise DataError(f"{where}: {name} takes the samples alone, not as a batch: {error}", hint) from error
        return problems

    def _pass_over(self, problem: DataError) -> None:
        """Notes a bad sample, or raises its error if bad samples are not to be skipped."""
        if self.on_bad == "error":
            raise problem
        self.skipped.append(Skipped.because(problem))


def _only_tensors(outputs: dict[str, Any], processor: Any) -> dict[str, Tensor]:
    """Checks that a processor returned nothing but tensors, which `model(**batch)` takes."""
    for key, value in outputs.items():
        if not isinstance(value, Tensor):
            raise DataError(
                f"{type(processor).__name__} returns {key} as {type(value).__name__} instead of a tensor.",
                "Images of different sizes may be the reason: set its image processor to one size.",
            )
    return outputs
