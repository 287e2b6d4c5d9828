"""From one layer's reading order to the next, without going back to the raster in between.

Between two mixers everything is token-wise: norms, modulation, cross-attention and residual do not care where a token
stands. So the stream stays in the order that the last layer read, and the next layer's norm, which reads and writes
every row anyway, gathers the rows by the *relative* permutation. The mixer then finds its tokens in scan order.

With P_i the order of layer i over all tokens (P_i[k] is the raster index of the token read at step k), row k of the
stream in layer i is the token P_i[k], and

    gather_0 = P_0,    gather_i = P_{i-1}^{-1} o P_i,    and at the end  P_last^{-1}  back to the raster.

A layer of a video model that mixes frames (or the tokens within frames) is one more such P: it brings the tokens of
each segment together, and the segments join the batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["LayerScan", "relative_scans"]


@dataclasses.dataclass(frozen=True)
class LayerScan:
    """How one layer comes to its tokens.

    Attributes:
        gather: (l,) row of the incoming stream for each row of this layer's; None where nothing moves.
        segments: independent sequences that the rows fall into, one after another.
        store: (l,) a further gather of the mixer's output, which some published weights were trained with; or None.
    """

    gather: Tensor | None
    segments: int = 1
    store: Tensor | None = None


def relative_scans(
    orders: Sequence[Tensor], axes: Sequence[str], grid: tuple[int, int], frames: int, device: torch.device,
    *, legacy_permutation: bool = False, reversed_time: bool = False,
) -> tuple[list[LayerScan], Tensor | None]:  # fmt: skip
    """Each layer's LayerScan, and the gather (l,) from the last layer's rows to the raster (None: nothing moves).

    Args:
        orders: one for each layer: (h*w,) for a layer that mixes space, (frames,) for time, all tokens otherwise.
        axes: of each layer: "s" the tokens of each frame, "t" the frames of each place, "a" all tokens.
        grid: (h, w) in tokens.
        frames: of a video, 0 for images.
        device: of the results.
        legacy_permutation: outputs are put back by the order again in place of its inverse (ZigMaConfig).
        reversed_time: layers that mix time write frame f to frame F - 1 - f (ZigMaConfig.corrected_time_order).
    """
    places, f = math.prod(grid), max(frames, 1)
    raster = torch.arange(f * places, device=device)
    made: dict[tuple[int, str], Tensor] = {}

    def full(order: Tensor, axis: str) -> Tensor:
        key = (id(order), axis)
        if key not in made:
            made[key] = _over_all_tokens(order.to(device), axis, f, places)
        return made[key]

    scans, inverse = [], raster
    for order, axis in zip(orders, axes, strict=True):
        here = full(order, axis)
        gather, inverse = inverse[here], here.argsort()
        store = None
        if legacy_permutation:
            store = inverse[_in_raster(order.to(device)[order.to(device)], axis, f, places)[here]]
        elif axis == "t" and reversed_time:
            store = inverse[_in_raster(torch.arange(f - 1, -1, -1, device=device), axis, f, places)[here]]
        segments = {"s": f, "t": places, "a": 1}[axis]
        scans.append(LayerScan(None if torch.equal(gather, raster) else gather, segments, store))
    return scans, None if torch.equal(inverse, raster) else inverse


def _over_all_tokens(order: Tensor, axis: str, frames: int, places: int) -> Tensor:
    """(l,) raster index of the token at row k, segment after segment, each in `order`."""
    if axis == "s":
        return (torch.arange(frames, device=order.device)[:, None] * places + order).flatten()
    if axis == "t":
        return (order * places + torch.arange(places, device=order.device)[:, None]).flatten()
    return order


def _in_raster(move: Tensor, axis: str, frames: int, places: int) -> Tensor:
    """(l,) the raster index that each raster index takes its value from, by a move within its segment."""
    if axis == "s":
        return (torch.arange(frames, device=move.device)[:, None] * places + move).flatten()
    if axis == "t":
        return (move[:, None] * places + torch.arange(places, device=move.device)).flatten()
    return move
