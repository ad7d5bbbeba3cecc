"""Which peak learning rate suits which method? The demo, once per rate: python benchmarks/rates.py

Every variant of the demo recipe (ours, low-rank, the paper's) is trained at every rate with the demo's budget. A rate
that is in the results file already is not run again. Exact match is on a sample of the training questions, so that the
test questions decide nothing.
"""

import argparse
import json
from pathlib import Path

from hyperfade import Recipe, compress
from hyperfade.measure import machine
from hyperfade.workspace import write_json


def main() -> None:
    """Run the demo at every rate and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-5, 1e-3], help="peak learning rates")
    parser.add_argument("--questions", type=int, default=1000, help="questions of the evaluation")
    parser.add_argument("--runs", type=Path, default=Path("runs/rates"), help="folder for the runs")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "rates.json")
    args = parser.parse_args()
    kept = json.loads(args.output.read_text(encoding="utf-8")) if args.output.exists() else {}
    if kept.get("questions") != args.questions:
        kept = {"machine": machine(), "questions": args.questions, "rates": {}}
    for rate in args.rates:
        if f"{rate:g}" in kept["rates"]:
            continue
        fields = Recipe.load("demo").model_dump()
        fields["output"] = args.runs / f"{rate:g}"
        fields["data"].update(evaluation="easy-vqa:train", evaluation_limit=args.questions)
        fields["train"]["learning_rate"] = rate
        fields["rivals"]["paper"]["train"]["learning_rate"] = rate
        results = compress(Recipe.parse(fields))
        kept["rates"][f"{rate:g}"] = {
            name: entry["quality"]["compressed"] for name, entry in {"ours": results, **results["rivals"]}.items()
        } | {"dense": results["quality"]["dense"]}
        write_json(args.output, kept)
    print(json.dumps(kept["rates"], indent=2))


if __name__ == "__main__":
    main()
