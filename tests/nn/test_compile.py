"""A compiled FFN, by torch's own compiler, gives what the plain one gives."""

import shutil
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from kron_oracle import random_layer
from torch import Tensor, nn

from hyperfade.algebra import Algebra
from hyperfade.nn import JointReading


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


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("algebra", [Algebra.products(4), Algebra.named("paper"), Algebra.named("cyclic", n=4)])
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
