"""What each ingredient is worth: the plain products recipe at one size, with one thing changed at a time.

    make reference
    python benchmarks/ablation.py

Data, steps and measurements are those of `comparison.py`, and so is the way it goes on after an interruption.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from comparison import RESULTS, arguments, both, run

RATE = 5e-5
TOP = 10  # of the language model's 30 layers


def products(n: int, fraction: float) -> dict[str, Any]:
    """Products that keep `fraction` of a matrix's parameters: n blocks a side, n² of them dense."""
    return {"kind": "products", "n": n, "products": round(n * n * fraction)}


def changes(fraction: float, steps: int) -> dict[str, dict[str, Any]]:
    """By name, what a recipe says apart from the base, which is products of n = 4, a calibrated fit, no fade, and
    nine parts of KL to one of cross-entropy."""
    base = products(4, fraction)

    def faded(share: float, **more: Any) -> dict[str, Any]:
        fade = round(share * steps)
        return {"train": {"fade_steps": fade, "polish_steps": steps - fade, **more}}

    return {
        "base": {},
        "fit: random": {"fit": {"method": "random"}},
        "fit: Frobenius": {"fit": {"method": "frobenius"}},
        "fit: hidden units by energy": {"fit": {"basis": "energy"}},
        "fade: a third of the steps": faded(1 / 3),
        "fade: two thirds": faded(2 / 3),
        "random fit, fade: two thirds": {"fit": {"method": "random"}, **faded(2 / 3)},
        "fade with reconstruction": faded(1 / 3, reconstruction_weight=0.1),
        "KD: none": {"train": {"kd_weight": 0}},
        "KD: alone": {"train": {"kd_weight": 1}},
        "KD and hidden states": {"train": {"hidden_weight": 10, "teacher": "live"}},
        "LoRA on attention": {"train": {"lora_rank": 8, "dense_learning_rate": RATE}},
        "n = 2": both(products(2, fraction)),
        "n = 8": both(products(8, fraction)),
        "algebra: learned, terms": both({"kind": "learned", "n": 4, "terms": round(16 * fraction)}),
        "algebra: fixed, quaternions": both({"kind": "quaternion", "terms": round(16 * fraction)}),
        "language only": {"replace": {"language": base, "vision": None}},
        "vision only": {"replace": {"language": None, "vision": base}},
        "top layers only": {
            "replace": {
                "language": None,
                "vision": None,
                "rules": [{"region": "language", "last_layers": TOP, "layer": base}],
            }
        },
    }


def cells(fraction: float, steps: int) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(name, what identifies it, recipe fields) of every cell."""
    for name, fields in changes(fraction, steps).items():
        train = {"fade_steps": 0, "polish_steps": steps, "learning_rate": RATE} | fields.get("train", {})
        yield name, {"change": name, "fraction": fraction}, both(products(4, fraction)) | fields | {"train": train}


def main() -> None:
    """Run every cell that the results file lacks."""
    parser = arguments(__doc__ or "", RESULTS.with_name("ablation.json"), Path("runs/ablation"))
    parser.add_argument("--fraction", type=float, default=0.25, help="share of the FFN parameters that stays")
    parser.add_argument("--changes", nargs="+", help=f"only these: {', '.join(changes(0.25, 60))}")
    args = parser.parse_args()
    wanted = [cell for cell in cells(args.fraction, args.steps) if not args.changes or cell[0] in args.changes]
    run(wanted, args, parser)


if __name__ == "__main__":
    main()
