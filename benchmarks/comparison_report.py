"""docs/results.md: the comparison on the reference model and the one on single FFNs, as tables and plots.

python benchmarks/comparison_report.py
"""

from pathlib import Path
from typing import Any

from comparison import FRACTIONS, RESULTS
from report_pieces import ratio, table

from hyperfade.hub import metric_label, score_text
from hyperfade.workspace import read_json

PAGE = Path(__file__).parent.parent / "docs" / "results.md"
README = PAGE.parent.parent / "README.md"
BEGIN, END = "<!-- comparison:begin", "<!-- comparison:end -->"
PLOTS = {name: PAGE.with_name(f"results_{name}.png") for name in ("quality", "ffn", "speed")}
FFN_RESULTS = RESULTS.with_name("ffn_quality.json")
ADVICE = RESULTS.with_name("advice.md")
_COLORS = ("#7f7f7f", "#e377c2", "#d62728", "#1f77b4", "#17becf", "#2ca02c", "#ff7f0e", "#9467bd")


def best_rates(cells: dict[str, Any]) -> list[dict[str, Any]]:
    """Of the cells of a method at a fraction, the one whose learning rate gave the lowest training loss: the test set
    chooses nothing."""
    best: dict[tuple[str, Any], dict[str, Any]] = {}
    for cell in cells.values():
        key = (cell["method"], cell["fraction"])
        if key not in best or cell["loss_after"] < best[key]["loss_after"]:
            best[key] = cell
    return list(best.values())


def comparison_table(kept: dict[str, Any], fraction: float | None) -> str:
    """The models of one size, the dense one first: quality with intervals, cost, size, speed."""
    dense = kept["dense"]
    tasks = list(dense["scores"])
    header = [
        "method",
        *(f"{task}: {metric_label(own['headline'])}" for task, own in dense["scores"].items()),
        *(
            "least kept",
            "KL before → after",
            "FFN",
            "all parameters",
            "on disk",
            "prefill",
            "decode",
            "fit",
            "training",
        ),
    ]
    rows = [
        ["dense", *(_score(dense["scores"][t]) for t in tasks), "", "", "100 %", _millions(dense), _megabytes(dense)]
    ]
    rows[0] += [""] * (len(header) - len(rows[0]))
    for cell in best_rates(kept["cells"]):
        if cell["fraction"] == fraction:
            kept_share = [share for share in cell["retention"].values() if share is not None]
            rows.append(
                [
                    cell["method"],
                    *(_score(cell["scores"][t]) for t in tasks),
                    f"{min(kept_share):.1%}" if kept_share else "-",
                    f"{cell['kl_before']:.2f} → {cell['kl_after']:.2f}",
                    f"{cell['ffn_params_ratio']:.1%}",
                    *(_millions(cell), _megabytes(cell)),
                    *(ratio(cell[f"{part}_speedup"]) for part in ("prefill", "decode")),
                    *(f"{cell[f'{part}_seconds']:.0f} s" for part in ("fit", "train")),
                ]
            )
    return table(header, rows)


def short_table(kept: dict[str, Any], fraction: float) -> str:
    """The comparison at one size in the README's width: quality, what is kept of it, size and speed."""
    tasks = kept["dense"]["scores"]
    rows = [["dense", *(_plain(own) for own in tasks.values()), "", "100 %", _megabytes(kept["dense"]), "", ""]]
    for cell in best_rates(kept["cells"]):
        if cell["fraction"] == fraction:
            rows.append(
                [
                    cell["method"],
                    *(f"{_plain(cell['scores'][t])} ({cell['retention'][t]:.0%})" for t in tasks),
                    f"{cell['kl_after']:.2f}",
                    f"{cell['ffn_params_ratio']:.1%}",
                    _megabytes(cell),
                    *(f"{cell[f'{part}_speedup'][0]:.2f}×" for part in ("prefill", "decode")),
                ]
            )
    names = [f"{task}: {metric_label(own['headline'])}" for task, own in tasks.items()]
    return table(["method", *names, "KL to dense", "FFN", "on disk", "prefill", "decode"], rows)


def with_comparison(readme: str, kept: dict[str, Any]) -> str:
    """The README's text with the part between the markers made anew."""
    head, rest = readme.split(BEGIN, 1)
    marker, rest = rest.split("\n", 1)
    return f"{head}{BEGIN}{marker}\n{short_table(kept, 0.25)}\n{END}{rest.split(END, 1)[1]}"


def ffn_table(kept: dict[str, Any]) -> str:
    """Single FFNs: error before and after training, one row per method, one column per layer and size."""
    cells = kept["cells"].values()
    places = sorted({(cell["layer"], cell["fraction"]) for cell in cells}, key=lambda place: (place[0], -place[1]))
    found = {(cell["method"], cell["layer"], cell["fraction"]): cell for cell in cells}
    rows = []
    for method in dict.fromkeys(cell["method"] for cell in cells):
        own = [found.get((method, *place)) for place in places]
        rows.append([method, *(f"{c['before']:.3f} → {c['after']:.3f}" if c else "-" for c in own)])
    return table(["method", *(f"layer {layer}, {fraction:g}" for layer, fraction in places)], rows)


