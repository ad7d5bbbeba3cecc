"""Two processes that work on one run: the same step as one, clean ends, and a resume after a kill."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy import batch_of, calibration, swapped
from two_processes import FITS, fitted_weights, recipe

from hyperfade.distill import Halving, distill_, fit_, latest_step, read_faults
from hyperfade.distill.activations import second_moments, sensitivities
from hyperfade.processes import share_of, sum_
from hyperfade.surgery import blends

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo"),
    pytest.mark.timeout(1200),  # six interpreters have to start
]


def launch(folder: Path, program: str = "two_processes.py") -> subprocess.CompletedProcess[str]:
    """Start the two processes and wait until both have ended."""
    worker = Path(__file__).parent / program
    tests = str(Path(__file__).parents[1])
    paths = os.pathsep.join([tests, str(worker.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(worker)]
    return subprocess.run(
        [*command, str(folder)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [{**json.loads(line), "seconds": 0} for line in text.splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left: `whole`, `exhausted`, and `killed`, the last after a resume."""
    folder = tmp_path_factory.mktemp("two")
    first = launch(folder)
    assert first.returncode != 0  # rank 1 was killed, and took the other with it
    assert "SIGKILL" in first.stderr, first.stderr[-3000:]
    assert latest_step(folder / "killed") == 4
    assert not (folder / "killed" / "weights.safetensors").exists()
    second = launch(folder)
    assert second.returncode == 0, second.stderr[-3000:]
    return folder


def test_two_processes_give_the_losses_of_one(runs: Path, tmp_path: Path) -> None:
    """Batches of five, so that shares weigh differently. Float32."""
    student, teacher, _ = swapped()
    distill_(student, teacher, 20, batch_of, recipe(), seed=3, folder=tmp_path)
    one, two = lines(tmp_path), lines(runs / "whole")
    assert len(one) == len(two) == 8
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=1e-5)  # observed 5e-7
    weights = load_file(runs / "whole" / "weights.safetensors")
    for name, value in student.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-4)  # observed 8e-6


def test_a_run_killed_in_one_process_continues_to_the_same_weights(runs: Path) -> None:
    one, other = (load_file(runs / name / "weights.safetensors") for name in ("whole", "killed"))
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert lines(runs / "whole") == lines(runs / "killed")


def test_when_one_process_runs_out_of_memory_both_take_the_step_in_parts(runs: Path) -> None:
    (fault,) = read_faults(runs / "exhausted" / "metrics.jsonl")
    assert isinstance(fault, Halving)
    assert (fault.step, fault.parts) == (3, 2)
    exhausted = [line for line in lines(runs / "exhausted") if "loss" in line]
    for a, b in zip(lines(runs / "whole"), exhausted, strict=True):
        assert b == pytest.approx(a, rel=1e-5)  # observed 3e-7


def test_calibration_over_shares_is_calibration_over_all(runs: Path) -> None:
    student, _, _ = swapped()
    layers = blends(student)
    found = load_file(runs / "calibration.safetensors")
    for name, moment in second_moments(student, layers, calibration(3), 0).items():
        torch.testing.assert_close(found[f"moment/{name}"], moment, rtol=1e-12, atol=1e-12)  # observed 1e-15
    linears = {name: blend.dense for name, blend in layers.items()}
    for name, value in sensitivities(student, linears, calibration(3)).items():
        assert found[name].item() == pytest.approx(value, rel=1e-5)  # observed 2e-16


@pytest.mark.parametrize("name", FITS)
def test_a_fit_over_shares_is_the_one_over_all(runs: Path, name: str) -> None:
    choice, recipe = FITS[name]
    student, _, plan = swapped(choice)
    fits = fit_(student, plan, calibration(5), recipe)
    assert any(fit.correction for fit in fits)  # observed two of five: nothing lies before the first layers
    if recipe.block_epochs:
        assert min(fit.held_out for fit in fits if fit.held_out) < 0.99  # observed 0.974
    found = load_file(runs / f"{name}.safetensors")
    for matrix, weight in fitted_weights(student).items():
        torch.testing.assert_close(found[matrix], weight, rtol=1e-5, atol=1e-6)  # observed 0


def test_one_process_alone_has_everything_and_sums_nothing() -> None:
    assert list(share_of(range(7))) == list(range(7))
    tensor = torch.arange(3.0)
    sum_([tensor])
    assert tensor.tolist() == [0, 1, 2]
