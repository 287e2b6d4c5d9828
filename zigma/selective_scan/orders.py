"""The check that a token order visits every token once, remembered for the tensors that passed it."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

_known: dict[int, tuple[weakref.ref, int]] = {}


def check_permutations(*orders: Tensor | None) -> None:
    """Raise ValueError unless each order (l,), int64, is a permutation of 0 ... l - 1 (None is raster order).

    The check sorts, and on a GPU waits for the device, so a tensor found good is remembered until it changes in place
    or goes away. (Tensors made in inference mode do not count their changes and are checked each time.)
    """
    for order in orders:
        if order is None:
            continue
        version = -1 if order.is_inference() else order._version
        known = _known.get(id(order))
        if known is not None and known[0]() is order and known[1] == version >= 0:
            continue
        if not torch.equal(order.sort().values, torch.arange(len(order), device=order.device)):
            raise ValueError(f"selective scan: the token order is not a permutation of 0 to {len(order) - 1}")
        key = id(order)
        _known[key] = (weakref.ref(order, lambda _, key=key: _known.pop(key, None)), version)
