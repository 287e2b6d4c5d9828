"""The pack's node ids, and graphs as a canvas saves them, read as it would send them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "nodes").glob("*.py"))
NODE_IDS = sorted(
    match for path in SOURCES for match in re.findall(r'node_id="(\w+)"', path.read_text(encoding="utf-8"))
)  # fmt: skip
AFTER_A_SEED = ("fixed", "randomize", "increment", "decrement")  # what a canvas does with it after each run


def as_api(ui: dict) -> dict:
    """The UI format as the frontend would send it; its links are checked from both ends."""
    links = {link[0]: [str(link[1]), link[2]] for link in ui["links"]}
    sent = {}
    for node in ui["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        values, inputs = list(node["widgets_values"]), {}
        for slot in node["inputs"]:
            if "widget" in slot:
                inputs[slot["name"]] = values.pop(0)
                if values and (values[0] in AFTER_A_SEED or (node["type"], values[0]) == ("LoadImage", "image")):
                    values.pop(0)
            elif slot["link"] is not None:  # an optional one may be left open
                inputs[slot["name"]] = links[slot["link"]]
        assert not values
        sent[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    by_id = {node["id"]: node for node in ui["nodes"]}
    for number, source, slot, target, target_slot, _ in ui["links"]:
        assert by_id[target]["inputs"][target_slot]["link"] == number
        assert number in by_id[source]["outputs"][slot]["links"]
    return sent
