"""Saved workflows keep working: what the nodes declare changes on purpose or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from contract import CURRENT, as_text, contract_of
from stand_in_host import nodes_of_the_pack, schema_of_the_guide

RELEASED = sorted(path for path in CURRENT.parent.glob("*.json") if path != CURRENT)
# Node id -> what replaces it. A node is first marked is_deprecated for a release, then may go here.
RETIRED: dict[str, str] = {}


@pytest.fixture(scope="module")
def schemas():
    with nodes_of_the_pack() as nodes:
        return {schema.node_id: schema for schema in (node.define_schema() for node in nodes)}


@pytest.fixture(scope="module")
def declared(schemas):
    return {name: contract_of(schema) for name, schema in schemas.items()}


def test_the_nodes_declare_what_the_contract_says(declared):
    assert as_text(declared) == CURRENT.read_text(encoding="utf-8"), (
        "the nodes' ids, inputs or outputs have changed: if that is meant, run `python tools/declarations.py` and "
        "say so in CHANGELOG.md"
    )


@pytest.mark.parametrize("path", RELEASED, ids=lambda path: path.stem)
def test_a_workflow_of_a_released_version_still_means_the_same(declared, path: Path):
    for name, old in json.loads(path.read_text(encoding="utf-8")).items():
        if name in RETIRED:
            assert RETIRED[name] in declared, f"{name} is said to be replaced by {RETIRED[name]}, which is not there"
            continue
        assert name in declared, f"{name} is gone: mark it is_deprecated for a release, then name it in RETIRED"
        new = declared[name]
        # Saved widget values are a list without names, and links name outputs by their place: order is meaning.
        assert [slot["type"] for slot in new["outputs"]][: len(old["outputs"])] == [s["type"] for s in old["outputs"]]
        for before, now in zip(old["inputs"], new["inputs"], strict=False):
            where = f"{name}.{before['id']}"
            assert (now["id"], now["type"]) == (before["id"], before["type"]), where
            assert now.get("default") == before.get("default"), where
            assert set(before.get("options", [])) <= set(now.get("options", [])), where
            for bound, wider in (("min", lambda a, b: a <= b), ("max", lambda a, b: a >= b)):
                assert bound not in before or wider(now[bound], before[bound]), where
        assert len(new["inputs"]) >= len(old["inputs"]), name
        assert all(slot["optional"] for slot in new["inputs"][len(old["inputs"]) :]), f"{name}: a new input is required"


def test_ids_begin_with_the_packs_name_and_names_are_given(declared):
    for name, facts in declared.items():
        assert name.startswith("ZigMa") and facts["display_name"].startswith("ZigMa "), name
        ids = [slot["id"] for slot in facts["inputs"]]
        assert len(set(ids)) == len(ids) and all(ids), name


def test_every_node_input_and_output_has_a_tooltip(schemas):
    for name, schema in schemas.items():
        assert schema.description, name
        missing = [slot.id or slot.io_type for slot in [*schema.inputs, *schema.outputs] if not slot.tooltip]
        assert not missing, f"{name}: no tooltip for {missing}"


def test_the_node_of_the_development_guide_is_one(tmp_path):
    schema, _ = schema_of_the_guide(tmp_path)
    assert contract_of(schema)["inputs"] == [{"id": "images", "type": "IMAGE", "optional": False}]
    assert schema.category == "ZigMa" and all(slot.tooltip for slot in [*schema.inputs, *schema.outputs])
