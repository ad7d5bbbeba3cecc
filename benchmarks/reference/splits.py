"""Which pictures are near-duplicates of each other, and the split each group of them goes to."""

import random
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

SHARES = {"test": 0.18, "validation": 0.07}
MAX_HELD_OUT_GROUP = 12
MAX_HASH_DISTANCE = 4


class Groups:
    """Union-find over anything hashable."""

    def __init__(self) -> None:
        self._parent: dict[Hashable, Hashable] = {}

    def find(self, item: Hashable) -> Hashable:
        """The representative of the item's group."""
        self._parent.setdefault(item, item)
        while self._parent[item] != item:
            self._parent[item] = self._parent[self._parent[item]]
            item = self._parent[item]
        return item

    def join_(self, first: Hashable, second: Hashable) -> None:
        """Makes one group of the groups of two items."""
        self._parent[self.find(first)] = self.find(second)


def close_pairs(hashes: np.ndarray, distance: int = MAX_HASH_DISTANCE) -> Iterable[tuple[int, int]]:
    """Pairs of rows of `hashes` (N, bits), of type bool, that differ in at most `distance` bits."""
    signs = hashes.astype(np.float32) * 2 - 1
    bits = hashes.shape[1]
    for start in range(0, len(signs), 1024):
        agreement = signs[start : start + 1024] @ signs.T
        rows, columns = np.nonzero(agreement >= bits - 2 * distance)
        yield from ((start + int(a), int(b)) for a, b in zip(rows, columns, strict=True) if start + a < b)


def group_names(keys: Sequence[Sequence[str]], hashes: np.ndarray) -> list[str]:
    """For every picture the name of its group: pictures with a common key or almost the same hash (N, bits)."""
    groups = Groups()
    for number, listed in enumerate(keys):
        for key in listed:
            groups.join_(number, key)
    for first, second in close_pairs(hashes):
        groups.join_(first, second)
    names: dict[Hashable, str] = {}
    return [names.setdefault(groups.find(number), f"group-{number}") for number in range(len(keys))]


def assign(groups: Sequence[str], seed: int) -> dict[str, str]:
    """The split of every group. Large ones train: in a test one of them would be one question asked many times."""
    sizes: dict[str, int] = {}
    for group in groups:
        sizes[group] = sizes.get(group, 0) + 1
    chance = random.Random(f"splits {seed}")
    splits = {}
    for group in sorted(sizes):
        draw = chance.random()
        if sizes[group] > MAX_HELD_OUT_GROUP:
            splits[group] = "train"
        elif draw < SHARES["test"]:
            splits[group] = "test"
        else:
            splits[group] = "validation" if draw < sum(SHARES.values()) else "train"
    return splits
