"""Draw docs/images/kinds.png: one variant of each kind of token order, on a square and on a rectangle.

python tools/order_pictures.py docs/images/kinds.png
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from zigma.order_drawing import draw_order
from zigma.scan_orders import count_jumps, scan_order
from zigma.sheet import labelled_sheet, save_picture

KINDS = ("sweep", "zigzag", "hilbert", "hilbert-published", "diagonal")
GRIDS = ((8, 8), (6, 10))


def main(path: str) -> None:
    """One row for each grid, one column for each kind."""
    drawings, names = [], []
    for height, width in GRIDS:
        for kind in KINDS:
            order = scan_order(kind, height=height, width=width)
            drawings.append(draw_order(order, height, width))
            names.append(f"{kind} 0, {height} x {width}: {count_jumps(order, width)} jumps")
    print(save_picture(labelled_sheet(drawings, names, columns=len(KINDS)), path))


if __name__ == "__main__":
    main(*sys.argv[1:])
