"""What the GPU benchmark measures, part by part; `gpu_speed.py` runs each part in a process of its own.

Cells of FFNs have the format of `ffn_speed.py`, with the way they were run. Whole models are timed dense beside one
compressed form at a time; both are whole in memory, which a GPU of 80 GB allows.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from execution import keep_prices, measured_prices
from ffn_speed import Cell, facts_of, numbers_of, rounded, shapes
from gpu_ways import Way, decoder, time_loops
from model_speed import GROUPS
from shapes import LOW_RANK, MODELS, VARIANTS, Model, qwen_3b
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from whole_models import built, compressed, decode, prefill, prompt

from hyperfade.measure import Ceilings, ceilings, num_parameters, speedup, time_alternately, weight_bytes
from hyperfade.measure.layers import TOKENS, copies, input_width, lone_ffn
from hyperfade.workspace import read_json, write_json

GRAPH_TOKENS = (1, 8)  # with more, launches no longer count
IN_KERNEL = [name for name in VARIANTS if name.startswith("products")]
GAP_WORTH_A_KERNEL = 0.15
NEW_TOKENS = 8
PHASES = (("per_token", 1), ("per_token_batch_8", 8))
UNFINISHED = {"error": "did not finish: out of time, or the process ended"}


@dataclass(frozen=True)
class WayCell(Cell):
    """A cell of `ffn_speed`, run one way."""

    way: Way

    @property
    def key(self) -> str:
        """Its name in the results file."""
        return f"{super().key}|{self.way}"


def tiny_model() -> Model:
    """Qwen2.5-VL with toy widths: every path in seconds."""

    def config() -> Qwen2_5_VLConfig:
        made = qwen_3b()
        text, vision = made.text_config, made.vision_config
        text.hidden_size, text.intermediate_size, text.num_hidden_layers = 256, 512, 2
        text.num_attention_heads, text.num_key_value_heads, text.layer_types = 2, 1, text.layer_types[:2]
        text.vocab_size, made.image_token_id, made.video_token_id, made.vision_start_token_id = 128, 127, 126, 125
        vision.hidden_size, vision.intermediate_size, vision.depth, vision.num_heads = 64, 128, 2, 2
        vision.out_hidden_size, vision.fullatt_block_indexes = 256, [1]
        return made

    return Model(Qwen2_5_VLForConditionalGeneration, config, 0)


@contextmanager
def benchmarked_models(tiny: bool) -> Iterator[None]:
    """The benchmarks' models. Tiny: one toy model in their place."""
    with patch.dict(MODELS, {"tiny": tiny_model()} if tiny else {}, clear=tiny):
        yield


def measure_part(part: str, run: "Run") -> None:
    """Run one part by its name."""
    kind, _, what = part.partition(" ")
    with benchmarked_models(run.tiny):
        if kind == "device":
            device_part(run)
        elif kind == "model":
            model_part(run, what)
        elif what == "compiled":
            ffn_part(run, "bfloat16", ("compiled",))
        else:
            ffn_part(run, what, ("graph", "kernel", "eager", "torch"))


# --- the parts -------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One process's work: its device, its end, and the results file, written after every cell."""

    device: torch.device
    tiny: bool
    output: Path
    end: float  # Unix time, the same clock in every process

    def __post_init__(self) -> None:
        self.results = read_json(self.output)
        self.longest_seconds = 0.0

    def cell(self, group: str, key: str, measure: Callable[[], dict[str, Any]], left: int) -> None:
        """Measure a cell and keep it, or the reason why there is none. Nothing begins that would hardly end."""
        kept = self.results[group]
        if key in kept or time.time() + self.longest_seconds > self.end:
            return
        kept[key] = UNFINISHED
        write_json(self.output, self.results)
        begun = time.time()
        kept[key] = attempt(measure)
        taken = time.time() - begun
        self.longest_seconds = max(self.longest_seconds, taken)
        self.results["gap_to_bandwidth"] = gaps(self.results)
        write_json(self.output, self.results)
        rest, time_left = taken * (left - 1), self.end - time.time()
        note = kept[key].get("error", f"{taken:.1f} s, about {rest:.0f} s for the {left - 1} left of this part")
        print(f"  {key}: {note}; {time_left:.0f} s left for it", flush=True)
        if "error" in kept[key]:
            torch.ones(1, device=self.device).sum().item()  # raises after a fault of the device, which ends the process


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The measurement, or its error's text: one that fails must not take the others along."""
    try:
        return measure()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is written down and shown
        return {"error": f"{type(error).__name__}: {error}"[:1000]}


