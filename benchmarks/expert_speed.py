"""How fast experts run, dense and as light layers, and what leaning on the average does to their fit: two small tables.

    python benchmarks/expert_speed.py    # writes results/expert_speed.json

Speed: one matrix of 64 experts, 2048 → 1536, eight experts per token, weights beyond the cache, ways alternating.
Prior: experts of one matrix whose inputs differ, fitted on few tokens, judged on the true covariance.
"""

import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperfade.algebra import Algebra, SecondMoment, fit, output_error, ridge_, shrunk
from hyperfade.measure import machine, time_alternately
from hyperfade.nn import ExpertsLinear, ExpertsPHM, Groups

RESULTS = Path(__file__).parent / "results" / "expert_speed.json"
EXPERTS, PER_TOKEN, WIDTHS = 64, 8, (2048, 1536)
ALGEBRAS = {"products n=4": Algebra.products(4), "learned n=2 t=2": Algebra.learned(2, 2)}
PRIORS = (0.01, 0.1, 0.3, 1.0, 3.0, 100.0)
SHARES = (0.1, 0.5, 2.0, 8.0)  # tokens that an expert met, per feature


@torch.inference_mode()
def speed(tokens: int) -> dict[str, Any]:
    """Medians and quartiles of how many times faster than dense, for so many tokens in a call."""
    dense = ExpertsLinear(torch.nn.Parameter(torch.randn(EXPERTS, *reversed(WIDTHS), dtype=torch.bfloat16) / 64))
    layers: dict[str, Any] = {"dense": dense}
    layers |= {name: ExpertsPHM(EXPERTS, *WIDTHS, a, dtype=torch.bfloat16) for name, a in ALGEBRAS.items()}
    expert, order = torch.stack([torch.randperm(EXPERTS)[:PER_TOKEN] for _ in range(tokens)]).flatten().sort()
    groups, x = Groups.of(expert, order // PER_TOKEN, EXPERTS, tokens), torch.randn(len(order), WIDTHS[0]).bfloat16()
    seconds = time_alternately({name: lambda la=la: la(x, groups) for name, la in layers.items()}, rounds=(5, 15))
    ratios = {
        name: statistics.quantiles([d / s for d, s in zip(seconds["dense"], own, strict=True)], n=4)
        for name, own in seconds.items()
    }
    return {"tokens": tokens, "faster_than_dense": ratios, "dense_seconds": statistics.median(seconds["dense"])}


def prior(share: float, d: int = 64, k: int = 64, experts: int = 8) -> dict[str, Any]:
    """The expected error of experts that met `share` · d tokens each, by prior. The root of their inputs' covariance is
    common to three quarters, and its columns fall to a hundredth."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    common = normal(d, d) * torch.logspace(0, -2, d, dtype=torch.float64)
    roots = [
        0.75 * common + 0.25 * normal(d, d) * torch.logspace(0, -2, d, dtype=torch.float64) for _ in range(experts)
    ]
    weights, seen = [normal(k, d) for _ in range(experts)], [normal(max(1, round(share * d)), d) @ r.T for r in roots]
    errors = {}
    for weight in PRIORS:
        moments = []
        for x in seen:
            moments.append(SecondMoment(d))
            moments[-1].add_(x)
        fits = [
            fit(w, Algebra.products(4, 8), ridge_(c, 1e-6), ridge=0)
            for w, c in zip(weights, shrunk(moments, weight * d), strict=True)
        ]
        own = [output_error(w, f.dense(), r @ r.T) for w, f, r in zip(weights, fits, roots, strict=True)]
        errors[str(weight)] = statistics.fmean(own)
    return {"tokens_per_feature": share, "errors": errors}


def main() -> None:
    """Measure and write."""
    torch.manual_seed(0)
    results = {"machine": machine(), "priors": [prior(share) for share in SHARES]}
    results["speed"] = [speed(tokens) for tokens in (1, 16, 256)]
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
