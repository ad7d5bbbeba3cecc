"""The PHM layer: a large linear map made of n² blocks that share a few small weights.

    W = Σ_i A_i ⊗ S_i          A (t, n, n) the algebra, S (t, k/n, d/n) the weights        (arXiv 2102.08597)

W need not be built. Block a of the output and block b of the input meet through A only, so a layer is an ordinary
matrix product between two tiny mixes of blocks. There are three ways to order them:

    form        weights at work                 computation, per token
    mix-in      core: nn.Linear(t·d/n → k/n)    u[a,i] = Σ_b A[i,a,b] x[b]       y[a] = core(u[a])            d ≤ k
    mix-out     core: nn.Linear(d/n → t·k/n)    z[b] = core(x[b])                y[a] = Σ_ib A[i,a,b] z[b,i]  d > k
    products    T (R, k/n, d/n)                 y = Σ_r P_r ⊗ (T_r · Σ_b Q[r,b] x[b])

The first two run the n blocks of a token through one core, so they cost t/n of the dense multiply-adds at t/n² of its
bytes: decoding, which waits for bytes, gets faster, prefill does not. The products form runs R small products, R/n² of
both: with R = n everything is 1/n. That is why it is the default. Where mixes cost more than the arithmetic they spare,
many tokens are multiplied by W after all, built for the call; `execution.py` knows where.

The core is exactly an `nn.Linear`, because quantizers, adapters and exporters know that type.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperfade.algebra import Algebra, Fit, fit, kron_sum
from hyperfade.nn.execution import Execution, Form, execution, kernel_calls, processor
from hyperfade.nn.forms import (
    batched,
    combined,
    fixed_factors,
    fixed_rows,
    mix_in,
    mix_out,
    separate,
    sliced,
)
from hyperfade.nn.kept import Kept
from hyperfade.nn.kernel_use import has_kernel
from hyperfade.nn.low_bit import LowBitLinear, low_bit_modules
from hyperfade.nn.low_rank import LowRankLinear
from hyperfade.nn.stacked import by_core, products_of

_COMPUTE_BOUND_TOKENS = 64  # from here on fewer multiply-adds count more than fewer calls, on processors we know


class Joint(Protocol):
    """What a layer knows of a `JointReading` it is part of."""

    def pack_(self) -> None: ...

    def part_(self) -> None: ...

    def output(self, layer: "PHMLinear", x: Tensor) -> Tensor | None: ...


class PHMLinear(nn.Module):
    """y = Ŵ x + bias with Ŵ hypercomplex; a drop-in for `nn.Linear(in_features, out_features)`.

    algebra: fixed algebras keep A as a buffer, learned ones train A (terms form) or P and Q (products form).
    companion_rank: rank of an added low-rank map; 0 for none.
    Input (..., in_features), output (..., out_features), any floating dtype. Raises `AlgebraError` where n does not
    divide both widths.
    """

    replaced: tuple[int, int] | None = None  # (in, out) of the dense matrix, where this layer is narrower
    T: nn.Parameter  # None once the products are stacked in a core
    core: nn.Linear  # or what a quantizer or an adapter put in its place

    def __init__(
        self,
        in_features: int,
        out_features: int,
        algebra: Algebra,
        bias: bool = True,
        companion_rank: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        algebra.check_features(in_features, out_features)
        like = {"device": device, "dtype": dtype}
        n, size = algebra.n, algebra.size
        d_block, k_block = in_features // n, out_features // n
        self.in_features, self.out_features, self.algebra = in_features, out_features, algebra
        self.mixes_in = in_features <= out_features
        self.joint: Joint | None = None
        self.derived: dict[Form, Kept[list[Tensor]]] | None = None  # None: nothing is kept
        self.stacked, self.kept_mixing = False, Kept[Tensor]()
        self.fixed_mixing, self.fixed_factors = fixed_rows(algebra, self.mixes_in), fixed_factors(algebra)
        if algebra.form == "products":
            self.P = nn.Parameter(torch.empty(size, n, **like))
            self.Q = nn.Parameter(torch.empty(size, n, **like))
            self.T = nn.Parameter(torch.empty(size, k_block, d_block, **like))
        else:
            mixing = torch.empty(size, n, n, **like)
            if algebra.trainable:
                self.A = nn.Parameter(mixing)
            else:
                self.register_buffer("A", mixing)
            shape = (size * d_block, k_block) if self.mixes_in else (d_block, size * k_block)
            self.core = nn.Linear(*shape, bias=False, **like)
        self.bias = nn.Parameter(torch.empty(out_features, **like)) if bias else None
        self.companion = LowRankLinear(in_features, out_features, companion_rank, **like) if companion_rank else None
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        algebra: Algebra,
        second_moment: Tensor | None = None,
        companion_rank: int = 0,
        sweeps: int = 12,
    ) -> "PHMLinear":
        """The layer nearest to `linear`: in expected output for `second_moment` C (d, d), else in weight distance."""
        layer = cls(
            linear.in_features,
            linear.out_features,
            algebra,
            bias=linear.bias is not None,
            companion_rank=companion_rank,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        layer.load_fit_(fit(linear.weight, algebra, second_moment, sweeps=sweeps, companion_rank=companion_rank))
        if layer.bias is not None:
            layer.bias.data.copy_(linear.bias.data)
        return layer

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random components with the variance of a fresh `nn.Linear`, the algebra at its starting point, zero bias."""
        with torch.device("cpu"):  # also where a caller builds the layer on the meta device
            structure = self.algebra.structure()
            overlap = structure.square().sum(0).mean().item()  # var(W) = overlap · var(component), averaged over blocks
            p, q = self.algebra.starting_products()
        std = (3 * self.in_features * overlap) ** -0.5
        if self.algebra.form == "products":
            self.P.copy_(p)
            self.Q.copy_(q)
            self.T.normal_(std=std)
        else:
            self.A.copy_(structure)
            self.core.weight.normal_(std=std)
        if self.bias is not None:
            self.bias.zero_()

    @torch.no_grad()
    def load_fit_(self, fit: Fit) -> None:
        """Take over the factors of a fit of the same algebra and widths, in this layer's dtype."""
        if fit.left is not None and fit.right is not None:
            self.P.copy_(fit.left)
            self.Q.copy_(fit.right)
            self.T.copy_(fit.components)
        else:
            self.A.copy_(fit.mixing_matrices)
            t, k_block, d_block = fit.components.shape
            if self.mixes_in:
                self.core.weight.copy_(fit.components.permute(1, 0, 2).reshape(k_block, t * d_block))
            else:
                self.core.weight.copy_(fit.components.reshape(t * k_block, d_block))
        if self.companion is not None:
            assert fit.companion is not None
            self.companion.load_fit_(fit.companion)

    def stack_(self) -> None:
        """Hold the products T_r under one another in one `nn.Linear`, d/n → R·k/n, as quantizers and adapters want."""
        self.derived = None if self.derived is None else {}  # of weights that soon are others'
        if self.algebra.form != "products" or self.stacked:
            return
        weight = self.T.detach().flatten(0, 1)
        core = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        core.weight = nn.Parameter(weight, requires_grad=self.T.requires_grad)
        self.core = core.train(self.training)
        self.T, self.stacked = None, True  # type: ignore[assignment]
        if self.joint is not None:
            self.joint.part_()

    @property
    def components(self) -> Tensor:
        """T (R, k/n, d/n), or S (t, k/n, d/n) out of the core; gradients flow through it."""
        n, t = self.algebra.n, self.algebra.size
        k_block, d_block = self.out_features // n, self.in_features // n
        if self.algebra.form == "products":
            return products_of(self.core, t, self.P.dtype) if self.stacked else self.T
        if self.mixes_in:
            return self.core.weight.view(k_block, t, d_block).transpose(0, 1)
        return self.core.weight.view(t, k_block, d_block)

    @property
    def weight(self) -> Tensor:
        """Ŵ (out_features, in_features), materialised at every access: for inspection, merging and `.weight.dtype`."""
        weight = self._hypercomplex_weight()
        return weight if self.companion is None else weight + self.companion.weight

    def _hypercomplex_weight(self) -> Tensor:
        """Ŵ without the companion."""
        mixing = self.P[:, :, None] * self.Q[:, None, :] if self.algebra.form == "products" else self.A
        return kron_sum(mixing, self.components)

    def forward(self, x: Tensor) -> Tensor:
        y = self.joint.output(self, x) if self.joint is not None else None
        if y is None and self.stacked:
            blocks = x.reshape(-1, self.algebra.n, self.in_features // self.algebra.n)
            y = by_core(blocks, self.P, self.Q, self.core, self.kept_mixing)
        if y is None:
            tokens = x.reshape(-1, self.in_features)
            y = self.run(tokens, self._execution(tokens))
        y = y.view(*x.shape[:-1], self.out_features)
        if self.companion is not None:
            y = y + self.companion(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)  # under autocast y is half and the bias is not

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PHMLinear":
        super()._apply(fn, recurse)  # .to(device) and the like move every parameter on its own
        self.derived = None if self.derived is None else {}
        if self.joint is not None:
            self.joint.pack_()
        return self

    def _execution(self, tokens: Tensor) -> Execution:
        """The form to run, by cost."""
        by_products = self.algebra.form == "products"
        if not by_products and not self.plain_core:
            return Execution("core", "matmul")
        if torch.compiler.is_exporting():  # a graph for any number of tokens
            return Execution("products" if by_products else "core", "sums")
        if torch.compiler.is_compiling():  # mixes fuse with their neighbours, so what remains is arithmetic
            by_products |= self.fixed_factors is not None and len(tokens) >= _COMPUTE_BOUND_TOKENS
            return Execution("products", "fused") if by_products else Execution("core", "sums")
        device, trains = tokens.device.type, torch.is_grad_enabled()
        widths = self.in_features, self.out_features
        own_kernel = by_products and not (self.stacked or trains)
        if own_kernel and has_kernel(self.algebra, *widths, tokens, self.P, self.Q, self.T):
            return Execution("products", "kernel")
        how = execution(self.algebra, *widths, len(tokens), _product_dtype(tokens), processor(device), self._keeps)
        if by_products and trains and how.form == "products":
            return Execution("products", "blocks")  # prices are those of a forward pass; its gradients are cheaper
        return replace(how, chunk=None) if trains else how  # autograd cannot follow chunks

    def run(self, tokens: Tensor, how: Execution) -> Tensor:
        """tokens (M, in_features) → (M, out_features) in the form that `how` says; no companion, no bias.

        Chunks write into one output, which autograd cannot follow: they are for inference.
        """
        if how.chunk is not None and len(tokens) > how.chunk:
            y = tokens.new_empty(len(tokens), self.out_features)
            whole = replace(how, chunk=None)
            for part, rows in zip(y.split(how.chunk), tokens.split(how.chunk), strict=True):
                part.copy_(self.run(rows, whole))
            return y
        if how.form == "weight":
            (weight,) = self._derive("weight", lambda: [self._hypercomplex_weight()])
            return F.linear(tokens, weight)
        n, t = self.algebra.n, self.algebra.size
        x = tokens.view(tokens.shape[0], n, self.in_features // n)
        if self.algebra.form == "products":
            products = products_of(self.core, t, x.dtype) if self.stacked else self.T
            return batched(x, self.P, self.Q, products, how.mixing)
        if how.form == "products" and self.fixed_factors is not None:
            u = self.fixed_factors.u  # T_r = Σ_i U[r, i] S_i
            weights = self._derive("products", lambda: combined(self.components.unbind(0), u))
            return separate(x, self.fixed_factors, weights)
        core = partial(sliced, weight=self.core.weight) if how.form == "slices" else self.core
        fixed = self.fixed_mixing if how.mixing == "sums" else None
        if self.mixes_in:
            return mix_in(x, fixed or self.A.transpose(0, 1).reshape(n * t, n), core)
        return mix_out(x, fixed or self.A.permute(1, 2, 0).reshape(n, n * t), core)

    def _derive(self, form: Form, make: Callable[[], list[Tensor]]) -> list[Tensor]:
        """What `form` multiplies by: made anew at every call, or kept where `keep_derived_` asked for it."""
        if self.derived is None or not self._keeps:
            return make()
        return self.derived.setdefault(form, Kept()).of(self._stored, make)

    @property
    def _keeps(self) -> bool:
        """Whether derived weights are kept, now: not where they have gradients, or another dtype than the layer, nor
        where nothing would tell that the layer's own have changed."""
        if self.derived is None or torch.is_grad_enabled() or torch.compiler.is_compiling() or not self.plain_core:
            return False
        return not any(tensor.is_inference() or _autocast_dtype(tensor) is not None for tensor in self._stored)

    @property
    def _stored(self) -> tuple[Tensor, ...]:
        """What the layer's weight is made of."""
        if self.algebra.form == "products":
            return self.P, self.Q, self.core.weight if self.stacked else self.T
        return self.A, self.core.weight

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "derived": None if self.derived is None else {}}  # a copy makes its own

    @property
    def plain_core(self) -> bool:
        """Whether weights can be read directly: not where a quantizer or an adapter took the core's place."""
        if self.algebra.form == "products" and not self.stacked:
            return True
        return type(self.core) is nn.Linear and self.core.weight.is_floating_point()

    def extra_repr(self) -> str:
        a = self.algebra
        size = f"{'terms' if a.form == 'terms' else 'products'}={a.size}"
        return f"{self.in_features}, {self.out_features}, {a.name}, n={a.n}, {size}, bias={self.bias is not None}"


def _product_dtype(tokens: Tensor) -> torch.dtype:
    """In which a matrix product of `tokens` runs."""
    return _autocast_dtype(tokens) or tokens.dtype


def _autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """In which autocast runs matrix products on the device of `tensor`, None where it is off."""
    device = tensor.device.type
    cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if cast else None


def keep_derived_(model: nn.Module, keep: bool = True) -> list[str]:
    """Trade memory for speed: layers keep what they derive of their weights, in place of making it at every call;
    returns the names of the layers that may. keep: False frees what is kept, and ends it.

    That is Ŵ, in_features × out_features, where multiplying by it is cheapest, as with many tokens on most processors
    (of layers with R of n² products n²/R times their own bytes, beside these); and sums that products of fixed algebras
    need, (R − t)/t of the layers' own bytes or more. Made at the first call that wants it; not under autocast, with
    gradients, compiled, in few bits, around adapters, or by experts. Weights that change are noticed, but for writes
    through `.data`, such as an adapter's that is merged: call it again after these.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PHMLinear)}
    for layer in layers.values():
        layer.derived = {} if keep else None
    return [name for name, layer in layers.items() if keep and layer.plain_core]


def pack_(model: nn.Module) -> None:
    """Lay few bits out as this processor's kernels read them best, product by product where matrices are large."""
    for module in model.modules():
        if isinstance(module, PHMLinear) and module.stacked and isinstance(module.core, LowBitLinear):
            module.core.unpack_()
            module.core.parts = kernel_calls(module.algebra, module.in_features, module.out_features)
    for layer in low_bit_modules(model).values():
        layer.pack_()
