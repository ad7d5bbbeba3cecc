"""docs/results.md: how methods compare on pretrained weights, as tables and plots, and the README's first table.

    python benchmarks/comparison_report.py

Shows what has been measured: `perplexity.py` (a language model), `ffn_quality.py` (single FFNs) and, where they have
been run, `comparison.py` (with more steps in the files of LONG) and `ablation.py` (the reference model); and what
`block_spectrum.py` found its matrices to allow. The advice is ours, from `results/advice.md`.
"""

import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
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
PLOTS = {name: PAGE.with_name(f"results_{name}.png") for name in ("perplexity", "ffn", "quality", "frontier")}
LONG = ("comparison_long", "comparison_recipes", "comparison_hidden", "comparison_longest")
COMPARISONS = ("comparison", *LONG)
FILES = {
    name: RESULTS.with_name(f"{name}.json")
    for name in ("perplexity", "ffn_quality", *COMPARISONS, "ablation", "block_spectrum")
}
ADVICE = RESULTS.with_name("advice.md")
PUBLISHED = ("low-rank, whitened", "width pruning", "paper")
# the best kinds, however they were fitted: how their methods begin, and what plots call them; tables have all
KINDS = {
    "width by budget": "widths by a budget",
    "products on fewer units": "products on fewer units",
    "low-rank, whitened": "low-rank, mended",
}
_MARKS = ("", "†", "‡", "§", "¶")  # of processors
_COLORS = (
    *("#7f7f7f", "#e377c2", "#d62728", "#1f77b4", "#17becf"),
    *("#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#bcbd22", "#000000"),
    *("#aec7e8", "#ffbb78", "#98df8a", "#c5b0d5"),
)

Kept = dict[str, dict[str, Any]]
"""The results files that are there, by name."""


@dataclass(frozen=True)
class Measured:
    """A cell, and the settings of the file that holds it."""

    cell: dict[str, Any]
    settings: dict[str, Any]

    @property
    def samples(self) -> int:
        """What the fit saw."""
        least = BLOCKS["samples"] if self.cell["method"].endswith("by blocks") else 0
        return max(least, self.settings["calibration"])

    @property
    def hidden(self) -> bool:
        """Whether hidden states taught."""
        return bool(self.settings.get("hidden_weight"))

    @property
    def kl(self) -> float:
        """From the dense model, after training."""
        return self.cell["agreement"]["after"]["kl"]

    @property
    def kind(self) -> str | None:
        """The method as published, or which of `KINDS` it is; None for others."""
        method = self.cell["method"]
        if method in PUBLISHED:
            return method
        return next((kind for start, kind in KINDS.items() if method.startswith(start)), None)

    @property
    def effort(self) -> tuple[int, int, bool, int, float]:
        """Of two of a kind, the one to show has more: samples, steps, hidden states, mending; then the lower loss."""
        stage = 2 * self.cell["method"].endswith("by blocks") + self.cell["method"].endswith("corrected")
        return self.samples, self.settings["steps"], self.hidden, stage, -self.cell["loss_after"]


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


def measured(kept: Kept, names: Iterable[str] = COMPARISONS) -> list[Measured]:
    """All models of these results files, at the learning rate that is shown."""
    files = [kept[name] for name in names if name in kept]
    return [Measured(cell, own["settings"]) for own in files for cell in best_rates(own["cells"])]


def in_short(found: Iterable[Measured]) -> list[Measured]:
    """What most will want to compare: methods as published, and of the best kinds at every size what was fitted and
    trained furthest (as far as another, the one with the lower training loss)."""
    furthest: dict[tuple[str | None, Any], Measured] = {}
    for one in found:
        key = (one.kind, one.cell["fraction"])
        if one.kind and (key not in furthest or one.effort > furthest[key].effort):
            furthest[key] = one
    return list(furthest.values())


def kept_table(found: Iterable[Measured], tasks: Iterable[str], marks: dict[str, str]) -> str:
    """What each model keeps of the dense one's scores, how near to it it is before training and after, how large, and
    how much faster, on which processor: with its mark."""
    found = sorted(found, key=lambda one: (-(one.cell["fraction"] or 1), one.kl))
    rows = [
        [
            f"{one.cell['ffn_params_ratio']:.1%}",
            one.cell["method"],
            "-" if one.cell["method"] == "paper" else f"{one.samples:,}",  # its fit takes none
            f"{one.settings['steps']}{', hidden states' if one.hidden else ''}",
            *(_kept(one.cell, task) for task in tasks),
            _agreement(one.cell)[1],
            _megabytes(one.cell),
            *(ratio(one.cell[f"{part}_speedup"]) + marks[_processor(one.cell)] for part in ("prefill", "decode")),
        ]
        for one in found
    ]
    head = ["FFN parameters", "method", "samples", "steps", *(f"{task} kept" for task in tasks)]
    present = {_processor(one.cell) for one in found}
    places = "; ".join(f"{mark} {where}".strip() for where, mark in marks.items() if where in present)
    return (
        table([*head, "KL before → after", "on disk", "prefill", "decode"], rows)
        + f"\n\nPrefill and decode: times dense, in bfloat16, on {places}."
    )


