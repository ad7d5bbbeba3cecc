"""Write the README's table of results from a demo run: python scripts/update_readme.py [runs/demo/results.json]

With a file: keeps it as benchmarks/results/demo.json first. Without: uses what is kept there.
"""

import json
import shutil
import sys
from pathlib import Path

from hyperfade.hub import footnote, table

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "benchmarks" / "results" / "demo.json"
BEGIN, END = "<!-- results:begin", "<!-- results:end -->"


def with_results(readme: str, results: dict) -> str:
    """The README's text with the part between the markers made anew."""
    head, rest = readme.split(BEGIN, 1)
    marker, rest = rest.split("\n", 1)
    tail = rest.split(END, 1)[1]
    return f"{head}{BEGIN}{marker}\n{table(results)}\n\n{footnote(results)}\n{END}{tail}"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        KEPT.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(sys.argv[1], KEPT)
    page = ROOT / "README.md"
    page.write_text(with_results(page.read_text(encoding="utf-8"), json.loads(KEPT.read_text(encoding="utf-8"))))
