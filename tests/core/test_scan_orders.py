"""Token orders: bijections that agree with the recorded ones, on any rectangle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from zigma.scan_orders import (
    available_orders,
    count_jumps,
    inverse_order,
    is_order,
    order_schedule,
    register_order,
    repeat_orders,
    scan_order,
)

SIDES = st.integers(1, 12)
KINDS = sorted(set(available_orders()) - {"random"})
GENERATOR = torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def recorded(root):
    return load_file(root / "tests/data/token_orders.safetensors")


@given(st.sampled_from(sorted(available_orders())), st.integers(0, 7), SIDES, SIDES)
def test_every_order_is_a_bijection_that_its_inverse_undoes(kind, index, height, width):
    index %= available_orders()[kind]
    order = scan_order(kind, index, height=height, width=width, generator=GENERATOR)
    assert order.dtype == torch.long and is_order(order, height * width)
    tokens = torch.randn(2, height * width, 3)
    assert torch.equal(tokens[:, order][:, inverse_order(order)], tokens)
    assert torch.equal(tokens[:, inverse_order(order)][:, order], tokens)


@pytest.mark.parametrize(("kind", "name"), [("zigzag", "zigzag"), ("hilbert-published", "hilbert")])
@pytest.mark.parametrize("side", [2, 3, 4, 5, 6, 8, 16])
def test_square_orders_are_the_published_ones(recorded, kind, name, side):
    for index in range(8):
        order = scan_order(kind, index, height=side, width=side)
        assert order.tolist() == recorded[f"{name}.{side}"][index].tolist()
        assert inverse_order(order).tolist() == recorded[f"{name}.{side}.inverse"][index].tolist()


@given(st.integers(0, 7), SIDES, SIDES)
def test_a_zigzag_never_jumps_and_starts_in_its_corner(index, height, width):
    order = scan_order("zigzag", index, height=height, width=width)
    assert count_jumps(order, width) == 0
    row, column = divmod(int(order[0]), width)
    assert (row == height - 1) == bool(index & 4) or height == 1
    assert (column == width - 1) == bool(index & 2) or width == 1


@given(SIDES, SIDES)
def test_the_eight_zigzags_of_a_plane_differ(height, width):
    if min(height, width) > 1:
        assert len({tuple(scan_order("zigzag", i, height=height, width=width).tolist()) for i in range(8)}) == 8


@given(st.integers(0, 7), SIDES, SIDES)
def test_a_sweep_jumps_at_the_end_of_each_line_only(index, height, width):
    lines, length = (width, height) if index & 1 else (height, width)
    expected = 0 if length == 1 else lines - 1
    assert count_jumps(scan_order("sweep", index, height=height, width=width), width) == expected


@pytest.mark.parametrize("side", [2, 4, 6, 8, 16, 32])
def test_the_true_hilbert_walk_does_not_jump_and_the_published_table_is_its_inverse(side):
    for index in range(8):
        walk = scan_order("hilbert", index, height=side, width=side)
        assert count_jumps(walk, side) == 0
        assert torch.equal(inverse_order(walk), scan_order("hilbert-published", index, height=side, width=side))
    assert count_jumps(scan_order("hilbert-published", height=16, width=16), 16) == 135


@given(st.integers(0, 7), SIDES, SIDES)
def test_a_hilbert_walk_of_any_rectangle_steps_to_neighbours_where_that_can_be(index, height, width):
    """No path of neighbours joins the ends of a longer side that is odd where the other is even: on a chessboard these
    ends have one colour, and a path over all of the even number of cells ends on the other."""
    order = scan_order("hilbert", index, height=height, width=width)
    row, column = order // width, order % width
    steps = torch.stack([row.diff().abs(), column.diff().abs()])
    assert steps.numel() == 0 or steps.max() <= 1
    long, short = max(height, width), min(height, width)
    assert count_jumps(order, width) == (1 if long % 2 and short % 2 == 0 and short > 2 else 0)


@given(SIDES, SIDES)
def test_a_diagonal_visits_diagonal_after_diagonal(height, width):
    order = scan_order("diagonal", height=height, width=width)
    assert ((order // width + order % width).diff() >= 0).all()


def test_a_schedule_cycles_and_shares():
    orders = order_schedule("zigzagN3", 7, 4, 5)
    assert [next(j for j in range(3) if orders[i] is orders[j]) for i in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    drawn = order_schedule("randomN2", 4, 3, 3, torch.Generator().manual_seed(1))
    again = order_schedule("randomN2", 4, 3, 3, torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True)) and not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: scan_order("spiral", height=2, width=2), "unknown token order 'spiral': choose one of zigzag"),
        (lambda: scan_order("zigzag", 8, height=2, width=2), "has no index 8: it has 8, from 0 to 7"),
        (lambda: scan_order("zigzag", height=0, width=2), "grid of 0x2 is empty"),
        (lambda: scan_order("random", height=2, width=2), "needs a torch.Generator"),
        (lambda: order_schedule("spiralN2", 4, 2, 2), "names no token orders: expected zigzagN1..8"),
        (lambda: order_schedule("zigzagN9", 4, 2, 2), "asks for 9 orders: zigzag has 1 to 8"),
        (lambda: repeat_orders([], 3), "an empty list"),
        (lambda: register_order("zigzag", 1)(None), "registered already"),
    ],
)
def test_mistakes_are_named(call, sentence):
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(")):
        call()


@pytest.mark.parametrize("wrong", [[0, 0], [1, 2], [[0, 1]]])
def test_what_is_no_permutation_is_no_order(wrong):
    assert not is_order(torch.tensor(wrong))
    assert is_order(torch.tensor([1, 0])) and not is_order(torch.tensor([0.0, 1.0]))
