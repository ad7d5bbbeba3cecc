"""Results for people: the plan as lines, the report page, its plots. Reads files and writes files, measures nothing."""

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from hyperfade.hub import footnote, is_share, metric_label, score_rows, score_text, table
from hyperfade.surgery import Plan, human

_COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b")


def plan_lines(plan: Plan, bytes_per_parameter: int = 2) -> list[str]:
    """The plan as aligned text: one row per kind of replacement, then the totals of the whole model."""
    groups: dict[tuple[str, str, str, str], list[Any]] = defaultdict(list)
    for swap in plan.swaps:
        shape = " → ".join(map(str, swap.spec.dense_features))
        groups[swap.region, swap.name.rpartition(".")[2], shape, swap.spec.label].append(swap)
    rows = [("region", "matrix", "features", "count", "becomes", "parameters", "multiply-adds/token")]
    for (region, matrix, shape, label), swaps in groups.items():
        before, after = sum(s.dense_parameters for s in swaps), sum(s.spec.num_parameters for s in swaps)
        work = sum(s.dense_multiply_adds for s in swaps), sum(s.spec.multiply_adds for s in swaps)
        rows.append(
            (
                *(region, matrix, shape, str(len(swaps)), label),
                *(f"{human(before)} → {human(after)}", f"{human(work[0])} → {human(work[1])}"),
            )
        )
    rule = tuple("-" * max(len(row[i]) for row in rows) for i in range(len(rows[0])))
    lines = _aligned([rows[0], rule, *rows[1:]])
    before, after = plan.bytes(bytes_per_parameter)
    lines.append(
        f"replaced matrices keep {plan.ffn_params_ratio:.1%} of their parameters; the whole model: "
        f"{human(plan.parameters_before)} → {human(plan.parameters_after)} ({plan.params_ratio:.1%}), "
        f"{human(before)}B → {human(after)}B at {8 * bytes_per_parameter} bits"
    )
    if plan.kept:
        lines.append(f"{len(plan.kept)} FFN matrices stay dense, e.g. {plan.kept[0][0]}: {plan.kept[0][1]}")
    lines += [
        f"{region}: no FFN of a known shape; if the model has one, name its nn.Linear modules with replace.patterns"
        for region in plan.missing
    ]
    return lines


def fit_text(layer: Any) -> str:
    """How one matrix came out of the fit, a `LayerFit` that has an error."""
    return (
        f"fit {layer.name}: {layer.label}, error {layer.error:.4f} (low-rank of the same size "
        f"{layer.low_rank_error:.4f}), {layer.seconds:.1f} s"
    )


def allocation_lines(allocation: dict[str, Any]) -> list[str]:
    """An `Allocation`, as a mapping: where the budget went, a line per region, and what that is predicted to gain."""
    lines, shares = [], allocation["shares"]
    for region in dict.fromkeys(share["region"] for share in shares):
        own = sorted((share for share in shares if share["region"] == region), key=_part)
        least, most = (
            f"{_part(s):.1%} ({s['name']}: {s['size']}, sensitivity {s['sensitivity']:.3g})" for s in (own[0], own[-1])
        )
        lines.append(f"budget: {region} keeps {_part(*own):.1%} of its parameters, from {least} to {most}")
    lines.append(
        f"budget: {_part(*shares):.2%} of {allocation['budget']:.2%} used; predicted loss change "
        f"{allocation['loss']:.4g} nats per answer token, with one size for all {allocation['uniform_loss']:.4g}"
    )
    return lines


def _part(*shares: dict[str, Any]) -> float:
    """Parameters after over before."""
    return sum(s["parameters"] for s in shares) / sum(s["dense_parameters"] for s in shares)


def quality_lines(quality: dict[str, Any]) -> list[str]:
    """The scores of a `Quality`, as a mapping, as aligned text: one row per task, part of its examples and metric."""
    rows = [
        (task, part, metric_label(metric), score_text(metric, score), f"of {score['count']}")
        for task, own in quality["tasks"].items()
        for (part, metric), score in score_rows(own).items()
    ]
    return _aligned(rows)


