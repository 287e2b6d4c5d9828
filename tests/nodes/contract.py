"""What a saved workflow relies on, as data: every node's id, its inputs in their order, its outputs.

`python tests/nodes/contract.py` writes tests/data/contracts/current.json anew. Whoever does that says in CHANGELOG.md
what changed; `test_contract.py` says what may. Beside it lie the contracts of the released versions.
"""

from __future__ import annotations

import json
from pathlib import Path

CURRENT = Path(__file__).resolve().parents[1] / "data" / "contracts" / "current.json"
NUMBERS = ("default", "min", "max", "step", "control_after_generate")


def contract_of(schema) -> dict:
    """The facts of one schema, of a real host or the stand-in."""
    return {
        "display_name": schema.display_name,
        "category": schema.category,
        "output_node": bool(schema.is_output_node),
        "inputs": [_input(slot) for slot in schema.inputs],
        "outputs": [{"type": slot.io_type, "name": slot.display_name} for slot in schema.outputs],
    }


def _input(slot) -> dict:
    facts = {"id": slot.id, "type": slot.io_type, "optional": bool(slot.optional)}
    facts |= {name: value for name in NUMBERS if (value := getattr(slot, name, None)) is not None}
    if getattr(slot, "multiline", None):
        facts["multiline"] = True
    if slot.io_type == "COMBO":
        facts["options"] = list(slot.options)
    return facts


def as_text(contract: dict) -> str:
    """One line for each input and output: what changed is seen in a diff."""
    text = json.dumps(contract, indent=1, sort_keys=True, ensure_ascii=False)
    return text + "\n"


def main() -> None:
    """Write what the nodes declare now."""
    from stand_in_host import nodes_of_the_pack

    with nodes_of_the_pack() as nodes:
        schemas = [node.define_schema() for node in nodes]
    CURRENT.write_text(as_text({schema.node_id: contract_of(schema) for schema in schemas}), encoding="utf-8")


if __name__ == "__main__":
    main()
