"""The page of an output folder: report.md with its tables, and the plots that stand in it."""

import json
from pathlib import Path
from typing import Any

from hyperfade.hub import footnote, metric_label, score_rows, score_text, table
from hyperfade.report.lines import fault_text, few_tokens_text, held_out_text, share_kept
from hyperfade.report.plots import plot_comparison, plot_layers, plot_training


def write_report(folder: Path) -> None:
    """report.md and plots/ of an output folder, from its results.json and metrics.jsonl files."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    metrics = {"compressed": read_metrics(folder / "work")}
    metrics |= {name: read_metrics(folder / "rivals" / name / "work") for name in results["rivals"]}
    plots = folder / "plots"
    plots.mkdir(exist_ok=True)
    plot_training(metrics, plots / "training.png")
    plot_layers(results["layers"], plots / "layers.png")
    plot_comparison(results, _by_task(results), plots / "comparison.png")
    (folder / "report.md").write_text(_page(results), encoding="utf-8")


def read_metrics(work: Path) -> list[dict[str, float]]:
    """The steps in a work folder's metrics.jsonl; empty where nothing was trained."""
    file = work / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    return [line for line in lines if "fault" not in line]


def _page(results: dict[str, Any]) -> str:
    layers = "\n".join(
        f"| {layer['name']} | {layer['label']} | {_error(layer['error'])} | {_error(layer['low_rank_error'])} |"
        f" {_share(layer.get('correction'))} | {_own_training(layer.get('held_out'))} |"
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

Relative output error before any training, beside whitened low-rank of the same size. A corrected writer is aimed at
more than the dense one's output, at what mends the layers before it as well: its error is relative to that, and larger.
With training of its own (fit.block_epochs) a writer's error is that of its whole FFN after it, each token by the size
of its stream; what was left of the squared error on batches held out stands in the last column.

![error per layer](plots/layers.png)

| matrix | becomes | error | low-rank | corrected | own training |
|---|---|---|---|---|---|
{layers}

{hardly_reached}{allocations}## Samples left out

{skipped}
"""


def _allocation_table(name: str, allocation: dict[str, Any]) -> str:
    """Every share of a model with a budget, and what the loss is predicted to do."""
    rows = "\n".join(
        f"| {s['name']} | {s['size']} | {share_kept(s):.1%} | {s['sensitivity']:.3g} | {s['error']:.4f} "
        f"| {s['loss']:.3g} |"
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


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _own_training(held_out: float | None) -> str:
    return "-" if held_out is None else held_out_text(held_out)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
