"""A drawn order shows every token, both ends and nothing beside its path; its measures have closed forms."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops

from zigma import order_drawing
from zigma.order_drawing import draw_order, draw_paths
from zigma.order_table import LayerPath, join_numbers, longest_step, neighbour_distance, order_table, same_steps
from zigma.scan_orders import available_orders, continuity, count_jumps, scan_order

SIDES = st.integers(1, 9)
KINDS = st.sampled_from(sorted(available_orders()))


def make(kind, index, height, width):
    generator = torch.Generator().manual_seed(index)
    return scan_order(kind, index % available_orders()[kind], height=height, width=width, generator=generator)


def near(colour, other, limit=24):
    return max(abs(a - b) for a, b in zip(colour, other, strict=True)) <= limit


def centre(token, height, width, drawing):
    return int((token % width + 0.5) * drawing.width / width), int((token // width + 0.5) * drawing.height / height)


@settings(max_examples=40, deadline=None)
@given(KINDS, st.integers(0, 7), SIDES, SIDES, st.sampled_from([None, (0, 0, 0), (255, 255, 255), (120, 120, 120)]))
def test_every_token_is_drawn_in_the_colour_of_its_step(kind, index, height, width, ground):
    """At its centre, on paper as over a picture, unless a later path crosses there: the orders' own never do."""
    order = make(kind, index, height, width)
    over = None if ground is None else Image.new("RGB", (40 * width, 40 * height), ground)
    drawing = draw_order(order, height, width, size=40 * max(height, width), over=over)
    assert drawing.size == (40 * width, 40 * height)
    stops = order_drawing.PATH_COLOURS if over is None else order_drawing.LIGHT_COLOURS
    for step, token in enumerate(order.tolist()):
        position = step / max(1, len(order) - 1) * (len(stops) - 1)
        left = min(int(position), len(stops) - 2)
        pairs = zip(stops[left], stops[left + 1], strict=True)
        expected = [a + (b - a) * (position - left) for a, b in pairs]
        assert near(drawing.getpixel(centre(token, height, width, drawing)), expected)


@pytest.mark.parametrize("kind", ["zigzag", "sweep", "hilbert", "diagonal"])
@pytest.mark.parametrize("height, width", [(4, 4), (3, 5), (1, 6), (1, 1), (64, 64), (128, 128)])
def test_a_drawn_order_starts_dark_and_ends_light(kind, height, width):
    order = scan_order(kind, 1, height=height, width=width)
    drawing = draw_order(order, height, width, size=320)
    assert max(drawing.size) == 320
    if height * width > 1:
        for token, colour in ((order[0], order_drawing.PATH_COLOURS[0]), (order[-1], order_drawing.PATH_COLOURS[-1])):
            x, y = centre(token.item(), height, width, drawing)
            around = drawing.crop((x - 6, y - 6, x + 7, y + 7))  # at the edge of a large grid a mark stands inwards
            assert sum(count for count, shade in around.getcolors() if shade == colour) >= 12


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["zigzag", "sweep", "hilbert"]), st.integers(0, 7), st.integers(2, 8), st.integers(2, 8))
def test_a_picture_stays_as_it_is_beside_the_path(kind, index, height, width):
    """The corners of tokens that no diagonal step or jump passes are the picture's, pixel for pixel."""
    order = make(kind, index, height, width)
    picture = Image.effect_noise((width * 20, height * 20), 90).convert("RGB")
    drawing = draw_order(order, height, width, over=picture)
    assert drawing.size == picture.size
    changed = ImageChops.difference(drawing, picture).convert("L").point(lambda level: 255 * (level > 0))
    if count_jumps(order, width) == 0:
        for row, column in itertools.product(range(height), range(width)):
            corner = (column * 20, row * 20, column * 20 + 2, row * 20 + 2)
            assert changed.crop(corner).getbbox() is None, (row, column)
    assert changed.getbbox() is not None


def test_a_path_over_a_picture_can_be_seen_on_black_and_on_white():
    """Next to the path there is a pixel that differs strongly from the ground, whatever the ground."""
    order = scan_order("hilbert", 0, height=8, width=8)
    for ground in ((0, 0, 0), (255, 255, 255), (128, 128, 128)):
        drawing = draw_order(order, 8, 8, over=Image.new("RGB", (256, 256), ground))
        for token in order.tolist():
            x, y = centre(token, 8, 8, drawing)
            around = [drawing.getpixel((x + dx, y + dy)) for dx in range(-9, 10) for dy in range(-9, 10)]
            assert max(abs(sum(p) - sum(ground)) for p in around) > 200


def test_opacity_lets_the_picture_through_in_proportion():
    order, ground = scan_order("zigzag", 0, height=3, width=3), (0, 0, 0)
    full, half = (draw_order(order, 3, 3, over=Image.new("RGB", (90, 90), ground), opacity=o) for o in (1.0, 0.5))
    at = centre(4, 3, 3, full)
    assert near(half.getpixel(at), [level / 2 for level in full.getpixel(at)], 2)


def test_a_jump_is_drawn_in_red_and_a_step_is_not():
    order = torch.tensor([0, 1, 2, 3])  # on 1 x 4: no jump
    red = order_drawing.JUMP

    def reds(order):
        return sum(count for count, colour in draw_order(order, 1, 4).getcolors(1 << 16) if near(colour, red, 40))

    assert reds(order) == 0 and reds(torch.tensor([0, 3, 1, 2])) > 20


