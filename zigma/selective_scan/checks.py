"""What the operators ask of their inputs: kernels read addresses, and would read beyond the end of what is smaller."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_devices", "check_order", "check_shape"]


def check_shape(name: str, t: Tensor, form: str, shape: tuple[int | None, ...]) -> None:
    """Raise ValueError unless t has that shape, None being any size; `form` is the shape in letters."""
    if t.ndim == len(shape) and all(want is None or got == want for got, want in zip(t.shape, shape, strict=True)):
        return
    expected = "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"
    raise ValueError(f"selective scan: {name} has shape {tuple(t.shape)}, expected {form} = {expected}")


def check_devices(name: str, t: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError unless all are where t, the input `name`, is."""
    device = t.device
    for other, tensor in others.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(
                f"selective scan: {other} is on {tensor.device} and {name} on {device}; move them to one device"
            )


def check_order(name: str, order: Tensor | None, rows: Tensor) -> None:
    """Raise ValueError unless an order has the form of one for rows (b, l, d); `check_permutations` looks into it."""
    if order is None:
        return
    if order.dtype != torch.long or order.ndim != 1 or len(order) != rows.shape[1]:
        raise ValueError(
            f"selective scan: {name} is {order.dtype} of shape {tuple(order.shape)}, "
            f"expected an int64 permutation of {rows.shape[1]} tokens"
        )
    if order.device != rows.device:
        raise ValueError(f"selective scan: {name} is on {order.device}, move it to {rows.device} beside the tokens")
