"""Try every family that answers in text about images, and write docs/families.md from what came of it.

    python benchmarks/family_table.py             # try all, keep results/families.json, write the page
    python benchmarks/family_table.py llava git   # try these again, keep what the others gave
    python benchmarks/family_table.py --page-only # write the page from the kept results

A tiny random model of each (benchmarks/families) is planned, swapped, run, folded, saved, loaded and asked.
"""

import argparse
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from families.trial import NAMES, attempt
from transformers.utils import logging

RESULTS = Path(__file__).parent / "results" / "families.json"
PAGE = Path(__file__).parents[1] / "docs" / "families.md"
_TIMM = "its vision tower comes from timm, which is not installed"
WHY = {
    "diffusion_gemma": "it writes by diffusion: there are no next-token logits to distil",
    "fast_vlm": _TIMM,
    "gemma3n": _TIMM,
    "llama4": "its forward fails in this version of transformers, dense as well; its FFNs are found",
    "perception_lm": _TIMM,
    "pi0": "it gives actions of a robot, no text; its FFNs are found",
    "shieldgemma2": "transformers renames its weights when saving and does not give the dense model back either",
}
"""Why a family fails, where the message of what failed does not tell."""
_REGIONS = ("language", "vision", "projector", "other")


def main() -> None:
    """Try all families, one after the other, and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("families", nargs="*", help="model types to try again [default: all]")
    parser.add_argument("--page-only", action="store_true", help="write the page from the kept results")
    arguments = parser.parse_args()
    if not arguments.page_only:
        kept = json.loads(RESULTS.read_text(encoding="utf-8")) if arguments.families else None
        results = measured(arguments.families or list(NAMES), kept)
        RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(page(json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")


def measured(names: Sequence[str], kept: dict[str, Any] | None) -> dict[str, Any]:
    """What came of these families, and of those in `kept`. Raises `SystemExit` for results of other versions."""
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    if kept is not None and versions != {key: kept[key] for key in versions}:
        raise SystemExit("The kept results are of other versions: try all families.")
    outcomes = {family["model_type"]: family for family in kept["families"]} if kept else {}
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    for model_type in names:
        outcome = attempt(model_type)
        print("passes" if outcome.passed else "fails ", model_type, outcome.reason, flush=True)
        outcomes[model_type] = asdict(outcome)
    return versions | {"families": [outcomes[name] for name in NAMES if name in outcomes]}


def page(results: dict[str, Any]) -> str:
    """docs/families.md."""
    families = results["families"]
    passed = [f for f in families if f["passed"]]
    failed = [f for f in families if not f["passed"]]
    lines = [
        "# Families",
        "",
        "Written by `benchmarks/family_table.py` from `benchmarks/results/families.json`.",
        "",
        f"transformers {results['transformers']} has {len(families)} model types that answer in text about images. "
        f"**{len(passed)}** of them go the whole way here: a tiny random model is planned, swapped, run, trained one "
        "step back, folded, saved, loaded bit-equal and asked, and its FFNs are as many and as large as its config "
        "implies.",
        "",
        "The regions' columns count FFNs in the tiny model (two layers mostly); `other` is audio and what else only "
        "`replace.patterns` reaches. `experts`: modules that hold experts as tensors, beside the FFNs of the regions. "
        "`reached`: replaced matrices that the forward pass of the trial met; those of a module's experts are two.",
        "",
        "| model type | class | language | vision | projector | other | experts | reached | left out |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for family in passed:
        numbers = [str(family["ffns"].get(region, ["–"])[0]) for region in _REGIONS]
        reached = "{} of {}".format(*family["reached"])
        cells = [family["model_type"], family["class_name"], *numbers, str(family["experts"] or "–"), reached]
        lines.append(f"| {' | '.join(cells)} | {family['reason']} |")
    lines += ["", "## What does not", "", "| model type | class | reason |", "| --- | --- | --- |"]
    for family in failed:
        reason = str(WHY.get(family["model_type"], family["reason"]))
        lines.append(f"| {family['model_type']} | {family['class_name']} | {reason.replace('|', '¦')} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
