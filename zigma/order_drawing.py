"""Token orders drawn as the paths they are, on squared paper or over a picture."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw

from .order_table import LayerPath, join_numbers
from .scan_orders import continuity, count_jumps
from .sheet import HAIRLINE, INK, PAPER, labelled_sheet

__all__ = ["draw_order", "draw_paths"]

# A path's colours from its first token to its last: dark blue, teal, green, yellow (after viridis; light means late).
PATH_COLOURS = ((68, 33, 116), (48, 103, 141), (38, 160, 134), (122, 202, 80), (236, 212, 40))
# The same hues, all of them light: with a dark line round them they stand out from dark and from light pictures.
LIGHT_COLOURS = ((176, 150, 255), (96, 190, 255), (72, 226, 196), (160, 240, 110), (255, 236, 70))
JUMP, LIGHT_JUMP = (214, 88, 74), (255, 150, 132)
OUTLINE = (16, 18, 22)
CROWD = 400  # jumps that are still drawn one by one, with smooth edges
CANVAS = 2560  # the longer side, in pixels, that an enlarged drawing has at most

Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class _Brush:
    """Draws on an enlarged layer; sizes are in its pixels."""

    draw: ImageDraw.ImageDraw
    sides: tuple[int, int]  # of the layer
    pixel: int  # of the finished drawing
    steps: Point  # from one token to the next, along columns and along rows
    outlined: bool

    @property
    def cell(self) -> float:
        """The shorter side of a token."""
        return min(self.steps)

    @property
    def stroke(self) -> int:
        """The width of the path."""
        return max(1, round(max(0.22 * self.cell, min(2 * self.pixel, 0.42 * self.cell))))

    @property
    def jump(self) -> tuple[int, int, int]:
        """The colour of jumps."""
        return LIGHT_JUMP if self.outlined else JUMP

    def places(self, rows: torch.Tensor, columns: torch.Tensor) -> list[Point]:
        """The centres of tokens."""
        x, y = (columns + 0.5) * self.steps[0], (rows + 0.5) * self.steps[1]
        return list(zip(x.tolist(), y.tolist(), strict=True))

    def line(self, start: Point, end: Point, colour: tuple[int, ...], width: float) -> None:
        self.draw.line((*start, *end), colour, max(1, round(width)))

    def disc(self, centre: Point, radius: float, colour: tuple[int, ...]) -> None:
        x, y = centre
        self.draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)

    def square(self, centre: Point, radius: float, colour: tuple[int, ...]) -> None:
        x, y = centre
        self.draw.rectangle((x - radius, y - radius, x + radius, y + radius), fill=colour)

    def colour(self, fraction: float) -> tuple[int, ...]:
        """The colour at `fraction` (0 to 1) of the way, linear between the stops."""
        colours = LIGHT_COLOURS if self.outlined else PATH_COLOURS
        position = fraction * (len(colours) - 1)
        left = min(int(position), len(colours) - 2)
        pairs = zip(colours[left], colours[left + 1], strict=True)
        return (*(round(a + (b - a) * (position - left)) for a, b in pairs), 255)


def draw_order(
    order: torch.Tensor, height: int, width: int, *, size: int | None = None, over: Image.Image | None = None,
    opacity: float = 1.0,
) -> Image.Image:  # fmt: skip
    """A token order as a path over the grid, from a dark disc (or a violet one, over a picture) to a yellow square.

    A step to one of the eight neighbours is a thick line, any other a thin red one; `count_jumps` is stricter, with
    four neighbours.

    Args:
        order: (height * width,) raster indices in the order in which they are read.
        height, width: the grid in tokens.
        size: the longer side of the drawing, in pixels; None is that of the picture, or 240 and more for large grids.
        over: a picture under the path, on which the grid is spread; None is squared paper.
        opacity: of the path, above 0 and up to 1.

    Raises:
        ValueError: for an order of another grid, and an opacity out of range.
    """
    if order.dim() != 1 or order.numel() != height * width:
        raise ValueError(
            f"got an order of shape {tuple(order.shape)}, but a grid of {height}x{width} has {height * width} tokens"
        )
    if not 0 < opacity <= 1:
        raise ValueError(f"got an opacity of {opacity}, expected a number above 0 and up to 1")
    if size is None:
        size = default_size(height, width) if over is None else max(over.size)
    scale = size / max(over.size) if over is not None else size / max(height, width)
    sides = over.size if over is not None else (width, height)
    sides = tuple(max(1, round(scale * side)) for side in sides)
    pixel = max(1, min(4, CANVAS // max(sides)))  # Pillow draws lines without anti-aliasing: draw larger, then shrink
    layer = _path_layer(order, height, width, sides, pixel, outlined=over is not None)
    if opacity < 1:
        layer.putalpha(layer.getchannel("A").point(lambda alpha: round(alpha * opacity)))
    if over is None:
        paper = _squared_paper(sides, height, width)
    else:
        paper = over.convert("RGB")
        paper = paper if paper.size == sides else paper.resize(sides, Image.Resampling.LANCZOS)
    return Image.alpha_composite(paper.convert("RGBA"), layer).convert("RGB")


def default_size(height: int, width: int) -> int:
    """The longer side in pixels at which a drawing of this grid can be read: 240, or 6 for each token, up to 1024."""
    return min(1024, max(240, 6 * max(height, width)))


def draw_paths(
    paths: Sequence[LayerPath], *, size: int | None = None, over: Image.Image | None = None, opacity: float = 1.0,
    columns: int | None = None, title: str = "",
) -> Image.Image:  # fmt: skip
    """A labelled sheet of the layers' paths; layers that read in the same order share a drawing.

    Arguments as in `draw_order` and `labelled_sheet`; a small picture is enlarged until its grid can be read. Layers
    that mix time are drawn as a strip of frames, without the picture.
    """
    groups: list[list[LayerPath]] = []
    for path in paths:
        alike = (g for g in groups if (g[0].name, g[0].axis) == (path.name, path.axis) and g[0].reads_as(path))
        group = next(alike, None)
        if group is None:
            groups.append([path])
        else:
            group.append(path)
    drawings, captions = [], []
    for group in groups:
        path, (height, width) = group[0], group[0].grid
        under, sides = over if path.over_picture else None, size
        if under is not None and size is None:
            sides = max(*under.size, default_size(height, width))
        drawings.append(draw_order(path.order, height, width, size=sides, over=under, opacity=opacity))
        jumps = count_jumps(path.order, width)
        captions.append(
            f"{'layer' if len(group) == 1 else 'layers'} {join_numbers([p.layer for p in group])}: {path.name}\n"
            f"{jumps or 'no'} jump{'s' * (jumps != 1)}, continuity {continuity(path.order, width):.2f}"
        )
    return labelled_sheet(
        drawings, captions, columns=columns, title=title, text_size=max(13, max(d.width for d in drawings) // 30),
        footnote=_legend([group[0] for group in groups], over is not None),
    )  # fmt: skip


def _legend(paths: Sequence[LayerPath], over_picture: bool) -> str:
    words = [f"From the {'violet' if over_picture else 'dark'} disc to the yellow square."]
    near = [_is_near(path.order // path.grid[1], path.order % path.grid[1]) for path in paths]
    far = [int((~flags).sum()) for flags in near]
    if any(far):
        words.append("Red lines are jumps.")
    if any(count_jumps(path.order, path.grid[1]) > count for path, count in zip(paths, far, strict=True)):
        words.append("Jumps to a diagonal neighbour are drawn as path.")
    return " ".join(words)


def _is_near(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """(l-1,) whether a step goes to one of the eight neighbours."""
    return torch.maximum(rows.diff().abs(), columns.diff().abs()) <= 1


def _path_layer(
    order: torch.Tensor, height: int, width: int, sides: tuple[int, int], pixel: int, outlined: bool
) -> Image.Image:
    """The path alone on a transparent ground of `sides` pixels: jumps below, then steps, then the two ends."""
    rows, columns = order // width, order % width
    near = _is_near(rows, columns).tolist()
    crowded = near.count(False) > CROWD
    jumps = Image.new("RGBA", sides if crowded else (pixel * sides[0], pixel * sides[1]))
    brush = _brush(jumps, 1 if crowded else pixel, height, width, outlined)
    places = brush.places(rows, columns)
    _draw_jumps(brush, [step for step, is_near in zip(itertools.pairwise(places), near, strict=True) if not is_near])

    path = Image.new("RGBA", (pixel * sides[0], pixel * sides[1]))
    brush = _brush(path, pixel, height, width, outlined)
    places = brush.places(rows, columns)
    _draw_steps(brush, places, near)
    if len(places) > 1:
        _draw_end(brush, brush.square, places[-1], 1.0)
    _draw_end(brush, brush.disc, places[0], 0.0)
    return Image.alpha_composite(jumps if crowded else jumps.reduce(pixel), path.reduce(pixel))


def _draw_jumps(brush: _Brush, jumps: list[tuple[Point, Point]]) -> None:
    """Thin lines, fainter the more there are: a few are to be seen one by one, thousands as a haze."""
    if not jumps:
        return
    alpha = round(255 * max(0.16, min(0.9, 12 / len(jumps) ** 0.5)))
    thin = max(1.2 * brush.pixel, 0.05 * brush.cell)
    if brush.outlined and len(jumps) <= CROWD:
        for start, end in jumps:
            brush.line(start, end, (*OUTLINE, round(0.6 * alpha)), thin + 2 * brush.pixel)
    for start, end in jumps:
        brush.line(start, end, (*brush.jump, alpha), thin)


def _draw_steps(brush: _Brush, places: list[Point], near: list[bool]) -> None:
    """The steps to neighbours, round at turns and ends; a token that none of them reaches is a dot of its own."""
    stroke, last = brush.stroke, max(1, len(places) - 1)
    steps = [
        (number, start, end)
        for number, ((start, end), is_near) in enumerate(zip(itertools.pairwise(places), near, strict=True))
        if is_near
    ]
    dots = []
    for number, (before, after) in enumerate(zip([False, *near], [*near, False], strict=True)):
        if not before and not after:
            dots.append((number, places[number], max(0.28 * brush.cell, (stroke - 1) / 2)))
        elif not (before and after) or _turns(*places[number - 1 : number + 2]):
            dots.append((number, places[number], (stroke - 1) / 2))
    if brush.outlined:
        edge = max(brush.pixel, round(0.05 * brush.cell))
        for _, start, end in steps:
            brush.line(start, end, (*OUTLINE, 225), stroke + 2 * edge)
        for _, place, radius in dots:
            brush.disc(place, radius + edge, (*OUTLINE, 225))
    pieces = -(-64 // last)  # of a step: on a small grid a single colour for each would be coarse
    for number, (x, y), (x1, y1) in steps:
        along = [(x + (x1 - x) * piece / pieces, y + (y1 - y) * piece / pieces) for piece in range(pieces + 1)]
        for piece, (start, end) in enumerate(itertools.pairwise(along)):
            brush.line(start, end, brush.colour((number + (piece + 0.5) / pieces) / last), stroke)
    for number, place, radius in dots:
        brush.disc(place, radius, brush.colour(number / last))


def _turns(before: Point, here: Point, after: Point) -> bool:
    return abs(before[0] + after[0] - 2 * here[0]) + abs(before[1] + after[1] - 2 * here[1]) > 0.5


def _draw_end(brush: _Brush, shape, place: Point, fraction: float) -> None:
    """A mark of one end, moved inwards where a large grid would have it cut off."""
    radius, rim = max(0.28 * brush.cell, 3.5 * brush.pixel), max(2 * brush.pixel, 0.06 * brush.cell)
    x, y = (
        min(max(at, radius + rim), max(side - radius - rim, side / 2))
        for at, side in zip(place, brush.sides, strict=True)
    )
    for wider, colour in ((rim, (*INK, 255)), (rim / 2, (*PAPER, 255)), (0, brush.colour(fraction))):
        shape((x, y), radius + wider, colour)


def _brush(layer: Image.Image, pixel: int, height: int, width: int, outlined: bool) -> _Brush:
    steps = (layer.width / width, layer.height / height)
    return _Brush(ImageDraw.Draw(layer), layer.size, pixel, steps, outlined)


def _squared_paper(sides: tuple[int, int], height: int, width: int) -> Image.Image:
    paper = Image.new("RGB", sides, PAPER)
    cell_w, cell_h = sides[0] / width, sides[1] / height
    if min(cell_w, cell_h) >= 6:  # below that the grid would be all there is to see
        draw = ImageDraw.Draw(paper)
        for column in range(width + 1):
            x = min(round(column * cell_w), sides[0] - 1)
            draw.line((x, 0, x, sides[1]), HAIRLINE)
        for row in range(height + 1):
            y = min(round(row * cell_h), sides[1] - 1)
            draw.line((0, y, sides[0], y), HAIRLINE)
    return paper
