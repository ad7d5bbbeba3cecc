"""Write docs/speed.md and its plot from the kept results: python benchmarks/speed_report.py

Reads benchmarks/results/{ffn_speed,model_speed,gpu_speed}.json; what was not measured shows as a dash.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gpu_parts import GAP_WORTH_A_KERNEL, GRAPH_TOKENS
from gpu_report import failures, ffn_cells, gap_rows, model_rows
from model_report import model_parts
from report_pieces import ratio, table
from shapes import LOW_RANK, RIVAL, VARIANTS
from speed_plot import plot

from hyperfade.workspace import read_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE, ROOFLINE = (
    ROOT / "benchmarks" / "results",
    ROOT / "docs" / "speed.md",
    ROOT / "docs" / "speed_roofline.png",
)
TOKENS = (1, 8, 64, 512, 2048)
ROWS = [row for name in (*VARIANTS, *LOW_RANK) for row in (name, f"{name}, compiled")]

HEAD = """# How fast

Written by `benchmarks/speed_report.py` from `benchmarks/results`; `make benchmark-speed` measures everything again.

Every number is a speed-up over the dense layer or model, timed side by side in alternating rounds of one run: the
median over rounds, with quartiles in parentheses. Weights are random: speed does not depend on their values.

**Two limits** stand in brackets behind each name. While few tokens are at work, a layer waits for its weights, and the
best it can do is dense bytes over its bytes: n for n products (n²/R with R of them), n²/t for t terms. With many tokens
it waits for arithmetic, and the limit is dense operations over its own: n²/R for products. t = n learned terms do as
many operations as dense, so they gain nothing there; complex numbers need three products in place of four. The measured
limits are given, of bytes and of operations.

**Where numbers fall short** of the limits, mixing blocks, a call's fixed price and smaller matrix products take the
difference, most of all in small models. A few ratios exceed them: the dense product itself is then far below what the
machine can do at that number of tokens.

**Compiled.** `hyperfade.compile_(model)` lets `torch.compile` have the FFNs: mixes then are part of what surrounds
them, and a single token's products become one loop over their weights, which reads faster than the matrix library does;
so they can pass the limit, which counts bytes at dense's own rate. Dense and low-rank layers gain nothing by it.
Compiled rows are compared with dense as it is, the faster way for dense at few tokens.