def page(kept: dict[str, Any], ffn: dict[str, Any], advice: str) -> str:
    """The whole page."""
    machine, settings = kept["machine"], kept["settings"]
    parts = [
        "# Results on really pretrained weights",
        "Written by `benchmarks/comparison_report.py` from `benchmarks/results/comparison.json` and "
        "`ffn_quality.json`; the advice is ours and stands in `advice.md` beside them.",
        advice,
        "## The reference model",
        f"A LLaVA of a pretrained ViT-S and SmolLM2-135M ([benchmarks/reference](../benchmarks/reference)). Every "
        f"cell: {settings['steps']} steps of {settings['batch_size']} samples after a fit on "
        f"{settings['calibration']}, with KL to the dense model and cross-entropy; {settings['examples']} unseen test "
        f"examples. Brackets hold 95 % intervals; * marks a score whose paired difference from the dense model's has "
        f"an interval without zero. KL is the training batch's, at the first step and over the last ten. Speed: "
        f"bfloat16, one prompt with an image, medians and quartiles against dense in one run. Machine: "
        f"{machine['processor']}, {machine['threads']} threads, {machine['accelerator']}; torch {machine['torch']}, "
        f"transformers {machine['transformers']}; {machine['date']}.",
    ]
    present = {cell["fraction"] for cell in kept["cells"].values()}
    for fraction in (f for f in (*FRACTIONS, None) if f in present):
        parts += [f"### {fraction:g} of the FFN parameters" if fraction else "### The paper's recipe"]
        parts += [comparison_table(kept, fraction)]
    parts += [f"![quality against size]({PLOTS['quality'].name})", f"![quality against speed]({PLOTS['speed'].name})"]
    own = ffn["settings"]
    parts += [
        "## One FFN at a time",
        f"FFNs of {ffn['model']} by themselves: relative error of the output on held-out WikiText-2, after the fit and "
        f"after {own['steps']} steps of 2,048 tokens on the FFN's own output (AdamW, {own['learning_rate']:g}).",
        ffn_table(ffn),
        f"![error of single FFNs]({PLOTS['ffn'].name})",
    ]
    return "\n\n".join(parts) + "\n"


def plot(kept: dict[str, Any], ffn: dict[str, Any]) -> None:
    """The page's three plots."""
    from matplotlib.figure import Figure

    cells = [cell for cell in best_rates(kept["cells"]) if cell["fraction"]]
    tasks = kept["dense"]["scores"]
    names = list(dict.fromkeys(cell["method"] for cell in (*cells, *ffn["cells"].values())))
    color = {name: _COLORS[i % len(_COLORS)] for i, name in enumerate(names)}

    def draw(figure: Any, axes: Any, points: list[tuple[str, float, float]], x: str, y: str) -> None:
        for name in names:
            own = sorted((a, b) for method, a, b in points if method == name)
            if own:
                axes.plot(*zip(*own, strict=True), "o-", color=color[name], label=name)
        axes.set(xlabel=x, ylabel=y)

    def save(figure: Any, panels: Any, name: str) -> None:
        handles = {h.get_label(): h for axes in panels for h in axes.get_legend_handles_labels()[0]}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(PLOTS[name], dpi=110)

    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, (task, own) in zip(panels, tasks.items(), strict=True):
        points = [(c["method"], c["fraction"], c["scores"][task][own["headline"]]["value"]) for c in cells]
        draw(figure, axes, points, "share of the FFN parameters", f"{task}: {metric_label(own['headline'])}")
        axes.axhline(own[own["headline"]]["value"], color="black", linestyle=":", label="dense")
    save(figure, panels, "quality")
    figure = Figure(figsize=(8, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, part in zip(panels, ("prefill", "decode"), strict=True):
        points = [(c["method"], c[f"{part}_speedup"][0], c["kl_after"]) for c in cells]
        draw(figure, axes, points, f"{part}, times dense", "KL to the dense model")
    save(figure, panels, "speed")
    layers = sorted({cell["layer"] for cell in ffn["cells"].values()})
    figure = Figure(figsize=(4.5 * len(layers), 4), layout="constrained")
    panels = figure.subplots(1, len(layers), squeeze=False)[0]
    for axes, layer in zip(panels, layers, strict=True):
        own = [cell for cell in ffn["cells"].values() if cell["layer"] == layer]
        draw(figure, axes, [(c["method"], c["ratio"], c["after"]) for c in own], "share of the parameters", "error")
        axes.set_title(f"layer {layer}, after training")
    save(figure, panels, "ffn")


def _score(own: dict[str, Any]) -> str:
    metric, difference = own["headline"], own.get("against_dense")
    differs = difference is not None and not difference["low"] <= 0 <= difference["high"]
    return score_text(metric, own[metric]) + ("*" if differs else "")


def _plain(own: dict[str, Any]) -> str:
    return score_text(own["headline"], own[own["headline"]]).partition(" ")[0]


def _millions(cell: dict[str, Any]) -> str:
    return f"{cell['parameters'] / 1e6:.1f} M"


def _megabytes(cell: dict[str, Any]) -> str:
    return f"{cell['disk_bytes'] / 1e6:.0f} MB"


def kept() -> tuple[dict[str, Any], dict[str, Any], str]:
    """The committed results and the advice."""
    return read_json(RESULTS), read_json(FFN_RESULTS), ADVICE.read_text(encoding="utf-8").strip()


def main() -> None:
    """Write the page and its plots."""
    results = kept()
    PAGE.write_text(page(*results), encoding="utf-8")
    README.write_text(with_comparison(README.read_text(encoding="utf-8"), results[0]), encoding="utf-8")
    plot(*results[:2])
    print(PAGE)


if __name__ == "__main__":
    main()
