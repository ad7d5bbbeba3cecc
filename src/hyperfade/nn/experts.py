"""Matrices of experts: E maps of one shape in one module, each for the tokens that a router sent it.

    y[s] = W_e(s) x[s]        rows s sorted by expert, so that every expert's rows are neighbours (`Groups`)

Parameters are those of the layer for one matrix with the expert's number in front, T (E, R, k/n, d/n), say, and a
forward is the one layer's with every product grouped: grouped products read each expert's weights once, for its rows
only, and nobody else's. No W is built.

    layer        products, each over all experts at once
    linear       y = W x
    low-rank     y = expand(reduce(x))
    terms        rows of all n blocks through the core: one product of n·S rows
    products     R products of S rows

Mixing is per row: a row's A, or P and Q, are gathered by its expert, n² or R·n numbers beside the d that it has.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperfade.algebra import Algebra
from hyperfade.nn.low_rank import LowRankLinear
from hyperfade.nn.phm import PHMLinear

_ALIGNED_BYTES = 16  # what torch's grouped product asks of rows
_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Groups:
    """Which rows are whose. expert (S,): every row's expert, rising; ends (E,) int32: where each expert's rows end;
    token (S,): which of `num_tokens` tokens a row is of."""

    expert: Tensor
    ends: Tensor
    token: Tensor
    num_tokens: int

    @classmethod
    def of(cls, expert: Tensor, token: Tensor, num_experts: int, num_tokens: int) -> "Groups":
        """The groups of rows that are sorted by their `expert` (S,)."""
        ends = torch.searchsorted(expert, torch.arange(num_experts, device=expert.device), right=True)
        return cls(expert, ends.int(), token, num_tokens)


def grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x (S, d) in groups that end at `ends` (E,), weight (E, k, d): every row times its group's matrix, (S, k)."""
    if torch.is_autocast_enabled(x.device.type):  # which does not know grouped products
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    aligned = all(size * x.itemsize % _ALIGNED_BYTES == 0 for size in (*weight.shape[1:], *x.stride()[:-1]))
    if aligned and x.dtype in _GROUPED_DTYPES and x.stride(-1) == 1:
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    sizes = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    return torch.cat([F.linear(rows, own) for rows, own in zip(x.split(sizes), weight.unbind(), strict=True)])


class _OfExperts(nn.Module):
    """What matrices of experts have in common: `num_experts` maps in_features → out_features, with a bias (E, k) or
    none."""

    replaced: tuple[int, int] | None = None  # experts keep all their hidden units
    bias: nn.Parameter | None

    def __init__(self, num_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.num_experts, self.in_features, self.out_features = num_experts, in_features, out_features

    def _biased(self, y: Tensor, groups: Groups) -> Tensor:
        return y if self.bias is None else y + self.bias[groups.expert].to(y.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_experts} × ({self.in_features}, {self.out_features}), bias={self.bias is not None}"


class ExpertsLinear(_OfExperts):
    """Dense matrices of experts: weight (E, out, in), bias (E, out) or None."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        super().__init__(weight.shape[0], weight.shape[2], weight.shape[1])
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor, groups: Groups) -> Tensor:
        return self._biased(grouped(x, self.weight, groups.ends), groups)

    def expert(self, number: int) -> nn.Linear:
        """One expert's matrix, sharing its storage."""
        one = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        return _views(one, {"weight": self.weight, "bias": self.bias}, number)


class ExpertsLowRank(_OfExperts):
    """Low-rank matrices of experts: y = expand (E, k, q) · reduce (E, q, d) · x + bias."""

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_experts, in_features, out_features)
        like = {"device": device, "dtype": dtype}
        self.rank = rank
        self.reduce = nn.Parameter(torch.empty(num_experts, rank, in_features, **like))
        self.expand = nn.Parameter(torch.empty(num_experts, out_features, rank, **like))
        self.bias = nn.Parameter(torch.zeros(num_experts, out_features, **like)) if bias else None
        _fresh_(self)

    @property
    def weight(self) -> Tensor:
        """Ŵ (E, out, in), materialised at every access."""
        return self.expand @ self.reduce

    def forward(self, x: Tensor, groups: Groups) -> Tensor:
        return self._biased(grouped(grouped(x, self.reduce, groups.ends), self.expand, groups.ends), groups)

    def expert(self, number: int) -> LowRankLinear:
        """One expert's layer, sharing its storage."""
        one = LowRankLinear(self.in_features, self.out_features, self.rank, self.bias is not None, device="meta")
        parts = {"reduce.weight": self.reduce, "expand.weight": self.expand, "expand.bias": self.bias}
        return _views(one, parts, number)


