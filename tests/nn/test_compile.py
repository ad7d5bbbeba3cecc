"""A compiled FFN, by torch's own compiler, gives what the plain one gives."""

import shutil
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from kron_oracle import random_layer
from torch import Tensor, nn

from hyperfade.algebra import Algebra
from hyperfade.errors import MissingLibraryError
from hyperfade.nn import JointReading, LowRankLinear, PHMLinear, compile_


class _GatedFFN(nn.Module):
    def __init__(self, algebra: Algebra) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up = (random_layer(32, 64, algebra, bias=False) for _ in range(2))
        self.down = random_layer(64, 32, algebra, bias=False)
        if algebra.form == "products":
            JointReading(self.gate, self.up)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.gate(x)) * F.silu(self.up(x)) / 8)


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


@needs_compiler
@pytest.mark.parametrize(
    "algebra", [Algebra.products(4), Algebra.learned(4), Algebra.named("paper"), Algebra.named("cyclic", n=4)]
)
def test_inductor_gives_what_eager_gives(algebra: Algebra) -> None:
    ffn = _GatedFFN(algebra)
    compiled: Callable[[Tensor], Tensor] = torch.compile(ffn, fullgraph=True)
    with torch.inference_mode():
        for tokens in (1, 2, 100):  # alone, a few, and with arithmetic for Gauss' three products
            x = torch.randn(tokens, 32)
            expected = ffn(x)
            worst = (compiled(x) - expected).abs().max() / expected.abs().max()
            assert worst < 1e-5  # seen 7.1e-7
    torch._dynamo.reset()


class _Block(nn.Module):
    """A layer of a model: FFN and what is not FFN."""

    def __init__(self, ffn: nn.Module) -> None:
        super().__init__()
        self.norm, self.ffn = nn.LayerNorm(32), ffn

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(self.norm(x))


class _Inline(nn.Module):
    """A layer of a model that holds its FFN's matrices itself, as OPT's does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1 = nn.LayerNorm(32), PHMLinear(32, 64, Algebra.products(4))
        self.fc2 = LowRankLinear(64, 32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(self.norm(x)))


@needs_compiler
def test_ffns_are_compiled_in_place_and_answer_as_before() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(_Block(_GatedFFN(Algebra.products(4))), _Block(_GatedFFN(Algebra.products(4))), _Inline())
    inputs = [torch.randn(1, tokens, 32) for tokens in (1, 2, 5, 100)]
    with torch.inference_mode():
        expected = [model(x) for x in inputs]
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        names = compile_(model)
        assert names == ["0.ffn", "1.ffn", "2.fc1"]  # the last block holds a norm too
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        for x, y in zip(inputs, expected, strict=True):
            worst = (model(x) - y).abs().max() / y.abs().max()
            assert worst < 1e-5  # seen 3.2e-7
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 4  # of two kinds of module, each for one token and for more: layers alike share theirs
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    torch._dynamo.reset()


def test_a_model_without_hypercomplex_layers_is_left_as_it_is() -> None:
    assert compile_(nn.Sequential(nn.Linear(4, 4), LowRankLinear(4, 4, 1))) == []


def test_without_a_compiler_the_error_says_so_and_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    model = nn.Sequential(PHMLinear(8, 8, Algebra.products(2)))
    with pytest.raises(MissingLibraryError, match="no no-such-compiler"):
        compile_(model)
    x = torch.randn(2, 8)
    torch.testing.assert_close(model(x), x @ model[0].weight.T + model[0].bias)  # type: ignore[operator, union-attr]
