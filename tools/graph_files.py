"""Graphs written down as Python, as the two files a host reads: the UI format of its canvas, and the API format.

A node is placed by the column it stands in; within a column nodes stand below one another, as high as their sockets and
widgets need. What a node's sockets and widgets are, a running host says (`/object_info`), so that nothing here repeats
a schema.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Graph", "Node", "declared_inputs", "is_widget"]

WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
SEEDS = ("seed", "noise_seed")  # a canvas gives inputs of these names a control, whether or not they ask for one
TOP, GAP = 60, 50  # canvas pixels
NOTE_COLOURS = {"color": "#432", "bgcolor": "#653"}
ACCENT = {"color": "#223", "bgcolor": "#335"}  # the canvas's own blue


@dataclass(frozen=True)
class Layout:
    """Sizes in canvas pixels: from column to column, of a node without rows, of its rows; of nodes that show things."""

    column: int
    bare: int
    line: int
    text: int
    heights: dict[str, int]
    outputs_take_rows: bool = True


ROOMY = Layout(
    360, 60, 26, 100, {"SaveImage": 420, "PreviewImage": 420, "SaveAnimatedWEBP": 460, "PreviewAny": 300},
    outputs_take_rows=False,
)  # fmt: skip
SNUG = Layout(270, 14, 24, 70, {"PreviewImage": 276, "PreviewAny": 276, "ZigMaDataset": 460, "ZigMaTrain": 560})


@dataclass
class Node:
    """A node of a graph; `node[1]` is its second output, as an input of another. `size` stands above the layout's."""

    number: int
    kind: str
    title: str
    inputs: dict
    column: int
    size: tuple[int, int] | None = None

    def __getitem__(self, slot: int) -> list:
        return [str(self.number), slot]


