"""docs/results.md: how methods compare on pretrained weights, as tables and plots, and the README's first table.

    python benchmarks/comparison_report.py

Shows what has been measured: `perplexity.py` (a language model), `ffn_quality.py` (single FFNs) and, where they have
been run, `comparison.py` (with more steps in the files of LONG) and `ablation.py` (the reference model); and what
`block_spectrum.py` found its matrices to allow. The advice is ours, from `results/advice.md`.
"""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from agreement import EXAMPLES
from comparison import BLOCKS, FRACTIONS, RESULTS
from report_pieces import ratio, table

from hyperfade.hub import metric_label, score_text
from hyperfade.workspace import read_json

PAGE = Path(__file__).parent.parent / "docs" / "results.md"
README = PAGE.parent.parent / "README.md"
BEGIN, END = "<!-- comparison:begin", "<!-- comparison:end -->"
PLOTS = {name: PAGE.with_name(f"results_{name}.png") for name in ("perplexity", "ffn", "quality", "speed")}
LONG = ("comparison_long", "comparison_hidden")
FILES = {
    name: RESULTS.with_name(f"{name}.json")
    for name in ("perplexity", "ffn_quality", "comparison", *LONG, "ablation", "block_spectrum")
}
ADVICE = RESULTS.with_name("advice.md")
# in short: those that are behind others of their kind at every size are left to the page, published ones stay
LEFT_OUT_IN_SHORT = ("products", "generic", "products + companion", "width, writer refitted")
PUBLISHED = ("low-rank, whitened", "width pruning", "paper")
_COLORS = (
    *("#7f7f7f", "#e377c2", "#d62728", "#1f77b4", "#17becf"),
    *("#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#bcbd22", "#000000"),
    *("#aec7e8", "#ffbb78", "#98df8a", "#c5b0d5"),
)

Kept = dict[str, dict[str, Any]]
"""The results files that are there, by name."""


def best_rates(cells: dict[str, Any]) -> list[dict[str, Any]]:
    """Of the cells of a method at a fraction, the one whose learning rate gave the lowest training loss: the test set
    chooses nothing. Ordered by size, then by the KL from the dense model."""
    best: dict[tuple[str, Any], dict[str, Any]] = {}
    for cell in cells.values():
        key = (cell["method"], cell["fraction"])
        if key not in best or cell["loss_after"] < best[key]["loss_after"]:
            best[key] = cell
    return sorted(best.values(), key=lambda cell: (-(cell["fraction"] or 1), cell["agreement"]["after"]["kl"]))


def comparison_table(kept: dict[str, Any], fraction: float | None) -> str:
    """The models of one size, the dense one first: quality with intervals, cost, size, speed."""
    dense = kept["dense"]
    tasks = list(dense["scores"])
    header = [
        "method",
        *(f"{task}: {metric_label(own['headline'])}" for task, own in dense["scores"].items()),
        *(
            "least kept",
            "same next token before → after",
            "KL before → after",
            "FFN",
            "all parameters",
            "on disk",
            "prefill",
            "decode",
            "fit",
            "training",
            "rate (tried)",
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
                    *_agreement(cell),
                    f"{cell['ffn_params_ratio']:.1%}",
                    *(_millions(cell), _megabytes(cell)),
                    *(ratio(cell[f"{part}_speedup"]) for part in ("prefill", "decode")),
                    *(f"{cell[f'{part}_seconds']:.0f} s" for part in ("fit", "train")),
                    f"{cell['learning_rate']:g} ({_rates_tried(kept['cells'], cell)})",
                ]
            )
    return table(header, rows)


def _rates_tried(cells: dict[str, Any], one: dict[str, Any]) -> int:
    return sum((cell["method"], cell["fraction"]) == (one["method"], one["fraction"]) for cell in cells.values())


def perplexity_table(kept: dict[str, Any]) -> str:
    """A language model's perplexity and KL before and after training, by size and method, with what it cost."""
    head = ["FFN parameters", "method", "perplexity before → after", "KL before → after", "fit", "training"]
    rows = [["100 %", "dense", f"{kept['dense']:.1f}", "", "", ""]]
    rows += [
        [
            f"{cell['ffn_params_ratio']:.1%}",
            cell["method"],
            f"{cell['before']:.0f} → {cell['after']:.1f}",
            f"{cell['kl_before']:.2f} → {cell['kl_after']:.2f}",
            *(f"{cell[f'{part}_seconds']:.0f} s" for part in ("fit", "train")),
        ]
        for cell in sorted(kept["cells"].values(), key=lambda cell: (-cell["fraction"], cell["after"]))
    ]
    return table(head, rows)


