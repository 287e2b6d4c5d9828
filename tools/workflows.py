"""Write workflows/ anew from tools/workflow_graphs.py: `python tools/workflows.py [NAME ...]`, with a ComfyUI at hand.

For each graph the UI format, the API format, a thumbnail for the host's template browser, and the picture that the
tests compare with. Look at what it drew before you commit it.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests/host"))  # for tiny_models.py, which writes the files that are not shipped

from compare_pictures import PICTURES, reduced  # noqa: E402
from graph_files import Graph  # noqa: E402
from host import find_hosts, make_base, running  # noqa: E402
from workflow_graphs import WORKFLOWS  # noqa: E402

THUMBNAIL = 400  # pixels
# Their models are files that a user brings: a picture of the tests' tiny ones would say nothing.
NOT_SHIPPED = {"label_to_image": 0, "large_picture": 1, "lora": 2, "released_models": 5, "video": 6}


def main(names: list[str]) -> None:
    """Write the workflows of these names, or all."""
    from tiny_models import write_models

    strange = set(names) - WORKFLOWS.keys()
    if strange:
        raise SystemExit(f"got {', '.join(sorted(strange))}, expected names among {', '.join(WORKFLOWS)}")
    with tempfile.TemporaryDirectory(prefix="zigma-workflows-") as folder:
        base = make_base(Path(folder))
        write_models(base)
        with running(find_hosts()[0], base) as comfy:
            facts = comfy.ask("/object_info")
            for name in names or WORKFLOWS:
                graph = Graph(name)
                WORKFLOWS[name](graph)
                api = graph.as_api(facts)
                _write(ROOT / f"workflows/{name}.json", json.dumps(graph.as_ui(facts), indent=1))
                _write(ROOT / f"workflows/api/{name}.json", json.dumps(api, indent=1))
                pictures = list(comfy.run(api).values())
                _keep(name, pictures)
                print(f"{name}: {len(pictures)} pictures")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")


def _keep(name: str, pictures: list[bytes]) -> None:
    """The first picture for the tests, and all of them, side by side, as the thumbnail."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    first = Image.open(io.BytesIO(pictures[0]))
    if getattr(first, "n_frames", 1) > 1:
        (PICTURES / f"{name}.webp").write_bytes(pictures[0])
    else:
        # Without the graph that a host writes in.
        reduced(first.convert("RGB")).save(PICTURES / f"{name}.png", optimize=True)
    if name in NOT_SHIPPED:
        _card(name).save(ROOT / f"workflows/{name}.jpg", quality=90)
        return
    shown = [Image.open(io.BytesIO(data)).convert("RGB") for data in pictures[:4]]
    columns = 2 if len(shown) > 1 else 1
    width, height = shown[0].size
    rows = -(-len(shown) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for number, picture in enumerate(shown):
        sheet.paste(picture, (number % columns * width, number // columns * height))
    factor = THUMBNAIL / max(sheet.size)
    sheet = sheet.resize((round(sheet.width * factor), round(sheet.height * factor)), Image.Resampling.LANCZOS)
    sheet.save(ROOT / f"workflows/{name}.jpg", quality=88)


def _card(name: str) -> Image.Image:
    """The path of a zigzag under the workflow's name, as a thumbnail."""
    from zigma.order_drawing import draw_order
    from zigma.scan_orders import scan_order
    from zigma.sheet import labelled_sheet

    path = draw_order(scan_order("zigzag", NOT_SHIPPED[name], height=8, width=8), 8, 8, size=THUMBNAIL - 60)
    return labelled_sheet([path], [name.replace("_", " ")], text_size=22)


if __name__ == "__main__":
    main(sys.argv[1:])