def processor_marks(found: Iterable[Measured]) -> dict[str, str]:
    """What stands behind speeds in tables, by processor: nothing where most of the models were measured."""
    processors = Counter(_processor(one.cell) for one in found)
    return {where: _MARKS[place] for place, (where, _) in enumerate(processors.most_common())}


def _processor(cell: dict[str, Any]) -> str:
    """What a cell's speeds were measured on."""
    return f"{cell['machine']['processor']}, {cell['machine']['threads']} threads"


def with_comparison(readme: str, kept: Kept) -> str:
    """The README's text with the part between the markers made anew: the table, and what its shares are of."""
    head, rest = readme.split(BEGIN, 1)
    marker, rest = rest.split("\n", 1)
    dense, found = kept["comparison"]["dense"], measured(kept)
    whole = f"Dense: {_millions(dense)} parameters, {_megabytes(dense)}; {'; '.join(_dense_scores(kept))}."
    body = f"{kept_table(in_short(found), dense['scores'], processor_marks(found))}\n\n{whole}"
    return f"{head}{BEGIN}{marker}\n{body}\n{END}{rest.split(END, 1)[1]}"


def _dense_scores(kept: Kept) -> list[str]:
    """The scores that shares are of: bfloat16 rounds otherwise on another processor, so each has its own."""
    found: dict[str, dict[str, Any]] = {}
    for own in (kept[name] for name in COMPARISONS if name in kept):
        for cell in own["cells"].values():
            if is_dense_of(own["dense"], cell):
                found.setdefault(cell["machine"]["processor"], own["dense"]["scores"])
    return [
        f"on {processor} "
        + ", ".join(f"{task} {metric_label(own['headline'])} {_score(own)}" for task, own in scores.items())
        for processor, scores in found.items()
    ]


def is_dense_of(dense: dict[str, Any], cell: dict[str, Any]) -> bool:
    """Whether the shares of a cell, whose file may hold cells of several processors, are of this model's scores."""
    return all(
        abs(share * own[own["headline"]]["value"] - cell["scores"][task][own["headline"]]["value"]) < 1e-9
        for task, own in dense["scores"].items()
        if (share := cell["retention"][task]) is not None
    )


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
        *_long_part(kept),
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
        f"against dense in one run. {_machines(kept['cells'].values())} The plots show what the "
        f"README's table shows: of each kind the model that was fitted and trained furthest, how far stands there.",
    ]
    for fraction in (f for f in (*FRACTIONS, None) if f in present):
        parts += [f"### {fraction:g} of the FFN parameters" if fraction else "### The paper's recipe"]
        parts += [comparison_table(kept, fraction)]
    return [*parts, *(f"![{name}]({PLOTS[name].name})" for name in ("quality", "frontier"))]


def _long_part(kept: Kept) -> list[str]:
    files = [kept[name] for name in LONG if name in kept]
    if not files:
        return []
    weights = {own["settings"].get("hidden_weight", 0.0) for own in files} - {0.0}
    hidden = f" Hidden states: with their error, times {', '.join(f'{w:g}' for w in weights)}, in the loss."
    return [
        "## The reference model, with more calibration and training",
        f"The same, fitted on more samples and trained for more steps.{hidden if weights else ''} "
        + _machines(cell for own in files for cell in own["cells"].values()),
        kept_table(measured(kept, LONG), files[0]["dense"]["scores"], processor_marks(measured(kept))),
        f"Dense: {'; '.join(_dense_scores(kept))}.",
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
        f"{settings['batch_size']} conversations, {settings['examples']} unseen test examples. "
        f"{_machines(kept['cells'].values())}",
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
    """Where and when something was measured that knows its machine: a results file, or a cell."""
    facts = kept["machine"]
    return (
        f"Machine: {facts['processor']}, {facts['threads']} threads, accelerator {facts['accelerator']}; torch "
        f"{facts['torch']}, transformers {facts['transformers']}; {facts['date']}."
    )


def _machines(cells: Iterable[dict[str, Any]]) -> str:
    """The same of all cells."""
    return " ".join(sorted({_machine(cell) for cell in cells}))


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
    shown = [(one.kind, one) for one in in_short(measured(kept)) if one.kind and one.cell["fraction"]]
    heads = {task: own["headline"] for task, own in kept["comparison"]["dense"]["scores"].items()}
    _draw(
        {
            task: (
                "share of the FFN parameters",
                metric_label(metric),
                [(kind, one.cell["fraction"], one.cell["scores"][task][metric]["value"]) for kind, one in shown],
            )
            for task, metric in heads.items()
        },
        PLOTS["quality"],
    )
    axes_of = {
        "size": ("MB on disk", lambda cell: cell["disk_bytes"] / 1e6),
        "prefill": ("times dense", lambda cell: cell["prefill_speedup"][0]),
        "decode": ("times dense", lambda cell: cell["decode_speedup"][0]),
    }
    _draw(
        {
            title: (label, "KL to the dense model", [(kind, x_of(one.cell), one.kl) for kind, one in shown])
            for title, (label, x_of) in axes_of.items()
        },
        PLOTS["frontier"],
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
