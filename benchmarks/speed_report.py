"""Write docs/speed.md and its plot from the kept results: python benchmarks/speed_report.py

Reads benchmarks/results/{ffn_speed,model_speed,gpu_speed}.json; what was not measured shows as a dash.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gpu_parts import GAP_WORTH_A_KERNEL, GRAPH_TOKENS
from gpu_report import failures, ffn_cells, gap_rows, model_rows
from shapes import LOW_RANK, RIVAL, VARIANTS
from speed_plot import plot
from whole_models import SHARED_PERIOD

from hyperfade.surgery import human
from hyperfade.workspace import read_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE, ROOFLINE = (
    ROOT / "benchmarks" / "results",
    ROOT / "docs" / "speed.md",
    ROOT / "docs" / "speed_roofline.png",
)
TOKENS = (1, 8, 64, 512, 2048)
AMDAHL_TARGET = 0.10

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

**Cold weights.** In a model every layer's weights come from memory at each token. So calls go round copies of a layer
that exceed the last cache four times. Timing one layer over and over (`hot`) tells another story; it stands beside.
"""

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
    parts += ["## Whole models", *_models(models), "## Feed-forward networks alone", *_ffns(ffns)]
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
    return "This machine's ceilings, measured in the same run:\n\n" + _table(head, rows)


# --- whole models ----------------------------------------------------------------------------------------------------


def _models(results: dict[str, Any]) -> list[str]:
    cells = [(*key.split("|"), cell) for key, cell in results["cells"].items()]
    speeds: dict[str, list[dict[str, Any]]] = {}
    for kind, name, _, cell in cells:
        if kind == "speed":
            speeds.setdefault(name, []).append(cell)
    parts = [
        "bfloat16. Time to first token: one image and 32 words, vision tower and prompt. `measured / predicted` "
        "compares with Amdahl's law: the FFNs' share of the dense model's time and the FFNs' own speed-ups, both from "
        f"the same process. Within {AMDAHL_TARGET:.0%} of 1 the FFNs' gain reaches the model in full.",
    ]
    for name, groups in speeds.items():
        parts.append(f"### {name}")
        parts.append(_facts(name, groups))
        parts.append(_model_table(groups))
    parts += _headline(speeds)
    loads: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for kind, name, variant, cell in cells:
        if kind == "load":
            loads.setdefault(name, []).append((variant, cell))
    if loads:
        parts.append("### Loading and memory")
        parts.append(
            "A checkpoint that is not in the file cache, loaded by `from_pretrained` in a fresh process, which then "
            "answers once. Peak memory is that process's largest resident set, the libraries' own included."
        )
        rows = []
        for name, entries in loads.items():
            dense = dict(entries).get("dense")
            for variant, cell in entries:
                gain = f"{dense['load_seconds'] / cell['load_seconds']:.2f}×" if dense else "–"
                peak = cell["peak_bytes"]
                sizes = [f"{size / 1e9:.2f}" for size in (cell["disk_bytes"], peak["loaded"], peak["answered"])]
                rows.append([name, variant, *sizes, f"{cell['load_seconds']:.1f}", gain])
        head = ["model", "FFNs", "on disk, GB", "peak loaded, GB", "peak answering, GB", "load, s", "speed-up"]
        parts.append(_table(head, rows))
    return parts


def _facts(name: str, groups: list[dict[str, Any]]) -> str:
    cell, dense = groups[0], groups[0]["models"]["dense"]
    share = cell["ffn_share"]
    text = (
        f"{human(dense['parameters'])} parameters, {cell['prompt_tokens']} prompt tokens, {cell['patches']} patches, "
        f"{cell['rounds']} rounds. Dense: {dense['first_token']['seconds']:.2f} s to the first token, "
        f"{1e3 * dense['per_token']['seconds']:.0f} ms per token. FFNs take {share['decode language']:.0%} of a "
        f"decoded token's time; of the first token's, those of language take {share['prefill language']:.0%} and those "
        f"of vision {share['prefill vision']:.0%}."
    )
    if name in SHARED_PERIOD:
        text += (
            f" To fit beside its compressed forms, every {SHARED_PERIOD[name]}th language layer uses the same storage; "
            "a layer is far larger than the caches, so each token still reads every layer's weights from memory."
        )
    return text


