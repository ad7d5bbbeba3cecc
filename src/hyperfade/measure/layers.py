"""How fast a model's FFNs get on this machine, before anything is compressed: its config is enough.

Each distinct FFN is built alone, as the module it is inside the model, with random weights: dense, as the plan says,
and low-rank at the plan's size. All are timed side by side in alternating rounds (`time_alternately`).

Weights that stay in a cache from one call to the next make small layers look faster than they are inside a model, where
every layer's weights come from memory at every token. So calls go round `copies` of the layer that together exceed the
last cache four times.
"""

import copy
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from types import FunctionType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hyperfade.hub import fold_
from hyperfade.measure.footprint import weight_bytes
from hyperfade.measure.speed import Ratio, speedup, time_alternately
from hyperfade.nn import LightSpec
from hyperfade.surgery import FFN, Plan, Swap, dense_matrices, features, matched_low_rank, set_alpha_, swap_

TOKENS = (1, 8, 64, 512, 2048)
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_MOST_COPIES, _COPIES_BYTES = 256, 3 * 10**9  # of one layer


@dataclass(frozen=True)
class LayerTime:
    """What one layer took for one number of tokens: seconds of a call in every round."""

    seconds: tuple[float, ...]
    flops: int
    weight_bytes: int

    @property
    def median_seconds(self) -> float:
        """The median over rounds."""
        return statistics.median(self.seconds)

    def speedup_over(self, other: "LayerTime") -> Ratio:
        """How many times faster than `other`, timed in the same rounds."""
        return speedup(self.seconds, other.seconds)


@dataclass(frozen=True)
class FFNSpeed:
    """One distinct FFN of a model: `times[tokens]` holds dense, compressed and low_rank, in that order."""

    region: str
    count: int  # FFNs of the model that are like it
    shape: str
    labels: tuple[str, ...]  # what its matrices become
    rivals: tuple[str, ...]  # low-rank layers of equal size
    times: dict[int, dict[str, LayerTime]]


def compare_ffns(
    model: nn.Module,
    plan: Plan,
    dtype: torch.dtype,
    device: torch.device,
    tokens: Iterable[int] = TOKENS,
    on_ffn: Callable[[str], None] = lambda shape: None,
    compiled: bool = False,
) -> list[FFNSpeed]:
    """Time every distinct FFN of `plan` dense, compressed, and low-rank of equal size. `model` may be on meta.
    compiled: let `torch.compile` have the compressed ones; the others gain nothing by it (docs/speed.md)."""
    found = []
    for ffn, swaps, count in distinct_ffns(model, plan):
        shape = describe(model, ffn)
        on_ffn(f"{ffn.region} {shape}")
        rivals = low_rank_swaps(swaps)
        choices = {"dense": (), "compressed": swaps, "low_rank": rivals}
        layers = {name: lone_ffn(model, ffn, chosen, dtype, device) for name, chosen in choices.items()}
        in_turn = {name: copies(layer) for name, layer in layers.items()}
        if compiled:
            in_turn["compressed"] = compiled_copies(in_turn["compressed"])
        times = {m: time_layers(in_turn, input_width(model, ffn), m) for m in tokens}
        labels, others = (tuple(dict.fromkeys(s.spec.label for s in some)) for some in (swaps, rivals))
        found.append(FFNSpeed(ffn.region, count, shape, labels, others, times))
    return found


def ffn_lines(ffns: Sequence[FFNSpeed]) -> list[str]:
    """A table for people: speed-ups over dense by tokens for every kind of FFN, and for a
    region's FFNs together where they are of several kinds."""
    lines = []
    for ffn in ffns:
        lines.append("")
        lines.append(f"{ffn.region}: {ffn.count} FFNs {ffn.shape}, random weights")
        lines.append(f"  {'tokens':>6}  {'dense':>10}  {', '.join(ffn.labels):30}  low-rank of equal size")
        for tokens, times in ffn.times.items():
            dense, light, rival = (times[name] for name in ("dense", "compressed", "low_rank"))
            lines.append(
                f"  {tokens:6}  {1e3 * dense.median_seconds:7.2f} ms  {light.speedup_over(dense)!s:30}  "
                f"{rival.speedup_over(dense)}"
            )
    for region in dict.fromkeys(ffn.region for ffn in ffns):
        same = [ffn for ffn in ffns if ffn.region == region]
        if len(same) == 1:
            continue
        lines += ["", f"{region}: all {sum(ffn.count for ffn in same)} FFNs together"]
        for tokens in same[0].times:
            dense, light, rival = (
                sum(ffn.count * ffn.times[tokens][name].median_seconds for ffn in same)
                for name in ("dense", "compressed", "low_rank")
            )
            lines.append(f"  {tokens:6}  {1e3 * dense:7.2f} ms  {f'{dense / light:.2f}×':30}  {dense / rival:.2f}×")
    return [
        *lines,
        "",
        "Medians (quartiles) over alternating rounds; weights come from memory, as inside a model. These are the FFNs",
        "alone: a whole model gains less, by the time that attention, embeddings and head take.",
    ]


