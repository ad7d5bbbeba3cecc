"""The roofs: the lower of the two limits, from numbers that can be checked against each other."""

import torch

from hyperfade.measure import Ceilings, ceilings


def test_the_lower_roof_counts() -> None:
    roofs = Ceilings(100.0, 2.0, 4.0, 3.0)
    assert roofs.attainable(10.0) == 40.0  # 10 operations a byte, at 4 bytes a second
    assert roofs.attainable(25.0) == roofs.attainable(1000.0) == 100.0


def test_measured_roofs_agree_with_each_other() -> None:
    found = ceilings(torch.float32, torch.device("cpu"), width=256, weight_bytes=2**24)
    rates = (found.gemv_bytes_per_second, found.sum_bytes_per_second, found.copy_bytes_per_second)
    assert all(1e8 < rate < 1e13 for rate in rates)  # observed 5e9 to 4e10 on one thread
    # a product of one vector makes two operations for each weight of four bytes, and cannot beat the peak
    assert found.gemv_bytes_per_second / 2 < found.flops_per_second
