"""The README tells the truth: its table is the kept results', its commands and files exist."""

import json
import re
import sys
from pathlib import Path

from typer.testing import CliRunner

from hyperfade.cli import app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SENTENCES = " ".join(README.split())


def test_the_table_is_what_the_kept_results_give() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from update_readme import KEPT, with_results
    finally:
        sys.path.pop(0)
    assert with_results(README, json.loads(KEPT.read_text(encoding="utf-8"))) == README


def test_every_command_it_shows_exists() -> None:
    commands = set(re.findall(r"hyperfade (\w+) (?:--|path|runs)", README))
    assert commands >= {"inspect", "compress", "evaluate", "benchmark"}
    for command in commands:
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


def test_every_file_it_links_to_exists() -> None:
    links = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target]
    assert len(links) >= 3
    assert [target for target in links if not (ROOT / target).exists()] == []


def test_the_peak_it_names_is_the_measured_one() -> None:
    measured = json.loads((ROOT / "benchmarks/results/stream_memory.json").read_text(encoding="utf-8"))
    assert f"{measured['disk_bytes']['source'] / 1e9:.1f} GB on disk" in SENTENCES
    assert f"a peak of {measured['peak_bytes'] / 1e9:.1f} GB" in SENTENCES
    assert measured["peak_bytes"] < 4e9


def test_the_memory_of_a_fit_it_names_is_the_measured_one() -> None:
    fits = json.loads((ROOT / "benchmarks/results/corrected_memory.json").read_text(encoding="utf-8"))["fits"]
    usual, one_arena = (next(fit for fit in fits if bool(fit["environment"]) is less) for less in (False, True))
    assert (
        f"{usual['samples']} samples of the reference model, {usual['tokens']:,} tokens of width {usual['width']}"
        in SENTENCES
    )
    assert f"took {usual['fit_bytes'] / 1e9:.1f} GB beside the model" in SENTENCES
    assert f"in the environment {one_arena['fit_bytes'] / 1e9:.1f} GB" in SENTENCES


def test_what_kept_weights_gain_is_the_measured_gain() -> None:
    made, kept = (
        json.loads((ROOT / f"benchmarks/results/derived_{way}.json").read_text(encoding="utf-8"))["models"]
        for way in ("made", "kept")
    )
    gains = {
        size: [of[name]["prefill_speedup"] for of in (made, kept) for name in of if f"at-{size}-" in name]
        for size in ("0.25", "0.125")
    }
    quarter, eighth = ("from {:.2f} to {:.2f}".format(*gain) for gain in gains.values())
    assert f"a quarter by a budget goes {quarter} times dense, an eighth {eighth}." in SENTENCES


def test_what_it_does_not_rule_out_are_the_intervals_of_the_paired_differences() -> None:
    products, widths = "products on fewer units by budget, by blocks", "width by budget, by blocks"

    def losses(file: str, method: str, fraction: float) -> list[str]:
        cells = json.loads((ROOT / f"benchmarks/results/{file}.json").read_text(encoding="utf-8"))["cells"].values()
        (cell,) = (cell for cell in cells if (cell["method"], cell["fraction"]) == (method, fraction))
        return [f"{-100 * cell['scores'][task]['against_dense']['low']:.1f}" for task in ("question", "reading")]

    of_widths = "{} points of exact match in questions and {} points of characters in reading by widths, "
    of_products = "{} and {} by hypercomplex layers, and by these at an eighth {} and {}."
    found = [*losses("comparison_hidden", widths, 0.25), *losses("comparison_longest", products, 0.25)]
    found += losses("comparison_longest", products, 0.125)
    assert (of_widths + of_products).format(*found) in SENTENCES
