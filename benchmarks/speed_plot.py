"""The roofline plot of the speed page."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {
    "dense": "black",
    "paper": "tab:green",
    "learned n=4": "tab:olive",
    "products n=2": "tab:cyan",
    "products n=4": "tab:blue",
    "products n=8": "tab:purple",
    "low-rank 1/2": "tab:orange",
    "low-rank 1/4": "tab:red",
    "low-rank 1/8": "tab:pink",
}


def plot(ffns: dict[str, Any], path: Path) -> None:
    """In bfloat16, one panel per FFN: a line for every layer, a point on it for every number of tokens."""
    roof = ffns["ceilings"]["bfloat16"]
    peak, slow = roof["flops_per_second"], roof["gemv_bytes_per_second"]
    fast = max(slow, roof["sum_bytes_per_second"])
    found: dict[str, list[dict[str, Any]]] = {}
    for cell in sorted(ffns["cells"].values(), key=lambda cell: cell["tokens"]):
        if (cell["part"], cell["dtype"], cell["cache"]) == ("ffn", "bfloat16", "cold"):
            found.setdefault(f"{' and '.join(cell['models'])}, {cell['region']}: {cell['shape']}", []).append(cell)
    figure, grid = plt.subplots(2, 3, figsize=(15, 9), sharex=True, sharey=True)
    for axis, (title, cells) in zip(grid.flat, found.items(), strict=False):
        for rate, style in ((fast, "-"), (slow, ":")):
            intensities = [0.5, peak / rate, 3000]
            axis.loglog(intensities, [min(peak, i * rate) / 1e9 for i in intensities], style, color="grey")
        for name, colour in COLOURS.items():
            points = []
            for cell in cells:
                if name in cell["layers"]:
                    own = cell["layers"][name]
                    moved_bytes = own["weight_bytes"] + 2 * cell["tokens"] * sum(cell["features"])
                    points.append((own["flops"] / moved_bytes, own["flops"] / own["seconds"] / 1e9))
            if points:
                style = "--" if name.startswith("low-rank") else "-"
                axis.loglog(*zip(*points, strict=True), style, marker="o", ms=4, lw=1, color=colour, label=name)
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.3)
        axis.tick_params(labelbottom=True)
        axis.set_xlabel("operations per byte")
        axis.set_ylabel("GFLOP/s")
    for axis in list(grid.flat)[len(found) :]:
        axis.axis("off")
    handles = {label: line for axis in grid.flat for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    grid.flat[-1].legend(handles.values(), handles.keys(), loc="center", fontsize=11, frameon=False)
    figure.suptitle("FFNs in bfloat16, 1 to 2048 tokens from left to right; dotted: the rate of one-vector products")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
