"""A host's page in a headless Chromium: what a user does there, as functions."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

LOADED = "() => !!(window.app && window.app.graph && window.app.canvas && window.app.extensionManager)"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "msedge")
SECONDS = 120


def find_chromium() -> str | None:
    """The path of a Chromium: CHROMIUM, one on PATH, or the one that playwright downloaded."""
    from playwright.sync_api import sync_playwright

    stated = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if stated:
        return stated
    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if Path(path).is_file() else None


@contextlib.contextmanager
def opened(url: str, chromium: str) -> Iterator[Page]:
    """The page of a host, ready."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # A sandbox needs rights that a container's root user does not have.
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1600, "height": 950})
        tab.set_default_timeout(1000 * SECONDS)
        tab.goto(url)
        tab.wait_for_function(LOADED)
        tab.wait_for_timeout(3000)  # the dialogs of a first visit
        yield Page(tab)
        browser.close()


class Page:
    """The canvas and what stands around it."""

    def __init__(self, tab) -> None:
        self.tab = tab

    def command(self, name: str) -> None:
        """Run one of the page's own commands, as its menus do."""
        self.tab.evaluate("(name) => { app.extensionManager.command.execute(name) }", name)

    def open_template(self, pack: str, name: str, nodes: int) -> None:
        """Load a workflow from the dialog of templates, and wait until its nodes are there."""
        self.close_dialogs()
        self.tab.evaluate("() => { app.graph.clear() }")  # so that what is waited for is not there already
        self.command("Comfy.BrowseTemplates")
        dialog = self.tab.get_by_role("dialog")
        dialog.get_by_text(pack, exact=True).first.click()
        dialog.get_by_text(name, exact=True).first.click()
        self.tab.wait_for_function("(count) => app.graph.nodes.length === count", arg=nodes)
        self.tab.wait_for_timeout(700)  # the dialog fades
        self.fit()

    def load(self, graph: dict) -> None:
        """Load a graph in UI format, in a tab of its own; files that came since the page was opened are known."""
        self.tab.evaluate("() => app.refreshComboInNodes()")
        self.tab.evaluate("(graph) => app.loadGraphData(graph)", graph)

    def fit(self) -> None:
        """Show the whole graph."""
        self.tab.evaluate("() => { app.canvas.deselectAll && app.canvas.deselectAll() }")
        self.command("Comfy.Canvas.FitView")
        self.tab.wait_for_timeout(900)

    def prompt(self) -> dict:
        """What the page would send: the graph in API format."""
        return self.tab.evaluate("async () => (await app.graphToPrompt()).output")

    def queue(self) -> None:
        """Press Run."""
        self.tab.get_by_role("button", name="Run", exact=True).first.click()

    def wait_for_pictures(self, number: int) -> int:
        """How many pictures the node of that number shows, once it shows any."""
        script = "(id) => ((app.graph.getNodeById(id).imgs || [])[0] || {}).width > 0"
        self.tab.wait_for_function(script, arg=number)
        return self.tab.evaluate("(id) => app.graph.getNodeById(id).imgs.length", number)

    def set_widget(self, number: int, name: str, value) -> None:
        """Give a node's widget a value."""
        script = "([id, name, v]) => { app.graph.getNodeById(id).widgets.find((w) => w.name === name).value = v }"
        self.tab.evaluate(script, [number, name, value])

    def select(self, number: int) -> None:
        """Click on a node's title."""
        script = """(id) => {
            const node = app.graph.getNodeById(id), ds = app.canvas.ds
            const frame = app.canvas.canvas.getBoundingClientRect()
            return [(node.pos[0] + 60 + ds.offset[0]) * ds.scale + frame.left,
                    (node.pos[1] - 12 + ds.offset[1]) * ds.scale + frame.top]
        }"""
        self.tab.mouse.click(*self.tab.evaluate(script, number))
        self.tab.wait_for_timeout(800)

    def open_help(self, number: int) -> None:
        """Select a node and press the button that opens its help page."""
        self.select(number)
        self.tab.locator("[data-testid='info-button']").first.click()

    def help_picture(self, name: str):
        """A picture of the help page that is open, in view and loaded."""
        picture = self.tab.locator(f"img[src$='{name}']").first
        picture.scroll_into_view_if_needed()
        self.tab.wait_for_function("(image) => image.naturalWidth > 0", arg=picture.element_handle())
        self.tab.wait_for_timeout(500)  # pictures above it move it
        return picture

    def drop_on_canvas(self, picture) -> None:
        """Drag a picture of the page onto an empty place of the canvas."""
        picture.hover()
        self.tab.mouse.down()
        self.tab.mouse.move(600, 800, steps=8)
        self.tab.mouse.move(610, 810, steps=4)
        self.tab.mouse.up()

    def refused(self) -> dict:
        """Node number -> messages of the refusal that the page shows on that node; empty if it shows none."""
        return self.tab.evaluate(
            "() => Object.fromEntries(Object.entries(app.lastNodeErrors || {}).map(([k, v]) => "
            "[k, v.errors.map((e) => e.message + ' ' + e.details)]))"
        )

    def errors(self) -> dict:
        """The same, once there are any."""
        self.tab.wait_for_function("() => !!app.lastNodeErrors && Object.keys(app.lastNodeErrors).length > 0")
        return self.refused()

    def close_dialogs(self) -> None:
        """Close what lies over the canvas."""
        for _ in range(2):
            self.tab.keyboard.press("Escape")
            self.tab.wait_for_timeout(300)

    def graph_picture(self, margin: int = 24) -> bytes:
        """A PNG of the graph alone at its full size, without what the page has around it."""
        script = """(margin) => {
            const canvas = app.canvas, frames = app.graph.nodes.map((node) => node.getBounding())
            const left = Math.min(...frames.map((f) => f[0])), top = Math.min(...frames.map((f) => f[1]))
            canvas.deselectAll()
            canvas.ds.scale = 1
            canvas.ds.offset = [260 - left, 120 - top]
            canvas.setDirty(true, true)
            const frame = canvas.canvas.getBoundingClientRect()
            return {
                x: frame.left + 260 - margin, y: frame.top + 120 - margin,
                width: Math.max(...frames.map((f) => f[0] + f[2])) - left + 2 * margin,
                height: Math.max(...frames.map((f) => f[1] + f[3])) - top + 2 * margin,
            }
        }"""
        self.tab.mouse.move(5, 5)
        clip = self.tab.evaluate(script, margin)
        room = {"width": int(clip["x"] + clip["width"]) + 420, "height": int(clip["y"] + clip["height"]) + 220}
        before = self.tab.viewport_size
        self.tab.set_viewport_size(room)
        self.tab.wait_for_timeout(1500)  # text that stands over the canvas follows it
        picture = self.tab.screenshot(clip=clip)
        self.tab.set_viewport_size(before)
        return picture

    def save_picture(self, path: Path) -> None:
        """A screenshot."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.tab.screenshot(path=str(path))
