"""Whether a call runs in a kernel of ours (`nn/kernel.py`): on a GPU where Triton works, called plainly, if it pays."""

import warnings
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from hyperfade.algebra import Algebra

_DEVICE = "cuda"
_FEW_PRODUCTS, _MANY_WEIGHTS = 4, 2**25  # twice the products where the dense matrix has fewer weights
_MANY_MIXED = 2**21  # elements written by a mix, from which on the library loses more than a launch of ours costs
_MOST_COEFFICIENTS = 256  # of a mix: more would not fit into registers


def has_kernel(algebra: Algebra, in_features: int, out_features: int, x: Tensor, *factors: Tensor) -> bool:
    """Whether a layer's products for x (M, in_features) run in the kernel for one token, with its P, Q and T."""
    return (
        x.device.type == _DEVICE  # asked first: on a processor the rest would cost every token something
        and len(x) == 1
        and kernel_pays(algebra, in_features, out_features)
        and x.dtype.itemsize <= 4
        and all(factor.is_contiguous() and factor.device == x.device for factor in factors)
        and kernels_run(x.device.type)
    )


def kernel_pays(algebra: Algebra, in_features: int, out_features: int) -> bool:
    """With more products torch's own are faster, above all in wide layers (`benchmarks/gpu_speed.py`, an H200)."""
    few = _FEW_PRODUCTS if in_features * out_features > _MANY_WEIGHTS else 2 * _FEW_PRODUCTS
    return algebra.form == "products" and algebra.size <= few


def mixes_in_kernel(x: Tensor, weights: Tensor) -> bool:
    """Whether blocks x (M, b, w) are mixed by weights (a, b) in the kernel for large mixes."""
    tokens, read, width = x.shape
    written = len(weights)
    return (
        mix_pays(tokens * width, read, written)
        and max(read, written) * tokens * width < 2**31  # it counts elements in 32 bits
        and x.dtype == weights.dtype
        and x.dtype.itemsize <= 4
        and weights.device == x.device
        and type(x) is Tensor
        and type(weights) in (Tensor, nn.Parameter)
        and not (torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad))
        and kernels_run(x.device.type)
    )


def mix_pays(width: int, read: int, written: int) -> bool:
    """Whether the kernel mixes `read` blocks of so many elements over all tokens into `written` ones faster.

    The library's way was measured (`prices.json`: 8 ps an element in bfloat16, where memory needs 1). When ours takes
    over follows from that and from what a launch costs, and waits for a measurement of its own.
    """
    return width * written >= _MANY_MIXED and read * written <= _MOST_COEFFICIENTS


def kernels_run(device_type: str) -> bool:
    """Whether our kernels can have a part in a call now: on a GPU where Triton works, with no autocast, tracer,
    transform or counter of operations around, which see torch's operations only."""
    return device_type == _DEVICE and _plainly_called(device_type) and _triton_works()


def _plainly_called(device_type: str) -> bool:
    return not (
        torch.is_autocast_enabled(device_type)
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


@cache
def _triton_works() -> bool:
    """Tried once: Triton also needs a C compiler and a GPU that it knows. What was measured was NVIDIA's."""
    if torch.version.hip is not None or find_spec("triton") is None:
        return False
    try:
        from hyperfade.nn.kernel import mix, one_token

        one = torch.ones(1, 1, 1, device=_DEVICE)
        one_token(one, one[0], one[0], one)
        mix(one, one[0])
    except Exception as error:  # noqa: BLE001 - of a compiler, a linker, a driver: torch's own operations do it as well
        warnings.warn(f"Our kernels are not used, since Triton fails: {error}", stacklevel=2)
        return False
    return True