def harness_lines(found: dict[str, Any]) -> list[str]:
    """What `measure.run_tasks` returned as aligned text: one row per metric, with its standard error."""
    rows = []
    for task, metrics in found["results"].items():
        samples = found["n-samples"].get(task)
        count = f"of {samples['effective']}" if samples else ""  # groups have none of their own
        for key, value in metrics.items():
            name, comma, way = key.partition(",")  # "exact_match,strict-match": a metric, and how the answer was found
            if comma and not name.endswith("_stderr") and isinstance(value, float | int):
                error = metrics.get(f"{name}_stderr,{way}")
                margin = f"± {error:.4f}" if isinstance(error, float | int) else ""
                rows.append((task, name if way == "none" else f"{name} ({way})", f"{value:.4f}", margin, count))
    return _aligned(rows)


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def write_report(folder: Path) -> None:
    """report.md and plots/ of an output folder, from its results.json and metrics.jsonl files."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    metrics = {"compressed": read_metrics(folder / "work")}
    metrics |= {name: read_metrics(folder / "rivals" / name / "work") for name in results["rivals"]}
    plots = folder / "plots"
    plots.mkdir(exist_ok=True)
    _plot_training(metrics, plots / "training.png")
    _plot_layers(results["layers"], plots / "layers.png")
    _plot_comparison(results, plots / "comparison.png")
    (folder / "report.md").write_text(_page(results), encoding="utf-8")


def _page(results: dict[str, Any]) -> str:
    layers = "\n".join(
        f"| {layer['name']} | {layer['label']} | {_error(layer['error'])} | {_error(layer['low_rank_error'])} |"
        for layer in results["layers"]
    )
    hardly_reached = "".join(
        f"- {layer['name']}, {few_tokens_text(layer['few_tokens'], None)}\n"
        for layer in results["layers"]
        if layer.get("few_tokens")
    )
    if hardly_reached:
        hardly_reached = f"Experts by number, with the tokens that calibration routed to each:\n\n{hardly_reached}\n"
    qualities = "\n\n".join(_quality_table(task, models) for task, models in _by_task(results).items())
    entries = {"compressed": results, **results["rivals"]}
    times = "\n".join(
        f"| {name} | {entry['fit_seconds']:.0f} s | {entry['training']['steps']} steps, "
        f"{entry['training']['seconds']:.0f} s | {entry['reload_bit_equal']} |"
        for name, entry in entries.items()
    )
    allocations = "".join(
        _allocation_table(name, entry["allocation"]) for name, entry in entries.items() if entry.get("allocation")
    )
    faults = "".join(
        f"- {name}: {fault_text(f)}\n" for name, entry in entries.items() for f in entry["training"].get("faults", ())
    )
    skipped = "\n".join(f"- {where}: {reason}" for where, reason in results["skipped"]) or "None."
    return f"""# {results["recipe"]["model"]}, compressed

{table(results)}

{footnote(results)}

![quality, size and speed](plots/comparison.png)

{qualities}

## Training

![losses and α over steps](plots/training.png)

| model | fit | training | reloaded model bit-equal |
|---|---|---|---|
{times}

{faults}
## The fit, matrix by matrix

Relative output error before any training, beside whitened low-rank of the same size.

![error per layer](plots/layers.png)

| matrix | becomes | error | low-rank |
|---|---|---|---|
{layers}

{hardly_reached}{allocations}## Samples left out

{skipped}
"""


def _allocation_table(name: str, allocation: dict[str, Any]) -> str:
    """Every share of a model with a budget, and what the loss is predicted to do."""
    rows = "\n".join(
        f"| {s['name']} | {s['size']} | {_part(s):.1%} | {s['sensitivity']:.3g} | {s['error']:.4f} | {s['loss']:.3g} |"
        for s in allocation["shares"]
    )
    return f"""## Where the budget went: {name}

Sensitivity: nats per answer token for a relative output error of 1. Predicted: before any training, to second order,
of errors in random directions; it compares sizes and foretells no loss. In all {allocation["loss"]:.4g}, with one size
for all {allocation["uniform_loss"]:.4g}.

| FFN or matrix | size | of its parameters | sensitivity | predicted error | predicted loss change |
|---|---|---|---|---|---|
{rows}

"""


def _by_task(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Task → model → its scores: dense, compressed, rivals. None for a model that could use no example of the task."""
    details = results["quality"]["details"]
    rivals = {name: entry["quality"]["details"]["compressed"] for name, entry in results["rivals"].items()}
    models = {name: quality["tasks"] for name, quality in (details | rivals).items()}
    return {task: {name: own.get(task) for name, own in models.items()} for task in models["dense"]}


def _quality_table(task: str, models: dict[str, Any]) -> str:
    """Every model's scores with their intervals, and what share of the dense headline each keeps."""
    rows = [score_rows(own) if own else {} for own in models.values()]
    lines = [f"## Quality: {task}", "", f"| examples | number | metric (95 % interval) | {' | '.join(models)} |"]
    lines.append("|---" * (3 + len(models)) + "|")
    for (part, metric), score in rows[0].items():
        cells = [score_text(metric, own[part, metric]) if (part, metric) in own else "-" for own in rows]
        lines.append(f"| {part} | {score['count']} | {metric_label(metric)} | {' | '.join(cells)} |")
    metric = models["dense"]["headline"]
    first, *_ = values = [own["scores"][metric]["value"] if own else None for own in models.values()]
    kept = ["-" if value is None or not first else f"{value / first:.1%}" for value in values]
    lines.append(f"| kept | | {metric_label(metric)} | {' | '.join(kept)} |")
    return "\n".join(lines)


