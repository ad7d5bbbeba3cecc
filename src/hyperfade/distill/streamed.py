"""The fit of a model that is on disk: one FFN at a time is read, fitted as `fit_` fits it, and given up again.

A calibrated fit also needs what the model computes in front of every FFN. All batches go through the model side by
side, from FFN to FFN (`passes.py`), and what they meet on the way is read when the first of them calls it and given up
at the next FFN. So memory holds the weights from one FFN to the next, and every weight is read once.
"""

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from hyperfade.distill.activations import Batch
from hyperfade.distill.calibrate import fit_, never_reached
from hyperfade.distill.matrices import LayerFit
from hyperfade.distill.passes import Pass, parts_of, sends_again, stops, trim
from hyperfade.errors import FitError
from hyperfade.recipe import Fit as FitRecipe
from hyperfade.surgery import Plan, blends, swap_

Read = Callable[[str], Tensor]
"""The tensor of a parameter's name, in the dtype and on the device that the model runs with."""
OnLayer = Callable[[LayerFit], None]


def fit_streamed(
    model: nn.Module,
    plan: Plan,
    batches: Sequence[Batch],
    recipe: FitRecipe,
    folder: Path,
    read: Read,
    on_layer: OnLayer = lambda layer: None,
) -> list[LayerFit]:
    """Fit every FFN of `plan`, made for `model`, whose parameters are on the meta device; the fits are in `folder`.

    What lies in `folder` is not fitted again. on_layer is called after each matrix. The fits are those of `fit_`, bit
    for bit, and so are the errors. `model` is used up by it. Raises `FitError` for `prefix: corrected`, which needs
    dense and compressed weights at once.
    """
    if recipe.method == "calibrated" and recipe.prefix == "corrected":
        raise FitError(
            "fit.prefix corrected needs the dense model in memory beside the compressed one.",
            "Take fit.prefix: compressed, or compress, which has the model in memory.",
        )
    parts = parts_of(plan)
    if recipe.method == "calibrated":
        return _fit_on_the_way(model, parts, batches, recipe, folder, read, on_layer)
    results = []
    for part in parts.values():
        with _swapped(model, part, read):
            results += fit_(model, part, (), recipe, folder, on_layer)
    return results


def _fit_on_the_way(
    model: nn.Module,
    parts: dict[str, Plan],
    batches: Sequence[Batch],
    recipe: FitRecipe,
    folder: Path,
    read: Read,
    on_layer: OnLayer,
) -> list[LayerFit]:
    """Fit every part while all batches wait in front of the module it is named by."""
    model.eval()
    shelf, results, left = _Shelf(read), [], dict(parts)
    passes = [Pass(model, dict(batch)) for batch in batches]
    try:
        with stops(model, parts), shelf.read_when_called(model, parts):
            for each in passes:
                each.go_on()
            while left:
                shelf.clear_()
                name = passes[0].at if passes else None
                if name is None:
                    raise never_reached(sorted(left))
                if name not in left:
                    raise FitError(
                        f"{name} runs more than once in a pass, the second time after it was fitted and given up.",
                        "Take fit.method: frobenius, or compress, which has the model in memory.",
                    )
                part, here = left.pop(name), {id(each.batch): each for each in passes if each.at == name}
                with _swapped(model, part, read) as empty:
                    shelf.bring_(model, name)
                    inputs = [each.batch for each in here.values()]
                    send = sends_again(here)
                    results += fit_(model, part, inputs, recipe, folder, on_layer, send=send)
                    for swapped, blend in blends(model).items():
                        light = recipe.prefix == "compressed"
                        model.set_submodule(swapped, blend.light if light else _filled(empty[swapped], swapped, read))
                    for each in here.values():
                        each.go_on() if left else each.end()
                trim()
    finally:
        for each in passes:
            each.end()
        trim()
    return results


@contextmanager
def _swapped(model: nn.Module, part: Plan, read: Read) -> Iterator[dict[str, nn.Module]]:
    """`swap_` by a part of the plan, whose matrices are read from disk, for the time of a with block; gives the ones
    without memory that have their place before and after."""
    empty = {swap.name: model.get_submodule(swap.name) for swap in part.swaps}
    for name, linear in empty.items():
        model.set_submodule(name, _filled(linear, name, read))
    swap_(model, part)
    yield empty
    for name, linear in empty.items():
        model.set_submodule(name, linear)


def _filled(linear: nn.Module, name: str, read: Read) -> nn.Module:
    """A copy of a matrix, which is called `name` in the model, with what is stored for it."""
    filled = copy.deepcopy(linear).requires_grad_(False)
    filled.__dict__.pop("forward", None)  # one that waits: a matrix that is an FFN by itself
    filled.load_state_dict({part: read(f"{name}.{part}") for part in filled.state_dict()}, assign=True)
    return filled


class _Shelf:
    """What is read of a model's weights for a while."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._brought: list[tuple[nn.Module, str, nn.Parameter]] = []

    def bring_(self, model: nn.Module, name: str, recurse: bool = True) -> None:
        """Read what the module `name`, with all in it or by itself, has on the meta device."""
        within = model.get_submodule(name)
        for inner, module in within.named_modules() if recurse else [("", within)]:
            for key, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    full = ".".join(part for part in (name, inner, key) if part)
                    module._parameters[key] = nn.Parameter(self._read(full), requires_grad=False)
                    self._brought.append((module, key, parameter))

    def clear_(self) -> None:
        """Give it up again."""
        for module, key, parameter in self._brought:
            module._parameters[key] = parameter
        self._brought.clear()

    @contextmanager
    def read_when_called(self, model: nn.Module, holders: Collection[str]) -> Iterator[None]:
        """Read what holds none of `holders` as a whole when it is called. What is around them keeps its own parameters
        (scales, mostly) all the time: it is still running while its FFNs are waited for."""
        handles, done = [], []
        for name, module in model.named_modules():
            if any(name == holder or name.startswith(f"{holder}.") or not holder for holder in holders):
                continue
            if not name or any(holder.startswith(f"{name}.") for holder in holders):
                self.bring_(model, name, recurse=False)
            elif not any(name.startswith(f"{whole}.") for whole in done):
                done.append(name)
                handles.append(module.register_forward_pre_hook(lambda *_, name=name: self.bring_(model, name)))
        self._brought.clear()
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
