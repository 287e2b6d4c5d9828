"""The curve of a training, drawn with Pillow alone: hosts and small installations have no plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

from ..fonts import font_for
from ..sheet import FAINT_INK, HAIRLINE, INK, PAPER

__all__ = ["loss_plot"]

SCALE = 3  # lines are drawn this many times as large, and made smaller: Pillow's own have steps
RAW, SMOOTH, HELD_OUT = (158, 197, 232), (31, 119, 180), (217, 115, 13)
TEXT, GAP = 13, 10  # pixels
Points = Sequence[tuple[float, float]]


def loss_plot(entries: list[dict], size: tuple[int, int] = (900, 420)) -> Image.Image:
    """The losses of a log's entries (RunFolder.log_entries), and the validation losses, as a picture.

    Raises:
        ValueError: there is nothing to draw.
    """
    training = [(entry["step"], entry["loss"]) for entry in entries if entry.get("loss") is not None]
    validation = [(entry["step"], entry["validation_loss"]) for entry in entries if "validation_loss" in entry]
    training, validation = ([pair for pair in pairs if math.isfinite(pair[1])] for pairs in (training, validation))
    if not training and not validation:
        raise ValueError("the log has no losses yet: train some steps first")
    smooth = list(zip([step for step, _ in training], smoothed([loss for _, loss in training]), strict=True))
    curves = [("loss", RAW, 1, training), ("loss, smoothed", SMOOTH, 2, smooth),
              ("validation loss", HELD_OUT, 2, validation)]  # fmt: skip
    curves = [curve for curve in curves if curve[3]]
    shown = [pair for curve in curves for pair in curve[3]]
    steps = ticks(min(step for step, _ in shown), max(step for step, _ in shown), size[0] // 120, whole=True)
    losses = ticks(*_span([loss for _, loss in shown]), size[1] // 70)
    return _drawn(curves, steps, losses, size)


def _span(values: list[float]) -> tuple[float, float]:
    """Without the hundredth part that is highest: one spike would flatten all the rest."""
    ranked = sorted(values)
    return ranked[0], ranked[max(0, math.ceil(0.99 * len(ranked)) - 1)]


def ticks(least: float, most: float, count: int, whole: bool = False) -> list[float]:
    """About `count` round numbers, from the last at or below `least` to the first at or above `most`.

    >>> ticks(0, 300, 4, whole=True), ticks(0.21, 0.84, 4)
    ([0, 100, 200, 300], [0.2, 0.4, 0.6, 0.8, 1.0])
    """
    if most - least < 1e-6 * max(abs(most), 1e-6):  # one value, or as good as one
        wide = abs(most) / 2 or 1.0
        least, most = least - wide, most + wide
    rough = (most - least) / max(count, 2)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    if whole:
        step = max(1, round(step))
    first, last = math.floor(least / step + 1e-9), math.ceil(most / step - 1e-9)
    return [float(f"{k * step:.10g}") if not whole else k * step for k in range(first, max(last, first + 1) + 1)]


def smoothed(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential mean without the pull towards its first value."""
    found, mean, norm = [], 0.0, 0.0
    for value in values:
        mean, norm = weight * mean + (1 - weight) * value, weight * norm + (1 - weight)
        found.append(mean / norm)
    return found


def _drawn(curves: list, steps: list[float], losses: list[float], size: tuple[int, int]) -> Image.Image:
    (width, height), font = size, font_for("step loss", TEXT)
    names = [f"{value:g}" for value in losses]
    left = GAP * 3 + round(max(font.getlength(name) for name in names))
    area = (left, GAP * 2 + TEXT, width - 2 * GAP, height - 2 * TEXT - 3 * GAP)

    def place(step: float, loss: float) -> tuple[float, float]:
        x = area[0] + (step - steps[0]) / (steps[-1] - steps[0]) * (area[2] - area[0])
        y = area[3] - (loss - losses[0]) / (losses[-1] - losses[0]) * (area[3] - area[1])
        return x * SCALE, max(area[1], y) * SCALE

    large = Image.new("RGB", (width * SCALE, height * SCALE), PAPER)
    draw = ImageDraw.Draw(large)
    for loss in losses:
        draw.line([place(steps[0], loss), place(steps[-1], loss)], HAIRLINE, SCALE)
    for step in steps:
        draw.line([place(step, losses[0]), place(step, losses[-1])], HAIRLINE, SCALE)
    for _, colour, wide, pairs in curves:
        _curve(draw, [place(*pair) for pair in pairs], colour, wide * SCALE)
    picture = large.resize(size, Image.Resampling.BOX)

    draw = ImageDraw.Draw(picture)
    for loss, name in zip(losses, names, strict=True):
        draw.text((area[0] - GAP, place(steps[0], loss)[1] / SCALE), name, FAINT_INK, font, anchor="rm")
    for step in steps:
        draw.text((place(step, losses[0])[0] / SCALE, area[3] + GAP), f"{step:g}", FAINT_INK, font, anchor="mt")
    draw.text(((area[0] + area[2]) / 2, height - GAP), "step", INK, font, anchor="mb")
    x = area[2]
    for name, colour, _, _ in reversed(curves):
        draw.text((x, GAP + TEXT / 2), name, INK, font, anchor="rm")
        x -= font.getlength(name) + GAP
        draw.rectangle([x - 14, GAP + TEXT / 2 - 1, x, GAP + TEXT / 2 + 1], fill=colour)
        x -= 14 + 2 * GAP
    return picture


def _curve(draw: ImageDraw.ImageDraw, points: Points, colour: tuple[int, int, int], wide: int) -> None:
    if len(points) > 1:
        draw.line(points, colour, wide, joint="curve")
    if len(points) <= 40:  # so few that each is to be seen; one alone is no line
        for x, y in points:
            draw.ellipse([x - 1.2 * wide, y - 1.2 * wide, x + 1.2 * wide, y + 1.2 * wide], fill=colour)
