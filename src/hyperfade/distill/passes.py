"""Forward passes that stop in front of every FFN, so that one pass of every batch calibrates a whole model.

A fit wants the inputs of one FFN after the other, each behind those fitted before. To send every batch from the first
layer to each FFN would read a model on disk as many times as it has FFNs. So each batch's pass runs in a thread of its
own that rests in front of an FFN while that is fitted, and goes on behind it. One thread runs at a time: threads stand
for coroutines here, which a model's forward is not written for. What waits is a batch's hidden states; the weights are
the caller's to bring and to take away.
"""

import ctypes
import sys
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from queue import SimpleQueue
from typing import Any, Literal

import torch
from torch import nn

from hyperfade.distill.activations import Batch, Reached, Run
from hyperfade.distill.activations import run as send
from hyperfade.surgery import Plan

Order = Literal["again", "on", "end"]


class Pass(threading.Thread):
    """The forward pass of one batch. `at` is the module it waits in front of, by name; None once it is over."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        super().__init__(daemon=True)
        self.at: str | None = None
        self._over = False
        self._model, self.batch = model, batch
        self._orders: SimpleQueue[Order] = SimpleQueue()
        self._reports: SimpleQueue[str | BaseException | None] = SimpleQueue()
        self.start()

    def go_on(self) -> None:
        """Run on to the next stop, or to the end."""
        self._command("on")

    def again(self) -> None:
        """Run the module that the pass waits in front of, for its hooks to see, and wait there as before."""
        self._command("again")

    def end(self) -> None:
        """Leave the rest of the model alone."""
        if not self._over:
            self._command("end")

    def _command(self, order: Order) -> None:
        self._orders.put(order)
        report = self._reports.get()
        self._over = report is None or isinstance(report, BaseException)
        if isinstance(report, BaseException):
            self.at = None
            raise report
        self.at = report

    def run(self) -> None:
        """The thread's work."""
        try:
            with torch.no_grad(), suppress(Reached):
                if self._orders.get() == "end":
                    raise Reached
                send(self._model, self.batch)
            self._reports.put(None)
        except BaseException as error:  # noqa: BLE001 (raised where the pass was sent on)
            self._reports.put(error)

    def stop(self, name: str) -> bool:
        """Called by the thread in front of a module: waits; True where the module shall run for its hooks only."""
        self._reports.put(name)
        order = self._orders.get()
        if order == "end":
            raise Reached
        return order == "again"


@contextmanager
def stops(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Let every `Pass` through `model` wait in front of these modules; of what has another's place since, the new one
    runs. What calls them outside a pass does not wait."""
    modules = {name: model.get_submodule(name) for name in names}
    own = {name: module.__dict__["forward"] for name, module in modules.items() if "forward" in module.__dict__}

    def stopping(name: str, module: nn.Module, forward: Any) -> Any:
        def waits(*args: Any, **kwargs: Any) -> Any:
            def computed() -> Any:
                present = model.get_submodule(name)
                return forward(*args, **kwargs) if present is module else present(*args, **kwargs)

            current = threading.current_thread()
            while isinstance(current, Pass) and current.stop(name):
                with suppress(Reached):
                    computed()
            return computed()

        return waits

    for name, module in modules.items():
        module.forward = stopping(name, module, module.forward)
    try:
        yield
    finally:
        for name, module in modules.items():
            del module.forward
            if name in own:
                module.forward = own[name]


def trim() -> None:
    """Give the system back what threads have freed. glibc's malloc keeps it for each of them otherwise, and what many
    batches leave behind is several times what they hold. Elsewhere it does nothing."""
    if sys.platform == "linux":
        release = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if release is not None:
            release(0)


def sends_again(waiting: Mapping[int, Pass]) -> Run:
    """Sends a batch through the module that its pass, by the batch's id, waits in front of."""
    return lambda _, batch: waiting[id(batch)].again()


def parts_of(plan: Plan) -> dict[str, Plan]:
    """`plan` in parts that are fitted at one stop, by the module that passes stop in front of."""
    holders = outermost([ffn.name for ffn in plan.ffns])
    return {
        holder: replace(
            plan,
            swaps=tuple(swap for swap in plan.swaps if holders[swap.ffn] == holder),
            ffns=tuple(ffn for ffn in plan.ffns if holders[ffn.name] == holder),
        )
        for holder in holders.values()
    }


def outermost(names: Sequence[str]) -> dict[str, str]:
    """Each module's name with that of the outermost of these modules that it lies in."""

    def around(name: str) -> str:
        parts = name.split(".") if name else []
        heads = (".".join(parts[:end]) for end in range(len(parts) + 1))
        return next(head for head in heads if head in names)

    return {name: around(name) for name in names}
