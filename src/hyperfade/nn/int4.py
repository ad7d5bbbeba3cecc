"""Four-bit numbers in memory: two to a byte, row by row, or as torch's CPU kernel reads them.

A checkpoint holds the first layout only. The second depends on the processor: AVX-512 interleaves blocks of 64 rows,
AVX2 of 32, others keep pairs of rows. What is packed here is unpacked again at once and compared, so a layout that is
not one of these is never used.
"""

import torch
from torch import Tensor

GROUPS = (256, 128, 64, 32)  # group sizes that the CPU kernel knows
_BLOCKS = (64, 32)  # rows that a processor interleaves
_ROWS = 16  # the kernel wants a multiple of these


def two_to_a_byte(numbers: Tensor) -> Tensor:
    """(k, d) integers 0 to 15 → (k, ⌈d/2⌉) bytes, the first number in the low half."""
    if numbers.shape[1] % 2:
        numbers = torch.nn.functional.pad(numbers, (0, 1))
    low, high = numbers.to(torch.uint8).unflatten(1, (-1, 2)).unbind(2)
    return low | high << 4


def one_to_a_byte(data: Tensor, width: int) -> Tensor:
    """What `two_to_a_byte` was given, as (k, width) bytes."""
    # torch's ONNX exporter (2.13) takes what is shifted for signed
    high = data // 16 if torch.compiler.is_exporting() else data >> 4
    return torch.stack([data & 15, high], 2).flatten(1)[:, :width]


def for_the_kernel(numbers: Tensor) -> tuple[Tensor, int] | None:
    """(parts, k, d) integers 0 to 15, each part in memory as this processor's kernel reads it, and the rows in a block;
    None where the kernel does not take this shape, or lays it out in a way that is not known here."""
    _, rows, width = numbers.shape
    if numbers.device.type != "cpu" or rows % _ROWS or width % GROUPS[-1]:
        return None
    data = torch.stack(
        [torch.ops.aten._convert_weight_to_int4pack_for_cpu(part.int().contiguous(), 1) for part in numbers]
    )
    for block in _BLOCKS:
        if torch.equal(from_the_kernel(data, block).transpose(1, 2), numbers):
            return data, block
    return None


def from_the_kernel(data: Tensor, block: int) -> Tensor:
    """The numbers that the kernel reads out of (parts, k, d/2) bytes, transposed: (parts, d, k) bytes."""
    rows, width = data.shape[1], 2 * data.shape[2]
    whole = rows // block
    parts, rest = data.flatten(1).split([width * whole * block // 2, width * (rows % block) // 2], 1)
    blocks = parts.unflatten(1, (whole, width, block // 2))
    columns = [torch.cat([blocks & 15, blocks >> 4], 3).transpose(1, 2).flatten(2)]
    if rest.numel():  # rows that fill no block lie in pairs
        pairs = rest.unflatten(1, (width, -1))
        columns.append(torch.stack([pairs & 15, pairs >> 4], 3).flatten(2))
    return torch.cat(columns, 2)
