"""What each of two processes does in `test_processes.py`, which starts them: two_processes.py FOLDER"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from toy import NARROW, QUARTER, batch_of, calibration, swapped, train

import hyperfade.distill.step as step_module
from hyperfade.distill import StepReport, distill_, fit_
from hyperfade.distill.activations import second_moments, sensitivities
from hyperfade.processes import is_first, join, leave, share_of
from hyperfade.recipe import Fit, Train
from hyperfade.surgery import blends

FITS = {  # what is replaced, and how
    "corrected": (NARROW, Fit(prefix="corrected")),
    "blocks": (QUARTER, Fit(prefix="corrected", sweeps=1, block_epochs=4, block_learning_rate=3e-3)),
}
RECIPE: dict[str, Any] = {
    "batch_size": 5,
    "accumulation": 2,
    "checkpoint_every": 2,
    "weight_decay": 0.01,
    "hidden_weight": 0.5,
}


def recipe(**changes: Any) -> Train:
    return train(**{**RECIPE, **changes})


def distil(folder: Path, on_step: Any = lambda report: None) -> None:
    """A toy run in `folder`; the weights go beside its state."""
    student, teacher, _ = swapped()
    if not is_first():  # the first one's weights count
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(parameter.requires_grad)
    distill_(student, teacher, 20, batch_of, recipe(), seed=3, folder=folder, on_step=on_step)
    if is_first():
        save_file({k: v.contiguous() for k, v in student.state_dict().items()}, folder / "weights.safetensors")


def calibrate(folder: Path) -> None:
    """Second moments and sensitivities over a share of the batches."""
    student, _, _ = swapped()
    layers = blends(student)
    batches = list(share_of(calibration(3)))
    moments = second_moments(student, layers, batches, 0)
    found = sensitivities(student, {name: blend.dense for name, blend in layers.items()}, batches)
    values = {name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()}
    fitted = {}
    for name, (choice, fit) in FITS.items():
        fitted[name], _, plan = swapped(choice)
        fit_(fitted[name], plan, list(share_of(calibration(5))), fit)
    if is_first():
        save_file({**{f"moment/{n}": m for n, m in moments.items()}, **values}, folder / "calibration.safetensors")
        for name, model in fitted.items():
            save_file(fitted_weights(model), folder / f"{name}.safetensors")


def fitted_weights(student: Any) -> dict[str, torch.Tensor]:
    """What fitted layers hold, by matrix."""
    return {name: blend.light.weight.detach().contiguous() for name, blend in blends(student).items()}


def exhaust_the_second() -> Any:
    """Let the second process alone run out of memory, once, in the middle of a run; returns what it was before."""
    real, computed = step_module.losses, iter(range(1000))

    def losses(*arguments: Any) -> Any:
        if next(computed) == 5 and not is_first():
            raise torch.OutOfMemoryError("artificial")
        return real(*arguments)

    step_module.losses = losses
    return real


def main(folder: Path) -> None:
    """All runs; the last is killed in one process when it is not there yet, and continued when it is."""

    def killed(report: StepReport) -> None:
        if report.step == 5 and join().process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    if (folder / "killed").exists():
        distil(folder / "killed")
    else:
        calibrate(folder)
        distil(folder / "whole")
        real = exhaust_the_second()
        distil(folder / "exhausted")
        step_module.losses = real
        distil(folder / "killed", killed)
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
