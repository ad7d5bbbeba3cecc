"""What each of two processes does in `test_divide.py`, which starts them: divided.py FOLDER"""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_models import IMAGE_TOKEN
from torch import Tensor
from toy import batch_of, swapped, train

from hyperfade.build import choose_trained_
from hyperfade.distill import StepReport, distill_
from hyperfade.distill.divide import divided_twin, is_divided
from hyperfade.processes import is_first, join, leave
from hyperfade.recipe import Train

EXAMPLES = 20


def recipe(**changes: Any) -> Train:
    """Batches of three: one process has two examples, the other one."""
    given = {
        "batch_size": 3,
        "accumulation": 2,
        "checkpoint_every": 2,
        "weight_decay": 0.01,
        "learning_rate": 1e-3,
        "fade_order": "layer_by_layer",
        "train_also": ("*embed_tokens*",),
        "lora_rank": 2,
        "shard": True,
        "hidden_weight": 0.5,
    }
    return train(**{**given, **changes})


def some_with_images(numbers: Sequence[int]) -> dict[str, Tensor]:
    """Two examples of three have no image, so that often one process needs no vision tower."""
    batch = batch_of(numbers)
    shown = torch.tensor([number % 3 == 0 for number in numbers])
    ids = torch.where(batch["input_ids"] == IMAGE_TOKEN, 3, batch["input_ids"])
    batch["input_ids"] = torch.where(shown[:, None], batch["input_ids"], ids)
    pixels = batch.pop("pixel_values")
    return batch | ({"pixel_values": pixels[shown]} if shown.any() else {})


def distil(folder: Path, settings: Train, on_step: Any = lambda report: None) -> Any:
    """A toy run in `folder`; the first process leaves the weights beside its state."""
    student, teacher, _ = swapped()
    choose_trained_(student, settings)
    distill_(student, teacher, EXAMPLES, some_with_images, settings, seed=3, folder=folder, on_step=on_step)
    if is_first():
        save_file({k: v.contiguous().clone() for k, v in student.state_dict().items()}, folder / "weights.safetensors")
    return student


def held_bytes(folder: Path) -> None:
    """How much of the language model's layers and of all that trains this process has."""
    student, _, _ = swapped()
    names = {n for n, p in student.named_parameters() if p.requires_grad or "language_model.layers" in n}
    whole = sum(p.nbytes for n, p in student.named_parameters() if n in names)
    twin = divided_twin(student)
    assert is_divided(twin)
    held = sum(p.to_local().nbytes if n in names else 0 for n, p in twin.named_parameters() if n in names)  # type: ignore
    left = sum(p.nbytes for p in student.parameters())
    (folder / f"held-{join().process_index}.txt").write_text(f"{whole} {held} {left}", encoding="utf-8")


def main(folder: Path) -> None:
    """All runs; the last is killed in one process when it is not there yet, and continued when it is."""

    def killed(report: StepReport) -> None:
        if report.step == 5 and join().process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    join()
    if (folder / "killed").exists():
        distil(folder / "killed", recipe())
    else:
        held_bytes(folder)
        distil(folder / "checkpointed", recipe(gradient_checkpointing=True))
        distil(folder / "whole", recipe())
        distil(folder / "killed", recipe(), killed)
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
