"""What the speed page shows of a GPU's results: which cells, and the rows of its tables."""

from typing import Any

from gpu_parts import GAP_WORTH_A_KERNEL, GRAPH_TOKENS
from report_pieces import ratio

PHASES = {
    "first_token": "first token",
    "per_token": "per token",
    "per_token_graph": "per token, graph",
    "per_token_batch_8": "per token, batch 8",
    "per_token_batch_8_graph": "per token, batch 8, graph",
}


def ffn_cells(results: dict[str, Any], *ways: str) -> dict[str, Any]:
    """The results with the cells of some ways alone, without those that failed. By default those to compare by: graphs
    with our kernel for a single token."""
    chosen = {}
    for key, cell in results["cells"].items():
        tokens = cell.get("tokens")
        usual = "kernel" if tokens == 1 else "graph" if tokens in GRAPH_TOKENS else "eager"
        if "error" not in cell and cell["way"] in (ways or (usual,)):
            chosen[key] = cell
    return {**results, "cells": chosen}


def model_rows(results: dict[str, Any]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """For each model the head and rows of a table: dense in milliseconds, then every variant's speed-ups; memory as
    what an answer takes at most. What failed shows as a dash."""
    tables: dict[str, tuple[list[str], list[list[str]]]] = {}
    head = ["FFNs", "weights, GB", "peak memory, GB", *PHASES.values()]
    for cell in results["models"].values():
        if "error" in cell:
            continue
        rows = tables.setdefault(cell["model"], (head, []))[1]
        for label, own in cell["models"].items():
            if label == "dense" and rows:
                continue  # it stands beside every variant; the first time is shown
            sizes = [f"{own[what] / 1e9:.2f}" if what in own else "–" for what in ("weight_bytes", "peak_bytes")]
            times = [_time(own[phase], label == "dense") for phase in PHASES]
            rows.append([label, *sizes, *times])
    return tables


def _time(phase: dict[str, Any], is_dense: bool) -> str:
    if "error" in phase:
        return "–"
    return f"{1e3 * phase['seconds']:.3g} ms" if is_dense else ratio(phase["speedup"])


def gap_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """One row per FFN, dtype and tokens, one column per layer: the gap to the bandwidth limit and the way of PyTorch's
    that came nearest, in bold where it is large enough for a kernel of our own; and the gap in ours."""
    names = list(dict.fromkeys(name for layers in results["gap_to_bandwidth"].values() for name in layers))
    rows = []
    for key, layers in results["gap_to_bandwidth"].items():
        region, shape, dtype, tokens = key.split("|")
        rows.append([region, shape, dtype, tokens, *(_gap(layers.get(name)) for name in names)])
    return ["FFN", "widths", "dtype", "tokens", *names], rows


def _gap(own: dict[str, Any] | None) -> str:
    if own is None:
        return "–"
    text = f"{own['gap']:.0%} {own['way']}"
    text = f"**{text}**" if own["gap"] > GAP_WORTH_A_KERNEL else text
    return f"{text}, kernel {own['in_kernel']:.0%}" if "in_kernel" in own else text


def failures(results: dict[str, Any]) -> list[str]:
    """A line for everything that has no number, with the reason."""
    lines = []
    for group in ("cells", "models"):
        for key, cell in results[group].items():
            if "error" in cell:
                lines.append(f"{key}: {cell['error']}")
            elif group == "models":
                for label, own in cell["models"].items():
                    failed = {phase: own[phase]["error"] for phase in PHASES if "error" in own[phase]}
                    lines += [f"{key}, {label}, {PHASES[phase]}: {error}" for phase, error in failed.items()]
    return [" ".join(line.split()) for line in lines]