def distinct_ffns(model: nn.Module, plan: Plan) -> list[tuple[FFN, tuple[Swap, ...], int]]:
    """The plan's FFNs without repetitions: one of each region, shape and replacement, its swaps, and how many."""
    swaps: dict[str, list[Swap]] = {}
    for swap in plan.swaps:
        swaps.setdefault(swap.ffn, []).append(swap)
    kinds: dict[tuple, list[FFN]] = {}
    for ffn in plan.ffns:
        specs = tuple((s.name.removeprefix(ffn.name), s.spec) for s in swaps[ffn.name])
        kinds.setdefault((ffn.region, describe(model, ffn), specs), []).append(ffn)
    return [(same[0], tuple(swaps[same[0].name]), len(same)) for same in kinds.values()]


def describe(model: nn.Module, ffn: FFN) -> str:
    """Widths in words, e.g. `2048 → 11008 → 2048, gated`."""
    readers, writer = _linears(model, ffn)
    hidden, outputs = features(writer)
    widths = [input_width(model, ffn), *([hidden] if readers else []), outputs]
    gated = ", gated" if ffn.fused or len(readers) == 2 else ""
    return " → ".join(map(str, widths)) + gated + (f", one of {ffn.experts} experts" if ffn.experts else "")


def input_width(model: nn.Module, ffn: FFN) -> int:
    """Features that the FFN reads."""
    readers, writer = _linears(model, ffn)
    return features(readers[0] if readers else writer)[0]


def low_rank_swaps(swaps: Iterable[Swap]) -> tuple[Swap, ...]:
    """The low-rank rivals of `swaps`: as many parameters each, or just below."""
    return tuple(
        replace(s, spec=LightSpec(*s.spec.dense_features, s.spec.bias, None, matched_low_rank(s))) for s in swaps
    )


def lone_ffn(model: nn.Module, ffn: FFN, swaps: Sequence[Swap], dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The FFN without its model, weights random, after `swaps`: input (M, in), output (M, out).

    It is a copy of the model's own module, changed by `swap_` and `fold_` as a model is. Where the module holding the
    FFN's linears holds more than them (OPT's decoder layer, say), they run with GELU between them instead. Of experts
    one is built, with GELU as well.
    """
    if ffn.experts:
        return _lone_expert(model, ffn, {s.name: replace(s.spec, experts=None) for s in swaps}, dtype, device)
    root = nn.Module()
    parent, (*path, last) = root, ffn.name.split(".")
    for part in path:
        parent.add_module(part, nn.Module())
        parent = parent.get_submodule(part)
    parent.add_module(last, copy.deepcopy(model.get_submodule(ffn.name)))
    root = root.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    fill_(root)
    if swaps:
        swap_(root, Plan(tuple(swaps), (ffn,), sum(p.numel() for p in root.parameters()), (), ()))
        set_alpha_(root, 1.0)
        fold_(root)
    holder = root.get_submodule(ffn.name)
    with_parameters = {name for name, module in model.get_submodule(ffn.name).named_modules() if module._parameters}
    if with_parameters == {name.removeprefix(ffn.name).lstrip(".") for name in ffn.linears}:
        return holder.requires_grad_(False).eval()
    readers = [root.get_submodule(name) for name in ffn.readers]
    return _Chain(readers, root.get_submodule(ffn.writer), ffn.fused).eval()


def _lone_expert(
    model: nn.Module, ffn: FFN, specs: Mapping[str, LightSpec], dtype: torch.dtype, device: torch.device
) -> nn.Module:
    matrices, layers, like = dense_matrices(model), [], {"device": device, "dtype": dtype}
    for name in ffn.linears:
        plain = partial(nn.Linear, *features(matrices[name]), bias=matrices[name].bias is not None)
        layers.append(specs[name].build(**like) if name in specs else plain(**like))
    chain = _Chain(layers[:-1], layers[-1], ffn.fused).requires_grad_(False).eval()
    fill_(chain)
    return chain


class _Chain(nn.Module):
    """Writer after GELU after reader; a second reader, or the second half of a fused one, is multiplied in."""

    def __init__(self, readers: list[nn.Module], writer: nn.Module, fused: bool) -> None:
        super().__init__()
        self.readers, self.writer, self.fused = nn.ModuleList(readers), writer, fused

    def forward(self, x: Tensor) -> Tensor:
        if not self.readers:
            return self.writer(x)
        read = [reader(x) for reader in self.readers]
        first, *second = read[0].chunk(2, -1) if self.fused else read
        hidden = F.gelu(first)
        return self.writer(hidden * second[0] if second else hidden)


@torch.no_grad()
def fill_(module: nn.Module) -> None:
    """Random numbers of a fresh layer's size in every matrix, repeated every million: times do not depend on them.
    A norm's weight becomes 1, a bias 0."""
    block = torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    for name, parameter in module.named_parameters():
        if parameter.dim() < 2:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        values = (block * parameter[0].numel() ** -0.5).to(parameter)
        for part in parameter.view(-1).split(len(values)):
            part.copy_(values[: len(part)])


