"""What there is to say of the orders that a model's layers read in: measures, and a table of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from .scan_orders import continuity, count_jumps, inverse_order

__all__ = [
    "LayerPath", "format_table", "join_numbers", "longest_step", "neighbour_distance", "order_table", "same_steps",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LayerPath:
    """The order that one layer reads in, and the one that it was trained with.

    Attributes:
        layer: its number, from 0.
        axis: "s" the tokens of each frame, "t" the frames of each place, "a" all tokens (LayerSchedule.axes).
        name: of the order, such as "zigzag 3".
        order: (l,) raster indices in the order in which they are read.
        grid: (rows, columns) that the order's tokens stand on: for time one row of frames; for all tokens of a video
            its frames, one below the other.
        over_picture: whether the grid is that of one picture.
        trained_name, trained_order: those that the model was trained with.
    """

    layer: int
    axis: str
    name: str
    order: torch.Tensor
    grid: tuple[int, int]
    over_picture: bool
    trained_name: str
    trained_order: torch.Tensor

    def reads_as(self, other: LayerPath) -> bool:
        """Whether the two layers read the same tokens in the same order."""
        return self.grid == other.grid and torch.equal(self.order, other.order)

    @property
    def departs(self) -> bool:
        """Whether the layer reads in another order than it was trained with."""
        return not torch.equal(self.order, self.trained_order)


def same_steps(order: torch.Tensor, other: torch.Tensor) -> float:
    """The share of steps of one order, from a token to the one read next, that the other takes too; in [0, 1].

    1 for equal orders, 0 for an order and its reverse (of two tokens and more). Both (l,), of one length.
    """
    length = order.numel()
    if length < 2:
        return 1.0
    place = inverse_order(other)
    return float((place[order[1:]] - place[order[:-1]] == 1).double().mean())


def neighbour_distance(order: torch.Tensor, width: int) -> float:
    """How many steps apart two neighbours on the grid are read, on average over all pairs; 1 at least, 0 for no pairs.

    What a scan has to remember for how long, to connect what stands together. The zigzag and the sweep are alike
    in it, with (h (w - 1) + (h - 1) w^2) / (h (w - 1) + (h - 1) w). It is the cost of Mitchison and Durbin, "Optimal
    numberings of an N x N array" (SIAM J. Alg. Disc. Meth. 7, 1986), for the exponent 1, divided by the pairs.
    """
    place = inverse_order(order).view(-1, width)
    apart = torch.cat([place.diff(dim=0).flatten(), place.diff(dim=1).flatten()]).abs()
    return float(apart.double().mean()) if apart.numel() else 0.0


def longest_step(order: torch.Tensor, width: int) -> int:
    """The longest way, in tokens along rows and columns, between two tokens read one after the other."""
    row, column = order // width, order % width
    steps = row.diff().abs() + column.diff().abs()
    return int(steps.max()) if steps.numel() else 0


def order_table(paths: Sequence[LayerPath]) -> str:
    """A line for each layer, under a line of headings; columns are set with spaces."""
    lines = [
        ["layer", "reads", "order", "trained with", "same steps", "jumps", "continuity", "longest step", "neighbours"]
    ]
    reads = {"s": "space", "t": "time", "a": "all"}
    for path in paths:
        order, width = path.order, path.grid[1]
        lines.append([
            str(path.layer), reads[path.axis], path.name, path.trained_name,
            f"{same_steps(order, path.trained_order):.0%}", str(count_jumps(order, width)),
            f"{continuity(order, width):.2f}", str(longest_step(order, width)),
            f"{neighbour_distance(order, width):.1f} apart",
        ])  # fmt: skip
    return format_table(lines, left=4)


def format_table(lines: Sequence[Sequence[str]], left: int) -> str:
    """Lines of words in columns; the first `left` columns start, the others end at the same place."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            word.ljust(width) if column < left else word.rjust(width)
            for column, (word, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def join_numbers(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> '0-2, 5': the form in which nodes take them."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    texts = (f"{part[0]}-{part[-1]}" if len(part) > 2 else ", ".join(map(str, part)) for part in parts)
    return ", ".join(texts)
