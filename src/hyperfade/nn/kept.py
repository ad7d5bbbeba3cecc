"""What a layer makes of its weights and keeps until they change."""

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Kept(Generic[T]):
    """Something made of tensors; nothing at first."""

    def __init__(self) -> None:
        self._made_of: tuple[object, ...] = ()
        self._value: T | None = None

    def of(self, tensors: Iterable[Tensor], make: Callable[[], T]) -> T:
        """What `make` makes of `tensors`: made anew where they have changed, and while gradients are asked for."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return make()
        made_of, value = tuple(state for tensor in tensors for state in state_of(tensor)), self._value
        if value is None or self._made_of != made_of:
            self._value = value = None  # memory holds one of the two
            self._made_of, self._value = made_of, (value := make())
        return value


def state_of(tensor: Tensor) -> tuple[object, ...]:
    """What changes when a tensor's numbers do, or their place."""
    return tensor.data_ptr(), tensor.dtype, None if tensor.is_inference() else tensor._version
