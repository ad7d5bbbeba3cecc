"""The fit of a model that is on disk: one FFN at a time is read, fitted as `fit_` fits it, and given up again."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from hyperfade.distill.calibrate import LayerFit, fit_
from hyperfade.recipe import Fit as FitRecipe
from hyperfade.surgery import Plan, swap_

Read = Callable[[str], Tensor]
"""The tensor of a parameter's name, in the dtype and on the device that the model runs with."""


def fit_streamed(
    model: nn.Module,
    plan: Plan,
    read: Read,
    recipe: FitRecipe,
    folder: Path,
    on_layer: Callable[[LayerFit], None] = lambda layer: None,
) -> list[LayerFit]:
    """Fit every FFN of `plan`, made for `model` on the meta device; leaves `model` as it is, and the fits in `folder`.

    What lies in `folder` is not fitted again. on_layer is called after each matrix. The fits are those of `fit_`, bit
    for bit. Raises `FitError` like `fit_`.
    """
    results = []
    for ffn in plan.ffns:
        part = replace(plan, swaps=tuple(swap for swap in plan.swaps if swap.ffn == ffn.name), ffns=(ffn,))
        empty = {swap.name: model.get_submodule(swap.name) for swap in part.swaps}
        for name, linear in empty.items():
            model.set_submodule(name, _filled(linear, name, read))
        swap_(model, part)
        results += fit_(model, part, (), recipe, folder, on_layer)
        for name, linear in empty.items():
            model.set_submodule(name, linear)
    return results


def _filled(module: nn.Module, name: str, read: Read) -> nn.Module:
    """A copy of `module`, which is called `name` in the model, with what is stored for it."""
    filled = copy.deepcopy(module).requires_grad_(False)
    filled.load_state_dict({part: read(f"{name}.{part}") for part in filled.state_dict()}, assign=True)
    return filled
