"""The GPU benchmark without a GPU: every path on a processor; and on tensors without numbers (meta), that nothing waits
for one, which no CUDA graph could hold.

Pretended CUDA tensors would do as well, but a torch built without CUDA cannot index them.
"""

import copy
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hyperfade.algebra import Algebra
from hyperfade.measure import time_alternately
from hyperfade.measure.layers import lone_ffn
from hyperfade.nn import PHMLinear
from hyperfade.nn.execution import candidates
from hyperfade.workspace import read_json, write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import gpu_parts
import gpu_speed
import gpu_ways
import whole_models
from execution import ALGEBRAS, SHAPES
from gpu_ways import decode_state, decoder
from shapes import VARIANTS
from whole_models import built, compressed, prefill, prompt

TOKENS = (1, 64, 2048)

# --- what a capture forbids ------------------------------------------------------------------------------------------


class _Apart(TorchDispatchMode):
    """Fails where an operation meets tensors of both the processor and meta: a copy between the two waits."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if len({leaf.device for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)}) > 1:
            raise AssertionError(f"{func} stands between two devices")
        return result


def _check_capturable(call: Callable[[Tensor], object], width: int, tokens: int) -> None:
    with torch.inference_mode(), _Apart():
        call(torch.empty(tokens, width, dtype=torch.bfloat16, device="meta"))


@pytest.mark.parametrize("algebra", [*ALGEBRAS, Algebra.learned(2), Algebra.learned(8)], ids=str)
def test_no_form_of_a_layer_waits_for_a_number(algebra: Algebra) -> None:
    for d, k in SHAPES:
        layer = PHMLinear(d, k, algebra, companion_rank=8, dtype=torch.bfloat16, device="meta")
        forms = [*candidates(algebra), replace(candidates(algebra)[0], chunk=256)]
        for tokens in TOKENS:
            for call in (layer, *(partial(layer.run, how=how) for how in forms)):  # whichever a device's prices choose
                _check_capturable(call, d, tokens)


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x * x.sum().item(),
        lambda x: -x if x.sum() > 0 else x,
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: x * torch.tensor([2.0]).to(x.device),
    ],
    ids=["item", "branch", "mask", "copy back", "copy there"],
)
def test_the_check_sees_what_a_capture_forbids(ask: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises((RuntimeError, NotImplementedError, AssertionError)):
        _check_capturable(ask, 4, 2)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The toy model among the benchmarks' own, with a small image."""
    monkeypatch.setattr(whole_models, "IMAGE_PIXELS", 56)
    with gpu_parts.benchmarked_models(tiny=True):
        yield


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("variant", [None, "products n=4", "learned n=4"])
def test_a_models_decoding_step_never_waits_for_a_number(variant: str | None) -> None:
    model = built("tiny")
    if variant:
        model, _ = compressed(model, "tiny", variant)
    with torch.inference_mode():
        token, cache = prefill(model, prompt(model)[0])
        state = decode_state(model, token, cache, 2, 4)
        state = replace(state, token=state.token.to("meta"), places=state.places.to("meta"))
        for layer in state.cache.layers:
            layer.device = torch.device("meta")
            for name in ("keys", "values", "cumulative_length"):
                setattr(layer, name, getattr(layer, name).to("meta"))
        model.to("meta")
        with _Apart():
            state.step_(model)