def fault_text(fault: dict[str, Any]) -> str:
    """A fault of the training and what was done about it, in one sentence."""
    if "back_to" in fault:
        return f"{fault['fault']} in step {fault['step']}: back to step {fault['back_to']}, with half the step"
    return f"{fault['fault']} in step {fault['step']}: every batch in {fault['parts']} parts from then on"


def few_tokens_text(few_tokens: dict[str, int], most: int | None = 8) -> str:
    """Which experts calibration hardly reached, in one sentence; at most so many by number."""
    shown = [f"{expert} ({tokens})" for expert, tokens in few_tokens.items()]
    rest = "" if most is None or len(shown) <= most else f" and {len(shown) - most} more"
    return f"fitted on the average of all experts more than on their own tokens: expert {', '.join(shown[:most])}{rest}"


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def read_metrics(work: Path) -> list[dict[str, float]]:
    """The steps in a work folder's metrics.jsonl; empty where nothing was trained."""
    file = work / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    return [line for line in lines if "fault" not in line]


def _figure(width: float, height: float, columns: int = 1) -> Any:
    # matplotlib takes half a second to import, and most commands draw nothing
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _plot_training(metrics: dict[str, list[dict[str, float]]], path: Path) -> None:
    """One panel per model: every step faintly, their running mean on top, and α."""
    figure, panels = _figure(max(6, 4.5 * len(metrics)), 3.6, columns=len(metrics))
    terms = {
        "cross_entropy": "cross-entropy",
        "kl": "KL to the teacher",
        "reconstruction": "reconstruction",
        "hidden": "hidden states",
    }
    for axes, (name, steps) in zip(panels, metrics.items(), strict=True):
        for color, (key, label) in zip(_COLORS, terms.items(), strict=False):
            measured = [m for m in steps if m.get(key)]  # a term that takes no part, as after the fade, is 0
            if measured:
                at, values = [m["step"] for m in measured], [m[key] for m in measured]
                axes.plot(at, values, color=color, alpha=0.25, linewidth=1)
                axes.plot(at, _running_mean(values), color=color, label=label)
        axes.set(title=name, xlabel="optimizer step", yscale="log" if steps else "linear")
        alpha = axes.twinx()
        alpha.plot(
            [m["step"] for m in steps], [m["alpha"] for m in steps], color="black", linestyle=":", label="α (right)"
        )
        alpha.set(ylim=(0, 1.05))
    handles = {h.get_label(): h for axes in figure.axes for h in axes.get_legend_handles_labels()[0]}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)


def _running_mean(values: list[float], width: int = 10) -> list[float]:
    return [sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))]


def _plot_layers(layers: list[dict[str, Any]], path: Path) -> None:
    fitted = [layer for layer in layers if layer["error"] is not None]
    figure, (axes,) = _figure(8, 1 + 0.28 * max(len(fitted), 4))
    rows = range(len(fitted))
    axes.barh([r - 0.2 for r in rows], [layer["error"] for layer in fitted], 0.4, label="hyperfade")
    axes.barh([r + 0.2 for r in rows], [layer["low_rank_error"] for layer in fitted], 0.4, label="low-rank, same size")
    axes.set_yticks(list(rows), [layer["name"].removeprefix("model.") for layer in fitted], fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="relative output error before training")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def _panel(task: str, models: dict[str, Any]) -> tuple[str, list[float]]:
    """A task's title and the heights of its bars, none for a model without a score."""
    metric = models["dense"]["headline"]
    title, factor = (f"{metric_label(metric)}, %", 100) if is_share(metric) else (metric_label(metric), 1)
    heights = [factor * own["scores"][metric]["value"] if own else math.nan for own in models.values()]
    return f"{task}: {title}" if task else title, heights


def _plot_comparison(results: dict[str, Any], path: Path) -> None:
    entries = {"compressed": results, **results["rivals"]}
    names = ["dense", *entries]
    dense_bytes, tasks = results["disk_bytes"]["dense"], _by_task(results)
    values = (
        *(_panel(task if len(tasks) > 1 else "", models) for task, models in tasks.items()),
        ("MB on disk", [dense_bytes / 1e6, *(e["disk_bytes"]["compressed"] / 1e6 for e in entries.values())]),
        ("prefill speed-up", [1, *(e["prefill_speedup"] for e in entries.values())]),
        ("decode speed-up", [1, *(e["decode_speedup"] for e in entries.values())]),
    )
    figure, panels = _figure(2.75 * len(values), 3.2, columns=len(values))
    for axes, (title, heights) in zip(panels, values, strict=True):
        bars = axes.bar(names, heights, color=["#888888", *(_COLORS[i % len(_COLORS)] for i in range(len(entries)))])
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
        axes.margins(y=0.12)
        axes.set_title(title, fontsize=10)
        axes.tick_params(axis="x", labelrotation=30, labelsize=8)
    figure.savefig(path, dpi=120)
