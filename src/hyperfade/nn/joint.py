"""Two PHM layers that read the same input, run as one: a gated FFN's gate and up.

An FFN calls its gate, then its up, on the same tokens. Apart they are two mixes in, two batched products and two mixes
out; together one of each, over 2R products, and the input is read once. With few tokens a call's fixed price is what
small layers wait for, and this halves the calls.

The two layers' factors lie side by side in memory, so the 2R products are a view of the parameters: no second copy.
The first layer computes both outputs and keeps the second's until the second asks with the very same input.
"""

import torch
from torch import Tensor

from hyperfade.nn.forms import mixed, mixed_each, products, products_in_a_kernel
from hyperfade.nn.kernel_use import has_kernel
from hyperfade.nn.phm import PHMLinear

_FACTORS = ("P", "Q", "T")
_MOST_TOKENS = 64  # with more, products and mixes outweigh calls and nothing is left to gain


class JointReading:
    """Joins `first` and `second`, products-form layers of one shape, called in this order on the same input.

    Where the order is another, or the two no longer lie side by side (one was replaced), they run apart.
    """

    def __init__(self, first: PHMLinear, second: PHMLinear) -> None:
        self.first, self.second = first, second
        self._kept: tuple[Tensor, Tensor] | None = None  # the input, and the second's output for it
        self._views: tuple[tuple[int, ...], tuple[Tensor, ...]] | None = None  # of where factors lie, and as what
        first.joint = second.joint = self
        self.pack_()

    @torch.no_grad()
    def pack_(self) -> None:
        """Put the two layers' factors side by side, where both are on one device in one dtype."""
        self._packed, self._views = True, None
        for name in _FACTORS:
            a, b = getattr(self.first, name), getattr(self.second, name)
            alike = (a.device, a.dtype) == (b.device, b.dtype)
            if alike and not a.is_meta and self._together(name) is None:
                both = torch.cat([a, b])
                a.data, b.data = both[: len(a)], both[len(a) :]

    def part_(self) -> None:
        """Let both run alone from now on."""
        self.first.joint = self.second.joint = None

    def output(self, layer: PHMLinear, x: Tensor) -> Tensor | None:
        """What `layer` makes of x (..., in_features), its bias and companion left out: (M, out_features); or None where
        it has to run alone."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.numel() > _MOST_TOKENS * layer.in_features:
            return None
        kept, self._kept = self._kept, None
        if layer is self.second:
            return kept[1] if kept is not None and kept[0] is x else None
        if kept is not None:  # the second does not read what the first does, so this only wastes work
            self.part_()
            return None
        if not self._packed:
            self.pack_()
        views = self._both()
        if views is None:
            return None
        tokens = x.reshape(-1, layer.in_features)
        blocks = tokens.view(-1, layer.algebra.n, layer.in_features // layer.algebra.n)
        if has_kernel(layer.algebra, layer.in_features, layer.out_features, tokens, *views):
            mine, other = products_in_a_kernel(blocks, *views, layers=2)
        else:
            mine, other = _outputs(blocks, *views)
        self._kept = (x, other)
        return mine

    def _both(self) -> tuple[Tensor, ...] | None:
        """P, Q and T of both layers, each as one view; looked up once for every place that they lie in."""
        layers = self.first._parameters, self.second._parameters
        places = tuple(own[name].data_ptr() for own in layers for name in _FACTORS)  # type: ignore[union-attr]
        if self._views is None or self._views[0] != places:
            views = tuple(view for name in _FACTORS if (view := self._together(name)) is not None)
            self._views = (places, views) if len(views) == len(_FACTORS) else None
        return None if self._views is None else self._views[1]

    def _together(self, name: str) -> Tensor | None:
        """A factor of both layers as one view, or None where they do not lie side by side."""
        a, b = getattr(self.first, name), getattr(self.second, name)
        if a.is_meta or a.data_ptr() + a.nbytes != b.data_ptr():
            return None
        if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
            return None  # neighbours by chance
        return torch.as_strided(a, (2 * len(a), *a.shape[1:]), a.stride())

    def __getstate__(self) -> dict[str, object]:
        # a copy has no use for an output, and its factors are copied one by one
        return {**self.__dict__, "_kept": None, "_views": None, "_packed": False}


def _outputs(x: Tensor, p: Tensor, q: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, n, d/n), P and Q (2R, n), T (2R, k/n, d/n): both layers' y (M, k)."""
    count = len(q) // 2
    z = products(mixed(x, q).transpose(0, 1), t).transpose(0, 1)
    if len(x) == 1:  # then z is a matrix for each layer, and both mixes out are one call
        first, second = mixed_each(z.view(2, count, -1), p.view(2, count, -1).transpose(1, 2)).flatten(1)
        return first[None], second[None]
    first, second = (mixed(part, own.T) for own, part in zip(p.chunk(2), z.chunk(2, 1), strict=True))
    return first.flatten(1), second.flatten(1)
