"""The teacher's answers, stored once, so that recipes train without a teacher in memory.

For every answer token the k likeliest tokens are kept with their log-probabilities at the recipe's temperature, and the
logarithm of what all others have together (`losses.truncated_kl` says what that costs). Answers lie by example number
in safetensors files of up to `EXAMPLES` examples, in a folder whose name is a hash of all they depend on: model, data,
k, temperature, dtype. A file is there in whole or not at all, and what is missing is computed, so an interrupted pass
continues, and a longer training adds to what a shorter one left.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hyperfade.data.collate import IGNORED
from hyperfade.distill.losses import answer_logits, top_k_log_probs, truncated_kl
from hyperfade.errors import CheckpointError, DataError
from hyperfade.processes import is_first, share_of, wait

VERSION = 1
EXAMPLES = 256  # in a file
_PARTS = ("targets", "tokens", "log_probs", "log_rest")
_AGAIN = "Delete the folder, and run the same command again."


class CachedTeacher:
    """What a folder holds of a teacher, read example by example; files stay on disk until they are asked for.

    Raises `CheckpointError` for a file that is damaged or of another version.
    """

    def __init__(self, folder: Path, temperature: float) -> None:
        self.folder, self.temperature = folder, temperature
        self._places: dict[int, tuple[Path, int, int]] = {}
        self._opened: dict[Path, Any] = {}
        for file in sorted(folder.glob("answers-*.safetensors")):
            self.add(file)

    def __contains__(self, number: int) -> bool:
        return number in self._places

    def add(self, file: Path) -> None:
        """Take note of a file's examples."""
        try:
            opened = safe_open(file, framework="pt")
            if (opened.metadata() or {}).get("version") != str(VERSION):
                raise CheckpointError(f"{file} is not of version {VERSION} of cached answers.", _AGAIN)
            numbers, offsets = (opened.get_tensor(name).tolist() for name in ("examples", "offsets"))
            rows = {opened.get_slice(name).get_shape()[0] for name in _PARTS}
            if len(offsets) != len(numbers) + 1 or rows != {offsets[-1]} or sorted(offsets) != offsets or offsets[0]:
                raise ValueError(f"{len(numbers)} examples do not fit {rows} tokens")
        except (SafetensorError, OSError, ValueError, TypeError, IndexError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}.", _AGAIN) from error
        self._opened[file] = opened
        for number, low, high in zip(numbers, offsets, offsets[1:], strict=False):
            self._places[number] = (file, low, high)

    def kl(self, numbers: Sequence[int], logits: Tensor, targets: Tensor) -> Tensor:
        """T² KL(teacher ‖ student), mean over the answer tokens of these examples in this order.

        logits (tokens, vocabulary) float32, targets (tokens,) of the student's batch. Raises `CheckpointError` where an
        example is missing, or its answer is another than the cached one.
        """
        missing = [number for number in numbers if number not in self]
        if missing:
            raise CheckpointError(f"{self.folder} has no answers for example {missing[0]}.", _AGAIN)
        rows = [self._rows(number) for number in numbers]
        columns = (torch.cat(column).to(logits.device) for column in zip(*rows, strict=True))
        wanted, tokens, log_probs, log_rest = columns
        if not torch.equal(wanted.to(targets.dtype), targets):
            raise CheckpointError(
                f"{self.folder} holds other answers than the batch of examples {', '.join(map(str, numbers[:8]))}.",
                _AGAIN,
            )
        return truncated_kl(logits, tokens.long(), log_probs, log_rest, self.temperature)

    def _rows(self, number: int) -> list[Tensor]:
        file, low, high = self._places[number]
        return [self._opened[file].get_slice(name)[low:high] for name in _PARTS]


@torch.no_grad()
def cache_teacher(
    teacher: nn.Module,
    numbers: Iterable[int],
    batch_of: Callable[[Sequence[int]], dict[str, Tensor]],
    folder: Path,
    depends_on: Mapping[str, Any],
    *,
    top_k: int,
    temperature: float,
    batch_size: int,
    autocast_dtype: torch.dtype | None,
    on_part: Callable[[int, int], None] = lambda done, total: None,
) -> CachedTeacher:
    """The answers of `teacher` to the examples with these numbers, computed as far as `folder` lacks them.

    depends_on: JSON values that identify model and data; with the settings given here they choose a folder within
    `folder`. on_part is called with the examples done and all that were missing. Of several processes each computes and
    writes its share. Raises `DataError` where a batch lacks examples it was asked for.
    """
    settings = {"version": VERSION, "top_k": top_k, "temperature": temperature, "autocast": str(autocast_dtype)}
    key = json.dumps({**settings, **depends_on}, sort_keys=True)
    folder = folder / hashlib.sha256(key.encode()).hexdigest()[:16]
    if is_first():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "key.json").write_text(key + "\n", encoding="utf-8")
    wait()
    cached = CachedTeacher(folder, temperature)
    missing = sorted({number for number in numbers if number not in cached})
    wait()  # all have seen the same files, so they agree on what is missing
    mine = share_of(missing)
    was_training = teacher.training
    teacher.eval()
    for first in range(0, len(mine), EXAMPLES):
        part = mine[first : first + EXAMPLES]
        batches = [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
        rows = [_answers(teacher, batch, batch_of, top_k, temperature, autocast_dtype) for batch in batches]
        counts = torch.cat([count for count, _ in rows])
        tensors = {name: torch.cat([columns[i] for _, columns in rows]) for i, name in enumerate(_PARTS)}
        tensors["examples"] = torch.tensor(part)
        tensors["offsets"] = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        file = folder / f"answers-{part[0]:08d}-{part[-1]:08d}.safetensors"
        partial = file.with_suffix(".partial")
        save_file(tensors, partial, metadata={"version": str(VERSION)})
        partial.replace(file)
        on_part(first + len(part), len(mine))
    teacher.train(was_training)
    if missing:
        wait()
        cached = CachedTeacher(folder, temperature)
    return cached


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors with their names, shapes and dtypes."""
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _answers(
    teacher: Any,
    numbers: Sequence[int],
    batch_of: Callable[[Sequence[int]], dict[str, Tensor]],
    top_k: int,
    temperature: float,
    autocast_dtype: torch.dtype | None,
) -> tuple[Tensor, list[Tensor]]:
    """Answer tokens per example, and the columns of `_PARTS` for all of them."""
    batch = batch_of(numbers)
    labels = batch["labels"]
    if len(labels) != len(numbers):
        raise DataError(
            f"A batch of {len(numbers)} examples has {len(labels)}: answers cannot be cached by number.",
            "Take data.on_bad_sample: error, or train.teacher: live.",
        )
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.autocast(labels.device.type, autocast_dtype or torch.bfloat16, enabled=autocast_dtype is not None):
        logits, targets = answer_logits(teacher(**inputs).logits, labels)
    tokens, log_probs, log_rest = top_k_log_probs(logits, top_k, temperature)
    columns = [targets.to(torch.int32), tokens.to(torch.int32), log_probs, log_rest]
    return (labels[:, 1:] != IGNORED).sum(dim=1).cpu(), [column.cpu().contiguous() for column in columns]
