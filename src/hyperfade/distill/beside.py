"""The dense model and the compressed one side by side, from FFN to FFN: what a corrected fit is told.

Every batch has two passes (`passes.py`) through the one model, in which an FFN's fading matrices are dense (α = 0) for
the one and light (α = 1) for the other. The dense pass is one FFN ahead: it has left the layer that is being fitted, so
what that layer gives out in the dense model is known.
"""

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hyperfade.distill.activations import Batch, Run
from hyperfade.distill.correction import Aim
from hyperfade.distill.landing import Landing, first_tensor, landings
from hyperfade.distill.passes import Pass, parts_of, sends_again, stops, trim
from hyperfade.errors import FitError
from hyperfade.surgery import Plan, blends

Stop = tuple[Plan, list[Batch], Run, Callable[[str], Aim | None]]
"""What is fitted now, the batches that reach it, how they do, and what the writer of its FFN of a name is aimed at."""


def beside(model: nn.Module, plan: Plan, batches: Sequence[Batch]) -> Generator[Stop, None, None]:
    """Every part of `plan` in the order in which the first of `batches` meets them, to be fitted before the next is
    asked for. `model` is swapped, in evaluation mode, with every α at 0; passes leave a part with its α at 1.

    What no batch meets is not given out. Raises `FitError` where there are no batches, or a module is met twice.
    """
    if not batches:
        raise FitError("A calibrated fit needs calibration batches, got none.", "Give data, or lower fit.batch_size.")
    left, layers = parts_of(plan), blends(model)
    landed = landings(model, plan.ffns, batches[0])
    compressed, dense = ([Pass(model, dict(batch)) for batch in batches] for _ in range(2))
    own = {id(light.batch): (light, other) for light, other in zip(compressed, dense, strict=True)}
    try:
        with _without_cache(model), stops(model, left), _Watch(model, landed, dense) as watch:
            for each in (*dense, *compressed):
                each.go_on()
            while (name := compressed[0].at) is not None:
                if name not in left:
                    raise FitError(
                        f"{name} runs more than once in a pass, the second time after it was fitted.",
                        "Take fit.prefix: compressed.",
                    )
                part, here = left.pop(name), [each for each in compressed if each.at == name]
                for each in here:
                    own[id(each.batch)][1].go_on()
                send = sends_again({id(each.batch): each for each in here})
                yield part, [each.batch for each in here], send, lambda ffn: watch.aim(ffn, own)
                for swap in part.swaps:
                    layers[swap.name].alpha = 1.0
                for each in here:
                    each.go_on()
                watch.forget([ffn.name for ffn in part.ffns])
                trim()
    finally:
        for each in (*dense, *compressed):
            each.end()
        trim()


class _Watch:
    """Keeps around every FFN that has landed what its entry was given in compressed passes, and what its layer gave out
    in dense ones."""

    def __init__(self, model: nn.Module, landed: dict[str, Landing], dense: Sequence[Pass]) -> None:
        self._model, self._landed, self._dense = model, landed, set(dense)
        self._given: dict[tuple[str, Any], Tensor] = {}
        self._made: dict[tuple[str, Any], Tensor] = {}

    def __enter__(self) -> "_Watch":
        def keep(into: dict[tuple[str, Any], Tensor], ffn: str, *values: Any) -> None:
            current = threading.current_thread()
            if (current in self._dense) == (into is self._made):
                tensor = first_tensor(*values)
                assert tensor is not None
                into[ffn, current] = tensor

        self._handles = []
        for ffn, landing in self._landed.items():
            entry, layer = self._model.get_submodule(landing.entry), self._model.get_submodule(landing.layer)
            self._handles += [
                entry.register_forward_pre_hook(
                    lambda _, args, kwargs, ffn=ffn: keep(self._given, ffn, args, *kwargs.values()), with_kwargs=True
                ),
                layer.register_forward_hook(lambda _, args, output, ffn=ffn: keep(self._made, ffn, output)),
            ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def aim(self, ffn: str, own: dict[int, tuple[Pass, Pass]]) -> Aim | None:
        """What `ffn`'s writer ought to add, batch by batch; None where its output's landing is unknown."""
        landing = self._landed.get(ffn)
        if landing is None:
            return None

        def out(batch: Batch) -> Tensor:
            return self._made[ffn, own[id(batch)][1]].float()

        def added(batch: Batch) -> Tensor:
            return out(batch) - self._given[ffn, own[id(batch)][0]].float()

        return Aim(added, out, landing.scale)

    def forget(self, ffns: Sequence[str]) -> None:
        """Give up what is kept of these."""
        for kept in (self._given, self._made):
            for key in [key for key in kept if key[0] in ffns]:
                del kept[key]


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """No keys and values of batches that wait, for the time of a with block."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    before = getattr(text, "use_cache", None)
    if text is not None and before is not None:
        text.use_cache = False
    try:
        yield
    finally:
        if text is not None and before is not None:
            text.use_cache = before
