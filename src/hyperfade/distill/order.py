"""Which examples a step draws: a pure function of seed and step, so that the step is all a run has to remember."""

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import islice

import torch

_WINDOW = 16
"""Batches that are looked at together where examples of like length are put into one."""


def data_order(num_examples: int, seed: int, first: int) -> Iterator[int]:
    """Endless example numbers from position `first`: every epoch is a fresh permutation seeded by (seed, epoch)."""
    epoch, offset = divmod(first, num_examples)
    while True:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        yield from torch.randperm(num_examples, generator=generator).tolist()[offset:]
        epoch, offset = epoch + 1, 0


class Batches:
    """The batches of a run, by number: example numbers in `data_order`.

    With `length_of`, which gives an example's length in any unit, 16 batches in a row are sorted by length, cut into
    batches again, and these shuffled: little is padded, every example still comes once an epoch, and only the lengths
    of what is soon drawn are asked for.
    """

    def __init__(
        self, num_examples: int, batch_size: int, seed: int, length_of: Callable[[int], int] | None = None
    ) -> None:
        self._num_examples, self._batch_size, self._seed = num_examples, batch_size, seed
        self._length_of = length_of
        self._window = lru_cache(maxsize=1)(self._sorted)

    def __getitem__(self, number: int) -> list[int]:
        """The example numbers of batch `number`, from 0."""
        if self._length_of is None:
            return self._drawn(number * self._batch_size, self._batch_size)
        window, place = divmod(number, _WINDOW)
        return self._window(window)[place]

    def drawn(self, count: int) -> set[int]:
        """Which examples the first `count` batches draw; with lengths, the rest of the last 16 are among them."""
        batches = count if self._length_of is None else -(-count // _WINDOW) * _WINDOW
        if batches * self._batch_size >= self._num_examples:
            return set(range(self._num_examples))
        return set(self._drawn(0, batches * self._batch_size))

    def _drawn(self, first: int, count: int) -> list[int]:
        return list(islice(data_order(self._num_examples, self._seed, first), count))

    def _sorted(self, window: int) -> list[list[int]]:
        assert self._length_of is not None
        size = self._batch_size
        numbers = sorted(self._drawn(window * _WINDOW * size, _WINDOW * size), key=self._length_of)
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + window)
        places = torch.randperm(_WINDOW, generator=generator).tolist()
        return [numbers[place * size : (place + 1) * size] for place in places]
