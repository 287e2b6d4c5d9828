"""Token orders: in which sequence a state-space layer reads the patches of a picture.

A token order is a value, a LongTensor `o` of length h*w: `o[k]` is the raster index (row * w + column) of the token
that is read at step k. An order is a permutation, its inverse is `torch.argsort(o)`, and gathering by one undoes
gathering by the other:

    tokens[:, o][:, inverse(o)] == tokens

Everything else in the project takes orders as arguments: the model (one per layer), the scan kernels (which gather
and scatter by them), the nodes (which draw them).

Zigzag orders: ZigMa, arXiv 2403.13802, section 3.2. The Hilbert walk: the generalised ("gilbert") curve for any
rectangle.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch

__all__ = [
    "LayerSchedule",
    "available_orders",
    "continuity",
    "count_jumps",
    "inverse_order",
    "is_order",
    "order_schedule",
    "register_order",
    "repeat_orders",
    "scan_order",
]

OrderFunction = Callable[..., torch.Tensor]

_REGISTRY: dict[str, tuple[OrderFunction, int]] = {}


def register_order(name: str, count: int) -> Callable[[OrderFunction], OrderFunction]:
    """Make `function(index, height, width, generator)` known as `scan_order(name, ...)` for index 0 ... count-1."""

    def register(function: OrderFunction) -> OrderFunction:
        if name in _REGISTRY:
            raise ValueError(f"token order {name!r} is registered already; choose another name")
        _REGISTRY[name] = (function, count)
        return function

    return register


def available_orders() -> dict[str, int]:
    """Names of the token orders, each with the number of indices it has."""
    return {name: count for name, (_, count) in _REGISTRY.items()}


def scan_order(
    kind: str, index: int = 0, *, height: int, width: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """The token order `kind`, variant `index`, on a grid of height x width tokens.

    Args:
        kind: a name of `available_orders()`.
        index: which variant, from 0.
        height, width: the grid in tokens (the latent's sides divided by the patch size).
        generator: a CPU generator, required by "random" and unused by the others.

    Returns:
        LongTensor (height * width,) on the CPU: raster indices in the order in which they are read.

    Raises:
        ValueError: unknown kind, index out of range, empty grid, or "random" without a generator.
    """
    if kind not in _REGISTRY:
        raise ValueError(f"unknown token order {kind!r}: choose one of {', '.join(_REGISTRY)}")
    function, count = _REGISTRY[kind]
    if not 0 <= index < count:
        raise ValueError(f"token order {kind!r} has no index {index}: it has {count}, from 0 to {count - 1}")
    if height < 1 or width < 1:
        raise ValueError(f"a token grid of {height}x{width} is empty: both sides have to be at least 1")
    return function(index, height, width, generator)


def inverse_order(order: torch.Tensor) -> torch.Tensor:
    """The order that undoes `order`: argsort. Shape (l,) -> (l,)."""
    return torch.argsort(order)


def is_order(order: torch.Tensor, length: int | None = None) -> bool:
    """Whether `order` (l,) is a permutation of 0 ... l-1 (and has `length` entries, if given)."""
    if order.dim() != 1 or order.dtype.is_floating_point or (length is not None and order.numel() != length):
        return False
    return bool(torch.equal(torch.sort(order).values, torch.arange(order.numel(), device=order.device)))


def count_jumps(order: torch.Tensor, width: int) -> int:
    """How often two tokens read one after the other are not neighbours (left, right, above or below) on the grid.

    0 means a continuous path, the property for which zigzag was introduced (ZigMa, section 3.2: spatial continuity).
    """
    row, column = order // width, order % width
    return int(((row.diff().abs() + column.diff().abs()) != 1).sum())


def continuity(order: torch.Tensor, width: int) -> float:
    """The share of steps that go to a neighbour (left, right, above or below) on the grid: 1 - jumps / (l - 1).

    In [0, 1], 1 for a path that never jumps and for a single token. On h x w tokens, read along rows: 1 for a zigzag,
    1 - (h - 1) / (h w - 1) for a sweep of w > 1 columns, and (4 h w - 2 h - 2 w) / (h w (h w - 1)) on average over all
    random orders. It is C, the share of contiguous segments, of Mokbel, Aref and Kamel, "Analysis of
    multi-dimensional space-filling curves", GeoInformatica 7 (2003).

    Args:
        order: (l,) raster indices in the order in which they are read.
        width: columns of the grid.
    """
    steps = order.numel() - 1
    return 1.0 if steps < 1 else 1 - count_jumps(order, width) / steps


def _seen_from_corner(index: int, height: int, width: int) -> torch.Tensor:
    """The grid of raster indices turned so that variant `index` starts at its top left and reads along its rows.

    index // 2 is the corner (top-left, top-right, bottom-left, bottom-right); odd ones read along columns.
    """
    corner, by_columns = divmod(index, 2)
    grid = torch.arange(height * width).view(height, width)
    if corner & 2:
        grid = grid.flip(0)
    if corner & 1:
        grid = grid.flip(1)
    return grid.t() if by_columns else grid


@register_order("zigzag", 8)
def _zigzag(index: int, height: int, width: int, generator: torch.Generator | None) -> torch.Tensor:
    """The eight snakes: four corners (top-left, top-right, bottom-left, bottom-right), each by rows, then by columns.

    A snake turns round at the end of every line, so that no step jumps.
    """
    grid = _seen_from_corner(index, height, width).clone()
    grid[1::2] = grid[1::2].flip(1)
    return grid.reshape(-1)


@register_order("sweep", 8)
def _sweep(index: int, height: int, width: int, generator: torch.Generator | None) -> torch.Tensor:
    """Every line in the same direction, as a page is read: jumps at each line's end. Corners as in zigzag."""
    return _seen_from_corner(index, height, width).reshape(-1)


@register_order("bidirectional", 4)
def _bidirectional(index: int, height: int, width: int, generator: torch.Generator | None) -> torch.Tensor:
    """The raster and its reverse, by rows and then by columns: in turn they read both ways (Vim, 2401.09417)."""
    backwards, by_columns = index % 2, index // 2
    order = _sweep(by_columns, height, width, generator)
    return order.flip(0) if backwards else order


@register_order("diagonal", 8)
def _diagonal(index: int, height: int, width: int, generator: torch.Generator | None) -> torch.Tensor:
    """Anti-diagonals as in JPEG's zigzag, turning round at each end: steps to diagonal neighbours. Corners as above."""
    grid = _seen_from_corner(index, height, width)
    rows, columns = grid.shape
    path = []
    for diagonal in range(rows + columns - 1):
        cells = [(row, diagonal - row) for row in range(rows) if 0 <= diagonal - row < columns]
        path += cells if diagonal % 2 else cells[::-1]
    return torch.stack([grid[row, column] for row, column in path])


def _gilbert(height: int, width: int) -> list[tuple[int, int]]:
    """The generalised Hilbert curve on any rectangle: the (x, y) cells in the order of the walk.

    A rectangle is spanned by a major vector (ax, ay) and an orthogonal vector (bx, by), and is split into two along
    the major one when long, else into three: up, along, and down again. Halves round toward minus infinity, which the
    published tables depend on.
    """
    path: list[tuple[int, int]] = []

    def sign(value: int) -> int:
        return (value > 0) - (value < 0)

    def walk(x: int, y: int, ax: int, ay: int, bx: int, by: int) -> None:
        w, h = abs(ax + ay), abs(bx + by)
        dax, day, dbx, dby = sign(ax), sign(ay), sign(bx), sign(by)
        if h == 1:
            path.extend((x + k * dax, y + k * day) for k in range(w))
            return
        if w == 1:
            path.extend((x + k * dbx, y + k * dby) for k in range(h))
            return
        ax2, ay2, bx2, by2 = ax // 2, ay // 2, bx // 2, by // 2
        if 2 * w > 3 * h:
            if abs(ax2 + ay2) % 2 and w > 2:
                ax2, ay2 = ax2 + dax, ay2 + day
            walk(x, y, ax2, ay2, bx, by)
            walk(x + ax2, y + ay2, ax - ax2, ay - ay2, bx, by)
        else:
            if abs(bx2 + by2) % 2 and h > 2:
                bx2, by2 = bx2 + dbx, by2 + dby
            walk(x, y, bx2, by2, ax2, ay2)
            walk(x + bx2, y + by2, ax, ay, bx - bx2, by - by2)
            walk(x + ax - dax + bx2 - dbx, y + ay - day + by2 - dby, -bx2, -by2, -(ax - ax2), -(ay - ay2))

    # Along the longer side first, as the curve's authors do: it avoids most of the diagonal steps of odd rectangles.
    if width >= height:
        walk(0, 0, width, 0, 0, height)
    else:
        walk(0, 0, 0, height, width, 0)
    return path


def _square_variant(grid: torch.Tensor, index: int) -> torch.Tensor:
    """Variant `index` of a table: rotated counter-clockwise by index // 2 quarter turns, transposed when odd."""
    quarter_turns, transposed = divmod(index, 2)
    grid = torch.rot90(grid, quarter_turns)
    return grid.t() if transposed else grid


@register_order("hilbert", 8)
def _hilbert(index: int, height: int, width: int, generator: torch.Generator | None) -> torch.Tensor:
    """The true Hilbert walk: argsort of the rank table, so that consecutive steps are neighbours.

    On a rectangle with odd sides the curve may need one diagonal step; `count_jumps` tells.
    """
    return torch.argsort(_hilbert_ranks(index, height, width))


@register_order("hilbert-published", 8)
def _hilbert_published(index: int, height: int, width: int, generator: torch.Generator | None) -> torch.Tensor:
    """The order that the published code gathers with: the rank table itself, which is the *inverse* of the walk.

    It is no Hilbert walk (135 jumps on 16x16, where the walk has none). Kept because published weights were trained
    with it.
    """
    return _hilbert_ranks(index, height, width)


def _hilbert_ranks(index: int, height: int, width: int) -> torch.Tensor:
    """rank[row * w + column] = the step at which variant `index` of the curve reaches that cell. Shape (h*w,)."""
    turned = index in (1, 2, 5, 6)  # an odd number of (quarter turn, transposition): the table's sides change places
    rows, columns = (width, height) if turned else (height, width)
    ranks = torch.empty(rows, columns, dtype=torch.long)
    # The published table has x down the rows: G[r][c] is the step that reaches (x=r, y=c).
    for step, (x, y) in enumerate(_gilbert(columns, rows)):
        ranks[x, y] = step
    return _square_variant(ranks, index).reshape(-1)


@register_order("random", 1 << 31)
def _random(index: int, height: int, width: int, generator: torch.Generator | None) -> torch.Tensor:
    """A permutation drawn from `generator`; the index only names it (the caller draws them one after another)."""
    if generator is None:
        raise ValueError("token order 'random' needs a torch.Generator to draw from: pass generator=...")
    return torch.randperm(height * width, generator=generator)


# The names in a scan_type, where they differ from the registry's: a published hilbertN reads by the rank table.
_SCAN_TYPE_NAMES = {"hilbert": "hilbert-published", "hilbert-walk": "hilbert"}
_SCAN_TYPE = re.compile(r"([a-z-]+)N(\d+)")
_VIDEO_SCAN_TYPE = re.compile(r"(?:zz)?video_([st]+)")


class LayerSchedule:
    """What a scan_type says about every layer: which axis it mixes, and in which order.

        zigzagN<k>            layer i reads by zigzag i mod k, k from 1 to 8
        hilbertN<k>           the published rank tables; hilbert-walkN<k> is the true walk
        sweepN<k>, diagonalN<k>, bidirectionalN<k>, randomN<k>
                              those orders; random ones belong to the model and travel in its file
        v2                    both directions of the raster in every layer, each with parameters of its own
        video_<pattern>       also zzvideo_<pattern>, a word of s and t: layer i mixes space or time as letter
                              i mod length says; the j-th spatial layer reads by zigzag j mod 8, the j-th temporal one
                              forwards if j is even and backwards if odd (ZigMa, section 3.3, factorised 3D zigzag)

    Args:
        scan_type: one of these.
        depth: number of layers.
        video: whether there are frames.

    Raises:
        ValueError: another name, too many orders, or a mismatch of video and images.
    """

    def __init__(self, scan_type: str, depth: int, video: bool = False) -> None:
        self.scan_type, self.depth = scan_type, depth
        self.bidirectional = scan_type == "v2"
        self.pattern = "a"  # all tokens at once
        self.kind, self.count = "sweep", 1
        match = _VIDEO_SCAN_TYPE.fullmatch(scan_type)
        if match is not None:
            self.pattern, self.kind, self.count = match.group(1), "zigzag", 8
        elif not self.bidirectional:
            self._parse_images(scan_type)
        if video and match is None and not self.bidirectional:
            raise ValueError(
                f"scan_type {scan_type!r} orders the tokens of one picture, but there are video_frames: expected "
                "video_ and a word of s and t such as 'video_sst', or v2"
            )
        if match is not None and not video:
            raise ValueError(f"scan_type {scan_type!r} is for video, but video_frames is 0: set it, or choose another")
        axes = [self.pattern[layer % len(self.pattern)] for layer in range(depth)]
        self.axes = tuple(axes)
        self._places = [axes[:layer].count(axis) for layer, axis in enumerate(axes)]  # of a layer among its like

    def _parse_images(self, scan_type: str) -> None:
        if scan_type.startswith("parallelN"):
            raise ValueError(
                f"scan_type {scan_type!r} names parallel branches, for which the published code makes parameters and "
                "has no computation: choose another"
            )
        match = _SCAN_TYPE.fullmatch(scan_type)
        kind = None if match is None else _SCAN_TYPE_NAMES.get(match.group(1), match.group(1))
        if match is None or kind not in _REGISTRY:
            raise ValueError(
                f"scan_type {scan_type!r} names no token orders: expected zigzagN1..8, hilbertN1..8, "
                "hilbert-walkN1..8, sweepN1..8, diagonalN1..8, bidirectionalN1..4, randomN<k>, v2, "
                "or video_ and a word of s and t"
            )
        self.kind, self.count = kind, int(match.group(2))
        if not 1 <= self.count <= available_orders()[kind]:
            raise ValueError(
                f"scan_type {scan_type!r} asks for {self.count} orders: {kind} has 1 to {available_orders()[kind]}"
            )

    @property
    def random(self) -> bool:
        """Whether the orders are drawn, and therefore part of a model rather than of its name."""
        return self.kind == "random"

    def names(self) -> list[str]:
        """What each layer's order is called: "zigzag 3"; "forwards", "backwards" in time; "both ways" of the raster."""
        if self.bidirectional:
            return ["both ways"] * self.depth
        space = [f"{self.kind} {index}" for index in range(self.count)]
        made = {"s": space, "t": ["forwards", "backwards"], "a": space}
        return [made[axis][place % len(made[axis])] for axis, place in zip(self.axes, self._places, strict=True)]

    def orders(
        self, height: int, width: int, frames: int = 0, generator: torch.Generator | None = None
    ) -> list[torch.Tensor]:
        """One LongTensor for each layer: (height * width,) for "s", (frames,) for "t", all tokens for "a".

        Layers that share an order share the tensor.
        """
        if self.bidirectional:
            return [torch.arange(max(frames, 1) * height * width)] * self.depth
        space = [
            scan_order(self.kind, index, height=height, width=width, generator=generator) for index in range(self.count)
        ]
        time = [torch.arange(frames), torch.arange(frames).flip(0)]
        made = {"s": space, "t": time, "a": space}
        return [made[axis][place % len(made[axis])] for axis, place in zip(self.axes, self._places, strict=True)]


def order_schedule(
    scan_type: str, depth: int, height: int, width: int, generator: torch.Generator | None = None, *, frames: int = 0
) -> list[torch.Tensor]:
    """The token orders of a model's layers, as its `scan_type` states them (see `LayerSchedule`).

    Args:
        scan_type: such as "zigzagN8".
        depth: number of layers.
        height, width: the grid in tokens.
        generator: for "randomN<k>".
        frames: of a video, 0 for images.

    Returns:
        `depth` LongTensors. Layers that share an order share the tensor.

    Raises:
        ValueError: for a scan type that names no orders, and a random one without a generator.
    """
    return LayerSchedule(scan_type, depth, video=frames > 0).orders(height, width, frames, generator)


def repeat_orders(orders: Sequence[torch.Tensor], depth: int) -> list[torch.Tensor]:
    """`orders` cycled over `depth` layers: layer i gets orders[i mod len(orders)]."""
    if not orders:
        raise ValueError("got an empty list of token orders: a schedule needs at least one")
    return [orders[layer % len(orders)] for layer in range(depth)]
