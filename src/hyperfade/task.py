"""What all variants of a run share: recipe, processor, data, and how examples become batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hyperfade.data import Collator, Source, named_when_slow, open_source
from hyperfade.distill import answers_only
from hyperfade.errors import DataError, FitError
from hyperfade.hub import load, load_processor, takes_images
from hyperfade.measure import device
from hyperfade.processes import join, share_of
from hyperfade.recipe import Fit, Recipe, Train
from hyperfade.workspace import Variant

Say = Callable[[str], None]


def open_task(recipe: Recipe, model: PreTrainedModel) -> "Task":
    """Processor and training data of `recipe`, for `model` (on any device). Raises `DataError` for what is wrong."""
    processor, data = load_processor(recipe.model), recipe.data
    source = open_source(data.train, needs_images=takes_images(model.config), on_bad=data.on_bad_sample)
    collator = Collator(processor, max_tokens=data.max_tokens, on_bad=data.on_bad_sample)
    return Task(recipe, processor, source, collator, "logits_to_keep" in signature(model.forward).parameters)


@dataclass(frozen=True)
class Task:
    """What all variants share: processor, data, and how examples become batches."""

    recipe: Recipe
    processor: Any
    source: Source
    collator: Collator
    keeps_logits: bool
    """Whether the model can leave out logits that nobody asks for."""

    def dense(self) -> Any:
        """The model to compress, fresh from its checkpoint."""
        return self._placed(load(self.recipe.model, self.recipe.dtype))

    def finished(self, variant: Variant) -> Any:
        """A variant's saved model, loaded as a user would."""
        return self._placed(load(str(variant.model)))

    def _placed(self, model: Any) -> Any:
        if self.recipe.attention:
            model.set_attn_implementation(self.recipe.attention)
        return model.to(device())

    def training_batch(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """The training batch of the examples with these numbers, on the device."""
        batch = self._usable(self.collator.training_batch, numbers)
        if self.keeps_logits:
            batch = answers_only(batch)
        return {key: value.to(device()) for key, value in batch.items()}

    def prompt_batch(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """The prompts of the examples with these numbers, on the device, in the recipe's dtype."""
        batch = self._usable(self.collator.prompt_batch, numbers)
        dtype = getattr(torch, self.recipe.dtype)
        return {k: v.to(device(), dtype if v.is_floating_point() else v.dtype) for k, v in batch.items()}

    def _usable(self, collate: Callable[..., dict[str, Tensor]], numbers: Sequence[int]) -> dict[str, Tensor]:
        """The batch of these examples; where all of them are bad and may be skipped, of the next ones."""
        for shift in range(len(self.source)):
            try:
                with named_when_slow():
                    return collate([self.source[(i + shift) % len(self.source)] for i in numbers])
            except DataError:
                if self.recipe.data.on_bad_sample == "error":
                    raise
        raise DataError(f"No sample of {self.source.name} can be used.", "Mend the data; the report lists the reasons.")

    def length_of(self, train: Train) -> Callable[[int], int] | None:
        """How long an example is, in characters, where batches shall be of like length."""

        def characters(number: int) -> int:
            return sum(len(str(message["content"])) for message in self.source[number].messages)

        return characters if train.group_by_length else None

    def calibration_batches(self, fit: Fit, *, alone: bool = False) -> list[dict[str, Tensor]]:
        """Batches of a seeded sample of training examples; of several processes, this one's share of them, unless it
        works `alone`."""
        generator = torch.Generator().manual_seed(self.recipe.seed)
        chosen = torch.randperm(len(self.source), generator=generator)[: fit.samples].tolist()
        batches = [chosen[i : i + fit.batch_size] for i in range(0, len(chosen), fit.batch_size)]
        if alone:
            return [self.training_batch(batch) for batch in batches]
        if len(batches) < join().num_processes:
            raise FitError(
                f"fit.samples {fit.samples} in batches of {fit.batch_size} are {len(batches)} calibration batches for "
                f"{join().num_processes} processes.",
                "Lower fit.batch_size, or raise fit.samples.",
            )
        return [self.training_batch(batch) for batch in share_of(batches)]
