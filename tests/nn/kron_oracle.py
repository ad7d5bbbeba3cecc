"""W straight from a layer's parameters by `torch.kron`: the oracle of this folder's tests."""

import torch
from torch import Tensor

from hyperfade.algebra import Algebra
from hyperfade.nn import PHMLinear

TOLERANCE = {  # relative to the largest sum of absolute products; seen 4e-16, 1.1e-7, 8e-4, 6e-3
    torch.float64: 1e-14,
    torch.float32: 1e-6,
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
}


def random_layer(d: int, k: int, algebra: Algebra, **options) -> PHMLinear:
    """A layer with every number random, as after training."""
    layer = PHMLinear(d, k, algebra, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def kron_weight(layer: PHMLinear) -> Tensor:
    """W (k, d) in float64, straight from the parameters by `torch.kron`."""
    n, t = layer.algebra.n, layer.algebra.size
    k_block, d_block = layer.out_features // n, layer.in_features // n
    if layer.algebra.form == "products":
        parts = [torch.kron(torch.outer(layer.P[r], layer.Q[r]).double(), layer.T[r].double()) for r in range(t)]
    else:
        core = layer.core.weight.double()
        if layer.in_features <= layer.out_features:
            s = [core[:, i * d_block : (i + 1) * d_block] for i in range(t)]
        else:
            s = [core[i * k_block : (i + 1) * k_block] for i in range(t)]
        parts = [torch.kron(layer.A[i].double(), s[i]) for i in range(t)]
    weight = torch.stack(parts).sum(0)
    if layer.companion is not None:
        weight = weight + layer.companion.expand.weight.double() @ layer.companion.reduce.weight.double()
    return weight.detach()