@pytest.mark.parametrize("kind", ["zigzag", "sweep", "random"])
def test_large_grids_are_drawn_in_full(kind):
    """Every row and every column of a 128 x 128 grid has paint in it, also where thousands of steps jump."""
    order = make(kind, 1, 128, 128)
    started = time.monotonic()
    drawing = draw_order(order, 128, 128)
    assert max(drawing.size) == 768 and time.monotonic() - started < 20  # a second here; a loaded machine takes longer
    for token in range(0, 128 * 128, 97):
        assert drawing.getpixel(centre(token, 128, 128, drawing)) != order_drawing.PAPER


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: draw_order(torch.arange(10), 3, 4), "grid of 3x4 has 12 tokens"),
        (lambda: draw_order(torch.arange(4), 2, 2, opacity=0), "opacity of 0, expected a number above 0"),
    ],
)
def test_what_cannot_be_drawn_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def path(layer, name, order, trained, grid=(2, 3), **more):
    facts = {"axis": "a", "over_picture": True, "trained_name": "zigzag 0", **more}
    return LayerPath(layer=layer, name=name, order=order, grid=grid, trained_order=trained, **facts)


def test_layers_that_read_alike_share_a_drawing():
    zigzag, sweep = (scan_order(kind, 0, height=2, width=3) for kind in ("zigzag", "sweep"))
    paths = [path(i, "zigzag 0" if i % 2 else "sweep 0", zigzag if i % 2 else sweep, zigzag) for i in range(6)]
    one, two, six = draw_paths(paths[:1]), draw_paths(paths[:2]), draw_paths(paths)
    assert one.width < two.width == six.width and two.height <= six.height < 2 * one.height
    frames = path(9, "forwards", torch.arange(5), torch.arange(5), (1, 5), axis="t", over_picture=False)
    assert draw_paths([*paths, frames], over=Image.new("RGB", (60, 40))).width > 0


# Measures


@given(st.integers(0, 7), SIDES, SIDES)
def test_continuity_of_zigzags_and_sweeps(index, height, width):
    assert continuity(make("zigzag", index, height, width), width) == 1
    lines, length = (width, height) if index & 1 else (height, width)
    expected = 1.0 if length == 1 else 1 - (lines - 1) / (height * width - 1)
    assert continuity(make("sweep", index, height, width), width) == pytest.approx(expected)


@pytest.mark.parametrize("height, width", [(1, 1), (2, 2), (2, 3), (1, 5)])
def test_continuity_averages_over_all_orders_to_its_closed_form(height, width):
    orders = list(itertools.permutations(range(height * width)))
    mean = sum(continuity(torch.tensor(order), width) for order in orders) / len(orders)
    pairs, length = 4 * height * width - 2 * height - 2 * width, height * width
    assert mean == pytest.approx(pairs / (length * (length - 1)) if length > 1 else 1)


@given(KINDS, st.integers(0, 7), SIDES, SIDES)
def test_measures_keep_to_their_range_and_do_not_see_the_direction(kind, index, height, width):
    order = make(kind, index, height, width)
    assert 0 <= continuity(order, width) <= 1 and continuity(order.flip(0), width) == continuity(order, width)
    assert neighbour_distance(order, width) == pytest.approx(neighbour_distance(order.flip(0), width))
    assert same_steps(order, order) == 1
    if height * width > 1:
        assert same_steps(order, order.flip(0)) == 0
        assert neighbour_distance(order, width) >= 1
        assert (longest_step(order, width) == 1) == (continuity(order, width) == 1)


@given(st.sampled_from(["zigzag", "sweep"]), SIDES, SIDES)
def test_neighbours_are_as_far_apart_in_a_zigzag_as_in_a_sweep(kind, height, width):
    across, down = height * (width - 1), (height - 1) * width
    expected = (across + down * width) / (across + down) if across + down else 0
    assert neighbour_distance(make(kind, 0, height, width), width) == pytest.approx(expected)


@given(st.integers(0, 7), st.integers(0, 7), st.integers(2, 6), st.integers(2, 6))
def test_same_steps_is_symmetric_and_counts(a, b, height, width):
    one, other = make("random", a, height, width), make("zigzag", b, height, width)
    assert same_steps(one, other) == pytest.approx(same_steps(other, one))
    pairs = [set(itertools.pairwise(order.tolist())) for order in (one, other)]
    assert same_steps(one, other) == pytest.approx(len(pairs[0] & pairs[1]) / (height * width - 1))


def test_the_table_has_a_line_for_each_layer():
    zigzag, sweep = (scan_order(kind, 0, height=2, width=3) for kind in ("zigzag", "sweep"))
    lines = order_table([path(0, "zigzag 0", zigzag, zigzag), path(11, "sweep 0", sweep, zigzag)]).splitlines()
    assert len(lines) == 3 and lines[0].split()[:3] == ["layer", "reads", "order"]
    assert lines[1].split() == ["0", "all", "zigzag", "0", "zigzag", "0", "100%", "0", "1.00", "1", "1.9", "apart"]
    assert lines[2].split() == ["11", "all", "sweep", "0", "zigzag", "0", "40%", "1", "0.80", "3", "1.9", "apart"]
    assert lines[1].index("100%") + 4 == lines[2].index("40%") + 3


@given(st.sets(st.integers(0, 30), min_size=1))
def test_joined_numbers_say_which(numbers):
    read = set()
    for part in join_numbers(sorted(numbers)).split(", "):
        first, _, last = part.partition("-")
        read |= set(range(int(first), int(last or first) + 1))
    assert read == numbers