def device_part(run: Run) -> None:
    """Ceilings, and the unit prices by which every layer chooses its form."""
    small = {"width": 256, "weight_bytes": 2**20} if run.tiny else {}
    prices = {}
    for name in ("bfloat16", "float32"):
        dtype = getattr(torch, name)
        if name not in run.results["ceilings"]:
            run.results["ceilings"][name] = rounded(asdict(ceilings(dtype, run.device, **small)))
            write_json(run.output, run.results)
        print(f"  ceilings, {name}: {run.results['ceilings'][name]}", flush=True)
        if not run.tiny:  # toy shapes say nothing, and must not overwrite what was measured
            prices[name] = measured_prices(dtype, run.device, 5)
    if prices:
        keep_prices(prices, run.device)


def ffn_part(run: Run, dtype: str, ways: tuple[Way, ...]) -> None:
    """FFNs alone."""
    todo = [cell for cell in ffn_cells(dtype, ways, run.tiny) if cell.key not in run.results["cells"]]
    built_for, layers = None, {}
    for number, cell in enumerate(todo):
        if built_for is not cell.shape:
            layers.clear()  # free the old ones first
            built_for, layers = cell.shape, ffn_layers(cell, run)
        run.cell("cells", cell.key, partial(ffn_cell, cell, layers), len(todo) - number)


def ffn_cells(dtype: str, ways: tuple[Way, ...], tiny: bool) -> Iterator[WayCell]:
    """The largest FFNs first, those of one shape together."""
    ffns = [shape for shape in shapes() if shape.part == "ffn"]
    for shape in sorted(ffns, key=lambda shape: -shape.multiply_adds):
        for tokens in (1, 64) if tiny else TOKENS:
            for way in ways:
                few = tokens == 1 if way == "kernel" else tokens in GRAPH_TOKENS
                if way == "eager" or few == (way != "torch"):
                    yield WayCell(shape, dtype, tokens, "cold", way)


