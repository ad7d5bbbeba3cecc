"""The fade: a dense layer and its replacement side by side, mixed by α."""

from typing import Any

import torch
from torch import Tensor, nn

from hyperfade.nn.experts import ExpertsLinear, Groups
from hyperfade.nn.spec import Light


class BlendLinear(nn.Module):
    """y = (1 − α) · dense(x) + α · light(x).

    At α = 0 only the dense branch runs and at α = 1 only the light one, so both ends are bit-equal to the plain layers.
    With `measure_reconstruction` the forward pass leaves the mean squared difference of the two outputs, relative to
    the dense output's mean square, in `reconstruction` (a scalar with gradients to the light branch), at any α.
    Matrices of experts blend alike; beside x they are given its groups.
    """

    def __init__(self, dense: nn.Linear | ExpertsLinear, light: Light) -> None:
        super().__init__()
        self.dense = dense.requires_grad_(False)
        self.light = light
        self.alpha = 0.0
        self.measure_reconstruction = False
        self.reconstruction: Tensor | None = None

    @property
    def in_features(self) -> int:
        """Features read: some models look."""
        return self.dense.in_features

    @property
    def out_features(self) -> int:
        """Features written."""
        return self.dense.out_features

    @property
    def weight(self) -> Tensor:
        """The dense weight: Hugging Face code reads its dtype and device."""
        return self.dense.weight

    @property
    def bias(self) -> Tensor | None:
        """The dense bias, or None."""
        return self.dense.bias

    def forward(self, x: Tensor, *groups: Groups) -> Tensor:
        if not self.measure_reconstruction:
            if self.alpha == 0:
                return self.dense(x, *groups)
            if self.alpha == 1:
                return self.light(x, *groups)
        dense, light = self.dense(x, *groups), self.light(x, *groups)
        if self.measure_reconstruction:
            target = dense.detach()
            self.reconstruction = _energy(light - target) / _energy(target).clamp_min(1e-12)
        if self.alpha in (0, 1):
            return light if self.alpha else dense
        return torch.lerp(dense, light, self.alpha)

    def __getstate__(self) -> dict[str, Any]:
        # the last reconstruction carries a graph, which neither copy.deepcopy nor pickle can take along
        return {**self.__dict__, "reconstruction": None}

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}"


def _energy(x: Tensor) -> Tensor:
    """Σ x² as a float32 scalar, without a float32 copy of x."""
    return torch.linalg.vector_norm(x, dtype=torch.float32).square()
