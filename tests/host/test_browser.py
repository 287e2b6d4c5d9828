"""The pack in a host's own page: a headless Chromium does there what a user does.

ZIGMA_SCREENSHOTS names a folder in which to keep what the page looked like.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from found_hosts import FAILED, NEEDS_HOST, ROOT
from page import find_chromium, opened
from ui_format import as_api

from zigma.assets import available_models

try:
    CHROMIUM, WHY = find_chromium(), "no Chromium was found: install one, or name it in CHROMIUM"
except ImportError:
    CHROMIUM, WHY = None, "the package playwright is not installed: pip install playwright"

pytestmark = [
    pytest.mark.host,
    NEEDS_HOST,
    pytest.mark.skipif(CHROMIUM is None, reason=f"NOT TESTED: the host's page in a browser: {WHY}"),
    pytest.mark.skipif(not available_models(), reason="NOT TESTED: the demo model is not in place"),
]
SCREENSHOTS = os.environ.get("ZIGMA_SCREENSHOTS")
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))


@pytest.fixture(scope="module")
def page(server):
    with opened(server.url, CHROMIUM) as page:
        yield page


@pytest.fixture
def screenshot(request, host, page):
    """Keeps the page as it is now, under a name, where that is asked for."""

    def keep(name: str) -> None:
        if SCREENSHOTS:
            page.save_picture(Path(SCREENSHOTS) / f"{host.name}-{name}.png")

    yield keep
    if request.node.stash.get(FAILED, False):
        keep(f"failed-{request.node.name}")


def read(path: Path) -> tuple[dict, dict]:
    """(UI format, API format) of a shipped workflow."""
    return tuple(json.loads(p.read_text(encoding="utf-8")) for p in (path, path.parent / "api" / path.name))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_from_the_templates_draws_in_its_nodes(page, screenshot, path):
    ui, api = read(path)
    page.open_template("ZigMa", path.stem, len(ui["nodes"]))
    sent = page.prompt()
    assert {key: node["class_type"] for key, node in sent.items()} == {k: n["class_type"] for k, n in api.items()}
    for key, node in api.items():  # a canvas may add widgets of its own
        assert {name: sent[key]["inputs"].get(name) for name in node["inputs"]} == node["inputs"], node["class_type"]
    if not SCREENSHOTS:  # the pictures themselves are compared in test_host.py, so that few steps do here
        fewer = {"steps": 2, "run_name": "in_the_page"}
        for key, node in api.items():
            for name in fewer.keys() & node["inputs"].keys():
                page.set_widget(int(key), name, fewer[name])
    page.queue()
    for key, node in api.items():
        if node["class_type"] in ("SaveImage", "PreviewImage", "SaveAnimatedWEBP"):
            assert page.wait_for_pictures(int(key)) > 0
    page.fit()
    screenshot(path.stem)


def test_a_nodes_help_page_opens_beside_the_canvas_and_its_picture_brings_a_graph(page, screenshot):
    ui, api = read(ROOT / "workflows/text_to_image.json")
    page.open_template("ZigMa", "text_to_image", len(ui["nodes"]))
    number = next(int(key) for key, node in api.items() if node["class_type"] == "ZigMaSampler")
    page.open_help(number)
    page.tab.get_by_role("heading", name="Common mistakes").first.wait_for()
    assert page.tab.get_by_role("cell", name="Intervals of the time grid.").count() > 0
    screenshot("help")
    picture = page.help_picture("/docs/examples/ZigMaSampler.png")
    screenshot("help-picture")
    page.drop_on_canvas(picture)
    example = json.loads((ROOT / "web/docs/examples/ZigMaSampler.json").read_text(encoding="utf-8"))
    page.tab.wait_for_function("(count) => app.graph.nodes.length === count", arg=len(example["nodes"]))
    sent, stated = page.prompt(), as_api(example)
    assert {key: node["class_type"] for key, node in sent.items()} == {k: n["class_type"] for k, n in stated.items()}
    for key, node in stated.items():
        assert {name: sent[key]["inputs"].get(name) for name in node["inputs"]} == node["inputs"], node["class_type"]


def test_a_wrong_value_is_shown_on_its_node(page, screenshot):
    ui, api = read(ROOT / "workflows/text_to_image.json")
    page.open_template("ZigMa", "text_to_image", len(ui["nodes"]))
    number = next(int(key) for key, node in api.items() if node["class_type"] == "ZigMaSampler")
    page.set_widget(number, "steps", 0)
    page.queue()
    errors = page.errors()
    assert list(errors) == [str(number)] and "steps" in " ".join(errors[str(number)])
    page.close_dialogs()
    page.fit()
    screenshot("error")
