"""The GPU's part of the speed page: each table takes the cells that belong to it, and what failed is said."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import gpu_parts
import speed_report

FACTS = dict.fromkeys(("processor", "threads", "torch", "transformers", "date"), "x")
EMPTY: dict[str, Any] = {"machine": FACTS, "ceilings": {}, "cells": {}}  # of the processor


def _cell(tokens: int, way: str, seconds: float, *, rival: bool = True) -> dict[str, Any]:
    ratio = [8.0 / seconds, 7.0 / seconds, 9.0 / seconds]
    light = {"seconds": seconds, "flops": 100, "weight_bytes": 50, "speedup": ratio}
    layers = {
        "dense": {"seconds": 8.0, "flops": 400, "weight_bytes": 200, "speedup": [1.0, 1.0, 1.0]},
        "products n=4": light | ({"speedup_over_low_rank": [0.8, 0.7, 0.9]} if rival else {}),
    }
    facts = {"part": "ffn", "region": "language", "shape": "8 → 16 → 8", "models": ["M"], "dtype": "bfloat16"}
    return facts | {"tokens": tokens, "cache": "cold", "features": [8, 8], "rounds": 3, "way": way, "layers": layers}


def _phase(seconds: float, ratio: float) -> dict[str, Any]:
    return {"seconds": seconds, "speedup": [ratio, ratio - 0.1, ratio + 0.1]}


@pytest.fixture
def gpu() -> dict[str, Any]:
    roof = dict.fromkeys(("gemv_bytes_per_second", "sum_bytes_per_second", "copy_bytes_per_second"), 200.0)
    broken = {"error": "RuntimeError: operation not\npermitted"}
    dense = {"weight_bytes": 4e9, "peak_bytes": 5e9, "parameters": 2e9, "per_token_graph": _phase(0.002, 1.0)}
    light = {"weight_bytes": 2e9, "parameters": 1e9, "per_token_graph": broken}
    for phase in ("first_token", "per_token", "per_token_batch_8", "per_token_batch_8_graph"):
        dense[phase], light[phase] = _phase(0.004, 1.0), _phase(0.002, 2.0)
    results = {
        "machine": FACTS | {"accelerator": "Imagined 9000"},
        "ceilings": {"bfloat16": {"flops_per_second": 1e9, **roof}},
        "cells": {
            "a": _cell(1, "graph", 3.0),
            "k": _cell(1, "kernel", 2.0),
            "b": _cell(1, "eager", 4.0),
            "c": _cell(1, "compiled", 1.0, rival=False),
            "d": _cell(64, "eager", 16.0),
            "e": {"error": "OutOfMemoryError: CUDA out of memory"},
        },
        "models": {
            "V-7B|paper": {"model": "V-7B", "variant": "paper", "models": {"dense": dense, "paper": light}},
            "V-7B|products n=4": {"error": "did not finish"},
        },
    }
    return results | {"gap_to_bandwidth": gpu_parts.gaps(results)}


@pytest.fixture
def page(gpu: dict[str, Any]) -> str:
    return speed_report.page({"machine": FACTS, "ceilings": {}, "cells": {}}, {"cells": {}}, gpu).split("## On a GPU")[
        1
    ]


def test_graphs_are_compared_at_few_tokens_and_eager_calls_at_many(page: str) -> None:
    assert "Accelerator: Imagined 9000; torch x" in page
    assert "| products n=4 [4, 4] | 4.00× (3.50-4.50) | 0.50× (0.44-0.56) |" in page
    assert "| products n=4 | 2 | 2 | low-rank 1/4 | 1 |" in page  # eager and compiled do not count a second time


def test_the_other_ways_have_tables_of_their_own(page: str) -> None:
    eager, compiled = page.split("### Eager calls, few tokens")[1].split("### `torch.compile`")
    assert "| products n=4 [4, 4] | 2.00× |" in eager
    assert "| products n=4 [4, 4] | 8.00× |" in compiled


def test_models_stand_with_what_failed(page: str) -> None:
    assert "| dense | 4.00 | 5.00 | 4 ms | 4 ms | 2 ms | 4 ms | 4 ms |" in page
    ratio = "2.00× (1.90-2.10)"
    assert f"| paper | 2.00 | – | {ratio} | {ratio} | – | {ratio} | {ratio} |" in page
    assert "- e: OutOfMemoryError: CUDA out of memory" in page
    assert "- V-7B|products n=4: did not finish" in page
    assert "- V-7B|paper, paper, per token, graph: RuntimeError: operation not permitted" in page


def test_gaps_above_the_threshold_are_bold(page: str) -> None:
    # dense: 200 + 32 bytes at 200 a second are 1.16 s, not 8; products: 82 bytes, 0.41 s, not 1
    assert "| language | 8 → 16 → 8 | bfloat16 | 1 | **590% graph** | **144% compiled**, kernel 388% |" in page


def test_without_a_gpu_the_page_does_without() -> None:
    assert "GPU" not in speed_report.page(EMPTY, {"cells": {}}, None)
