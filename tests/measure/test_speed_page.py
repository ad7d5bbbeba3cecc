"""The speed page is exactly what the kept results give."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import speed_report
from speed_plot import plot


def test_the_page_is_what_the_kept_results_give() -> None:
    assert speed_report.page(*speed_report.kept()) == speed_report.PAGE.read_text(encoding="utf-8")
    assert speed_report.ROOFLINE.is_file()


def _cell(tokens: int, seconds: float, low: float, high: float) -> dict:
    layer = {"seconds": seconds, "flops": 100, "weight_bytes": 50, "speedup": [4.0 / seconds, low, high]}
    layers = {
        "dense": {"seconds": 4.0, "flops": 400, "weight_bytes": 200, "speedup": [1.0, 1.0, 1.0]},
        "products n=4": layer | {"speedup_over_low_rank": [0.8, 0.7, 0.9]},
        "low-rank 1/4": layer,
    }
    facts = {"part": "ffn", "region": "language", "shape": "8 → 16 → 8", "models": ["M"], "dtype": "bfloat16"}
    return facts | {"tokens": tokens, "cache": "cold", "features": [8, 8], "rounds": 3, "layers": layers}


@pytest.fixture
def results() -> dict:
    roof = dict.fromkeys(("flops_per_second", "gemv_bytes_per_second", "sum_bytes_per_second"), 1e9)
    facts = dict.fromkeys(("processor", "accelerator", "threads", "torch", "transformers", "date"), "x")
    return {
        "machine": facts,
        "ceilings": {"bfloat16": roof | {"copy_bytes_per_second": 1e9}},
        "left_out": {"one": "does not divide"},
        "cells": {"a": _cell(1, 2.0, 1.9, 2.1), "b": _cell(64, 8.0, 0.4, 0.6)},
    }


def test_numbers_stand_where_they_belong(results: dict) -> None:
    page = speed_report.page(results, {"cells": {}}, None)
    assert "| products n=4 [4, 4] | 2.00× (1.90-2.10) | 0.50× (0.40-0.60) |" in page  # limits of bytes and operations
    assert "| dense | 4e+03 ms | 4e+03 ms |" in page
    assert "| products n=4 | 2 | 2 | low-rank 1/4 | 1 |" in page  # two cells, both behind low-rank, one behind dense
    assert "- one: does not divide" in page


def test_a_plot_has_every_point_and_both_roofs(results: dict, tmp_path: Path) -> None:
    plot(results, tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")
