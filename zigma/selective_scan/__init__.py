"""The selective scan of Mamba (Gu and Dao, arXiv 2312.00752, algorithm 2) under any token order.

One operator, several backends behind one signature; `dispatch` picks one by device and says once which and why.
"""

from .dispatch import available_backends, explain_backends
from .operator import ordered_conv1d_silu, selective_scan, selective_scan_gathered
from .stream import Stream, add_norm, gather_rows

__all__ = [
    "Stream",
    "add_norm",
    "available_backends",
    "explain_backends",
    "gather_rows",
    "ordered_conv1d_silu",
    "selective_scan",
    "selective_scan_gathered",
]