def kept_table(files: Sequence[dict[str, Any]], *, short: bool) -> str:
    """What each model of these results keeps of the dense one's scores, and how like it they are, before training and
    after; `short`: `in_short`."""
    tasks, rows = list(files[0]["dense"]["scores"]), list[tuple[float, float, list[str]]]()
    for own in files:
        cells = best_rates(own["cells"])
        for cell in in_short(cells) if short else cells:
            row = [f"{cell['ffn_params_ratio']:.1%}", cell["method"], *_effort(cell, own["settings"])]
            row += [*(_kept(cell, task) for task in tasks), *_agreement(cell)]
            rows.append((-(cell["fraction"] or 1), cell["agreement"]["after"]["kl"], row))
    head = ["FFN parameters", "method", "samples", "steps", *(f"{task} kept" for task in tasks)]
    return table([*head, "same next token before → after", "KL before → after"], [row for *_, row in sorted(rows)])


def _effort(cell: dict[str, Any], settings: dict[str, Any]) -> tuple[str, str]:
    """The fit's samples and the training's steps; the paper's fit takes no samples."""
    if cell["method"] == "paper":
        return "-", f"{settings['steps']}"
    least = BLOCKS["samples"] if cell["method"].endswith("by blocks") else 0
    hidden = ", hidden states" if settings.get("hidden_weight") else ""
    return f"{max(least, settings['calibration']):,}", f"{settings['steps']}{hidden}"


