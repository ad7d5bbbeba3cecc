"""Writes docs/quantization.md and the README's table of few bits from the results that `quantization.py`,
`stacking.py`, `rounding_quality.py`, `low_bit_forms.py` and `low_bit_model.py` keep."""

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import stacking_report
from low_bit_forms import RESULTS as FORMS
from low_bit_model import RESULTS as LARGE
from quantization import BITS, RESULTS
from report_pieces import table
from rounding_quality import RESULTS as ANSWERS
from stacking import RESULTS as STACKING

from hyperfade.workspace import read_json

PAGE = RESULTS.parents[2] / "docs" / "quantization.md"
README = RESULTS.parents[2] / "README.md"
METHODS = ("dense", "products", "products, strong ridge", "terms", "terms, equal ranges", "low-rank")
TITLES = {
    "embedded": "The model that ships",
    "language": "A pretrained language model: SmolLM2-135M, layers 10 and 20",
    "encoder": "A pretrained encoder: all-MiniLM-L6-v2, layers 0, 2 and 4",
}
Cells = Mapping[str, Mapping[str, Any]]


def median_of(
    cells: Cells, method: str, value: str, bits: int, grouped: bool, mixes_rounded: bool = False
) -> float | None:
    """The median over a model's matrices of one value of the rounded rows; None where the method has no such row."""
    wanted = (bits, grouped, mixes_rounded)
    found = [
        row[value]
        for cell in cells.values()
        for row in cell[method]["rounded"]
        if (row["bits"], row["grouped"], row["mixes_rounded"]) == wanted
    ]
    return statistics.median(found) if found else None


def by_bits(cells: Cells, value: str, show: Callable[[float], str], mixes: bool = False) -> str:
    """A table with a row per number of bits and grouping, a column per method; with `mixes` two rows of each, and only
    the methods that have mixes."""
    methods = [m for m in METHODS if not mixes or median_of(cells, m, value, 8, True, True) is not None]
    rows = []
    for bits in BITS:
        for grouped in (False, True):
            for rounded in (False, True) if mixes else (False,):
                numbers = [median_of(cells, method, value, bits, grouped, rounded) for method in methods]
                kind = [f"{bits}", "groups" if grouped else "rows"]
                kind += (["rounded too" if rounded else "float"]) if mixes else []
                rows.append([*kind, *("" if number is None else show(number) for number in numbers)])
    return table(["bits", "by", *(["A, P, Q"] if mixes else []), *methods], rows)


def shapes(cells: Cells) -> str:
    """Outliers of what is stored: medians over matrices, with extremes."""
    rows = []
    for method in METHODS:
        for part in next(iter(cells.values()))[method]["numbers"]:
            own = [cell[method]["numbers"][part] for cell in cells.values()]
            spread = []
            for value in ("kurtosis", "largest"):
                numbers = [numbers[value] for numbers in own]
                spread.append(f"{statistics.median(numbers):.1f} ({min(numbers):.1f}-{max(numbers):.1f})")
            rows.append([method, part, *spread])
    return table(["method", "numbers", "kurtosis", "max / σ"], rows)


def sizes(cells: Cells) -> str:
    """Norm and gain of what replaces a matrix, and the error of the fit: medians over matrices, with extremes."""
    rows = []
    for method in METHODS:
        row = [method]
        for value in ("norm", "gain", "fit_error"):
            numbers = [cell[method][value] for cell in cells.values()]
            row.append(f"{statistics.median(numbers):.2f} ({min(numbers):.2f}-{max(numbers):.2f})")
        rows.append(row)
    return table(["method", "norm", "gain", "error of the fit"], rows)


def lag(cells: Cells, method: str) -> list[str]:
    """By how many decibels a method's W is rounded worse (−) or better (+) than dense, median over matrices."""
    shown = []
    for bits in BITS:
        differences = []
        for cell in cells.values():
            own, dense = (
                next(
                    r
                    for r in cell[m]["rounded"]
                    if (r["bits"], r["grouped"], r["mixes_rounded"]) == (bits, True, False)
                )
                for m in (method, "dense")
            )
            differences.append(own["weight_sqnr"] - dense["weight_sqnr"])
        shown.append(f"{statistics.median(differences):+.1f} ({min(differences):+.1f} to {max(differences):+.1f})")
    return shown


