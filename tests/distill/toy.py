"""A tiny swapped model with its data: examples by number, each with an image, padding, and two answer tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from tiny_models import FAMILIES, IMAGE_TOKEN, VOCAB
from torch import Tensor, nn

from hyperfade.distill import teacher_of
from hyperfade.recipe import Layer, Replace, Train
from hyperfade.surgery import Plan, plan, swap_

QUARTER = Replace(language=Layer(n=4), vision=Layer(n=4))
NARROW = Replace(language=Layer(kind="dense", width=0.5), vision=Layer(kind="dense", width=0.6))
HALF = Replace(language=Layer(n=4, products=8), vision=Layer(n=2))


def batch_of(numbers: Sequence[int]) -> dict[str, Tensor]:
    """The training batch of these examples, padded on the right by up to three tokens. Number n is always the same."""
    rows: dict[str, list[Tensor]] = {"input_ids": [], "attention_mask": [], "labels": [], "pixel_values": []}
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        length = 5 + number % 4  # question and answer
        text = torch.randint(3, IMAGE_TOKEN, (length,), generator=generator)
        ids = torch.cat([torch.full((4,), IMAGE_TOKEN), text, torch.zeros(8 - length, dtype=torch.long)])
        labels = torch.full((12,), -100)
        labels[length + 2 : length + 4] = ids[length + 2 : length + 4]
        rows["input_ids"].append(ids)
        rows["attention_mask"].append((torch.arange(12) < length + 4).long())
        rows["labels"].append(labels)
        rows["pixel_values"].append(torch.randn(3, 8, 8, generator=generator))
    return {key: torch.stack(value) for key, value in rows.items()}


def calibration(number: int = 2, size: int = 8) -> list[dict[str, Tensor]]:
    return [batch_of(range(i * size, (i + 1) * size)) for i in range(number)]


def swapped(replace: Replace = QUARTER, family: str = "llava_siglip") -> tuple[Any, Any, Plan]:
    """Student at α = 0 with only its light branches training, teacher, plan."""
    torch.manual_seed(0)
    student = FAMILIES[family].build()
    the_plan = plan(student, replace)
    teacher = teacher_of(student)
    student.requires_grad_(False)
    swap_(student, the_plan)
    return student, teacher, the_plan


def train(**changes: Any) -> Train:
    return Train(**{"fade_steps": 4, "polish_steps": 4, "batch_size": 4, "learning_rate": 1e-2, **changes})


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


assert VOCAB > IMAGE_TOKEN
