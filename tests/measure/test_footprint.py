"""Sizes that can be counted by hand."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hyperfade.measure import disk_bytes, forward_flops, num_parameters, weight_bytes
from hyperfade.nn import LowBit, LowBitLinear


class Map(nn.Module):
    """A linear called with keyword arguments, as models are."""

    def __init__(self) -> None:
        super().__init__()
        self.linear: nn.Module = nn.Linear(7, 11)
        self.register_buffer("scale", torch.ones(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def test_a_linear_counts_two_operations_for_each_multiply_add() -> None:
    assert forward_flops(Map(), {"x": torch.randn(5, 7)}) == 2 * 5 * 7 * 11


def test_parameters_and_bytes_by_hand() -> None:
    model = Map()
    assert num_parameters(model) == 7 * 11 + 11
    assert weight_bytes(model) == 4 * 88 + 8 * 3
    assert weight_bytes(model.bfloat16()) == 2 * 88 + 2 * 3


def test_shared_parameters_count_once() -> None:
    one, two = nn.Linear(3, 3), nn.Linear(3, 3)
    two.weight = one.weight
    assert num_parameters(nn.ModuleList([one, two])) == 9 + 3 + 3
    assert weight_bytes(nn.ModuleList([one, two])) == 4 * 15


@pytest.mark.parametrize("shards", [1, 3])
def test_disk_bytes_are_those_of_the_weight_files_alone(shards: int, tmp_path: Path) -> None:
    for shard in range(shards):
        save_file({"w": torch.zeros(100 + shard)}, tmp_path / f"model-{shard}.safetensors")
    (tmp_path / "tokenizer.json").write_text("x" * 5000, encoding="utf-8")
    expected = sum(len((tmp_path / f"model-{shard}.safetensors").read_bytes()) for shard in range(shards))
    assert disk_bytes(tmp_path) == expected
    assert expected > 400 * shards


@pytest.mark.parametrize("held", [LowBit("int8"), LowBit("int4", 32)])
def test_few_bits_count_like_any_others(held: LowBit) -> None:
    model = Map().bfloat16()
    model.linear = LowBitLinear(64, 32, held, bias=True, dtype=torch.bfloat16)
    for buffer in model.linear.buffers():
        buffer.zero_()
    model.linear.scale.fill_(1)
    model.linear.pack_()
    assert num_parameters(model) == 64 * 32 + 32
    for tokens in (5, 200):  # in torch's kernel, and rebuilt
        assert forward_flops(model, {"x": torch.zeros(tokens, 64, dtype=torch.bfloat16)}) == 2 * tokens * 64 * 32
