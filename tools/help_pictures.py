"""Write the example of help pages and its picture: `python tools/help_pictures.py [NODE ...]`, with a ComfyUI at hand.

web/docs/examples/NODE.json is a graph of tools/example_graphs.py, NODE.png what it looks like in the host's page when it
has run. The picture has the graph in itself: dragged onto a canvas it loads. Look at it before you commit it.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests/host"))  # for page.py, which drives a browser, and tiny_models.py

from example_graphs import example_graph  # noqa: E402
from host import Host, HostError, find_hosts, make_base, running  # noqa: E402
from page import Page, find_chromium, opened  # noqa: E402

EXAMPLES = ROOT / "web/docs/examples"
SECONDS = 300
AFTER = {"ZigMaLoraLoader": "ZigMaSaveLora"}  # whose example writes the file


def main(names: list[str]) -> None:
    """The examples of these nodes, or of all."""
    from help_models import write_models

    with tempfile.TemporaryDirectory(prefix="ComfyUI-") as folder:
        base = make_base(Path(folder))
        write_models(base, names)
        with running(find_hosts()[0], base) as comfy, opened(comfy.url, find_chromium()) as page:
            page.close_dialogs()
            facts = comfy.ask("/object_info")
            wanted = names or [kind for kind in facts if kind.startswith("ZigMa")]
            for name in sorted(wanted, key=lambda name: (name in AFTER, name)):
                if name in AFTER and AFTER[name] not in wanted:
                    comfy.run(example_graph(AFTER[name], facts).as_api(facts))
                page.tab.evaluate("() => app.refreshComboInNodes()")
                ui = example_graph(name, facts).as_ui(facts)
                shown = _shown(page, comfy, ui)
                EXAMPLES.mkdir(exist_ok=True)
                (EXAMPLES / f"{name}.json").write_text(json.dumps(ui, indent=1) + "\n", encoding="utf-8")
                path = EXAMPLES / f"{name}.png"
                path.write_bytes(_with_graph(shown, ui))
                print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB, {shown.size}")


def _shown(page: Page, comfy: Host, ui: dict) -> Image.Image:
    """What the host's page shows of a graph that has run."""
    page.load(ui)
    done = len(comfy.ask("/history"))
    page.command("Comfy.QueuePrompt")
    deadline = time.monotonic() + SECONDS
    while len(history := comfy.ask("/history")) == done:
        if time.monotonic() > deadline:
            raise HostError(f"{ui['id']} took longer than {SECONDS} s")
        time.sleep(0.2)
    comfy.pictures(list(history.values())[-1])  # for the error, if there is one
    return Image.open(io.BytesIO(page.graph_picture())).convert("RGB")


def _with_graph(picture: Image.Image, ui: dict) -> bytes:
    """A PNG of few colours with a graph in it, as a canvas reads it."""
    facts, file = PngInfo(), io.BytesIO()
    facts.add_text("workflow", json.dumps(ui, separators=(",", ":")))
    # An octree keeps the colours of thin links, which are few pixels.
    picture.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(file, "png", pnginfo=facts, optimize=True)
    return file.getvalue()


if __name__ == "__main__":
    main(sys.argv[1:])