def section(name: str, cells: Cells) -> list[str]:
    """One model's tables."""
    return [
        f"## {TITLES[name]}",
        f"{len(cells)} matrices of its FFNs, medians over them.",
        "### Against dense",
        "Decibels of W (signal to rounding noise) gained or lost against the dense matrix at the same bits, by groups; "
        "with the extremes over matrices.",
        table(["method", *(f"{bits} bits" for bits in BITS)], [[m, *lag(cells, m)] for m in METHODS[1:]]),
        "### Where the noise goes",
        "Norm: ‖Ŵ‖ / ‖W‖. Gain: how much more of its norm a matrix shows in its output than a random one, "
        "‖Ŵ C^½‖ / (‖Ŵ‖ √(tr C / d)). Rounding noise has a gain of 1, so a matrix with a larger one hears less of it.",
        sizes(cells),
        "### Outliers",
        "Kurtosis is 3 for a normal distribution; max / σ grows with the number of elements.",
        shapes(cells),
        "### Signal to noise of W",
        "20 log10 ‖Ŵ‖ / ‖Ŵ − rounded Ŵ‖, in decibels; A, P and Q in float.",
        by_bits(cells, "weight_sqnr", lambda x: f"{x:.1f}"),
        "### Error that rounding adds to the output",
        "On inputs that no fit has seen, relative to the output of the layer before rounding.",
        by_bits(cells, "added_error", lambda x: f"{x:.4f}"),
        "### The whole error",
        "Against the dense matrix's output; what is left at 8 bits is the error of the fit itself, untrained.",
        by_bits(cells, "error", lambda x: f"{x:.3f}"),
        "### A, P and Q in float, or rounded like the rest",
        "The error that rounding adds to the output. A, P and Q are rounded by rows of n = 4.",
        by_bits(cells, "added_error", lambda x: f"{x:.4f}", mixes=True),
    ]


def page(
    kept: Mapping[str, Any],
    stacked: Mapping[str, Any],
    answers: Mapping[str, Any],
    forms: Mapping[str, Any],
    large: Mapping[str, Any],
) -> str:
    """The whole page."""
    machine, settings = kept["machine"], kept["settings"]
    facts = (
        f"Fits: {settings['sweeps']} sweeps, n = {settings['n']}, a quarter of the parameters; language model and "
        f"encoder on {settings['tokens']:,} tokens of WikiText-2. torch {machine['torch']}, {machine['date']}."
    )
    words = (RESULTS.parent / "quantization.md").read_text(encoding="utf-8").strip()
    parts = [
        "# Do hypercomplex weights quantize better or worse than dense ones?",
        "Written by `benchmarks/quantization_report.py` from `benchmarks/results/quantization.json`; the summary is "
        "ours and stands in `quantization.md` beside it.",
        words,
        facts,
        *stacking_report.section(stacked),
        *stacking_report.answers_section(answers),
        *stacking_report.large_section(large),
        *stacking_report.calls_section(forms),
    ]
    for name in TITLES:
        if kept.get(name):
            parts += section(name, kept[name])
    return "\n\n".join(parts) + "\n"


def kept_results() -> list[Any]:
    """What the page is made of, in the order that `page` takes it."""
    return [read_json(path) for path in (RESULTS, STACKING, ANSWERS, FORMS, LARGE)]


def main() -> None:
    """Write the page and the README's table."""
    kept, stacked, answers, forms, large = kept_results()
    PAGE.write_text(page(kept, stacked, answers, forms, large), encoding="utf-8")
    README.write_text(stacking_report.with_stacking(README.read_text(encoding="utf-8"), stacked), encoding="utf-8")


if __name__ == "__main__":
    main()
