"""Memory that the layers of one evaluation use one after another, on a CPU without gradients.

Fresh memory comes from the system a page at a time, each zeroed and mapped on its own: at 4096 tokens of width 768 that
is a tenth of a mixer's time, at 16384 more. The layers of a model are alike, so what one has done with serves the next;
and the first time it is asked for in large pages.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from .selective_scan import native, native_library
from .selective_scan.custom_ops import operators_are_looked_at

__all__ = ["Scratch"]

# Bytes of a layer's tokens, a quarter of its widest result. Below it memory is found without asking the system, and to
# look at each layer before it is called took 4 % of a step of the demo model.
WORTH_IT_FROM = 2**20

# A product of bfloat16 of so many rows is taken in pieces of so many columns, whose weights stay in the second-level
# cache from one group of rows to the next. On a Zen 4 a step takes 1 % less at 4096 rows, 2 to 3 % at 16384. Of fewer
# rows it gains nothing, and in float32, which is another library's, it loses.
PIECES_FROM_ROWS, PIECE_COLUMNS = 4096, 1024


class Scratch:
    """Named pieces of memory: whoever takes one ends what was in it, so nobody else may have seen that.

    Made by `for_inference`, and good for as long as what it looks at stays as it was: one evaluation.

    Attributes:
        between_layers: whether what one layer gives to the next may lie here too; a model says so of its own layers.
    """

    def __init__(self) -> None:
        self.between_layers = False
        self._pieces: dict[str, Tensor] = {}
        self._norms = 0

    @classmethod
    def for_inference(cls, tokens: Tensor) -> Scratch | None:
        """One for many tokens on a CPU with native kernels, if nobody wants gradients or looks at operators."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return None
        if tokens.nbytes < WORTH_IT_FROM or tokens.device.type != "cpu":
            return None
        if operators_are_looked_at(tokens) or torch.is_autocast_enabled("cpu") or native.unavailable() is not None:
            return None
        return cls()

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, place: Tensor | str | None = None
    ) -> Tensor:
        """F.linear of x (..., m) and weight (n, m): (..., n).

        place: the result's memory: a tensor of its shape that nobody needs any more, the name of a piece, or None for
            memory of its own.
        """
        if type(weight) is not Tensor and type(weight) is not Parameter:  # a quantized one brings its own product
            return F.linear(x, weight, bias)
        out = place if isinstance(place, Tensor) else self._take(place, (*x.shape[:-1], len(weight)), x)
        rows, results = x.flatten(0, -2), out.view(-1, len(weight))
        step = _columns_at_once(rows, weight)
        for first in range(0, len(weight), step):
            part = slice(first, first + step)
            if bias is None:
                torch.mm(rows, weight[part].t(), out=results[:, part])
            else:
                torch.addmm(bias[part], rows, weight[part].t(), out=results[:, part])
        return out

    def between(self, name: str) -> str | None:
        """The name, for a layer's result that goes to the next layer alone; None where that has memory of its own."""
        return name if self._reaches_between() else None

    def of_norm(self, base: Tensor, total: torch.dtype | None = None) -> tuple[Tensor | None, ...] | None:
        """Places for x, u and m of an `add_norm`: of x and u one of two, in turns, for the next norm reads these.

        Without a total it is the last one, which gives u alone.
        """
        if not self._reaches_between():
            return None
        tokens = self._take("tokens", base.shape, base)
        if total is None:
            return None, tokens, None
        self._norms += 1
        residual, normed = (f"{name} {self._norms % 2}" for name in ("residual", "normed"))
        return self._take(residual, base.shape, base, total), self._take(normed, base.shape, base), tokens

    def _reaches_between(self) -> bool:
        return self.between_layers and not torch.compiler.is_compiling()  # a part of a model alone

    def _take(
        self, name: str | None, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        size, piece, dtype = math.prod(shape), self._pieces.get(name), dtype or like.dtype
        if piece is None or piece.numel() < size or piece.dtype != dtype:
            piece = native_library.load().use_huge_pages(like.new_empty(size, dtype=dtype))
            if name is not None:
                self._pieces[name] = piece
        return piece[:size].view(shape)


def _columns_at_once(rows: Tensor, weight: Tensor) -> int:
    """How many columns of the product of rows (k, m) and weight (n, m) are computed together."""
    columns = len(weight)
    large = len(rows) >= PIECES_FROM_ROWS and columns >= 2 * PIECE_COLUMNS
    return PIECE_COLUMNS if large and rows.dtype == torch.bfloat16 else columns
