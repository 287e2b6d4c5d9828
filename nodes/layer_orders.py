"""The token orders of a MODEL's layers in a graph: how they travel, what they are, how far from the trained ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..zigma.order_table import LayerPath, join_numbers, order_table, same_steps
from ..zigma.scan_orders import scan_order

__all__ = [
    "SCAN_ORDERS", "CustomOrder", "LayerOrder", "departure", "grid_of", "layer_paths", "make_order", "report",
    "schedule_of", "settable_layers", "token_pixels",
]  # fmt: skip

# Where a graph's token orders travel: transformer_options of a cloned MODEL, which reach `forward` and nothing else.
SCAN_ORDERS = "zigma_scan_orders"


class CustomOrder(NamedTuple):
    """An order that a user wrote; hashable at no cost, as every step of a sampling run asks for it.

    Attributes:
        kind: "custom".
        index: which of those that were written.
        grid: (rows, columns) of tokens that it is for.
        indices: the raster indices, as the bytes of int64 numbers.
    """

    kind: str
    index: int
    grid: tuple[int, int]
    indices: bytes

    @classmethod
    def of(cls, order: Tensor, index: int, grid: tuple[int, int]) -> CustomOrder:
        """From a LongTensor (rows * columns,)."""
        return cls("custom", index, grid, order.numpy().tobytes())

    def order(self) -> Tensor:
        """LongTensor (rows * columns,)."""
        return torch.frombuffer(bytearray(self.indices), dtype=torch.long)


# What a layer reads in place of its own: (kind, index, seed), which scan_order needs beside the grid, or numbers.
LayerOrder = tuple[str, int, int] | CustomOrder


def make_order(entry: LayerOrder, grid: tuple[int, int]) -> Tensor:
    """The order of an entry on a grid (height, width) of tokens.

    Raises:
        ValueError: a custom order is for another grid.
    """
    if isinstance(entry, CustomOrder):
        if entry.grid != tuple(grid):
            raise ValueError(
                "make the latent of the size that the custom scan order was written for, or write the order for this "
                f"one (width and height of ZigMa Scan Order): got {grid[0]} x {grid[1]} tokens, expected "
                f"{entry.grid[0]} x {entry.grid[1]}"
            )
        return entry.order()
    kind, index, seed = entry
    generator = torch.Generator().manual_seed(seed + index)
    return scan_order(kind, index, height=grid[0], width=grid[1], generator=generator)


def schedule_of(model, depth: int) -> list[LayerOrder | None]:
    """What chained nodes gave each layer of a MODEL; None leaves it its own order."""
    options = model.model_options.get("transformer_options", {})
    return list(options.get(SCAN_ORDERS) or [None] * depth)


def settable_layers(network) -> list[int]:
    """The layers that read the patches of one picture: all, or the spatial ones of a video model."""
    video = network.config.video_frames > 0
    return [layer for layer, axis in enumerate(network.schedule.axes) if axis == "s" or (axis == "a" and not video)]


def token_pixels(model, network) -> int:
    """The side of a token in pixels of the decoded picture."""
    return model.get_model_object("latent_format").zigma.downscale * network.config.patch_size


def grid_of(model, network, width: int, height: int) -> tuple[int, int]:
    """(rows, columns) of tokens of a picture of width x height pixels; 0 is the side that the model was trained on.

    Raises:
        ValueError: a side that is no multiple of a token.
    """
    unit, sides = token_pixels(model, network), []
    for name, pixels, own in (("height", height, network.config.grid[0]), ("width", width, network.config.grid[1])):
        if pixels % unit:
            nearest = max(1, round(pixels / unit)) * unit
            raise ValueError(
                f"set the {name} to {nearest}: got {pixels}, expected a multiple of {unit} pixels (one token of this "
                "model)"
            )
        sides.append(pixels // unit or own)
    return sides[0], sides[1]


def layer_paths(network, schedule: list[LayerOrder | None], grid: tuple[int, int]) -> list[LayerPath]:
    """Every layer's order on a grid (rows, columns), beside the one that it was trained with.

    Raises:
        ValueError: an order, of the graph or of the model's file, is for another grid.
    """
    frames, (rows, columns) = network.config.video_frames, grid
    own = network.layer_orders(rows, columns, frames)
    names = network.schedule.names()
    if network.token_orders is not None:
        names = [
            "of the file" if axis != "t" else name for name, axis in zip(names, network.schedule.axes, strict=True)
        ]
    grids = {"s": grid, "t": (1, frames), "a": (max(frames, 1) * rows, columns)}
    made = {entry: make_order(entry, grid) for entry in dict.fromkeys(schedule) if entry is not None}
    return [
        LayerPath(
            layer=layer, axis=axis, name=names[layer] if entry is None else f"{entry[0]} {entry[1]}",
            order=own[layer] if entry is None else made[entry], grid=grids[axis],
            over_picture=axis == "s" or (axis == "a" and not frames), trained_name=names[layer],
            trained_order=own[layer],
        )
        for layer, (axis, entry) in enumerate(zip(network.schedule.axes, schedule, strict=True))
    ]  # fmt: skip


def departure(network, paths: list[LayerPath]) -> str:
    """A sentence about the layers that read in another order than they were trained with; empty if none does."""
    other = [path for path in paths if path.departs]
    if not other:
        return ""
    if network.config.mixer == "attention":
        return "the layers of this model mix by attention, which has no order: other scan orders change nothing"
    shares: dict[str, list[int]] = {}
    for path in other:
        shares.setdefault(f"{same_steps(path.order, path.trained_order):.0%}", []).append(path.layer)
    which = "; ".join(f"layer{'s' * (len(layers) > 1)} {join_numbers(layers)}: {share}"
                      for share, layers in shares.items())  # fmt: skip
    return (
        f"{len(other)} of {len(paths)} layers read in another order than the model was trained with, so expect worse "
        f"pictures; token steps that are the same: {which}"
    )


def report(network, paths: list[LayerPath], remarks: list[str]) -> str:
    """Remarks, how far the layers depart from the training, and the table of all layers."""
    summary = departure(network, paths) or "all layers read in the order that the model was trained with"
    return "\n".join([*remarks, summary, "", order_table(paths)])
