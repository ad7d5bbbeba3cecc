"""Experts whose matrices are layers: what stands in the place of a transformers module of experts.

The matrices go by the names of the tensors they replace (`gate_up_proj` or `up_proj`, `down_proj`); everything else of
the module, its activation, gate and norms, stays as it was in `rest`. The routers outside are left alone, and both ways
to call experts in transformers are kept:

    routed     experts(x, top_k_index, top_k_weights)    tokens (M, d), the experts (M, K) of each, their weights (M, K)
    arranged   experts(x)                                (E·M, d): all tokens once per expert, times the router's score,
                                                         which is 0 where the token goes elsewhere (Llama 4)
"""

from typing import Any

import torch
from torch import Tensor, nn

from hyperfade.nn.experts import Groups


class _Mixture(nn.Module):
    """rest: the module that is replaced, without its matrices. matrices: the reader, then the writer, by name."""

    def __init__(self, rest: nn.Module, matrices: dict[str, nn.Module], num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.reader, self.writer = matrices
        for name, matrix in matrices.items():
            self.add_module(name, matrix)
        self.rest: Any = rest

    def _outputs(self, x: Tensor, groups: Groups) -> Tensor:
        """x (S, d) sorted by expert: what each row's expert makes of it, (S, k)."""
        h = self.get_submodule(self.reader)(x, groups)
        h = self._activated(h)
        return self.get_submodule(self.writer)(h, groups)

    def _activated(self, h: Tensor) -> Tensor:
        raise NotImplementedError


class RoutedExperts(_Mixture):
    """Experts by transformers' own contract for them (`use_experts_implementation`), gated or not."""

    def _activated(self, h: Tensor) -> Tensor:
        return self.rest._apply_gate(h) if self.reader == "gate_up_proj" else self.rest.act_fn(h)

    def forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        top_k = top_k_index.shape[-1]
        expert, order = torch.sort(top_k_index.reshape(-1))
        token = order // top_k
        y = self._outputs(x[token], Groups.of(expert, token, self.num_experts, x.shape[0]))
        if getattr(self.rest, "has_post_expert_norm", False):  # not every version of transformers says so
            y = self.rest.post_expert_norm(y)
        y = y * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        by_token = y[torch.argsort(order)].view(*top_k_index.shape, y.shape[-1])
        return by_token.sum(1).to(x.dtype)


class ArrangedExperts(_Mixture):
    """Llama 4's experts. Rows of zeros give zeros, since nothing here has a bias, so they are not run."""

    def _activated(self, h: Tensor) -> Tensor:
        gate, up = h.chunk(2, dim=-1)
        return up * self.rest.act_fn(gate)

    def forward(self, x: Tensor) -> Tensor:
        routed = x.any(1).nonzero().squeeze(1)
        num_tokens = x.shape[0] // self.num_experts
        groups = Groups.of(routed // num_tokens, routed % num_tokens, self.num_experts, num_tokens)
        y = self._outputs(x[routed], groups)
        return y.new_zeros(x.shape[0], y.shape[1]).index_copy(0, routed, y)
