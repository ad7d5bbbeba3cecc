"""Compress any nn.Module: name its linears, fit them on your own batches, fold.

    python examples/any_module.py

A plain PyTorch encoder, no transformers model: `patterns` says which `nn.Linear` modules take part. `fit_` gathers
their inputs from the batches it is given; a training loop of your own would follow before the fold.
"""

import torch
from torch import nn

from hyperfade.distill import fit_
from hyperfade.hub import fold_
from hyperfade.measure import num_parameters
from hyperfade.recipe import Fit, Layer, Replace
from hyperfade.surgery import plan, set_alpha_, swap_


class Encoder(nn.Module):
    """Two residual FFN blocks over features (batch, tokens, 64)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def main() -> None:
    """Plan, swap, fit, fold; print what it did to size and output."""
    torch.manual_seed(0)
    model = Encoder().eval()
    inputs = torch.randn(32, 16, 64) @ torch.randn(64, 64) / 8
    before, dense = num_parameters(model), model(inputs)
    chosen = plan(model, Replace(language=None, vision=None, patterns=("blocks.*",), other=Layer(n=4)))
    swap_(model, chosen)
    for layer in fit_(model, chosen, [{"x": inputs}], Fit()):
        print(f"{layer.name}: {layer.label}, output error {layer.error:.3f} (low-rank {layer.low_rank_error:.3f})")
    set_alpha_(model, 1)
    fold_(model)
    error = (model(inputs) - dense).norm() / dense.norm()
    print(f"{before:,} → {num_parameters(model):,} parameters, output changed by {error:.1%}")


if __name__ == "__main__":
    main()