def in_short(cells: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """What most will want to compare: methods as published, and of ours the best kinds, each with the last stage of
    fitting that was measured at that size."""

    def kind(cell: dict[str, Any]) -> tuple[str, Any]:
        return cell["method"].removesuffix(", by blocks").removesuffix(", corrected"), cell["fraction"]

    def stage(cell: dict[str, Any]) -> int:
        return 2 if cell["method"].endswith(", by blocks") else int(cell["method"].endswith(", corrected"))

    cells = [cell for cell in cells if cell["method"] not in LEFT_OUT_IN_SHORT]
    last = {kind(cell): stage(cell) for cell in sorted(cells, key=stage)}
    return [cell for cell in cells if cell["method"] in PUBLISHED or stage(cell) == last[kind(cell)]]


def with_comparison(readme: str, kept: Kept) -> str:
    """The README's text with the part between the markers made anew."""
    head, rest = readme.split(BEGIN, 1)
    marker, rest = rest.split("\n", 1)
    files = [kept[name] for name in ("comparison", *LONG) if name in kept]
    return f"{head}{BEGIN}{marker}\n{kept_table(files, short=True)}\n{END}{rest.split(END, 1)[1]}"


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


def bound_table(kept: dict[str, Any]) -> str:
    """By tower and size, what share of a matrix's energy the best layer of a kind could keep: medians over matrices."""
    rows = []
    for region in dict.fromkeys(cell["region"] for cell in kept["cells"].values()):
        own = [cell["kept"] for cell in kept["cells"].values() if cell["region"] == region]
        for place, fraction in enumerate(kept["fractions"]):
            shares = {kind: [cell[kind][place] for cell in own] for kind in own[0]}
            shown = [f"{statistics.median(of):.1%}" if None not in of else "-" for of in shares.values()]
            rows.append([region, f"{fraction:g}", *shown])
    kinds = next(iter(kept["cells"].values()))["kept"]
    return table(["matrices", "parameters", *kinds], rows)


def page(kept: Kept, advice: str) -> str:
    """The whole page."""
    parts = [
        "# Results on really pretrained weights",
        "Written by `benchmarks/comparison_report.py` from the results files in `benchmarks/results`; the advice is "
        "ours and stands in `advice.md` there.",
        advice,
        *_perplexity_part(kept["perplexity"]),
        *_ffn_part(kept["ffn_quality"]),
        *(_reference_part(kept["comparison"]) if "comparison" in kept else ()),
        *_long_part([kept[name] for name in LONG if name in kept]),
        *(_ablation_part(kept["ablation"]) if "ablation" in kept else ()),
        *_bound_part(kept["block_spectrum"]),
    ]
    return "\n\n".join(parts) + "\n"


def _perplexity_part(kept: dict[str, Any]) -> list[str]:
    own, tokens = kept["settings"], 256
    return [
        "## A language model: SmolLM2-135M on WikiText-2",
        f"All language FFNs replaced; fitted on {own['calibration']} sequences of {tokens} tokens of the validation "
        f"text, trained for {own['steps']} steps of {own['batch_size']} of them by the KL to the dense model (AdamW, "
        f"{own['learning_rate']:g}), scored on the first {own['test']} sequences of the test text. The budget is a "
        f"short one, and the same for all; the sizes are within 0.3 points of each other. The second moments of the "
        f"calibration are a part of the fit's seconds only where no earlier cell of the same run had gathered them. "
        f"{_machine(kept)}",
        perplexity_table(kept),
        f"![perplexity against size]({PLOTS['perplexity'].name})",
    ]


def _ffn_part(kept: dict[str, Any]) -> list[str]:
    own = kept["settings"]
    return [
        "## One FFN at a time",
        f"FFNs of the same model by themselves: relative error of the output on held-out WikiText-2, after the fit and "
        f"after {own['steps']} steps of 2,048 tokens on the FFN's own output (AdamW, {own['learning_rate']:g}). "
        f"{_machine(kept)}",
        ffn_table(kept),
        f"![error of single FFNs]({PLOTS['ffn'].name})",
    ]


def _reference_part(kept: dict[str, Any]) -> list[str]:
    settings, present = kept["settings"], {cell["fraction"] for cell in kept["cells"].values()}
    parts = [
        "## The reference model",
        f"A LLaVA of a pretrained ViT-S and SmolLM2-135M ([benchmarks/reference](../benchmarks/reference)). Every "
        f"cell: {settings['steps']} steps of {settings['batch_size']} samples after a fit on "
        f"{settings['calibration']} (by blocks: on {BLOCKS['samples']}, with {BLOCKS['block_epochs']} epochs of every "
        f"FFN by itself), with KL to the dense model and cross-entropy; {settings['examples']} unseen test "
        f"examples. Of the learning rates that were tried for a row, in brackets how many, the one with the lowest "
        f"training loss is shown. Other brackets hold 95 % intervals; * marks a score whose paired difference "
        f"from the dense model's has an interval without zero. Before and after training, on the answer tokens of "
        f"{EXAMPLES} test examples with the true tokens before them: how often the most likely next token is the dense "
        f"model's, and the KL from it in nats. Speed: bfloat16, one prompt with an image, medians and quartiles "
        f"against dense in one run. {_machine(kept)}",
    ]
    for fraction in (f for f in (*FRACTIONS, None) if f in present):
        parts += [f"### {fraction:g} of the FFN parameters" if fraction else "### The paper's recipe"]
        parts += [comparison_table(kept, fraction)]
    return [*parts, *(f"![{name} against size]({PLOTS[name].name})" for name in ("quality", "speed"))]


def _long_part(files: Sequence[dict[str, Any]]) -> list[str]:
    if not files:
        return []
    weights = {own["settings"].get("hidden_weight", 0.0) for own in files} - {0.0}
    hidden = f" Hidden states: with their error, times {', '.join(f'{w:g}' for w in weights)}, in the loss."
    return [
        "## The reference model, with more calibration and training",
        f"The same, fitted on more samples and trained for more steps.{hidden if weights else ''} "
        + " ".join(dict.fromkeys(_machine(own) for own in files)),
        kept_table(files, short=False),
    ]


def ablation_table(kept: dict[str, Any]) -> str:
    """One row per change, the base first: what each task keeps, and how like the dense model it was and is."""
    tasks = list(kept["dense"]["scores"])
    rows = [
        [
            cell["change"],
            *(_kept(cell, task) for task in tasks),
            *_agreement(cell),
            f"{cell['ffn_params_ratio']:.1%}",
            f"{cell['train_seconds']:.0f} s",
        ]
        for cell in kept["cells"].values()
    ]
    head = ["change", *(f"{task} kept" for task in tasks), "same next token before → after", "KL before → after"]
    return table([*head, "FFN", "training"], rows)


def _ablation_part(kept: dict[str, Any]) -> list[str]:
    settings, fractions = kept["settings"], {cell["fraction"] for cell in kept["cells"].values()}
    return [
        "## What each ingredient is worth",
        f"The reference model by plain products (n = 4, {', '.join(f'{f:g}' for f in fractions)} of the FFN parameters,"
        f" calibrated fit, no fade, mostly KL), with one thing changed at a time; {settings['steps']} steps of "
        f"{settings['batch_size']} conversations, {settings['examples']} unseen test examples. {_machine(kept)}",
        ablation_table(kept),
    ]


def _bound_part(kept: dict[str, Any]) -> list[str]:
    return [
        "## Why: what a matrix lets any algebra keep",
        f"Share of ‖W‖² that a layer of so many parameters can keep at best, medians over the {len(kept['cells'])} FFN "
        "matrices of the reference model, by weights alone (`benchmarks/block_spectrum.py`). For n: the best terms or "
        "products of any algebra with n × n blocks, fixed or learned; the last column is what our fit of products "
        "reaches. "
        f"{_machine(kept)}",
        bound_table(kept),
    ]


def _machine(kept: dict[str, Any]) -> str:
    facts = kept["machine"]
    return (
        f"Machine: {facts['processor']}, {facts['threads']} threads, accelerator {facts['accelerator']}; torch "
        f"{facts['torch']}, transformers {facts['transformers']}; {facts['date']}."
    )


def plot(kept: Kept) -> None:
    """The page's plots: every panel has a line per method."""
    text, ffn = list(kept["perplexity"]["cells"].values()), list(kept["ffn_quality"]["cells"].values())
    sizes = [(c["method"], c["fraction"], c["after"]) for c in text]
    _draw({"": ("share of the FFN parameters", "perplexity after training", sizes)}, PLOTS["perplexity"])
    layers = sorted({cell["layer"] for cell in ffn})
    _draw(
        {
            f"layer {layer}, after training": (
                "share of the parameters",
                "relative error",
                [(c["method"], c["ratio"], c["after"]) for c in ffn if c["layer"] == layer],
            )
            for layer in layers
        },
        PLOTS["ffn"],
    )
    if "comparison" not in kept:
        return
    cells = [cell for cell in best_rates(kept["comparison"]["cells"]) if cell["fraction"]]
    heads = {task: own["headline"] for task, own in kept["comparison"]["dense"]["scores"].items()}
    _draw(
        {
            task: (
                "share of the FFN parameters",
                metric_label(metric),
                [(c["method"], c["fraction"], c["scores"][task][metric]["value"]) for c in cells],
            )
            for task, metric in heads.items()
        },
        PLOTS["quality"],
    )
    _draw(
        {
            part: (
                "times dense",
                "KL to the dense model",
                [(c["method"], c[f"{part}_speedup"][0], c["agreement"]["after"]["kl"]) for c in cells],
            )
            for part in ("prefill", "decode")
        },
        PLOTS["speed"],
    )


def _draw(panels: dict[str, tuple[str, str, list[tuple[str, float, float]]]], path: Path) -> None:
    """title → (x label, y label, (method, x, y) points)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * len(panels) + 1, 4.2), layout="constrained")
    names = list(dict.fromkeys(name for _, _, points in panels.values() for name, _, _ in points))
    for axes, (title, (x, y, points)) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for place, name in enumerate(names):
            own = sorted((a, b) for method, a, b in points if method == name)
            axes.plot(*zip(*own, strict=True), "o-", color=_COLORS[place % len(_COLORS)], label=name)
        axes.set(title=title, xlabel=x, ylabel=y)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=110)


def _score(own: dict[str, Any]) -> str:
    metric, difference = own["headline"], own.get("against_dense")
    differs = difference is not None and not difference["low"] <= 0 <= difference["high"]
    return score_text(metric, own[metric]) + ("*" if differs else "")


def _kept(cell: dict[str, Any], task: str) -> str:
    share = cell["retention"][task]
    return "-" if share is None else f"{share:.1%}"


def _agreement(cell: dict[str, Any]) -> tuple[str, str]:
    before, after = (cell["agreement"][when] for when in ("before", "after"))
    return f"{before['same_token']:.1%} → {after['same_token']:.1%}", f"{before['kl']:.2f} → {after['kl']:.2f}"


def _millions(cell: dict[str, Any]) -> str:
    return f"{cell['parameters'] / 1e6:.1f} M"


def _megabytes(cell: dict[str, Any]) -> str:
    return f"{cell['disk_bytes'] / 1e6:.0f} MB"


def kept_results() -> tuple[Kept, str]:
    """The committed results and the advice."""
    kept = {name: read_json(path) for name, path in FILES.items() if path.exists()}
    return kept, ADVICE.read_text(encoding="utf-8").strip()


def main() -> None:
    """Write the page, its plots and the README's table."""
    kept, advice = kept_results()
    PAGE.write_text(page(kept, advice), encoding="utf-8")
    README.write_text(with_comparison(README.read_text(encoding="utf-8"), kept), encoding="utf-8")
    plot(kept)
    print(PAGE)


if __name__ == "__main__":
    main()
