"""What this machine can do at most: a layer reaches the lower of two roofs (Williams et al., 2009).

attainable operations per second = min(peak, intensity · bandwidth),  intensity = operations per byte moved
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hyperfade.measure.speed import time_alternately


@dataclass(frozen=True)
class Ceilings:
    """Best of a few timings. gemv: weights read by products with one vector, what decoding can hope for."""

    flops_per_second: float
    gemv_bytes_per_second: float
    sum_bytes_per_second: float
    copy_bytes_per_second: float  # bytes read plus bytes written

    def attainable(self, flops_per_byte: float) -> float:
        """Operations per second under both roofs."""
        return min(self.flops_per_second, flops_per_byte * self.read_bytes_per_second)

    @property
    def read_bytes_per_second(self) -> float:
        """The best reading rate seen."""
        return max(self.gemv_bytes_per_second, self.sum_bytes_per_second)


@torch.inference_mode()
def ceilings(dtype: torch.dtype, device: torch.device, *, width: int = 4096, weight_bytes: int = 2**30) -> Ceilings:
    """Measure the roofs with torch itself: a (width, width) product of 2048 tokens, and `weight_bytes` of memory that
    no cache holds, read by products with one vector, summed, and copied."""
    like = {"dtype": dtype, "device": device}
    count = max(1, weight_bytes // (width * width * dtype.itemsize))
    weights = torch.full((count, width, width), 1e-3, **like)
    many, one = torch.ones(2048, width, **like), torch.ones(1, width, **like)
    plain = weights.view(-1).view(torch.float32)  # sums in float32: their conversion must not be the limit
    target = torch.empty_like(weights)
    times = time_alternately(
        {
            "product": lambda: F.linear(many, weights[0]),
            "gemv": lambda: [F.linear(one, weight) for weight in weights],
            "sum": plain.sum,
            "copy": lambda: target.copy_(weights),
        },
        rounds=(5, 5),
    )
    best = {name: min(seconds) for name, seconds in times.items()}
    return Ceilings(
        2 * many.numel() * width / best["product"],
        weights.nbytes / best["gemv"],
        weights.nbytes / best["sum"],
        2 * weights.nbytes / best["copy"],
    )
