"""The low-rank layer: two plain linears in a row. The rival of the PHM layer, and its companion."""

import torch
from torch import Tensor, nn

from hyperfade.algebra import LowRankFit


class LowRankLinear(nn.Module):
    """y = expand(reduce(x)) + bias with reduce: d → q and expand: q → k, both `nn.Linear`."""

    replaced: tuple[int, int] | None = None  # (in, out) of the dense matrix, where this layer is narrower

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.reduce = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.expand = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @torch.no_grad()
    def load_fit_(self, fit: LowRankFit) -> None:
        """Take over the factors of a fit of the same widths and rank, in this layer's dtype."""
        self.reduce.weight.copy_(fit.reduce)
        self.expand.weight.copy_(fit.expand)

    @property
    def bias(self) -> Tensor | None:
        """The bias (k,), or None."""
        return self.expand.bias

    @property
    def weight(self) -> Tensor:
        """Ŵ (out_features, in_features), materialised at every access."""
        return self.expand.weight @ self.reduce.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(self.reduce(x))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}"
