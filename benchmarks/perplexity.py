"""A pretrained language model by every method at every size: its perplexity before and after a short distillation.

    make reference
    python benchmarks/perplexity.py --text wikitext-2

All language FFNs are replaced, fitted on valid.txt, trained on it by the KL to the dense model alone, and scored on
test.txt. WikiText-2 (Merity et al. 2016) in its tokenised form is what the kept results are from. A cell that is in the
results file is not run again, so the command can be stopped and continued.
"""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from comparison import FRACTIONS, RESULTS, methods
from torch import Tensor

from hyperfade.distill import allocate, distill_, fit_, teacher_of
from hyperfade.hub import load, load_processor
from hyperfade.measure import machine
from hyperfade.recipe import Fit, Replace, Train
from hyperfade.surgery import find_ffns, plan, set_alpha_, swap_
from hyperfade.workspace import read_json, write_json

LENGTH = 256  # tokens of a sequence


@torch.inference_mode()
def perplexity(model: Any, sequences: Tensor) -> float:
    """exp of the mean cross-entropy of every token but the first of its sequence."""
    total = 0.0
    for batch in sequences.split(16):
        logits = model(input_ids=batch).logits[:, :-1].flatten(0, 1).float()
        total += F.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / sequences[:, 1:].numel())


def compressed(
    fields: Mapping[str, Any], text: Mapping[str, Tensor], args: argparse.Namespace, moments: dict[str, Tensor]
) -> tuple[Any, dict[str, Any]]:
    """The model with its language FFNs replaced, fitted and trained; and its scores. moments: as of `fit_`, for all."""
    torch.manual_seed(0)
    model: Any = load(args.model, "bfloat16")
    if args.attention:
        model.set_attn_implementation(args.attention)
    teacher = teacher_of(model)
    replaced = Replace.model_validate(fields["replace"] | {"vision": None})
    calibration = [{"input_ids": part, "labels": part} for part in text["valid"][: args.calibration].split(16)]
    began = time.perf_counter()
    if replaced.budget is not None:
        replaced = allocate(model, replaced, calibration[:4], ridge=1e-4).replace
    chosen = plan(model, replaced)
    matrices = [name for ffn in find_ffns(model) if ffn.region == "language" for name in ffn.linears]
    dense_parameters = sum(model.get_submodule(name).weight.numel() for name in matrices)
    model.requires_grad_(False)
    swap_(model, chosen)
    recipe = Fit(**{"prefix": "dense", "sweeps": 6, "ridge": 1e-4, **fields.get("fit", {})})
    fit_(model, chosen, calibration, recipe, moments=moments)
    fit_seconds = time.perf_counter() - began
    set_alpha_(model, 1.0)
    before = perplexity(model, text["test"])
    train = Train(
        fade_steps=0,
        polish_steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        kd_weight=1,
        temperature=1,
        mixed_precision="bf16",
        checkpoint_every=10**6,
    )

    def batch_of(numbers: Sequence[int]) -> dict[str, Tensor]:
        chosen_rows = text["valid"][list(numbers)]
        return {"input_ids": chosen_rows, "labels": chosen_rows}

    kl: list[float] = []
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        count = len(text["valid"])
        distill_(
            *(model, teacher, count, batch_of, train),
            seed=0,
            folder=Path(folder),
            on_step=lambda report: kl.append(report.kl),
        )
    seconds = time.perf_counter() - began
    return model, {
        "before": before,
        "after": perplexity(model, text["test"]),
        "kl_before": kl[0],
        "kl_after": statistics.mean(kl[-10:]),
        "ffn_params_ratio": 1 - chosen.saved_parameters / dense_parameters,
        "fit_seconds": fit_seconds,  # with the second moments where this cell gathered them
        "train_seconds": seconds,
    }


def sequences(name: str, folder: Path, test: int) -> dict[str, Tensor]:
    """valid.txt and the first `test` sequences of test.txt in the tokens of the model `name`: (sequences, LENGTH)."""
    processor = load_processor(name)
    tokenizer = getattr(processor, "tokenizer", processor)
    text = {}
    for split in ("valid", "test"):
        ids = torch.tensor(tokenizer((folder / f"{split}.txt").read_text(encoding="utf-8"))["input_ids"])
        text[split] = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    return text | {"test": text["test"][:test]}


def main() -> None:
    """Run every cell that the results file lacks."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="runs/reference/untrained", help="a causal language model, or a LLaVA of one")
    add("--text", type=Path, required=True, help="folder with valid.txt and test.txt")
    add(
        "--results",
        type=Path,
        default=RESULTS.with_name("perplexity.json"),
        help="file that every finished cell is added to",
    )
    add("--fractions", type=float, nargs="+", default=FRACTIONS, help="shares of the FFN parameters that stay")
    add("--methods", nargs="+", help=f"only these: {', '.join(methods(0.5))}")
    add("--steps", type=int, default=60, help="optimizer steps of every cell")
    add("--batch-size", type=int, default=4, help=f"sequences of {LENGTH} tokens per step")
    add("--learning-rate", type=float, default=5e-4, help="peak learning rate")
    add("--calibration", type=int, default=256, help="sequences of the fit")
    add("--test", type=int, default=96, help="sequences of test.txt that are scored")
    add("--attention", default="eager", help="eager is faster on a CPU, sdpa on a GPU")
    args = parser.parse_args()
    names = ("steps", "batch_size", "learning_rate", "calibration", "test")
    settings = {name: getattr(args, name) for name in names}
    kept = read_json(args.results) if args.results.exists() else {}
    if kept.setdefault("settings", settings) != settings:
        parser.error(f"{args.results} holds cells of other settings, {kept['settings']}: choose another --results")
    text = sequences(args.model, args.text, args.test)
    kept["machine"] = machine()
    if "dense" not in kept:
        kept["dense"] = perplexity(load(args.model, "bfloat16"), text["test"])
    cells = kept.setdefault("cells", {})
    moments: dict[str, Tensor] = {}
    for fraction in args.fractions:
        for method, fields in methods(fraction).items():
            name = f"{method} at {fraction:g}"
            if name not in cells and (not args.methods or method in args.methods):
                cells[name] = {"method": method, "fraction": fraction} | compressed(fields, text, args, moments)[1]
                write_json(args.results, kept)
                own = cells[name]
                print(
                    f"{name}: {own['before']:.1f} → {own['after']:.1f} (dense {kept['dense']:.1f}), "
                    f"fit {own['fit_seconds']:.0f} s, training {own['train_seconds']:.0f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