def _model_table(groups: list[dict[str, Any]]) -> str:
    rows = []
    for cell in groups:
        for variant, own in cell["models"].items():
            if variant == "dense":
                continue
            checks = [own["amdahl"][phase]["measured_over_predicted"] for phase in ("first_token", "per_token")]
            batch = 8 / own["per_token_batch_8"]["seconds"]
            rows.append(
                [
                    variant,
                    human(own["parameters"]),
                    _ratio(own["first_token"]["speedup"]),
                    f"{checks[0]:.2f}",
                    _ratio(own["per_token"]["speedup"]),
                    f"{checks[1]:.2f}",
                    f"{1 / own['per_token']['seconds']:.2f}",
                    _ratio(own["per_token_batch_8"]["speedup"]),
                    f"{batch:.2f}",
                ]
            )
    head = [
        "FFNs",
        "parameters",
        "first token",
        "measured / predicted",
        "per token",
        "measured / predicted",
        "tokens/s",
    ]
    return _table([*head, "per token, batch 8", "tokens/s, batch 8"], rows)


def _headline(speeds: dict[str, list[dict[str, Any]]]) -> list[str]:
    found = {v: own for cell in speeds.get("Qwen2.5-VL-7B", []) for v, own in cell["models"].items() if v != "dense"}
    if "paper" not in found:
        return []
    paper = found["paper"]
    lines = [
        "The paper reports 48 % more speed at 8.29 B → 5.38 B parameters. The same sizes here, by its recipe: "
        f"{_ratio(paper['per_token']['speedup'])} per token, {_ratio(paper['first_token']['speedup'])} to the first."
    ]
    if "products n=4" in found:
        ours = found["products n=4"]
        lines.append(
            f"products n=4 on the same model: {human(ours['parameters'])} parameters, "
            f"{_ratio(ours['per_token']['speedup'])} per token, {_ratio(ours['first_token']['speedup'])} to the first."
        )
    return [" ".join(lines)]


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
            parts.append(_tokens_table(group, "speedup", [*VARIANTS, *LOW_RANK]))
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
            parts.append(f"{title}:\n\n{_tokens_table(group, 'speedup', [*VARIANTS, *LOW_RANK], spread=False)}")
    ffns = [c for c in cells if (c["part"], c["cache"]) == ("ffn", "cold")]
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
            ratio = by_tokens[count].get(name, {}).get(key)
            cells.append("–" if ratio is None else _ratio(ratio) if spread else f"{ratio[0]:.2f}×")
        rows.append([f"{name} {_limits(by_tokens[tokens[-1]], name)}", *cells])
    dense = [f"{1e3 * by_tokens[count]['dense']['seconds']:.3g} ms" for count in tokens]
    head = ["FFNs", *(f"{count} token{'s' if count > 1 else ''}" for count in tokens)]
    return _table(head, [["dense", *dense], *rows] if key == "speedup" else rows)


def _limits(layers: dict[str, Any], name: str) -> str:
    """Dense bytes over the layer's, dense operations over the layer's (at the most tokens measured)."""
    by = [layers["dense"][what] / layers[name][what] for what in ("weight_bytes", "flops")]
    return f"[{by[0]:.2g}, {by[1]:.2g}]"


def _losses(ffns: list[dict[str, Any]]) -> str:
    counted = []
    for name in VARIANTS:
        own = [cell["layers"][name] for cell in ffns if name in cell["layers"]]
        rivals = sum(one["speedup_over_low_rank"][2] < 1 for one in own)
        slower = sum(one["speedup"][2] < 1 for one in own)
        counted.append([name, str(len(own)), str(rivals), RIVAL[name], str(slower)])
    head = ["FFNs", "cells", "slower than low-rank", "of the size", "slower than dense"]
    text = "How often, by more than the spread (the upper quartile is below 1), whole FFNs with cold weights:\n\n"
    return text + _table(head, counted)


# --- on a GPU --------------------------------------------------------------------------------------------------------


def _gpu(results: dict[str, Any]) -> list[str]:
    parts = [
        "A CUDA graph is one launch of all a call's kernels. Where few tokens are at work, an eager call waits for the "
        "processor that launches them one by one, and its speed-ups say little about the layers.",
    ]
    for name, (head, rows) in model_rows(results, _ratio).items():
        parts += [f"### {name} on the GPU", _table(head, rows)]
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
    parts += ["### Gap to the bandwidth limit", GAP_TEXT, _table(*gap_rows(results))]
    if failed := failures(results):
        parts += ["### Without a number", "\n".join(f"- {line}" for line in failed)]
    return parts


# --- plain pieces ----------------------------------------------------------------------------------------------------


def _ratio(ratio: list[float]) -> str:
    return f"{ratio[0]:.2f}× ({ratio[1]:.2f}-{ratio[2]:.2f})"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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