@dataclass
class Graph:
    """A workflow: nodes in the order in which they were added.

    Nodes of the class `accent` stand out by their colour.
    """

    name: str
    layout: Layout = ROOMY
    accent: str = ""
    nodes: list[Node] = field(default_factory=list)
    notes: list[tuple[str, str, int]] = field(default_factory=list)

    def add(self, kind: str, column: int, title: str = "", /, **inputs) -> Node:
        """A node of class `kind`; an input is a value, or what another node's `[slot]` gives."""
        node = Node(len(self.nodes) + 1, kind, title, inputs, column)
        self.nodes.append(node)
        return node

    def source(self, slot: list) -> Node:
        """The node that a slot belongs to."""
        return self.nodes[int(slot[0]) - 1]

    def note(self, text: str, column: int, title: str = "About") -> None:
        """A note in Markdown, which stands above the nodes of its column."""
        self.notes.append((title, text, column))

    def as_api(self, facts: Mapping[str, dict]) -> dict:
        """The graph as `/prompt` takes it; every widget stated, those left out with their defaults."""
        return {
            str(node.number): {
                "class_type": node.kind, "inputs": _stated(node, facts[node.kind]),
                "_meta": {"title": node.title or facts[node.kind]["display_name"]},
            }
            for node in self.nodes
        }  # fmt: skip

    def as_ui(self, facts: Mapping[str, dict]) -> dict:
        """The graph as the canvas saves it."""
        links: list[list] = []
        below: dict[int, int] = {}
        nodes = []
        for number, (title, text, column) in enumerate(self.notes, len(self.nodes) + 1):
            height = 110 + 22 * sum(1 + len(line) // 44 for line in text.splitlines())
            place = self._place(below, column, height)
            nodes.append({
                "id": number, "type": "MarkdownNote", "pos": place, "size": [self.layout.column - 40, height],
                "flags": {}, "order": number - 1, "mode": 0, "inputs": [], "outputs": [], "title": title,
                "properties": {}, "widgets_values": [text], **NOTE_COLOURS,
            })  # fmt: skip
        drawn = {node.number: self._drawn(node, facts[node.kind], below) for node in self.nodes}
        for node in self.nodes:
            for slot, entry in enumerate(drawn[node.number]["inputs"]):
                source = node.inputs.get(entry["name"])
                if isinstance(source, list):
                    kind = drawn[int(source[0])]["outputs"][source[1]]["type"]
                    links.append([len(links) + 1, int(source[0]), source[1], node.number, slot, kind])
                    entry["link"] = len(links)
                    drawn[int(source[0])]["outputs"][source[1]]["links"].append(len(links))
        nodes = [*drawn.values(), *nodes]
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"zigma/{self.name}")), "revision": 0,
            "last_node_id": len(nodes), "last_link_id": len(links), "nodes": nodes, "links": links, "groups": [],
            "config": {}, "extra": {"ds": {"scale": 0.7, "offset": [0, 0]}}, "version": 0.4,
        }  # fmt: skip

    def _drawn(self, node: Node, facts: dict, below: dict[int, int]) -> dict:
        layout, stated = self.layout, _stated(node, facts)
        inputs, values, height = [], [], layout.bare
        for name, (kind, options) in declared_inputs(facts).items():
            inputs.append({"name": name, "type": kind, "link": None})
            height += layout.text if options.get("multiline") else layout.line
            if is_widget(kind, options):
                inputs[-1]["widget"] = {"name": name}
                value = stated[name]
                values.append(_default(kind, options) if isinstance(value, list) else value)
                if options.get("control_after_generate") or name in SEEDS:
                    values.append("fixed")
                    height += layout.line
                if options.get("image_upload"):
                    values.append("image")
                    height += 300
        slots = zip(facts["output"], facts["output_name"], strict=True)
        outputs = [{"name": n, "type": t, "slot_index": i, "links": []} for i, (t, n) in enumerate(slots)]
        sockets = sum("widget" not in entry for entry in inputs)
        if layout.outputs_take_rows:
            height += layout.line * max(0, len(outputs) - sockets)
        height = max(layout.heights.get(node.kind, 0), height, layout.bare + layout.line * len(outputs))
        size = list(node.size or (layout.column - 40, height))
        return {
            "id": node.number, "type": node.kind, "pos": self._place(below, node.column, size[1]), "size": size,
            "flags": {}, "order": node.number - 1, "mode": 0, "inputs": inputs, "outputs": outputs,
            "properties": {"Node name for S&R": node.kind}, "widgets_values": values,
            "title": node.title or facts["display_name"], **(ACCENT if node.kind == self.accent else {}),
        }  # fmt: skip

    def _place(self, below: dict[int, int], column: int, height: int) -> list[int]:
        y = below.get(column, TOP)
        below[column] = y + height + GAP
        return [40 + self.layout.column * column, y]


def is_widget(kind: str, options: dict) -> bool:
    """Whether an input is filled in on the node; others are sockets."""
    return kind in WIDGETS and not options.get("forceInput")


def declared_inputs(facts: dict) -> dict[str, tuple[str, dict]]:
    """Input name -> (type, options), required ones first, as the canvas shows them."""
    declared = {}
    for group in ("required", "optional"):
        for name in facts["input_order"].get(group, []):
            kind, *rest = facts["input"][group][name]
            options = rest[0] if rest else {}
            if isinstance(kind, list):  # how older hosts write a combo
                kind, options = "COMBO", {**options, "options": kind}
            declared[name] = (kind, options)
    return declared


def _default(kind: str, options: dict):
    if kind == "COMBO":
        return options.get("default", (options.get("options") or [""])[0])
    return options.get("default", {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False}[kind])


def _stated(node: Node, facts: dict) -> dict:
    """The inputs of a node, widgets that were left out with their defaults.

    Raises:
        ValueError: an input that the node does not have, or lacks.
    """
    declared = declared_inputs(facts)
    strange = node.inputs.keys() - declared.keys()
    required = facts["input_order"].get("required", [])
    missing = [name for name in required if name not in node.inputs and not is_widget(*declared[name])]
    if strange or missing:
        raise ValueError(f"{node.kind}: got {sorted(strange)} too many, and {missing} not at all")
    stated = {}
    for name, (kind, options) in declared.items():
        if name in node.inputs:
            stated[name] = node.inputs[name]
        elif is_widget(kind, options):
            stated[name] = _default(kind, options)
    return stated
