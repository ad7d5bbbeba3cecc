"""The examples run as they are printed, and do what they say."""

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import any_module
import encoder_decoder


def _sizes(line: str) -> tuple[int, int]:
    before, after = (int(number.replace(",", "")) for number in re.findall(r"[\d,]+", line)[:2])
    return before, after


def test_the_plain_encoder_becomes_smaller(capsys: pytest.CaptureFixture[str]) -> None:
    any_module.main()
    *layers, last = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in layers] == ["blocks.0.1", "blocks.0.3", "blocks.1.1", "blocks.1.3"]
    before, after = _sizes(last)
    assert after < 0.3 * before


def test_an_encoder_decoder_with_its_own_loader_forward_and_loss(capsys: pytest.CaptureFixture[str]) -> None:
    """With few steps: sizes follow from the recipe, and what is loaded is what was saved."""
    encoder_decoder.main(steps=10)
    *layers, last = capsys.readouterr().out.splitlines()
    names = {line.split(":")[0] for line in layers}
    sides = {"transformer.encoder.layers.0", "transformer.decoder.layers.0"}
    assert names == {f"{side}.{part}" for side in sides for part in ("linear1", "linear2")} | {"mix"}
    assert last.endswith("reloaded bit-equal")
    gone = (
        4 * 32 * 128 * 3 // 4 + 32 * 32 // 2
    )  # weights; what comes is P and Q, 32 numbers per FFN matrix and 8 of mix
    before, after = _sizes(last)
    assert before - after == gone - 4 * 32 - 8


def test_training_with_a_teacher_moves_light_layers_alone() -> None:
    torch.manual_seed(0)
    model = encoder_decoder.Sorter()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    encoder_decoder.compress_(model, 2)
    after = dict(model.named_parameters())
    kept = [name for name in before if "linear" not in name and "mix" not in name]
    assert isinstance(model.head, nn.Linear)
    assert "head.weight" in kept
    assert all(torch.equal(before[name], after[name]) for name in kept)