# --- the benchmark's own pieces --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("batch", [1, 3])
def test_static_decoding_gives_the_tokens_of_a_growing_cache(batch: int) -> None:
    model = built("tiny", torch.float32)
    with torch.inference_mode():
        for parameter in model.parameters():  # so that the tokens differ from step to step
            parameter.add_(
                0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
        token, cache = prefill(model, prompt(model)[0])
        by_static = [decoder(model, token, cache, batch, count)() for count in range(1, 7)]
        again = decoder(model, token, cache, batch, 6)
        again()  # from the same state at every call
        expected = []
        for _ in range(6):
            output = model(input_ids=token, past_key_values=cache, use_cache=True)
            token = output.logits[:, -1:].argmax(-1)
            expected.append(token)
        assert len({int(one) for one in expected}) > 2
        for mine, theirs in zip([*by_static, again()], [*expected, expected[-1]], strict=True):
            assert torch.equal(mine, theirs.expand(batch, 1))


@pytest.mark.usefixtures("toy")
def test_a_layers_copies_share_their_compiled_code() -> None:
    """More copies than `torch.compile` recompiles for: were each compiled apart, the call would raise."""
    (cell, *_) = gpu_parts.ffn_cells("float32", ("compiled",), tiny=True)
    swaps = cell.shape.choices["products n=4"]
    layer = lone_ffn(cell.shape.model, cell.shape.ffn, swaps, torch.float32, torch.device("cpu"))
    counters.clear()
    gpu_ways.time_loops({"dense": [layer, *(copy.deepcopy(layer) for _ in range(11))]}, 256, 1, "compiled", (1, 1))
    assert counters["stats"]["unique_graphs"] == 1


def _cell(way: str, tokens: int, seconds: float, flops: int = 100) -> dict[str, Any]:
    layers = {"dense": {"seconds": seconds, "flops": flops, "weight_bytes": 996}}
    facts = {"region": "language", "shape": "1 → 1", "dtype": "bfloat16", "features": [1, 1]}
    return facts | {"tokens": tokens, "way": way, "layers": layers}


def test_the_gap_is_that_of_the_best_way_where_bytes_are_the_limit() -> None:
    rates = {"flops_per_second": 1000.0, "gemv_bytes_per_second": 500.0, "sum_bytes_per_second": 1000.0}
    cells = {
        "a": _cell("eager", 1, 2.0),  # 996 bytes of weights and 4 of input and output at 1000 bytes per second
        "b": _cell("graph", 1, 1.1),
        "c": _cell("compiled", 1, 1.3),
        "d": _cell("graph", 8, 1.3),
        "e": _cell("eager", 64, 9.0, flops=9000),  # waits for operations
        "f": {"error": "out of memory"},
        "g": _cell("kernel", 8, 1.05),
    }
    roofs = {"ceilings": {"bfloat16": rates | {"copy_bytes_per_second": 1.0}}, "cells": cells}
    found = gpu_parts.gaps(roofs)
    assert found == {
        "language|1 → 1|bfloat16|1": {"dense": {"gap": 0.1, "way": "graph", "worth_a_kernel": False}},
        "language|1 → 1|bfloat16|8": {"dense": {"gap": 0.265, "way": "graph", "worth_a_kernel": True}},
    }


# --- the whole script ------------------------------------------------------------------------------------------------


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A results file at its beginning, and timings too short to mean anything."""
    brief = partial(time_alternately, rounds=(1, 2), least_seconds=1e-4, budget_seconds=0.01)
    monkeypatch.setattr(gpu_parts, "time_alternately", lambda calls, rounds: brief(calls))
    monkeypatch.setattr(gpu_ways, "time_alternately", lambda calls, rounds: brief(calls))
    monkeypatch.setattr(whole_models, "IMAGE_PIXELS", 56)
    path = tmp_path / "gpu_speed.json"
    write_json(path, gpu_speed.beginning(path, torch.device("cpu"), False, ArgumentParser()))
    return path


def _flags(output: Path, *more: str) -> list[str]:
    return ["--device", "cpu", "--tiny", "--output", str(output), *more]


def _part(output: Path, part: str) -> dict[str, Any]:
    """One part in this process."""
    gpu_speed.main(_flags(output, "--part", part, "--end", str(time.time() + 300)))
    return read_json(output)


def test_every_part_gives_numbers_and_a_repeat_keeps_them(output: Path) -> None:
    gpu_speed.main(_flags(output, "--only", "device"))  # with a process of its own
    for part in ("ffns bfloat16", "model tiny", "ffns compiled"):
        results = _part(output, part)
    assert set(results["ceilings"]) == {"bfloat16", "float32"}
    ways = {(cell["tokens"], cell["way"]) for cell in results["cells"].values()}
    assert ways == {(1, "graph"), (1, "kernel"), (1, "eager"), (1, "compiled"), (64, "eager"), (64, "torch")}
    assert {cell["region"] for cell in results["cells"].values()} == {"language", "vision"}
    for cell in results["cells"].values():
        layers = cell["layers"]
        assert set(VARIANTS) <= set(layers)
        assert layers["dense"]["speedup"] == [1.0, 1.0, 1.0]
        assert ("speedup_over_low_rank" in layers["paper"]) == (cell["way"] != "compiled")
        assert layers["products n=4"]["weight_bytes"] < layers["dense"]["weight_bytes"]
    (cell,) = results["models"].values()
    phases = {"first_token", *(phase + end for phase in ("per_token", "per_token_batch_8") for end in ("", "_graph"))}
    for own in cell["models"].values():
        assert all(own[phase]["seconds"] > 0 for phase in phases)
    assert not any(gpu_speed.failed(cell) for cell in (*results["cells"].values(), *results["models"].values()))
    roofs = {name: roof | {"flops_per_second": 1e18} for name, roof in results["ceilings"].items()}
    gaps = gpu_parts.gaps({**results, "ceilings": roofs})  # where operations cost nothing, all layers wait for bytes
    assert len(gaps) == len({cell["shape"] for cell in results["cells"].values()}) * 2
    assert _part(output, "model tiny") == results  # nothing is left to do


def test_a_failing_cell_is_written_down_and_loses_no_other(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    time_loops = gpu_parts.time_loops

    def broken(layers: Any, width: int, tokens: int, way: str) -> Any:
        if way == "graph":
            raise RuntimeError("operation not permitted when stream is capturing")
        return time_loops(layers, width, tokens, way)

    monkeypatch.setattr(gpu_parts, "time_loops", broken)
    cells = _part(output, "ffns float32")["cells"]
    bad = {key: cell for key, cell in cells.items() if "error" in cell}
    assert {key.split("|")[-1] for key in bad} == {"graph"}
    assert all("stream is capturing" in cell["error"] for cell in bad.values())
    assert (len(bad), len(cells)) == (2, 10)
    kept = gpu_speed.beginning(
        output, torch.device("cpu"), False, ArgumentParser()
    )  # a repeat measures the failed ones again
    assert kept["cells"] == {key: cell for key, cell in cells.items() if key not in bad}
    assert gpu_speed.beginning(output, torch.device("cpu"), True, ArgumentParser())["cells"] == {}


def test_out_of_time_nothing_begins(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_speed, "LEAST_SECONDS", 0.1)
    gpu_speed.main(_flags(output, "--part", "ffns bfloat16", "--end", str(time.time() - 1)))
    assert read_json(output)["cells"] == {}
    begun = time.perf_counter()
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    gpu_speed.run_part("hangs", time.time() + 0.5, command, output)
    assert time.perf_counter() - begun < 10


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--device cpu --tiny"),
        (["--device", "cpu"], "goes with --tiny"),
        (["--device", "cpu", "--tiny"], "--output of its own"),
    ],
)
def test_wrong_calls_say_what_to_do(
    flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu_speed.main(flags)
    assert message in capsys.readouterr().err
