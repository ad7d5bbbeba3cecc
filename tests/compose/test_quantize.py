"""Few bits on top of every kind of layer: the libraries' numbers, nothing else changed, nothing skipped in silence."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hyperfade.algebra import Algebra
from hyperfade.compose.quantize import quantize_
from hyperfade.errors import MissingLibraryError, NothingMatchedError, PlanError
from hyperfade.measure import num_parameters
from hyperfade.nn import LowRankLinear, NarrowLinear, PHMLinear, compile_, low_bit_modules

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from rounding import nearest

LAYERS = {
    "products": lambda: PHMLinear(256, 128, Algebra.products(4, 4)),
    "companion": lambda: PHMLinear(256, 512, Algebra.products(2, 3), companion_rank=32),
    "mix in": lambda: PHMLinear(128, 256, Algebra.learned(2, 2)),
    "mix out": lambda: PHMLinear(256, 128, Algebra.named("quaternion")),
    "low-rank": lambda: LowRankLinear(128, 256, 64, bias=True),
    "narrow": lambda: NarrowLinear(128, 96, bias=True),
}
# observed: int8 .004 to .008, int4 .07 to .12, fp8 .025 to .04, nf4 .07 to .12 (two matrices in a row add up)
MOST_ERROR = {"int8": 0.012, "int4": 0.16, "fp8": 0.06, "nf4": 0.16}


@pytest.fixture(params=["int8", "int4", "fp8", "nf4"])
def to(request: pytest.FixtureRequest) -> Any:
    pytest.importorskip("bitsandbytes" if request.param == "nf4" else "torchao")
    return request.param


class Holder(nn.Module):
    """A light layer in a model, beside an attention's linear."""

    up_proj: Any

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.up_proj = layer
        self.q_proj = nn.Linear(64, 64)


def _relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("kind", ["products", "mix in", "mix out"])
def test_layers_in_few_bits_are_not_compiled(kind: str, to: Any) -> None:
    model = Holder(LAYERS[kind]())
    quantize_(model, to)
    assert compile_(model) == []


@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_every_layer_computes_nearly_the_same(kind: str, to: Any) -> None:
    torch.manual_seed(0)
    layer: Any = LAYERS[kind]()
    if layer.bias is not None:
        layer.bias.normal_()
    model = Holder(layer)
    x = torch.randn(5, layer.in_features)
    wanted, weight, count = layer(x), layer.weight.clone(), num_parameters(model)
    report = quantize_(model, to)
    assert not report.left
    assert report.bytes_after < 0.35 * report.bytes_before
    assert num_parameters(model) == count
    assert 1e-4 < _relative(layer(x), wanted) < MOST_ERROR[to]
    assert _relative(layer.weight, weight) < MOST_ERROR[to]
    bias = 0 if layer.bias is None else layer.bias
    assert torch.allclose(layer(x), x @ layer.weight.T + bias, atol=1e-4)
    assert type(model.q_proj) is nn.Linear


@pytest.mark.parametrize(("to", "bits", "group"), [("int8", 8, 128), ("int8", 8, 32), ("int4", 4, 32)])
def test_the_numbers_are_the_nearest(to: Any, bits: int, group: int) -> None:
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    model = Holder(NarrowLinear(128, 96))
    weight = model.up_proj.weight.detach().clone()
    quantize_(model, to, 0 if group == 128 else group)
    wanted = nearest(weight.double(), bits, group, symmetric=to == "int8")
    differs = (model.up_proj.weight.double() - wanted).abs().gt(1e-6)
    # a group's extreme lies between two numbers, and float32 may take the other one: observed .005 for int8 by 32
    assert differs.double().mean() < 1 / group


def test_int4_scales_are_rounded_before_the_numbers() -> None:
    """Stored in bfloat16, the scales are 0.4 % off; numbers that know it lose nothing by it."""
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    model = Holder(NarrowLinear(128, 96))
    exact = model.up_proj.weight.detach().clone()
    quantize_(model, "int4", scale_dtype=torch.bfloat16)
    low = low_bit_modules(model)["up_proj.core"]
    assert torch.equal(low.scale, low.scale.bfloat16().float())
    loss = _relative(low.rebuilt(torch.float32), exact) / _relative(nearest(exact, 4, 64), exact)
    assert loss < 1.02  # observed 1.000


def test_a_shorter_last_group_is_rounded_by_itself() -> None:
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    model = Holder(NarrowLinear(75, 48))
    exact = model.up_proj.weight.detach().clone()
    assert quantize_(model, "int4", 32).low_bits["up_proj.core"].group_size == 32
    wanted = torch.cat([nearest(part, 4) for part in exact.double().split(32, 1)], 1)
    assert (model.up_proj.weight.double() - wanted).abs().gt(1e-6).double().mean() < 0.01  # observed 0


def test_what_a_group_does_not_divide_is_said() -> None:
    pytest.importorskip("torchao")
    model = nn.ModuleDict({"a": NarrowLinear(96, 64), "b": NarrowLinear(24, 64), "c": NarrowLinear(128, 64)})
    report = quantize_(model, "int4")
    assert report.left == [("b.core", "narrower than 32")]
    assert report.smaller == {32: ["a.core"]}
    assert list(low_bit_modules(model)) == ["a.core", "c.core"]
    assert report.lines()[1:] == [
        "by groups of 32: a.core",
        "left as they are, narrower than 32: b.core",
    ]


def test_rest_takes_attention_but_not_the_head() -> None:
    pytest.importorskip("torchao")
    from tiny_models import FAMILIES

    def names(rest: bool) -> set[str]:
        model = FAMILIES["llama"].build()
        quantize_(model, "int8", rest=rest)
        assert type(model.lm_head) is nn.Linear
        return set(low_bit_modules(model))

    own, more = names(False), names(True)
    assert own == {f"model.layers.{i}.mlp.{part}_proj" for i in range(3) for part in ("gate", "up", "down")}
    assert more - own == {f"model.layers.{i}.self_attn.{part}_proj" for i in range(3) for part in "qkvo"}


def test_nothing_changes_where_something_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Holder(PHMLinear(128, 64, Algebra.products(2, 2)))
    before = str(model)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingLibraryError, match="torchao, which is not installed"):
        quantize_(model, "int4")
    with pytest.raises(MissingLibraryError, match=r"nf4 needs bitsandbytes.*int8, int4 and fp8"):
        quantize_(model, "nf4")
    wrong: list[tuple[Any, int | None]] = [("int3", None), ("int4", 16), ("fp8", 64), ("nf4", 100)]
    for to, group in wrong:
        with pytest.raises(PlanError):
            quantize_(model, to, group)
    monkeypatch.undo()
    pytest.importorskip("torchao")
    with pytest.raises(NothingMatchedError):
        quantize_(nn.Linear(64, 64), "int4")
    assert str(model) == before
    quantize_(model, "int4")
    with pytest.raises(PlanError, match="quantized already"):
        quantize_(model, "int8")
