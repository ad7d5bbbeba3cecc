"""The order of examples: fresh each epoch, the same from any point on, and little padded where lengths are known."""

from collections import Counter
from itertools import chain, islice, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperfade.distill.order import Batches, data_order


@given(st.integers(1, 40), st.integers(0, 5), st.integers(0, 130))
def test_an_order_goes_on_from_any_position(num_examples: int, seed: int, first: int) -> None:
    whole = list(islice(data_order(num_examples, seed, 0), first + 50))
    assert list(islice(data_order(num_examples, seed, first), 50)) == whole[first:]
    assert sorted(whole[:num_examples]) == list(range(num_examples))


def test_every_epoch_is_another_permutation() -> None:
    whole = list(islice(data_order(20, 3, 0), 60))
    epochs = [whole[start : start + 20] for start in (0, 20, 40)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)


def test_batches_follow_the_order() -> None:
    batches = Batches(20, 3, 7)
    assert [number for batch in range(30) for number in batches[batch]] == list(islice(data_order(20, 7, 0), 90))


@given(st.integers(1, 8), st.integers(0, 3))
def test_grouped_batches_hold_what_the_order_holds_window_by_window(batch_size: int, seed: int) -> None:
    lengths = [(37 * number) % 101 for number in range(300)]
    batches = Batches(300, batch_size, seed, lengths.__getitem__)
    plain = Batches(300, batch_size, seed)
    for window in range(3):
        numbers = range(16 * window, 16 * window + 16)
        drawn = [batches[number] for number in numbers]
        assert all(len(batch) == batch_size for batch in drawn)
        assert Counter(chain(*drawn)) == Counter(chain(*(plain[number] for number in numbers)))
        # no batch's shortest lies inside another: they are cut from one sorted list
        spans = sorted((min(lengths[n] for n in batch), max(lengths[n] for n in batch)) for batch in drawn)
        assert all(one[1] <= other[0] for one, other in pairwise(spans))
    again = Batches(300, batch_size, seed, lengths.__getitem__)
    assert again[41] == batches[41]


def test_grouped_batches_are_shuffled_and_pad_little() -> None:
    lengths = [(37 * number) % 101 for number in range(1000)]

    def padded(batches: Batches) -> float:
        drawn = [[lengths[n] for n in batches[number]] for number in range(48)]
        return sum(len(batch) * max(batch) for batch in drawn) / sum(map(sum, drawn))

    grouped = Batches(1000, 16, 0, lengths.__getitem__)
    assert padded(Batches(1000, 16, 0)) > 1.7  # observed 1.89
    assert padded(grouped) < 1.1  # observed 1.06
    longest = [max(lengths[n] for n in grouped[number]) for number in range(16)]
    assert longest != sorted(longest)


@pytest.mark.parametrize("grouped", [False, True])
def test_what_is_drawn_holds_all_that_the_batches_give(grouped: bool) -> None:
    batches = Batches(500, 3, 0, (lambda number: number) if grouped else None)
    for count in (0, 1, 5, 16, 17, 40, 400):
        given = set(chain(*(batches[number] for number in range(count))))
        assert batches.drawn(count) == (
            given if not grouped or count % 16 == 0 else batches.drawn(-(-count // 16) * 16)
        )
        assert given <= batches.drawn(count)


def test_only_lengths_of_the_window_are_asked_for() -> None:
    asked: list[int] = []
    batches = Batches(10_000, 4, 0, lambda number: asked.append(number) or number)
    for number in range(16):
        assert len(batches[number]) == 4
    assert len(asked) == 64
