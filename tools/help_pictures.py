"""Write the examples of help pages and their pictures: `python tools/help_pictures.py [NODE ...]`.

web/docs/examples/NODE.json is a graph of tools/example_graphs.py; NODE.png is what the page of a ComfyUI (COMFYUI_PATH)
shows of it when it has run, and has the graph in itself: dragged onto a canvas it loads. Look at it before it is
committed.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests/host"))  # for page.py, which drives a browser

from example_graphs import example_graph  # noqa: E402
from help_models import write_files  # noqa: E402
from host import Host, HostError, find_hosts, make_base, running  # noqa: E402
from page import Page, find_chromium, opened  # noqa: E402

EXAMPLES = ROOT / "web/docs/examples"
AFTER = {"ZigMaLoraLoader": "ZigMaSaveLora"}  # whose example writes the file
SECONDS = 300
LIMIT = 60_000  # bytes of a picture


def main(names: list[str]) -> None:
    """Write the examples of these nodes, or of all."""
    hosts, chromium = find_hosts(), find_chromium()
    if not hosts or chromium is None:
        raise SystemExit("name a ComfyUI in COMFYUI_PATH and a Chromium in CHROMIUM: one of them was not found")
    with user_folder() as base:
        write_files(base, names)
        with running(hosts[0], base) as comfy, opened(comfy.url, chromium) as page:
            page.close_dialogs()
            facts = comfy.ask("/object_info")
            wanted = names or [name for name in facts if name.startswith("ZigMa")]
            for name in sorted(wanted, key=lambda name: (name in AFTER, name)):
                if name in AFTER and AFTER[name] not in wanted:
                    comfy.run(example_graph(AFTER[name], facts).as_api(facts))
                write_example(name, page, comfy, facts)


def write_example(name: str, page: Page, comfy: Host, facts: dict) -> None:
    """Run it in the page, and write the two files."""
    ui = example_graph(name, facts).as_ui(facts)
    page.load(ui)
    before = comfy.ask("/history").keys()
    page.command("Comfy.QueuePrompt")
    deadline = time.monotonic() + SECONDS
    while not (done := {key: run for key, run in comfy.ask("/history").items() if key not in before}):
        if refused := page.refused():
            raise HostError(f"the host refused the example of {name}: {refused}")
        if time.monotonic() > deadline:
            raise HostError(f"the example of {name} takes longer than {SECONDS} s")
        time.sleep(0.2)
    comfy.pictures(*done.values())  # raises what went wrong
    EXAMPLES.mkdir(exist_ok=True)
    (EXAMPLES / f"{name}.json").write_text(json.dumps(ui, indent=1) + "\n", encoding="utf-8")
    path = EXAMPLES / f"{name}.png"
    path.write_bytes(small_png(Image.open(io.BytesIO(page.graph_picture())).convert("RGB"), ui))
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def small_png(picture: Image.Image, graph: dict) -> bytes:
    """A PNG with a graph in it, of as many colours as keep it below LIMIT."""
    facts = PngInfo()
    facts.add_text("workflow", json.dumps(graph, separators=(",", ":")))
    for colours in (256, 192, 128, 96, 64):
        file = io.BytesIO()
        # An octree keeps the colours of links, which are few pixels.
        few = picture.quantize(colours, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        few.save(file, "png", optimize=True, pnginfo=facts)
        if file.tell() < LIMIT:
            break
    return file.getvalue()


@contextlib.contextmanager
def user_folder() -> Iterator[Path]:
    """A base directory whose name may be seen: some nodes show where they have put a file."""
    base = Path(tempfile.gettempdir()) / "ComfyUI"
    base.mkdir()
    try:
        yield make_base(base)
    finally:
        shutil.rmtree(base)


if __name__ == "__main__":
    main(sys.argv[1:])
