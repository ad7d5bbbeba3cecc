"""Conversations → text, and where the answers lie in it.

Every family of models writes a conversation in its own way: its chat template. With `write(messages)` the text that the
template makes of messages, an answer is the text between

    write(messages before it, add_generation_prompt=True)     what the model sees when it has to answer
    write(messages up to it)                                  and what that should have become

which must both begin the writing of the whole conversation. Trailing white space is cut off an answer, so that it ends
with the end-of-turn token, where generation stops. Where a template ends the conversation without such a token
(LLaVA-1.5's does), the end-of-sequence token is added, or the model would never learn to stop.
"""

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

import jinja2

from hyperfade.data.examples import Example, count_images, fault, text_of
from hyperfade.errors import DataError

_TEMPLATE_HINT = "Use the instruction-tuned checkpoint of the family, or set the chat_template of its processor."


@dataclass(frozen=True)
class Written:
    """An example as the template writes it, each image still one placeholder."""

    example: Example
    text: str
    num_images: int
    """How many of the example's images the text shows: the first ones."""
    answers: tuple[tuple[int, int], ...] = ()
    """(from, to) in characters of `text`: every answer with its end token. Empty for a prompt."""


class Chat:
    """Writes conversations for one processor (or, for a text-only model, one tokenizer)."""

    def __init__(self, processor: Any) -> None:
        name = type(processor).__name__
        if not hasattr(processor, "apply_chat_template"):
            raise DataError(f"{name} cannot write conversations.", "Give a transformers processor or tokenizer.")
        self.reads_images = hasattr(processor, "tokenizer")
        self._processor = processor
        self._tokenizer = processor.tokenizer if self.reads_images else processor
        # Older checkpoints keep the template with the tokenizer, where a processor does not look.
        self._template = processor.chat_template or self._tokenizer.chat_template
        if not self._template:
            raise DataError(f"{name} has no chat template, so conversations cannot be written for it.", _TEMPLATE_HINT)
        token = getattr(processor, "image_token", None) if self.reads_images else None
        self.image_token = None if token is None else str(token)
        self._end_tokens = tuple(str(token) for token in self._tokenizer.added_tokens_decoder.values() if token.special)

    def whole(self, example: Example) -> Written:
        """The whole conversation with the places of all its answers.

        Raises `DataError` if it cannot be trained on, or if this template makes the answers impossible to place.
        """
        messages, where = example.messages, example.where
        reason = fault(messages)
        if reason:
            raise DataError(f"{where}: {reason}.", "Correct the conversation, or let bad samples be skipped.")
        text = self._write(messages, where)
        answers = []
        for turn in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
            before = self._write(messages[:turn], where, add_generation_prompt=True)
            after = text if turn == len(messages) - 1 else self._write(messages[: turn + 1], where)
            after = after.rstrip()
            if not (text.startswith(after) and after.startswith(before) and after != before):
                raise DataError(
                    f"{where}: the chat template writes answer {len(answers) + 1} differently when it is asked for"
                    " and when it is part of the conversation, so it cannot be told from the prompt.",
                    "Give each answer a row of its own; for a reasoning model, use a template without thinking.",
                )
            answers.append((len(before), len(after)))
        start, end = answers[-1]
        if not text[:end].endswith(self._end_tokens) and self._tokenizer.eos_token:
            text = text[:end] + self._tokenizer.eos_token
            answers[-1] = (start, len(text))
        self._check_images(example, text, len(example.images))
        return Written(example, text, len(example.images), tuple(answers))

    def prompt(self, example: Example) -> Written:
        """The conversation up to its last answer, with the generation prompt."""
        turns = [i for i, message in enumerate(example.messages) if message["role"] == "assistant"]
        asked = example.messages[: turns[-1]] if turns else example.messages
        if not asked:
            raise DataError(f"{example.where}: there is no question to answer.", "Begin with a message of the user.")
        text = self._write(asked, example.where, add_generation_prompt=True)
        self._check_images(example, text, count_images(asked))
        return Written(example, text, count_images(asked))

    def expanded_answers(self, written: Written, expanded: str) -> list[tuple[int, int]]:
        """`written.answers` in characters of `expanded`, where a processor has blown up every placeholder.

        The text between placeholders comes through unchanged, so it is looked for, piece by piece. A short piece
        between two images (a line break) may be found too early, inside an image's expansion. That does no harm:
        a piece that holds an answer carries the marks of the turns around it, which no expansion contains.
        """
        pieces = written.text.split(self.image_token) if self.image_token else [written.text]
        starts, places = [0], [0]
        for number, piece in enumerate(pieces):
            is_last = number == len(pieces) - 1
            place = len(expanded) - len(piece) if is_last else expanded.find(piece, places[-1])
            if place < places[-1] or not expanded.startswith(piece, place):
                raise DataError(
                    f"{written.example.where}: {type(self._processor).__name__} changes the text of the conversation,"
                    " so the answers cannot be found in it.",
                    "Look for control tokens in the text; if there are none, this family is not supported.",
                )
            places[-1] = place
            # The next piece begins after a placeholder here, and after at least one character of its expansion there.
            starts.append(starts[-1] + len(piece) + len(self.image_token or ""))
            places.append(place + len(piece) + 1)

        def moved(position: int) -> int:
            piece = min(bisect_right(starts, position), len(pieces)) - 1
            return places[piece] + position - starts[piece]

        return [(moved(start), moved(end)) for start, end in written.answers]

    def _write(self, messages: tuple[dict, ...], where: str, *, add_generation_prompt: bool = False) -> str:
        # Templates of text-only models expect a text where those of processors expect a list of parts.
        given = list(messages) if self.reads_images else [m | {"content": text_of(m)} for m in messages]
        try:
            return self._processor.apply_chat_template(
                given, chat_template=self._template, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(
                f"{where}: the chat template refuses messages of {roles}: {error}",
                "Write the conversation as this family of models expects it, e.g. user and assistant in turn.",
            ) from error

    def _check_images(self, example: Example, text: str, expected: int) -> None:
        """Raises unless the example has the images that its messages place, and the text a placeholder for each."""
        placed = count_images(example.messages)
        if placed != len(example.images):
            raise DataError(
                f"{example.where}: the messages place {placed} images, and {len(example.images)} are given.",
                'Give one image for every {"type": "image"} part.',
            )
        if placed and not self.reads_images:
            raise DataError(
                f"{example.where}: the example has images, but {type(self._processor).__name__} reads text only.",
                "Take a processor instead of its tokenizer, or data without images.",
            )
        written = text.count(self.image_token) if self.image_token else expected
        if written != expected:
            raise DataError(
                f"{example.where}: {expected} images belong into a text with {written} placeholders"
                f" {self.image_token}.",
                f'Place images by {{"type": "image"}} parts and keep {self.image_token} out of the texts.',
            )
