"""What few bits cost in answers: the models of `stacking.py`, their FFNs rounded to 8, 6, 4, 3 and 2 bits.

    make reference
    python benchmarks/rounding_quality.py --text wikitext-2
    python benchmarks/quantization_report.py

Rounding is to nearest, by rows and by groups, as in `quantization.py`; A, P and Q stay as they are. A cell is a model,
a method, a number of bits and a grouping; one that is in the results file is not measured again.
"""

import itertools
from pathlib import Path
from typing import Any

import torch
from quantization import BITS, GROUP, parts
from rounding import nearest
from stacking import METHODS, MODELS, arguments, checkpoint, ffn_matrices, quality
from torch import Tensor, nn

from hyperfade.hub import load
from hyperfade.measure import machine
from hyperfade.nn import fitting_group
from hyperfade.workspace import read_json, write_json

RESULTS = Path(__file__).parent / "results" / "rounding_quality.json"
GROUPINGS = ("rows", "groups")


@torch.no_grad()
def round_(model: nn.Module, bits: int, grouping: str) -> None:
    """Round every FFN matrix in place, the arithmetic in float32."""
    for layer in ffn_matrices(model):
        for tensor in parts(layer)[0].values():
            group = (fitting_group("int8", tensor.shape[1], GROUP) or 0) if grouping == "groups" else 0
            tensor.copy_(nearest(tensor.float(), bits, group))


def main() -> None:
    """Measure what the results file lacks."""
    parser = arguments(__doc__, RESULTS)
    parser.set_defaults(examples=500, test=32)
    args = parser.parse_args()
    settings = {"examples": args.examples, "test": args.test, "group": GROUP}
    kept = read_json(args.results) if args.results.exists() else {}
    if kept.setdefault("settings", settings) != settings:
        parser.error(f"{args.results} holds cells of other settings, {kept['settings']}: choose another --results")
    cells: dict[str, Any] = kept.setdefault("cells", {})
    moments: dict[str, Tensor] = {}
    choices = [(16, "whole"), *itertools.product(BITS, GROUPINGS)]
    for name, method in itertools.product([args.only] if args.only else MODELS, METHODS):
        folder = checkpoint(args, name, method, "bf16", moments)
        for bits, grouping in choices:
            key = f"{name}|{method}|{bits}|{grouping}"
            if key in cells:
                continue
            model: Any = load(str(folder), "bfloat16")
            if bits < 16:
                round_(model, bits, grouping)
            cells[key] = quality(args, name, model, folder)
            kept["machine"] = machine()
            write_json(args.results, kept)
            print(f"{key}: {cells[key]}", flush=True)


if __name__ == "__main__":
    main()
