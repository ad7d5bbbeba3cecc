"""A model in parts: two processes with half of it each train as one with all of it does."""

from pathlib import Path

import pytest
import torch
from divided import EXAMPLES, recipe, some_with_images
from safetensors import safe_open
from safetensors.torch import load_file
from test_processes import launch, lines
from toy import swapped

from hyperfade.build import choose_trained_
from hyperfade.distill import distill_, latest_step
from hyperfade.distill.divide import divide_
from hyperfade.errors import TrainingError

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo"),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left: `whole`, `checkpointed`, and `killed`, the last after a resume."""
    folder = tmp_path_factory.mktemp("divided")
    first = launch(folder, "divided.py")
    assert first.returncode != 0
    assert "SIGKILL" in first.stderr, first.stderr[-3000:]
    assert latest_step(folder / "killed") == 4
    second = launch(folder, "divided.py")
    assert second.returncode == 0, second.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", ["whole", "checkpointed"])
def test_two_processes_with_parts_give_the_losses_of_one(name: str, runs: Path, tmp_path: Path) -> None:
    """Layers that fade in turn, examples without images, shares that weigh differently, embeddings and LoRA."""
    student, teacher, _ = swapped()
    choose_trained_(student, recipe())
    distill_(student, teacher, EXAMPLES, some_with_images, recipe(), seed=3, folder=tmp_path)
    one, two = lines(tmp_path), lines(runs / name)
    assert len(one) == len(two) == 8
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=1e-5)  # observed 6e-7
    weights = load_file(runs / name / "weights.safetensors")
    own = student.state_dict()
    assert weights.keys() == own.keys()
    for key, value in own.items():
        torch.testing.assert_close(weights[key], value, rtol=0, atol=1e-5)  # observed 1e-7


def test_a_run_killed_in_one_process_continues_to_the_same_weights(runs: Path) -> None:
    one, other = (load_file(runs / name / "weights.safetensors") for name in ("whole", "killed"))
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert lines(runs / "whole") == lines(runs / "killed")


def test_each_process_holds_and_writes_its_part_without_pickle(runs: Path) -> None:
    for rank in (0, 1):
        whole, held, left = map(int, (runs / f"held-{rank}.txt").read_text(encoding="utf-8").split())
        assert left == 0
        assert 0.4 * whole < held < 0.6 * whole  # observed 0.5
    (state,) = (runs / "whole").glob("step-*")
    files = sorted(state.iterdir())
    assert {file.suffix for file in files} == {".json", ".safetensors"}
    sizes = []
    for file in files[1:]:
        with safe_open(file, framework="pt") as opened:
            assert all("/" in key for key in opened.keys())  # noqa: SIM118 (not a dict)
        sizes.append(file.stat().st_size)
    assert len(sizes) == 2
    assert max(sizes) < 1.3 * min(sizes)  # observed 1.15


def test_an_older_pytorch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyperfade.distill.divide.FSDPModule", object)
    with pytest.raises(TrainingError, match=r"train\.shard needs PyTorch 2\.13"):
        divide_(torch.nn.Linear(2, 2))
