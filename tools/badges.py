"""Draw workflows/badges/ anew, the six pictures that workflows/fine_tune.json learns from: `python tools/badges.py`.

One style that no emoji has: a cream figure with one orange detail on a dark disc, inside a ring of dots.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw

FOLDER = Path(__file__).resolve().parents[1] / "workflows" / "badges"
SIZE, SCALE = 64, 16  # pixels of a picture, and how many times as large it is drawn
PAPER, DISC, CREAM, ORANGE = "white", "#16324a", "#f6e7c1", "#f08a24"

Figure = Callable[["Pen"], None]
FIGURES: dict[str, Figure] = {}


def figure(function: Figure) -> Figure:
    """A picture of the function's name, which is its caption too."""
    FIGURES[function.__name__.replace("_", " ")] = function
    return function


class Pen:
    """Drawing on a canvas from (-1, -1) to (1, 1) with y upwards, the disc within radius 1."""

    def __init__(self) -> None:
        side = SIZE * SCALE
        self.picture = Image.new("RGB", (side, side), PAPER)
        self.draw = ImageDraw.Draw(self.picture)
        self.middle, self.unit = side / 2, 0.47 * side

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a point."""
        return self.middle + x * self.unit, self.middle - y * self.unit

    def disc(self, x: float, y: float, radius: float, colour: str, high: float | None = None) -> None:
        """An ellipse of half-width `radius` and half-height `high`."""
        high = radius if high is None else high
        self.draw.ellipse([*self.at(x - radius, y + high), *self.at(x + radius, y - high)], fill=colour)

    def shape(self, points: list[tuple[float, float]], colour: str) -> None:
        """A polygon."""
        self.draw.polygon([self.at(*point) for point in points], fill=colour)

    def line(self, points: list[tuple[float, float]], colour: str, wide: float) -> None:
        """A line with round ends."""
        self.draw.line([self.at(*point) for point in points], colour, round(wide * self.unit), joint="curve")
        for point in (points[0], points[-1]):
            self.disc(*point, wide / 2, colour)


@figure
def apple(pen: Pen) -> None:
    """With an orange leaf."""
    for side in (-1, 1):
        pen.disc(0.17 * side, -0.12, 0.34, CREAM, 0.42)
    pen.line([(0, 0.2), (0.04, 0.46)], CREAM, 0.08)
    pen.shape([(0.06, 0.34), (0.22, 0.52), (0.46, 0.5), (0.3, 0.32)], ORANGE)


@figure
def fish(pen: Pen) -> None:
    """Swimming to the left, with an orange fin."""
    pen.disc(-0.1, 0, 0.46, CREAM, 0.3)
    pen.shape([(0.25, 0), (0.62, 0.32), (0.54, 0), (0.62, -0.32)], CREAM)
    pen.shape([(-0.08, 0.04), (0.2, 0.2), (0.16, -0.12)], ORANGE)
    pen.disc(-0.34, 0.07, 0.06, DISC)


@figure
def mushroom(pen: Pen) -> None:
    """With orange dots."""
    pen.disc(0, 0.04, 0.54, CREAM, 0.5)
    pen.draw.rectangle([*pen.at(-0.6, 0.02), *pen.at(0.6, -0.5)], fill=DISC)
    pen.shape([(-0.17, 0.04), (0.17, 0.04), (0.24, -0.54), (-0.24, -0.54)], CREAM)
    for x, y, radius in ((-0.24, 0.22, 0.09), (0.06, 0.34, 0.1), (0.28, 0.16, 0.08)):
        pen.disc(x, y, radius, ORANGE)


@figure
def moon(pen: Pen) -> None:
    """With an orange star."""
    pen.disc(-0.04, 0, 0.54, CREAM)
    pen.disc(0.2, 0.12, 0.46, DISC)
    pen.shape(star(0.27, 0.14, 0.24), ORANGE)


@figure
def heart(pen: Pen) -> None:
    """With an orange band."""
    for side in (-1, 1):
        pen.disc(0.24 * side, 0.17, 0.27, CREAM)
    pen.shape([(-0.5, 0.1), (0.5, 0.1), (0, -0.52)], CREAM)
    pen.line([(-0.3, -0.1), (0.3, 0.16)], ORANGE, 0.11)


@figure
def tree(pen: Pen) -> None:
    """With an orange trunk."""
    pen.draw.rectangle([*pen.at(-0.09, -0.3), *pen.at(0.09, -0.6)], fill=ORANGE)
    for base, top, wide in ((-0.36, 0.1, 0.5), (-0.1, 0.36, 0.4), (0.16, 0.62, 0.3)):
        pen.shape([(-wide, base), (wide, base), (0, top)], CREAM)


def star(x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Five points."""
    rays = [(math.pi / 2 + k * math.pi / 5, radius * (0.42 if k % 2 else 1)) for k in range(10)]
    return [(x + r * math.cos(angle), y + r * math.sin(angle)) for angle, r in rays]


def drawn(inside: Figure) -> Image.Image:
    """A badge."""
    pen = Pen()
    pen.disc(0, 0, 1, DISC)
    for k in range(24):
        pen.disc(0.86 * math.cos(k * math.pi / 12), 0.86 * math.sin(k * math.pi / 12), 0.05, CREAM)
    inside(pen)
    return pen.picture.resize((SIZE, SIZE), Image.Resampling.BOX)


def main() -> None:
    """Write the pictures and their captions."""
    FOLDER.mkdir(exist_ok=True)
    for name, inside in FIGURES.items():
        path = FOLDER / f"{name.replace(' ', '_')}.png"
        drawn(inside).save(path, optimize=True)
        path.with_suffix(".txt").write_text(f"{name}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
