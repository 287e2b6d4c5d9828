"""The curve of a training: round numbers around the data, and the data where they belong."""

from __future__ import annotations

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zigma.training.loss_drawing import loss_plot, smoothed, ticks

FINITE = st.floats(-1e6, 1e6, allow_subnormal=False)


@given(FINITE, FINITE, st.integers(1, 12), st.booleans())
def test_ticks_enclose_what_is_shown_and_are_evenly_spaced(a, b, count, whole):
    least, most = (round(min(a, b)), round(max(a, b))) if whole else (min(a, b), max(a, b))
    found = ticks(least, most, count, whole)
    slack = 1e-6 * max(1, abs(least), abs(most))
    assert found[0] <= least + slack and found[-1] >= most - slack and len(set(found)) == len(found)
    assert 2 <= len(found) <= 3 * max(count, 2) + 2
    assert numpy.allclose(numpy.diff(found), found[1] - found[0], rtol=1e-3, atol=slack)
    if whole:
        assert all(value == int(value) for value in found)


@given(st.lists(FINITE, min_size=1, max_size=50))
def test_smoothing_begins_at_the_first_loss_and_stays_within_them(values):
    found = smoothed(values)
    slack = 1e-6 * max(1, *map(abs, values))
    assert abs(found[0] - values[0]) < slack
    assert min(values) - slack <= min(found) and max(found) <= max(values) + slack


@pytest.mark.parametrize(
    "losses", [[0.5], [0.5, 0.5], [0.0], [0.1, 1e9, 0.2], [0.3, None, 0.2], [0.2, float("nan")], [-1.0, 2.0]]
)
def test_any_losses_are_drawn_at_the_size_asked_for(losses):
    entries = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    picture = loss_plot(entries, (400, 240))
    assert picture.size == (400, 240) and len(picture.getcolors(100000)) > 20


def test_a_falling_loss_falls_on_the_page():
    entries = [{"step": step, "loss": 1 - step / 200} for step in range(1, 201)]
    pixels = numpy.asarray(loss_plot(entries, (600, 300)).convert("RGB")).astype(int)
    curve = numpy.abs(pixels[40:] - (31, 119, 180)).sum(-1) < 40  # below the legend
    rows, columns = numpy.nonzero(curve)
    assert numpy.corrcoef(rows, columns)[0, 1] > 0.99


def test_a_log_without_losses_is_a_sentence():
    with pytest.raises(ValueError, match="no losses yet"):
        loss_plot([{"step": 1, "loss": None}, {"step": 2, "loss": float("nan")}])