class ExpertsPHM(_OfExperts):
    """Hypercomplex matrices of experts: per expert what `PHMLinear` is for one, in the same two forms.

    P and Q (E, R, n), T (E, R, k/n, d/n); or A (E, t, n, n), of a fixed algebra (t, n, n), and core (E, k/n, t·d/n) or
    (E, t·k/n, d/n). Input (S, in_features) with its groups, output (S, out_features). Raises `AlgebraError` where n
    does not divide both widths.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        algebra: Algebra,
        bias: bool = False,
        companion_rank: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_experts, in_features, out_features)
        self.algebra, self.mixes_in = algebra, in_features <= out_features
        one = self._one(bias, 0)
        like = {"device": device, "dtype": dtype}

        def stacked(part: Tensor) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *part.shape, **like))

        if algebra.form == "products":
            self.P, self.Q, self.T = stacked(one.P), stacked(one.Q), stacked(one.T)
        else:
            self.core = stacked(one.core.weight)
            if algebra.trainable:
                self.A = stacked(one.A)
            else:
                self.register_buffer("A", torch.empty(one.A.shape, **like))
        self.bias = nn.Parameter(torch.zeros(num_experts, out_features, **like)) if bias else None
        self.companion = (
            ExpertsLowRank(num_experts, in_features, out_features, companion_rank, **like) if companion_rank else None
        )
        _fresh_(self)

    @property
    def weight(self) -> Tensor:
        """Ŵ (E, out, in), materialised at every access: for inspection and `.weight.dtype`."""
        return torch.stack([self.expert(number).weight for number in range(self.num_experts)])

    def forward(self, x: Tensor, groups: Groups) -> Tensor:
        blocks = x.view(x.shape[0], self.algebra.n, self.in_features // self.algebra.n)
        y = self._by_products(blocks, groups) if self.algebra.form == "products" else self._by_core(blocks, groups)
        if self.companion is not None:
            y = y + self.companion(x, groups)
        return self._biased(y, groups)

    def _by_products(self, x: Tensor, groups: Groups) -> Tensor:
        """x (S, n, d/n): y (S, k)."""
        u = torch.bmm(self.Q[groups.expert], x).unbind(1)
        z = [grouped(part, t, groups.ends) for part, t in zip(u, self.T.unbind(1), strict=True)]
        return torch.bmm(self.P[groups.expert].transpose(1, 2), torch.stack(z, 1)).flatten(1)

    def _by_core(self, x: Tensor, groups: Groups) -> Tensor:
        """x (S, n, d/n): y (S, k)."""
        (rows, n, width), t = x.shape, self.algebra.size
        a = self.A[groups.expert] if self.algebra.trainable else self.A.expand(rows, *self.A.shape)
        ends = n * groups.ends  # a row's blocks are neighbours
        if self.mixes_in:
            u = torch.bmm(a.transpose(1, 2).reshape(rows, n * t, n), x)
            return grouped(u.view(rows * n, t * width), self.core, ends).view(rows, self.out_features)
        z = grouped(x.reshape(rows * n, width), self.core, ends).view(rows, n * t, self.out_features // n)
        return torch.bmm(a.permute(0, 2, 3, 1).reshape(rows, n, n * t), z).flatten(1)

    def expert(self, number: int) -> PHMLinear:
        """One expert's layer, sharing its storage."""
        companion = self.companion
        one = self._one(self.bias is not None, companion.rank if companion else 0)
        parts: dict[str, Tensor | None] = {"bias": self.bias}
        if self.algebra.form == "products":
            parts |= {"P": self.P, "Q": self.Q, "T": self.T}
        else:
            parts |= {"core.weight": self.core} | ({"A": self.A} if self.algebra.trainable else {})
        if companion is not None:
            parts |= {"companion.reduce.weight": companion.reduce, "companion.expand.weight": companion.expand}
        if not self.algebra.trainable:
            one.A = self.A
        return _views(one, parts, number)

    def _one(self, bias: bool, companion_rank: int) -> PHMLinear:
        return PHMLinear(self.in_features, self.out_features, self.algebra, bias, companion_rank, device="meta")

    def extra_repr(self) -> str:
        size = f"{'t' if self.algebra.form == 'terms' else 'R'}={self.algebra.size}"
        return f"{super().extra_repr()}, {self.algebra.name}, n={self.algebra.n}, {size}"


def _views(one: Any, parts: dict[str, Tensor | None], number: int) -> Any:
    """`one`, a layer on the meta device, with expert `number`'s slices of `parts` as its parameters."""
    for name, part in parts.items():
        if part is not None:
            holder, _, key = name.rpartition(".")
            setattr(one.get_submodule(holder), key, nn.Parameter(part.detach()[number], requires_grad=False))
    return one


def _fresh_(layer: "ExpertsLowRank | ExpertsPHM") -> None:
    """Random parameters, expert by expert as those of the layer for one matrix."""
    first = next(layer.parameters())
    if first.is_meta:
        return
    for number in range(layer.num_experts):
        one = layer.expert(number)
        if isinstance(one, PHMLinear):
            one.reset_parameters()
        else:
            one.reduce.reset_parameters()
            one.expand.reset_parameters()
