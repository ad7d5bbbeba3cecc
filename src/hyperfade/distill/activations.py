"""What a model's layers read: second moments of their inputs over calibration batches, gathered by hooks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from hyperfade.algebra import SecondMoment, conditioned, ridge_
from hyperfade.errors import FitError
from hyperfade.surgery import region_of

Batch = dict[str, Tensor]


class Reached(Exception):
    """Raised inside a forward pass once everything wanted has its input: the rest of the pass is not needed."""


def second_moments(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Batch], ridge: float
) -> dict[str, Tensor]:
    """C (d, d), float64, of the inputs of every one of `layers` (by name), over all batches in one pass over them, with
    `ridge` on the diagonal; padding of the text does not count.

    All of them are in memory at a time. Raises `FitError` where a layer is never reached or its inputs are not finite.
    """
    moments: dict[str, SecondMoment] = {}
    met: set[str] = set()
    mask: Tensor | None = None

    def collect(name: str, args: tuple[Tensor, ...]) -> None:
        x = args[0].flatten(0, -2)  # some families (OPT) flatten it themselves
        if mask is not None and len(x) == mask.numel() and region_of(name) == "language":
            x = x[mask.flatten().bool()]
        if name not in moments:
            moments[name] = SecondMoment(x.shape[-1], x.device)
        moments[name].add_(x)
        met.add(name)
        if len(met) == len(layers):
            raise Reached

    with input_hooks({module: lambda _, args, name=name: collect(name, args) for name, module in layers.items()}):
        for batch in batches:
            mask = batch.get("attention_mask")
            met.clear()
            run(model, batch)
    results = {}
    for name in layers:
        if name not in moments:
            raise FitError(f"No calibration batch reaches {name}.", "Give calibration data with images and text.")
        try:
            moment = moments[name].mean()
            conditioned(moment, len(moment), 0, moment.device)  # finite?
        except FitError as failure:
            raise FitError(f"{name}: {failure.message}", failure.hint) from failure
        results[name] = ridge_(moment, ridge)
    return results


@contextmanager
def input_hooks(hooks: Mapping[nn.Module, Callable[[nn.Module, Any], None]]) -> Iterator[None]:
    """Forward pre-hooks for the time of a with block."""
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def run(model: nn.Module, batch: Batch) -> None:
    """One forward pass, as far as the hooks let it go; labels are left out."""
    with suppress(Reached):
        model(**{key: value for key, value in batch.items() if key != "labels"})