def ffn_layers(cell: WayCell, run: Run) -> dict[str, list[nn.Module]]:
    """Every layer with its copies; compiled, where each costs long searches, without the low-rank ones."""
    shape, found = cell.shape, {}
    for name, swaps in shape.choices.items():
        if cell.way != "compiled" or name not in LOW_RANK:
            layer = lone_ffn(shape.model, shape.ffn, swaps, getattr(torch, cell.dtype), run.device)
            found[name] = copies(layer, weight_bytes(layer) // 2 if run.tiny else None)
    return found


def ffn_cell(cell: WayCell, layers: dict[str, list[nn.Module]]) -> dict[str, Any]:
    """The cell's numbers, in the format of `ffn_speed`."""
    times = time_loops(layers, input_width(cell.shape.model, cell.shape.ffn), cell.tokens, cell.way)
    return facts_of(cell, len(times["dense"].seconds)) | {"way": cell.way, "layers": numbers_of(times)}


def model_part(run: Run, name: str) -> None:
    """A whole model: dense beside one compressed form at a time, all weights real."""
    variants = ["products n=4"] if run.tiny else [variant for group in GROUPS for variant in group]
    todo = [variant for variant in variants if f"{name}|{variant}" not in run.results["models"]]
    dense = built(name, device=run.device) if todo else None
    for number, variant in enumerate(todo):
        run.cell("models", f"{name}|{variant}", partial(model_cell, dense, name, variant), len(todo) - number)


@torch.inference_mode()
def model_cell(dense: Any, name: str, variant: str) -> dict[str, Any]:
    """Time to first token, eager; time per output token at batch 1 and 8, eager and as graphs; peak memory."""
    light, _ = compressed(dense, name, variant)
    models = {"dense": dense, variant: light}
    batch, patches = prompt(dense)
    batch = {key: value.to(dense.device) for key, value in batch.items()}
    own = {label: {"parameters": num_parameters(model), **peak_memory(model, batch)} for label, model in models.items()}
    first = {label: partial(prefill, model, batch) for label, model in models.items()}
    _add(own, "first_token", lambda: timed(first))
    for graph in (False, True):  # captures last: one that fails may leave the device's state in disorder
        for phase, size in PHASES:
            _add(
                own, phase + "_graph" * graph, lambda s=size, g=graph: timed(decoders(models, batch, s, g), NEW_TOKENS)
            )
    facts = {"model": name, "variant": variant, "patches": patches, "prompt_tokens": batch["input_ids"].shape[1]}
    return facts | {"models": rounded(own)}


def _add(own: dict[str, dict[str, Any]], phase: str, measure: Callable[[], dict[str, Any]]) -> None:
    """A phase's numbers for each model, or for each the error's text."""
    numbers = attempt(measure)
    for label in own:
        own[label][phase] = numbers if "error" in numbers else numbers[label]


def decoders(models: dict[str, Any], batch: dict[str, Any], size: int, graph: bool) -> dict[str, Callable[[], object]]:
    """For each model a call that decodes NEW_TOKENS for `size` equal requests."""
    found: dict[str, Callable[[], object]] = {}
    for label, model in models.items():
        token, cache = prefill(model, batch)
        if graph:
            found[label] = decoder(model, token, cache, size, NEW_TOKENS)
        else:
            cache.batch_repeat_interleave(size)
            found[label] = partial(decode, model, token.expand(size, 1), cache, NEW_TOKENS)
    return found


def timed(calls: dict[str, Callable[[], object]], tokens: int = 1) -> dict[str, dict[str, Any]]:
    """Seconds per token and the speed-up over dense."""
    times = time_alternately(calls, rounds=(3, 7))
    return {
        label: {"seconds": statistics.median(own) / tokens, "speedup": speedup(own, times["dense"])}
        for label, own in times.items()
    }


def peak_memory(model: Any, batch: dict[str, Any]) -> dict[str, int]:
    """A model's own bytes, and with what an answer takes at most beside them; the other model here is not counted."""
    own = weight_bytes(model)
    if model.device.type == "cpu":
        return {"weight_bytes": own}
    decode(model, *prefill(model, batch), 1)  # what the first call sets up once is not an answer's
    before = torch.accelerator.memory_allocated()
    torch.accelerator.reset_peak_memory_stats()
    decode(model, *prefill(model, batch), 1)
    return {"weight_bytes": own, "peak_bytes": own + torch.accelerator.max_memory_allocated() - before}


def gaps(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Per FFN, dtype and tokens, for each layer that waits for bytes rather than operations: PyTorch's best way, and by
    how much it takes longer than moving the bytes (weights, input, output) at the best reading rate; and the same for
    our kernel, where products were run in it."""
    found: dict[str, dict[str, Any]] = {}
    for cell in results["cells"].values():
        if "error" in cell or cell["dtype"] not in results["ceilings"]:
            continue
        roof = Ceilings(**results["ceilings"][cell["dtype"]])
        moved_bytes = cell["tokens"] * sum(cell["features"]) * getattr(torch, cell["dtype"]).itemsize
        key = "|".join([cell["region"], cell["shape"], cell["dtype"], str(cell["tokens"])])
        for name, own in cell["layers"].items():
            least_seconds = (own["weight_bytes"] + moved_bytes) / roof.read_bytes_per_second
            gap = round(own["seconds"] / least_seconds - 1, 3)
            here = found.setdefault(key, {}).setdefault(name, {})
            if own["flops"] / roof.flops_per_second >= least_seconds:
                continue
            if cell["way"] == "kernel":
                here |= {"in_kernel": gap} if name in IN_KERNEL else {}
            elif gap < here.get("gap", math.inf):
                here |= {"gap": gap, "way": cell["way"], "worth_a_kernel": gap > GAP_WORTH_A_KERNEL}
    found = {key: {name: own for name, own in layers.items() if "gap" in own} for key, layers in found.items()}
    return {key: layers for key, layers in found.items() if layers}
