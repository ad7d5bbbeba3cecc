"""What one example is: a conversation, its images, and where it came from.

A row from outside (a line of JSON, a row of a table) is read in one place, `read_row`, and is either a complete
`Example` or a `DataError` that names the row. Images stay closed until `open_image` is called on them. A URL is never
fetched: files that the data names are read, and nothing else.
"""

import io
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from hyperfade.data.watch import reading
from hyperfade.errors import DataError

ROLES = ("system", "user", "assistant")
ROW_HINT = (
    'A row looks like {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is'
    ' this?"}]}, {"role": "assistant", "content": "a cat"}], "images": ["cat.png"]}.'
)
# Pillow also opens formats that run a program (EPS starts Ghostscript); data from elsewhere must not be able to.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# Two letters at least, so that C:\cat.png is a path.
_URL = re.compile(r"[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)

ImageRef = Image.Image | Path | bytes
"""An image not opened yet: an image object, a file, or the bytes of a file."""


@dataclass(frozen=True)
class Example:
    """A conversation that ends with an answer."""

    messages: tuple[dict, ...]
    """Chat messages for `apply_chat_template`; every content is a list of text and image parts."""
    images: tuple[ImageRef, ...]
    """Images in the order of their placeholders in `messages`; see `open_image`."""
    where: str
    """The origin as errors name it, e.g. "train.jsonl line 17"."""
    references: tuple[str, ...]
    """Accepted answers: the last assistant message first. An answer that several people gave may stand repeatedly."""
    kind: str = ""
    """Kind of question, for scores per kind."""
    task: str = ""
    """What is to be done, which decides how answers are scored: question (also if empty), caption or reading; a task
    has several kinds."""


@dataclass(frozen=True)
class Skipped:
    """A bad sample that was passed over, and why."""

    where: str
    reason: str

    @classmethod
    def because(cls, problem: DataError) -> "Skipped":
        """From the error, whose message begins with the place."""
        where, _, reason = problem.message.partition(": ")
        return cls(where, reason)


def read_row(row: Any, where: str, folder: Path) -> Example:
    """The example in `row`, a mapping with `messages` and, optionally, `images`, `references`, `kind` and `task`.

    Paths of images are relative to `folder`. Raises `DataError` that starts with `where` for anything else.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row must be an object, not {type(row).__name__}.", ROW_HINT)
    given = row.get("messages")
    if not isinstance(given, list) or not given:
        raise DataError(f"{where}: there are no messages.", ROW_HINT)
    listed = row.get("images") or []
    if not isinstance(listed, list):
        raise DataError(f"{where}: images must be a list, not {type(listed).__name__}.", ROW_HINT)

    supply = iter(listed)
    images: list[ImageRef] = []
    messages = tuple(_read_message(message, where, supply, images, folder) for message in given)
    unused = sum(1 for _ in supply)
    if unused:
        raise DataError(
            f"{where}: {len(listed)} images are given, but the messages place only {len(listed) - unused} of them.",
            'Put one {"type": "image"} part per image where it belongs in the content.',
        )
    reason = fault(messages)
    if reason:
        raise DataError(f"{where}: {reason}.", ROW_HINT)
    references = _references(row, messages, where)
    return Example(messages, tuple(images), where, references, str(row.get("kind") or ""), _task(row, where))


def fault(messages: tuple[dict, ...]) -> str | None:
    """What makes normalised `messages` useless for training and evaluation, or None."""
    for message in messages:
        if message["role"] not in ROLES:
            return f"unknown role {message['role']!r} (known: {', '.join(ROLES)})"
        if message["role"] == "assistant":
            if count_images((message,)):
                return "an image stands in an assistant message, but models answer in text"
            if not text_of(message).strip():
                return "an assistant message is empty"
    spoken = [message["role"] for message in messages if message["role"] != "system"]
    if not spoken or spoken[-1] != "assistant" or messages[-1]["role"] != "assistant":
        return "the last message must be the assistant's answer"
    if spoken[0] == "assistant":
        return "the assistant answers before anything was asked"
    return None


def text_of(message: dict) -> str:
    """The text parts of a normalised message, joined."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def count_images(messages: tuple[dict, ...]) -> int:
    """The number of image placeholders in normalised messages."""
    return sum(part["type"] == "image" for message in messages for part in message["content"])


def open_image(image: ImageRef, where: str) -> Image.Image:
    """`image` decoded, upright and in RGB.

    Raises `DataError` that starts with `where` if the file is missing, truncated or no image.
    """
    name = str(image) if isinstance(image, Path) else "an embedded image"
    reading(f"{where}, image {name}")
    try:
        if isinstance(image, Image.Image):
            opened = image
        else:
            opened = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=IMAGE_FORMATS)
        # Cameras store photographs sideways with a note; `convert` decodes the pixels, which finds truncated files.
        return ImageOps.exif_transpose(opened).convert("RGB")
    except FileNotFoundError as error:
        hint = (
            "Paths are relative to the folder of the data file; check the spelling and that the file was copied along."
        )
        raise DataError(f"{where}: image {name} does not exist.", hint) from error
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        hint = f"Replace or remove the file; formats read are {', '.join(IMAGE_FORMATS)}."
        raise DataError(f"{where}: image {name} cannot be read: {error}", hint) from error