**Cold weights.** In a model every layer's weights come from memory at each token. So calls go round copies of a layer
that exceed the last cache four times. Timing one layer over and over (`hot`) tells another story; it stands beside.
"""

AIMS = {  # speed-ups over dense by tokens, in bfloat16, at FFNs too large for a call's fixed price to count
    "products n=2": {1: 1.9, 64: 1.7, 512: 1.8, 2048: 1.8},
    "products n=4": {1: 3.8, 64: 3.3, 512: 3.3, 2048: 3.3},
    "products n=8": {1: 6.5, 64: 5.0, 512: 5.0, 2048: 5.0},
    "learned n=4": {1: 3.6, 64: 2.5, 512: 1.0, 2048: 1.0},
    "paper": {1: 1.85, 64: 1.5, 512: 1.2, 2048: 1.2},
}
AIM_TEXT = (
    "The faster way, plain or compiled, beside what this project set out to reach; in bold what falls short. "
    "An FFN also has an activation, which no algebra makes cheaper."
)

GAP_TEXT = (
    "How much longer each layer takes than moving its bytes (weights, input, output) at the best reading rate, in the "
    "best way PyTorch has and where bytes are the limit. "
    f"Above {GAP_WORTH_A_KERNEL:.0%}, in bold, a kernel of our own could help."
)


def page(ffns: dict[str, Any], models: dict[str, Any], gpu: dict[str, Any] | None) -> str:
    """The whole page."""
    parts = [HEAD, _machine("Processor", ffns["machine"])]
    if ffns["ceilings"]:
        parts.append(_ceilings(ffns["ceilings"]))
    parts += ["## Whole models", *model_parts(models), "## Feed-forward networks alone", *_ffns(ffns)]
    if gpu:
        parts += ["## On a GPU", _machine("Accelerator", gpu["machine"]), _ceilings(gpu["ceilings"]), *_gpu(gpu)]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _machine(title: str, facts: dict[str, Any]) -> str:
    place = f"{facts['processor']}, {facts['threads']} threads" if title == "Processor" else facts["accelerator"]
    versions = f"torch {facts['torch']}, transformers {facts['transformers']}"
    return f"{title}: {place}; {versions}; {facts['date']}."


def _ceilings(roofs: dict[str, Any]) -> str:
    rows = [
        [
            dtype,
            f"{roof['flops_per_second'] / 1e9:.0f}",
            *(f"{roof[f'{way}_bytes_per_second'] / 1e9:.1f}" for way in ("gemv", "sum", "copy")),
        ]
        for dtype, roof in roofs.items()
    ]
    head = ["", "product, GFLOP/s", "product with one vector, GB/s", "sum, GB/s", "copy, GB/s"]
    return "This machine's ceilings, measured in the same run:\n\n" + table(head, rows)


# --- FFNs alone ------------------------------------------------------------------------------------------------------


def _ffns(results: dict[str, Any], prefix: str = "") -> list[str]:
    cells = list(results["cells"].values())
    parts = []
    if not prefix:
        parts.append(f"![Roofline of the FFNs in bfloat16]({ROOFLINE.name})")
        parts.append(
            "Operations per second that each FFN reaches, over operations per byte that it must move (weights, input "
            "and output). The slope is the best reading rate seen, the flat part the best matrix product."
        )
    for dtype in ("bfloat16", "float32"):
        same = [c for c in cells if (c["part"], c["dtype"], c["cache"]) == ("ffn", dtype, "cold")]
        for title, group in _grouped(same):
            parts.append(f"### {prefix}{title}, {dtype}")
            parts.append(_tokens_table(group, "speedup", ["dense, compiled", *ROWS]))
    matrices = [c for c in cells if (c["part"], c["dtype"], c["cache"]) == ("matrix", "bfloat16", "cold")]
    if matrices:
        parts.append("### Single matrices, bfloat16")
        for title, group in _grouped(matrices):
            parts.append(f"{title}:\n\n{_tokens_table(group, 'speedup', [*VARIANTS, *LOW_RANK], spread=False)}")
    hot = [c for c in cells if c["cache"] == "hot"]
    if hot:
        parts.append("### Hot weights, FFNs in bfloat16")
        parts.append("What the same calls show when one layer is called over and over:")
        for title, group in _grouped(hot):
            parts.append(f"{title}:\n\n{_tokens_table(group, 'speedup', ROWS, spread=False)}")
    ffns = [c for c in cells if (c["part"], c["cache"]) == ("ffn", "cold")]
    if not prefix:
        parts += _aims([c for c in ffns if c["dtype"] == "bfloat16"])
    parts.append("### Against low-rank of equal size")
    parts.append(
        "Low-rank is two plain products in a row: no mixing, and as few operations as bytes. Below 1 it is the faster "
        "one; which of them answers better is another question ([log](log.md))."
    )
    for dtype in ("bfloat16", "float32"):
        for title, group in _grouped([c for c in ffns if c["dtype"] == dtype]):
            parts.append(
                f"{title}, {dtype}:\n\n{_tokens_table(group, 'speedup_over_low_rank', VARIANTS, spread=False)}"
            )
    parts.append(_losses(ffns))
    if results.get("left_out"):
        notes = [f"- {what}: {why}" for what, why in results["left_out"].items()]
        parts += ["### Left out", "\n".join(notes)]
    return parts


def _grouped(cells: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        region = f", {cell['region']}" if cell["region"] else ""
        groups.setdefault(f"{' and '.join(cell['models'])}{region}: {cell['shape']}", []).append(cell)
    return list(groups.items())


def _tokens_table(group: list[dict[str, Any]], key: str, names: Iterable[str], *, spread: bool = True) -> str:
    by_tokens = {cell["tokens"]: cell["layers"] for cell in group}
    tokens = [count for count in TOKENS if count in by_tokens]
    rows = []
    for name in names:
        if not any(key in by_tokens[count].get(name, {}) for count in tokens):
            continue
        cells = []
        for count in tokens:
            found = by_tokens[count].get(name, {}).get(key)
            cells.append("–" if found is None else ratio(found) if spread else f"{found[0]:.2f}×")
        rows.append([f"{name} {_limits(by_tokens[tokens[-1]], name)}", *cells])
    dense = [f"{1e3 * by_tokens[count]['dense']['seconds']:.3g} ms" for count in tokens]
    head = ["FFNs", *(f"{count} token{'s' if count > 1 else ''}" for count in tokens)]
    return table(head, [["dense", *dense], *rows] if key == "speedup" else rows)


def _limits(layers: dict[str, Any], name: str) -> str:
    """Dense bytes over the layer's, dense operations over the layer's (at the most tokens measured)."""
    by = [layers["dense"][what] / layers[name][what] for what in ("weight_bytes", "flops")]
    return f"[{by[0]:.2g}, {by[1]:.2g}]"


def _aims(cells: list[dict[str, Any]]) -> list[str]:
    """Aims and measurements at the language FFNs of the larger models."""
    parts = []
    for title, group in _grouped([c for c in cells if c["region"] == "language" and c["features"][0] >= 2048]):
        by_tokens = {cell["tokens"]: cell["layers"] for cell in group}
        tokens, rows = [count for count in TOKENS if count in by_tokens and count != 8], []
        for name, aims in AIMS.items():
            ways = {count: [by_tokens[count].get(row) for row in (name, f"{name}, compiled")] for count in tokens}
            best = {count: max(way["speedup"][0] for way in found if way) for count, found in ways.items()}
            rows.append([name, *(_beside(best[count], aims[count]) for count in tokens)])
        parts.append(f"{title}:\n\n" + table(["FFNs", *(f"{c} token{'s' if c > 1 else ''}" for c in tokens)], rows))
    return ["### What was aimed for", AIM_TEXT, *parts] if parts else []


def _beside(measured: float, aim: float) -> str:
    text = f"{measured:.2f}× (aim {aim:g})"
    return text if round(measured, 2) >= aim else f"**{text}**"


def _losses(ffns: list[dict[str, Any]]) -> str:
    counted = []
    for name in VARIANTS:
        own = [cell["layers"][name] for cell in ffns if name in cell["layers"]]
        rivals = sum(one["speedup_over_low_rank"][2] < 1 for one in own)
        slower = sum(one["speedup"][2] < 1 for one in own)
        counted.append([name, str(len(own)), str(rivals), RIVAL[name], str(slower)])
    head = ["FFNs", "cells", "slower than low-rank", "of the size", "slower than dense"]
    text = "How often, by more than the spread (the upper quartile is below 1), whole FFNs with cold weights:\n\n"
    return text + table(head, counted)


# --- on a GPU --------------------------------------------------------------------------------------------------------


def _gpu(results: dict[str, Any]) -> list[str]:
    parts = [
        "A CUDA graph is one launch of all a call's kernels. Where few tokens are at work, an eager call waits for the "
        "processor that launches them one by one, and its speed-ups say little about the layers. Tables show graphs "
        "with 1 and 8 tokens, our kernel for a single one included, and eager calls beyond. Where the kernel was "
        "slower than PyTorch's products (n = 8 at Qwen2.5-VL-7B's widths; see the gaps below), layers do not use it "
        "any more. With 64 tokens and more products are slower than dense here, for want of a good way to mix blocks; "
        "the kernel that is to mend it ([why](decisions/0005-execution.md)) is younger than these numbers.",
    ]
    for name, (head, rows) in model_rows(results).items():
        parts += [f"### {name} on the GPU", table(head, rows)]
    parts += _ffns(ffn_cells(results), prefix="On the GPU, ")
    for way, title in (("eager", "Eager calls"), ("compiled", "`torch.compile`, max-autotune, as graphs")):
        found = [cell for cell in ffn_cells(results, way)["cells"].values() if cell["tokens"] in GRAPH_TOKENS]
        if found:
            parts.append(f"### {title}, few tokens")
        for group_title, group in _grouped(found):
            for dtype in dict.fromkeys(cell["dtype"] for cell in group):
                same = [cell for cell in group if cell["dtype"] == dtype]
                names = [*VARIANTS, *LOW_RANK]
                parts.append(f"{group_title}, {dtype}:\n\n{_tokens_table(same, 'speedup', names, spread=False)}")
    parts += ["### Gap to the bandwidth limit", GAP_TEXT, table(*gap_rows(results))]
    if failed := failures(results):
        parts += ["### Without a number", "\n".join(f"- {line}" for line in failed)]
    return parts


# --- plain pieces ----------------------------------------------------------------------------------------------------


def kept() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]:
    """The committed results; the GPU's are there where someone had one."""
    gpu = RESULTS / "gpu_speed.json"
    ffns, models = (read_json(RESULTS / f"{name}.json") for name in ("ffn_speed", "model_speed"))
    return ffns, models, read_json(gpu) if gpu.exists() else None


if __name__ == "__main__":
    results = kept()
    PAGE.write_text(page(*results), encoding="utf-8")
    plot(results[0], ROOFLINE)
    print(f"{PAGE} and {ROOFLINE}")
