"""The narrow layer: a dense matrix of an FFN that keeps a part of its hidden units. What width pruning leaves."""

import torch
from torch import Tensor, nn


class NarrowLinear(nn.Module):
    """y = core(x), an `nn.Linear` between as many features as are left; `replaced` has the dense matrix's (in, out).

    The core is a module of its own so that no tensor of another shape goes by the dense matrix's name.
    """

    replaced: tuple[int, int] | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.core = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)

    @property
    def bias(self) -> Tensor | None:
        """The bias (out_features,), or None."""
        return self.core.bias

    @property
    def weight(self) -> Tensor:
        """The weight (out_features, in_features): Hugging Face code reads its dtype and device."""
        return self.core.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.core(x)
