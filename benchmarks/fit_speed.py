"""Seconds of the calibrated fit of one FFN: python benchmarks/fit_speed.py [--algebras products-4 learned-4 ...]

The matrices have the shapes of Qwen2.5-VL-3B's language model by default: gate (up costs the same) and down. Weights
are random plus a low-rank and a hypercomplex part, so that sweeps have something to find. Inputs have a falling
spectrum, features of unequal scale, a few massive activations, and fewer tokens than the down projection has features,
so its second moment is singular but for the ridge. Floating-point operations are those of the matrix products,
factorisations and solves that really ran, all in float64: over a GPU's float64 rate they are the seconds it needs.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hyperfade.algebra import Algebra, SecondMoment, fit, kron_sum, low_rank, rank_for, ridge_
from hyperfade.measure import device, machine
from hyperfade.workspace import write_json

RIDGE = 1e-6  # the default of a recipe


def trained_like(k: int, d: int) -> Tensor:
    """W (k, d), float32: equal energies in noise, in 64 directions, and in a product form near, not at, the start."""
    p, q = (rows.float() + 0.2 * torch.randn(4, 4) for rows in Algebra.products(4).starting_products())
    structure = 2 * kron_sum(p[:, :, None] * q[:, None, :], torch.randn(4, k // 4, d // 4))
    return (torch.randn(k, d) + torch.randn(k, 64) @ torch.randn(64, d) / 8 + structure) / d**0.5


def inputs_like(tokens: int, d: int) -> Tensor:
    """x (tokens, d), float32: a falling spectrum, log-normal scales, and three features a thousandfold in 0.1% of x."""
    directions = min(d, 1024)
    x = torch.randn(tokens, directions) * torch.logspace(0, -2, directions) @ torch.randn(directions, d) / 8
    x = (x + 0.1 * torch.randn(tokens, d)) * torch.randn(d).exp()
    x[: tokens // 1000 + 1, : 3 * (d // 5) : d // 5] *= 1000
    return x


def second_moment(tokens: int, d: int) -> Tensor:
    """C (d, d) of such inputs, float64, with the ridge of a recipe; gathered 512 tokens at a time."""
    moment = SecondMoment(d, device())
    for x in inputs_like(tokens, d).split(512):
        moment.add_(x.to(device()))
    return ridge_(moment.mean(), RIDGE)


def algebra_of(text: str) -> Algebra:
    """products-4 or learned-4, or a named one: quaternion."""
    kind, _, n = text.partition("-")
    made = {"products": Algebra.products, "learned": Algebra.learned}
    return made[kind](int(n)) if kind in made else Algebra.named(text, n=int(n) if n else None)


def _cholesky_flop(shape: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    return shape[-1] ** 3 // 3


def _solve_flop(right_side: tuple[int, ...], factor: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    return 2 * factor[-1] ** 2 * right_side[-1]


def counter() -> FlopCounterMode:
    """Counts matrix products, Cholesky factorisations and their solves."""
    aten = torch.ops.aten
    own = {aten.linalg_cholesky_ex: _cholesky_flop, aten.cholesky_solve: _solve_flop}
    return FlopCounterMode(display=False, custom_mapping=own)


def measured(weight: Tensor, moment: Tensor, algebra: Algebra, sweeps: int, repeats: int) -> dict[str, Any]:
    """The fit of one matrix: the fastest of `repeats`, its errors after each sweep, and the arithmetic it took."""
    cells = []
    for _ in range(repeats):
        start = time.perf_counter()
        with counter() as count:
            result = fit(weight, algebra, moment, sweeps=sweeps, ridge=0)  # its errors are on the host: all is done
        cells.append(
            {
                "seconds": time.perf_counter() - start,
                "sweeps": len(result.errors) - 1,
                "error": result.error,
                "errors": result.errors,
                "gflop": count.get_total_flops() / 1e9,
            }
        )
    return min(cells, key=lambda cell: cell["seconds"])


def whole_ffn(gate: dict[str, Any], down: dict[str, Any]) -> dict[str, float]:
    """Gate, up (as gate) and down together."""
    return {key: 2 * gate[key] + down[key] for key in ("seconds", "gflop")}


def main() -> None:
    """Measure and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048, help="width of the residual stream")
    parser.add_argument("--ffn", type=int, default=11008, help="hidden units of an FFN")
    parser.add_argument("--tokens", type=int, default=4096, help="calibration tokens")
    parser.add_argument(
        "--algebras", nargs="+", default=["products-2", "products-4", "products-8", "learned-4"], help="what to fit"
    )
    parser.add_argument("--matrices", nargs="+", default=["gate", "down"], choices=["gate", "down"])
    parser.add_argument("--sweeps", type=int, default=12, help="the most sweeps of a fit")
    parser.add_argument("--repeats", type=int, default=1, help="fits of each kind, the fastest counts")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "fit_speed.json")
    args = parser.parse_args()
    shapes = {"gate": (args.ffn, args.hidden), "down": (args.hidden, args.ffn)}
    matrices: dict[str, dict[str, Any]] = {}
    for matrix in args.matrices:
        k, d = shapes[matrix]
        torch.manual_seed(0)
        weight, moment = trained_like(k, d).to(device()), second_moment(args.tokens, d)
        matrices[matrix] = {}
        for name in args.algebras:
            cell = measured(weight, moment, algebra_of(name), args.sweeps, args.repeats)
            matrices[matrix][name] = cell
            print(
                f"{matrix} {name}: {cell['seconds']:.1f} s, {cell['sweeps']} sweeps, error {cell['error']:.4f}, "
                f"{cell['gflop']:.0f} GFLOP, {cell['gflop'] / cell['seconds']:.0f} GFLOP/s",
                flush=True,
            )
        start = time.perf_counter()
        rival = low_rank(weight, rank_for(d, k, k * d / 4), moment, ridge=0)
        matrices[matrix]["low-rank"] = {"seconds": time.perf_counter() - start, "error": rival.error}
        print(
            f"{matrix} low-rank at a quarter: {time.perf_counter() - start:.1f} s, error {rival.error:.4f}", flush=True
        )
    shape = {key: getattr(args, key) for key in ("hidden", "ffn", "tokens")}
    result: dict[str, Any] = {"machine": machine(), "shape": shape, "most_sweeps": args.sweeps, "matrices": matrices}
    if len(matrices) == 2:
        result["ffn"] = {name: whole_ffn(matrices["gate"][name], matrices["down"][name]) for name in args.algebras}
    write_json(args.output, result)


if __name__ == "__main__":
    main()