def _read_message(given: Any, where: str, supply: Iterator[Any], images: list[ImageRef], folder: Path) -> dict:
    """`given` with its content as a list of parts; its images, from the parts or from `supply`, go to `images`."""
    if not isinstance(given, dict) or not isinstance(given.get("role"), str):
        raise DataError(f"{where}: a message must be an object with a role and a content.", ROW_HINT)
    content = given.get("content")
    if isinstance(content, str):
        return {"role": given["role"], "content": [{"type": "text", "text": content}]}
    if not isinstance(content, list):
        raise DataError(f"{where}: the content of a message must be text or a list of parts.", ROW_HINT)
    parts: list[dict] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif kind == "image":
            # Tables fill the keys that a row lacks with None, so a key counts only with a value.
            inline = [part[key] for key in ("path", "image", "url") if part.get(key) is not None]
            images.append(_image_ref(inline[0] if inline else next(supply, None), where, folder))
            parts.append({"type": "image"})
        else:
            raise DataError(f"{where}: a content part of type {kind!r} cannot be used.", ROW_HINT)
    return {"role": given["role"], "content": parts}


def _image_ref(given: Any, where: str, folder: Path) -> ImageRef:
    """A path, image object, bytes, or the {"bytes", "path"} of an undecoded `datasets` image, as an `ImageRef`."""
    if isinstance(given, dict):
        given = given.get("bytes") or given.get("path")
    if isinstance(given, (Image.Image, bytes)):
        return given
    if given is None:
        raise DataError(
            f"{where}: the messages place more images than there are in `images`.",
            'Give one entry in "images" for every {"type": "image"} part.',
        )
    if not isinstance(given, str) or not given:
        raise DataError(f"{where}: an image must be a path, not {given!r}.", ROW_HINT)
    if _URL.match(given):
        raise DataError(
            f"{where}: image {given[:80]!r} is a URL; only files are read.", "Download it and give its path."
        )
    return folder / given


def _task(row: dict, where: str) -> str:
    task = row.get("task")
    if task is not None and not isinstance(task, str):
        raise DataError(f"{where}: task must be a text, not {task!r}.", 'For example "task": "caption".')
    return task or ""


def _references(row: dict, messages: tuple[dict, ...], where: str) -> tuple[str, ...]:
    more = row.get("references") or []
    if not isinstance(more, list) or not all(isinstance(answer, str) for answer in more):
        raise DataError(f"{where}: references must be a list of texts.", 'For example "references": ["grey", "gray"].')
    answer, others = text_of(messages[-1]).strip(), list(more)
    if answer in others:  # it is one of those listed; how often each was given counts for VQA accuracy
        others.remove(answer)
    return (answer, *others)
