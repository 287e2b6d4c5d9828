"""Buckets have the sizes that they promise; the order of batches drops nothing and resumes exactly."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zigma.training.buckets import BatchOrder, make_buckets, nearest_bucket, target_sizes


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(0, 63), st.sampled_from([1, 8, 16, 32]), st.floats(1, 4))
def test_buckets_keep_area_step_and_ratio(units, rest, step, ratio):
    side = units * step + rest % step
    buckets = make_buckets(side, step, ratio)
    assert len(set(buckets)) == len(buckets)
    for h, w in buckets:
        assert h % step == 0 and w % step == 0 and h * w <= side**2 and max(h / w, w / h) <= ratio + 1e-9
        assert (w, h) in buckets
    assert (units * step, units * step) in buckets
    assert [w / h for h, w in buckets] == sorted(w / h for h, w in buckets)


def test_buckets_of_a_usual_size():
    buckets = make_buckets(256, 32)
    assert (256, 256) in buckets and (192, 320) in buckets and (320, 192) in buckets
    assert all(h * w > 0.7 * 256**2 for h, w in buckets)  # none wastes much of the area


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000))
def test_the_nearest_bucket_cuts_least(h, w):
    buckets = make_buckets(128, 8)
    chosen = nearest_bucket((h, w), buckets)

    def cut(bucket):
        return abs(math.log(w / h) - math.log(bucket[1] / bucket[0]))

    assert chosen in buckets and cut(chosen) <= min(map(cut, buckets)) + 1e-8
    assert nearest_bucket((w, h), buckets) == chosen[::-1] or math.isclose(h, w)


def test_square_pictures_go_to_the_square():
    assert nearest_bucket((500, 500), make_buckets(60, 8)) == (56, 56)


def test_target_sizes():
    sizes = [(100, 100), (100, 200), (200, 100)]
    assert target_sizes(sizes, 64) == [(64, 64)] * 3
    assert target_sizes(sizes, (32, 64)) == [(32, 64)] * 3
    square, wide, tall = target_sizes(sizes, 64, buckets=True, step=8)
    assert square == (64, 64) and wide == tall[::-1] and wide[1] > wide[0]


@pytest.mark.parametrize("arguments", [(7, 8), (64, 0), (64, 8, 0.5)])
def test_impossible_buckets(arguments):
    with pytest.raises(ValueError, match="expected a side of at least one step"):
        make_buckets(*arguments)
    with pytest.raises(ValueError, match="expected at least one of each"):
        nearest_bucket((0, 5), [(8, 8)])


groupings = st.lists(st.integers(0, 3), min_size=1, max_size=40)


def epochs(order: BatchOrder, count: int) -> list[list[list[int]]]:
    """The batches of the first `count` epochs."""
    found: list[list[list[int]]] = [[] for _ in range(count)]
    while True:
        batch = order.next()
        if order.epoch >= count:
            return found
        found[order.epoch].append(batch)


@settings(deadline=None, max_examples=60)
@given(groupings, st.integers(1, 9), st.integers(0, 5))
def test_every_sample_once_an_epoch(groups, batch_size, seed):
    sizes = Counter(groups)
    seen: Counter[int] = Counter()
    for k, batches in enumerate(epochs(BatchOrder(groups, batch_size, seed), 7), 1):
        for batch in batches:
            assert len(batch) == batch_size and len({groups[i] for i in batch}) == 1
            if sizes[groups[batch[0]]] >= batch_size:
                assert len(set(batch)) == batch_size
            seen.update(batch)
        for index, group in enumerate(groups):
            least = k - math.ceil(batch_size / sizes[group]) if sizes[group] < batch_size else k - 1
            assert least <= seen[index] <= k
        for group in sizes:
            counts = [seen[index] for index, own in enumerate(groups) if own == group]
            assert max(counts) - min(counts) <= 1


@settings(deadline=None, max_examples=60)
@given(groupings, st.integers(1, 9), st.integers(0, 40), st.integers(0, 5))
def test_resuming_is_exact(groups, batch_size, steps, seed):
    straight, first = BatchOrder(groups, batch_size, seed), BatchOrder(groups, batch_size, seed)
    expected = [straight.next() for _ in range(steps + 30)]
    assert [first.next() for _ in range(steps)] == expected[:steps]
    state = json.loads(json.dumps(first.state_dict()))
    resumed = BatchOrder(groups, batch_size, seed + 1)
    resumed.load_state_dict(state)
    assert [resumed.next() for _ in range(30)] == expected[steps:]
    assert (resumed.epoch, resumed.position) == (straight.epoch, straight.position)


def test_epochs_and_seeds_differ():
    groups = [0] * 12
    first, second = epochs(BatchOrder(groups, 4, 0), 2)
    assert first != second != epochs(BatchOrder(groups, 4, 1), 2)[1]
    assert BatchOrder(groups, 5, 0).steps_per_epoch == 12 / 5


def test_no_sample_is_always_left_over():
    """What is left for the next epoch is another part of the data each time."""
    order, left = BatchOrder([0] * 10, 4, 0), Counter()
    for batches in epochs(order, 200):
        seen = Counter(index for batch in batches for index in batch)
        left.update(index for index in range(10) if not seen[index])
    assert min(left.values()) > 0.5 * sum(left.values()) / 10 and len(left) == 10


def test_states_of_other_data_are_refused():
    state = BatchOrder([0, 0, 1, 1], 2, 0).state_dict()
    for groups in ([0, 0, 1], [0, 1, 1, 1], [0, 0, 0, 0]):
        with pytest.raises(ValueError, match="other data or other buckets"):
            BatchOrder(groups, 2, 0).load_state_dict(state)
    with pytest.raises(ValueError, match="batches of 2, but this run's have 3"):
        BatchOrder([0, 0, 1, 1], 3, 0).load_state_dict(state)
    for groups, size in (([], 2), ([0], 0)):
        with pytest.raises(ValueError, match="expected at least 1 of each"):
            BatchOrder(groups, size, 0)
