"""Draw pictures of documents that need no host: token orders (docs/images/kinds.png, orders.png), four help pages.

python tools/order_pictures.py                     # all, into their places
python tools/order_pictures.py kinds preview       # some
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from zigma.assets import available_models
from zigma.checkpoint import load_bundle
from zigma.order_drawing import draw_order, draw_paths
from zigma.order_table import LayerPath
from zigma.sampling import sample
from zigma.scan_orders import count_jumps, scan_order
from zigma.sheet import enlarge, labelled_sheet, save_picture, to_pictures
from zigma.time_grids import SPACINGS, sigma_grid

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("sweep", "zigzag", "hilbert", "hilbert-published", "diagonal")
GRIDS = ((8, 8), (6, 10))
SCHEDULE = ("zigzag 0", "zigzag 1", "zigzag 2", "zigzag 3", "hilbert 0", "hilbert 1", "sweep 0", "diagonal 6")


def order_of(name: str, side: int) -> torch.Tensor:
    """ "zigzag 3" -> (side * side,)."""
    kind, index = name.split()
    return scan_order(kind, int(index), height=side, width=side, generator=torch.Generator().manual_seed(0))


def kinds() -> Image.Image:
    """One row for each grid, one column for each kind."""
    drawings, names = [], []
    for height, width in GRIDS:
        for kind in KINDS:
            order = scan_order(kind, height=height, width=width)
            drawings.append(draw_order(order, height, width))
            names.append(f"{kind} 0, {height} x {width}: {count_jumps(order, width)} jumps")
    return labelled_sheet(drawings, names, columns=len(KINDS))


def orders() -> Image.Image:
    """The eight zigzags."""
    names = [f"zigzag {index}" for index in range(8)]
    return labelled_sheet([draw_order(order_of(name, 8), 8, 8) for name in names], names)


def paths(names: tuple[str, ...], side: int) -> list[LayerPath]:
    """Layers that read in these orders on a square."""
    made = [order_of(name, side) for name in names]
    return [
        LayerPath(layer, "a", name, order, (side, side), True, name, order)
        for layer, (name, order) in enumerate(zip(names, made, strict=True))
    ]


def drawn_by_demo(changes: dict[str, str | None], prompts: list[str]) -> list[Image.Image]:
    """The demo model's pictures of each prompt, for each entry with all layers in one order (None: its own)."""
    pictures = []
    for order in changes.values():
        bundle = load_bundle(available_models()["demo"])
        if order is not None:
            bundle.model.token_orders = [order_of(order, 8)] * bundle.model.config.depth
        pictures += to_pictures(sample(bundle, prompts, seed=2))
    return pictures


def preview() -> Image.Image:
    """One path on a small and on a large grid, over a picture that the demo model draws."""
    (picture,) = drawn_by_demo({"": None}, ["red apple"])
    large = enlarge(picture, 5)
    over = [draw_order(order_of(name, side), side, side, over=large, opacity=0.85)
            for name, side in (("zigzag 0", 8), ("hilbert 0", 16), ("hilbert 0", 64))]  # fmt: skip
    names = ["zigzag 0, 8 x 8", "hilbert 0, 16 x 16", "hilbert 0, 64 x 64"]
    return labelled_sheet(over, names, columns=3, text_size=18)


def sheet() -> Image.Image:
    """One seed in several orders."""
    changes = {"as trained": None, "sweep": "sweep 0", "hilbert": "hilbert 0", "random": "random 0"}
    prompts = ["cat face with wry smile", "red apple"]
    pictures = [enlarge(picture, 2) for picture in drawn_by_demo(changes, prompts)]
    captions = [f"{name}: {prompt}" for name in changes for prompt in ("cat", "apple")]
    pictures = pictures[0::2] + pictures[1::2]
    captions = captions[0::2] + captions[1::2]
    return labelled_sheet(pictures, captions, columns=4, title="One seed, four orders", text_size=15)


def spacings() -> Image.Image:
    """The sigmas of 20 steps, by spacing and by shift."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(7.6, 3.3), dpi=110, layout="constrained", sharey=True)
    for name in SPACINGS:
        left.plot(sigma_grid(20, name), ".-", label=name)
    for shift in (0.5, 1, 2, 4):
        right.plot(sigma_grid(20, "uniform", shift), ".-", label=f"shift {shift:g}")
    left.set(title="spacing", xlabel="step", ylabel="sigma: from noise to picture")
    right.set(title="shift, of uniform", xlabel="step")
    for axes in (left, right):
        axes.set_xticks(range(0, 21, 5))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    file = io.BytesIO()
    figure.savefig(file)
    return Image.open(file).convert("RGB")


PICTURES = {
    "kinds": (kinds, "docs/images/kinds.png"),
    "orders": (orders, "docs/images/orders.png"),
    "schedule": (lambda: draw_paths(paths(SCHEDULE, 8), columns=4), "web/docs/ZigMaScanOrder.png"),
    "preview": (preview, "web/docs/ZigMaScanOrderPreview.png"),
    "spacings": (spacings, "web/docs/ZigMaScheduler.png"),
    "sheet": (sheet, "web/docs/ZigMaPictureSheet.png"),
}


def main(names: list[str]) -> None:
    """Draw those that are named, or all."""
    for name in names or PICTURES:
        draw, place = PICTURES[name]
        picture = draw()
        if place.startswith("web/"):  # a help page loads within a blink
            picture = picture.quantize(128, dither=Image.Dither.NONE)
        print(save_picture(picture, ROOT / place))


if __name__ == "__main__":
    main(sys.argv[1:])