def copies(layer: nn.Module, cache_bytes: int | None = None) -> list[nn.Module]:
    """The layer and as many copies as exceed `cache_bytes` [default: the last cache of its device] four times, within
    3 GB and 256 copies: going round them, every call finds its weights in memory only."""
    own = weight_bytes(layer)
    wanted = 4 * (cache_bytes or last_cache_bytes(next(layer.parameters()).device))
    count = max(1, min(-(-wanted // own), _COPIES_BYTES // own, _MOST_COPIES))
    return [layer, *(copy.deepcopy(layer) for _ in range(count - 1))]


def compiled_copies(layers: Sequence[nn.Module]) -> list[nn.Module]:
    """The same layers, compiled at their first call: one graph for a single token, one for more."""
    # a function of their own: inside one that others share, the others' graphs would be tried at every call
    compiled = torch.compile(
        FunctionType(_call.__code__.replace(co_name=f"call_{id(layers)}"), globals()), dynamic=True
    )
    return [_Compiled(layer, compiled) for layer in layers]


def _call(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


class _Compiled(nn.Module):
    """A layer that runs as a compiled function."""

    def __init__(self, layer: nn.Module, compiled: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.compiled = layer, compiled

    def forward(self, x: Tensor) -> Tensor:
        return self.compiled(self.layer, x)


def last_cache_bytes(device: torch.device) -> int:
    """Size of the last cache of a GPU or of the processor; 32 MB where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [file.read_text(encoding="utf-8").strip() for file in _CACHES.glob("index*/size")]
    return max((int(size[:-1]) * 2**10 for size in sizes if size.endswith("K")), default=32 * 2**20)


@torch.inference_mode()
def time_layers(
    layers: Mapping[str, Sequence[nn.Module]],
    width: int,
    tokens: int,
    *,
    rounds: tuple[int, int] = (5, 15),
    budget_seconds: float = 1.5,
) -> dict[str, LayerTime]:
    """Time layers on the same (tokens, width) input; each comes as a list of copies that its calls go round."""
    some = next(next(iter(layers.values()))[0].parameters())
    x = torch.randn(tokens, width).to(some)
    flops = {}
    for name, (layer, *_) in layers.items():
        with FlopCounterMode(display=False) as counter:  # on the real device: the form may depend on it
            (layer.layer if isinstance(layer, _Compiled) else layer)(x)  # called in this mode, it would stay uncompiled
        flops[name] = counter.get_total_flops()
        for one in layers[name]:
            one(x[:1])  # layers that read together lay their factors side by side at the first call
        layer(x)
    turns = {name: cycle(same) for name, same in layers.items()}
    calls = {name: lambda turn=turn: next(turn)(x) for name, turn in turns.items()}
    times = time_alternately(calls, rounds=rounds, budget_seconds=budget_seconds, warm=True)
    return {
        name: LayerTime(tuple(seconds), flops[name], weight_bytes(layers[name][0])) for name, seconds in times.items()
    }


def _linears(model: nn.Module, ffn: FFN) -> tuple[list[nn.Module], nn.Module]:
    of = dense_matrices(model) if ffn.experts else dict(model.named_modules())
    return [of[name] for name in ffn.readers], of[ffn.writer]
