"""What a user writes as an order or a schedule is read as meant, or refused by a sentence that names the fault."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zigma.order_table import join_numbers
from zigma.order_text import parse_numbers, parse_orders, parse_schedule

GRIDS = st.tuples(st.integers(1, 6), st.integers(1, 6))


@st.composite
def written_orders(draw):
    """(orders, width): some permutations of one grid."""
    height, width = draw(GRIDS)
    permutation = st.permutations(range(height * width))
    return draw(st.lists(permutation, min_size=1, max_size=4)), width


@given(written_orders(), st.sampled_from([", ", " ", ",", " ; ", "\t"]))
def test_every_way_of_writing_orders_is_read_alike(written, between):
    orders, width = written
    length = len(orders[0])
    rows = [[between.join(map(str, order[r : r + width])) for r in range(0, length, width)] for order in orders]
    texts = [
        "\n".join(between.join(map(str, order)) for order in orders),
        "\n\n".join("\n".join(row) for row in rows),
        json.dumps(orders),
        json.dumps(orders, indent=2),
        "\n".join(json.dumps(order) for order in orders),
    ]
    for text in texts:
        assert [order.tolist() for order in parse_orders(text, length, "a grid")] == orders, text
    assert [order.tolist() for order in parse_orders(json.dumps(orders[0]), length, "a grid")] == orders[:1]


@given(st.permutations(range(12)), st.data())
def test_what_is_missing_twice_or_beyond_is_named(order, data):
    wrong = list(order)
    place = data.draw(st.integers(0, 11))
    put = data.draw(st.integers(0, 20).filter(lambda number: number != wrong[place]))
    lost, wrong[place] = wrong[place], put
    fault = f"{put} is there more than once" if put < 12 else f"{put} is out of range"
    with pytest.raises(ValueError, match=f"{lost} is missing, {fault}"):
        parse_orders(" ".join(map(str, wrong)), 12, "3 x 4 tokens")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (" \n ", "write the custom order as 6 numbers, one for each of 2 x 3 tokens: got an empty text"),
        ("[]", "got an empty text"),
        ("0 1 2 3 4", "got 5, expected 6"),
        ("0 1 2\n3 4", "write 6 numbers in the custom order, .*got 5"),
        ("0 1 2 3 4 5\n0 1 2 3 4 5 6", "in the custom order 1, .*got 7"),
        ("0 1 2 3 4 -5", "-5 is out of range"),
        ("0 1 2 three 4 5", "whole numbers only in the custom order: got 'three'"),
        ("0 0 0 0 0 0", "1, 2, 3, 4, 5 are missing, 0 is there more than once"),
        ('{"order": [0, 1, 2, 3, 4, 5]}', "whole numbers only"),
        ("9" * 5000, "whole numbers only"),
    ],
)
def test_mistakes_in_orders_are_named(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse_orders(text, 6, "2 x 3 tokens")


@given(st.text(max_size=80), st.integers(1, 9))
def test_any_text_is_read_or_refused_by_one_sentence(text, length):
    try:
        orders = parse_orders(text, length, "a grid")
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 400
    else:
        assert all(sorted(order.tolist()) == list(range(length)) for order in orders) and orders


@given(st.lists(st.integers(0, 30), min_size=1, unique=True))
def test_numbers_that_are_joined_are_read_back(numbers):
    assert parse_numbers(join_numbers(numbers), 31, "layers") == sorted(numbers)


def layers_of(text):
    return parse_numbers(text, 8, "layers")


KINDS = {
    name: lambda text, count=count: parse_numbers(text, count, "variants")
    for name, count in (("zigzag", 8), ("hilbert", 8), ("hilbert-published", 8), ("as trained", 1))
}


def test_a_schedule_is_read_line_by_line():
    text = "0-3: zigzag 0, 2  # four\n\n# nothing\n 4,5 :hilbert-published 1\n6: as trained\nall: hilbert 7"
    assert parse_schedule(text, layers_of, KINDS) == [
        ([0, 1, 2, 3], "zigzag", [0, 2]), ([4, 5], "hilbert-published", [1]), ([6], "as trained", [0]),
        (list(range(8)), "hilbert", [7]),
    ]  # fmt: skip
    assert parse_schedule("# nothing", layers_of, KINDS) == []


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("0: zigzag\n\n1: spiral 3", "line 3 of the schedule: got 'spiral 3', expected one of zigzag, hilbert"),
        ("0 zigzag", "write line 1 of the schedule as '0-3: zigzag 0-7': got '0 zigzag'"),
        (": zigzag", "write line 1"),
        ("0:", "write line 1"),
        ("0: as", "got 'as', expected one of"),
        ("0-8: zigzag", "line 1 of the schedule, '0-8: zigzag': got the layers '0-8', .* there is no 8"),
        ("0: zigzag 8", "line 1 .* there is no 8"),
        ("x: zigzag", "line 1 .*expected numbers and ranges"),
        ("0-99999999999: zigzag", "there is no 8"),
    ],
)
def test_mistakes_in_schedules_name_the_line(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse_schedule(text, layers_of, KINDS)
