"""Where an FFN's output lands: the residual stream around it, found in what a forward pass does, not in names.

Most layers end with  out = r + γ ⊙ y:  r is the residual stream in front of the FFN, y what its writer makes of it, γ a
scale for every channel that few models have (LayerScale). Whether that is so, and which modules hold r and γ, is read
off one pass: r enters the module whose output is the FFN's input, γ is what lies between the writer and the sum, and
r + γ ⊙ y has to be the layer's output to the last bit. Where it is not (norms behind the FFN, attention beside it),
nothing is said about that FFN.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hyperfade.distill.activations import Batch, run
from hyperfade.processes import join, sum_
from hyperfade.surgery import FFN


@dataclass(frozen=True)
class Landing:
    """An FFN's surroundings by module names: `entry` reads r, `layer` gives out r + γ ⊙ y. scale: γ (k,), or None."""

    entry: str
    layer: str
    scale: Tensor | None


@dataclass(frozen=True)
class _Call:
    module: str
    given: Tensor
    made: Tensor


def first_tensor(*values: Any) -> Tensor | None:
    """The first tensor of what a module was given or gave out, looked for one level deep."""
    flat = [part for value in values for part in (value if isinstance(value, tuple | list) else (value,))]
    return next((part for part in flat if isinstance(part, Tensor)), None)


def landings(model: nn.Module, ffns: Sequence[FFN], batch: Batch) -> dict[str, Landing]:
    """The `Landing` of every one of `ffns` that has one and that `batch` reaches, in every process, by the FFN's name.
    Experts and projectors have none."""
    found: dict[str, Landing] = {}
    modules = dict(model.named_modules())
    around: dict[str, list[FFN]] = {}  # by what may be the layer: the module that holds the FFN, or the one around it
    for ffn in ffns:
        for layer in {ffn.name, ffn.name.rpartition(".")[0]} - {""}:
            within = sum(other.name.startswith(f"{layer}.") for other in ffns)
            layered = ffn.readers and not ffn.experts and ffn.region != "projector" and within <= 1
            if layered and not isinstance(modules[layer], nn.ModuleList):
                around.setdefault(layer, []).append(ffn)
    calls: dict[str, list[_Call]] = {layer: [] for layer in around}

    def note(name: str, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        given, made = first_tensor(args, *kwargs.values()), first_tensor(output)
        if given is not None and made is not None:
            for layer, own in calls.items():
                if name.startswith(f"{layer}."):
                    own.append(_Call(name, given, made))
            for ffn in around.get(name, ()):
                landing = _landing(modules, name, made, calls[name], ffn)
                if landing is not None:
                    found.setdefault(ffn.name, landing)
        if name in calls:
            calls[name].clear()

    with _noting(modules, list(around), note):
        run(model, batch)
    agreed = torch.tensor([float(ffn.name in found) for ffn in ffns])
    sum_([agreed])
    everywhere = {ffn.name for ffn, times in zip(ffns, agreed.tolist(), strict=True) if times == join().num_processes}
    return {name: landing for name, landing in found.items() if name in everywhere}


@contextmanager
def _noting(modules: dict[str, nn.Module], layers: list[str], note: Any) -> Iterator[None]:
    inside = [n for n in modules if any(n == layer or n.startswith(f"{layer}.") for layer in layers)]
    handles = [
        modules[n].register_forward_hook(
            lambda _, args, kwargs, output, n=n: note(n, args, kwargs, output), with_kwargs=True
        )
        for n in inside
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _landing(
    modules: dict[str, nn.Module], layer: str, out: Tensor, calls: Sequence[_Call], ffn: FFN
) -> Landing | None:
    """What `calls` within `layer`, in their order, say about `ffn`."""
    read = next((call.given for call in calls if call.module == ffn.readers[0]), None)
    y = next((call.made for call in calls if call.module == ffn.writer), None)
    if read is None or y is None or y.numel() != out.numel():
        return None
    entries = [
        call for call in calls if _same(call.made, read) and not _same(call.given, read) and _sized(call.given, out)
    ]
    scaled, scales = y, list[nn.Module]()
    while True:
        for entry in entries:
            ended = entry.given.reshape(out.shape) + scaled.reshape(out.shape)
            if torch.allclose(out, ended, rtol=0, atol=0, equal_nan=True):  # padding may hold anything
                scale = _scale(scales, y) if scales else None
                return Landing(entry.module, layer, scale) if scale is not None or not scales else None
        following = next((c for c in calls if _same(c.given, scaled) and not _same(c.made, scaled)), None)
        if following is None or not _sized(following.made, out) or len(scales) == 2:
            return None
        scaled, scales = following.made, [*scales, modules[following.module]]


def _scale(scales: Sequence[nn.Module], y: Tensor) -> Tensor | None:
    """γ (k,) where `scales`, one after the other, do nothing but multiply by it; else None."""
    ones, through = torch.ones_like(y[:1] if y.dim() == 2 else y[:1, :1]), y
    for module in scales:
        ones, through = module(ones), module(through)
    gamma = ones.flatten()
    return gamma if gamma.shape == y.shape[-1:] and torch.equal(through, gamma * y) else None


def _same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel()


def _sized(one: Tensor, other: Tensor) -> bool:
    return one.shape[-1:] == other.shape[-1:] and one.numel() == other.numel()
