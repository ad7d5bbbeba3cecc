"""The plots of an output folder: its training, its layers, and the models beside each other."""

import math
from pathlib import Path
from typing import Any

from hyperfade.hub import is_share, metric_label

_COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b")


def plot_training(metrics: dict[str, list[dict[str, float]]], path: Path) -> None:
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


def plot_layers(layers: list[dict[str, Any]], path: Path) -> None:
    """Every fitted matrix's error, beside low-rank of the same size."""
    fitted = [layer for layer in layers if layer["error"] is not None]
    figure, (axes,) = _figure(8, 1 + 0.28 * max(len(fitted), 4))
    rows = range(len(fitted))
    axes.barh([r - 0.2 for r in rows], [layer["error"] for layer in fitted], 0.4, label="hyperfade")
    rivals = [math.nan if layer["low_rank_error"] is None else layer["low_rank_error"] for layer in fitted]
    axes.barh([r + 0.2 for r in rows], rivals, 0.4, label="low-rank, same size")
    axes.set_yticks(list(rows), [layer["name"].removeprefix("model.") for layer in fitted], fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="relative output error before training")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def plot_comparison(results: dict[str, Any], tasks: dict[str, dict[str, Any]], path: Path) -> None:
    """A panel for every task (by name, then by model), the size and both speeds; a bar per model."""
    entries = {"compressed": results, **results["rivals"]}
    names = ["dense", *entries]
    dense_bytes = results["disk_bytes"]["dense"]
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


def _panel(task: str, models: dict[str, Any]) -> tuple[str, list[float]]:
    """A task's title and the heights of its bars, none for a model without a score."""
    metric = models["dense"]["headline"]
    title, factor = (f"{metric_label(metric)}, %", 100) if is_share(metric) else (metric_label(metric), 1)
    heights = [factor * own["scores"][metric]["value"] if own else math.nan for own in models.values()]
    return f"{task}: {title}" if task else title, heights


def _running_mean(values: list[float], width: int = 10) -> list[float]:
    return [sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))]


def _figure(width: float, height: float, columns: int = 1) -> Any:
    # matplotlib takes half a second to import, and most commands draw nothing
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]
