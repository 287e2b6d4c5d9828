"""Every node has a help page with a picture and an example, and the example is one of today's node.

That the examples run is tested in a real host: tests/host/test_help_examples.py.
"""

from __future__ import annotations

import json
import re
import sys

import pytest
from contract import contract_of
from PIL import Image
from stand_in_host import nodes_of_the_pack, schema_of_the_guide
from ui_format import NODE_IDS, ROOT, as_api

sys.path.insert(0, str(ROOT / "tools"))

from example_graphs import example_graph
from help_pictures import LIMIT

PAGES, EXAMPLES = ROOT / "web/docs", ROOT / "web/docs/examples"
PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)]+)\)")
SOCKET = ["IMAGE", {}]
# What a host says of the stock nodes that examples use, as far as they are connected.
STOCK = {
    "PreviewImage": ({"images": SOCKET}, []),
    "PreviewAny": ({"source": ["*", {}]}, ["STRING"]),
    "LoadImage": ({"image": [["example.png"], {"image_upload": True}]}, ["IMAGE", "MASK"]),
    "ImageScale": (
        {"image": SOCKET, "upscale_method": [["lanczos"], {}], "width": ["INT", {"default": 512}],
         "height": ["INT", {"default": 512}], "crop": [["disabled", "center"], {}]},
        ["IMAGE"],
    ),
    "SamplerCustom": (
        {"model": ["MODEL", {}], "add_noise": ["BOOLEAN", {"default": True}], "noise_seed": ["INT", {"default": 0}],
         "cfg": ["FLOAT", {"default": 8.0}], "positive": ["CONDITIONING", {}], "negative": ["CONDITIONING", {}],
         "sampler": ["SAMPLER", {}], "sigmas": ["SIGMAS", {}], "latent_image": ["LATENT", {}]},
        ["LATENT", "LATENT"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def schemas():
    with nodes_of_the_pack() as nodes:
        return {schema.node_id: schema for schema in (node.define_schema() for node in nodes)}


@pytest.fixture(scope="module")
def facts(schemas):
    """What a host's /object_info says of these nodes."""
    stock = {
        kind: {"display_name": kind, "input": {"required": inputs}, "input_order": {"required": list(inputs)},
               "output": outputs, "output_name": outputs, "output_node": not outputs}
        for kind, (inputs, outputs) in STOCK.items()
    }  # fmt: skip
    return {**stock, **{name: facts_of(schema) for name, schema in schemas.items()}}


def facts_of(schema) -> dict:
    inputs: dict[str, dict] = {"required": {}, "optional": {}}
    for slot in schema.inputs:
        options = {**slot.facts, "forceInput": slot.facts.get("force_input", False)}
        inputs["optional" if slot.optional else "required"][slot.id] = [slot.io_type, options]
    kinds = [slot.io_type for slot in schema.outputs]
    return {
        "display_name": schema.display_name, "input": inputs, "output": kinds, "output_name": kinds,
        "input_order": {group: list(names) for group, names in inputs.items()}, "output_node": schema.is_output_node,
    }  # fmt: skip


def drawn_again(node: str) -> str:
    return f"run `python tools/help_pictures.py {node}` with COMFYUI_PATH=..., and look at what it has drawn"


def example_of(node: str) -> dict:
    """In UI format."""
    path = EXAMPLES / f"{node}.json"
    assert path.is_file(), f"{node} has no example: {drawn_again(node)}"
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("node", NODE_IDS)
def test_every_node_has_a_help_page(node):
    path = PAGES / f"{node}.md"
    assert path.is_file(), f"write web/docs/{node}.md, as the pages beside it"
    page = path.read_text(encoding="utf-8")
    for heading in ("| Input | Meaning |", "| Output | Meaning |", "## Example", "## Common mistakes"):
        assert heading in page


def test_there_is_no_help_page_or_example_without_a_node():
    for folder, kind in ((PAGES, "md"), (EXAMPLES, "json"), (EXAMPLES, "png")):
        assert {path.stem for path in folder.glob(f"*.{kind}")} <= set(NODE_IDS), folder


@pytest.mark.parametrize("node", NODE_IDS)
def test_a_help_page_shows_its_example_and_says_where_it_is(node):
    example = (PAGES / f"{node}.md").read_text(encoding="utf-8").partition("## Example\n")[2].partition("\n## ")[0]
    shown = dict((place, alt) for alt, place in PICTURE.findall(example))
    assert len(shown.get(f"examples/{node}.png", "")) > 20, (
        f"show the example below the heading, ![what is seen there](examples/{node}.png): {drawn_again(node)}"
    )
    assert f"`{node}.json`" in example


@pytest.mark.parametrize("node", NODE_IDS)
def test_pictures_of_help_pages_are_there_small_and_described(node):
    for alt, place in PICTURE.findall((PAGES / f"{node}.md").read_text(encoding="utf-8")):
        path = PAGES / place
        assert path.is_file(), f"{node} shows {place}, which is not there: {drawn_again(node)}"
        assert alt and path.stat().st_size < LIMIT, place
        with Image.open(path) as picture:
            assert min(picture.size) > 250 and len(picture.convert("L").getcolors()) > 16, place


@pytest.mark.parametrize("node", NODE_IDS)
def test_the_picture_brings_its_graph(node):
    example = example_of(node)
    with Image.open(EXAMPLES / f"{node}.png") as picture:
        assert json.loads(picture.text["workflow"]) == example, drawn_again(node)
    assert b"tEXtworkflow\0{" in (EXAMPLES / f"{node}.png").read_bytes()  # a canvas reads no compressed one


@pytest.mark.parametrize("node", NODE_IDS)
def test_an_example_has_the_node_and_knows_the_inputs_of_today(node, schemas):
    graph = example_of(node)
    assert node in [entry["type"] for entry in graph["nodes"]]
    sent = as_api(graph)
    for entry in graph["nodes"]:
        if entry["type"] not in schemas:
            assert entry["type"] in STOCK
            continue
        contract = contract_of(schemas[entry["type"]])
        required = [slot["id"] for slot in contract["inputs"] if not slot["optional"]]
        declared = sorted((slot["id"], slot["type"]) for slot in contract["inputs"])
        assert sorted((slot["name"], slot["type"]) for slot in entry["inputs"]) == declared, drawn_again(node)
        assert [slot["type"] for slot in entry["outputs"]] == [slot["type"] for slot in contract["outputs"]]
        inputs = sent[str(entry["id"])]["inputs"]
        assert set(required) <= set(inputs)
        for slot in contract["inputs"]:
            value = inputs.get(slot["id"])
            if isinstance(value, list) or value is None:
                continue
            files = slot["id"] in ("model_name", "vae_name", "lora_name")
            assert files or value in slot.get("options", [value]), (slot["id"], value)
            assert "min" not in slot or slot["min"] <= value <= slot["max"], (slot["id"], value)


@pytest.mark.parametrize("node", NODE_IDS)
def test_an_example_is_what_the_tool_makes_today(node, facts):
    """Of stock nodes as far as it is stated: their other inputs differ between hosts."""
    graph = example_graph(node, facts)
    stored = as_api(example_of(node))
    assert [n.kind for n in graph.nodes] == [entry["class_type"] for entry in stored.values()], drawn_again(node)
    for key, made in graph.as_api(facts).items():
        inputs = {name: stored[key]["inputs"].get(name) for name in made["inputs"]}
        assert inputs == made["inputs"], f"{made['class_type']}: {drawn_again(node)}"


def test_the_node_of_the_development_guide_gets_an_example_without_a_line_of_code(facts, tmp_path):
    schema, text = schema_of_the_guide(tmp_path)
    new = facts_of(schema)
    assert "python tools/help_pictures.py ZigMaUpsideDown" in text
    graph = example_graph("ZigMaUpsideDown", {**facts, "ZigMaUpsideDown": new})
    kinds = {node.kind: node for node in graph.nodes}
    assert list(kinds)[-3:] == ["ZigMaVAEDecode", "ZigMaUpsideDown", "PreviewImage"]
    assert kinds["ZigMaUpsideDown"].inputs == {"images": kinds["ZigMaVAEDecode"][0]}
    assert kinds["PreviewImage"].inputs == {"images": kinds["ZigMaUpsideDown"][0]}


def new_node(inputs: dict[str, str], outputs: list[str]) -> dict:
    sockets = {name: [kind, {}] for name, kind in inputs.items()}
    return {"display_name": "New", "input": {"required": sockets}, "input_order": {"required": list(sockets)},
            "output": outputs, "output_name": outputs, "output_node": False}  # fmt: skip


@pytest.mark.parametrize(
    ("inputs", "outputs", "follower", "slot"),
    [
        ({"model": "MODEL"}, ["MODEL"], "ZigMaSampler", "model"),
        ({"clip": "CLIP"}, ["CLIP"], "ZigMaTextConditioning", "clip"),
        ({"positive": "CONDITIONING"}, ["CONDITIONING"], "ZigMaSampler", "positive"),
        ({"pixels": "IMAGE", "vae": "VAE"}, ["LATENT"], "ZigMaSampler", "latent_image"),
        ({"samples": "LATENT"}, ["LATENT"], "ZigMaVAEDecode", "samples"),
        ({"model": "MODEL"}, ["STRING"], "PreviewAny", "source"),
    ],
)
def test_what_a_new_node_gives_is_seen_through_what_usually_takes_it(facts, inputs, outputs, follower, slot):
    graph = example_graph("ZigMaNew", {**facts, "ZigMaNew": new_node(inputs, outputs)})
    (new,) = (node for node in graph.nodes if node.kind == "ZigMaNew")
    assert set(new.inputs) == set(inputs)
    takers = [node for node in graph.nodes if node.kind == follower and node.inputs.get(slot) == new[0]]
    assert len(takers) == 1 and graph.nodes[-1].kind in ("PreviewImage", "PreviewAny")
    for node in graph.nodes:  # from the left to the right, previews below what they show
        for source in (graph.source(value) for value in node.inputs.values() if isinstance(value, list)):
            assert source.column < node.column or node.kind.startswith("Preview")


def test_a_new_node_that_needs_or_gives_something_new_is_told_where_to_say_it(facts):
    with pytest.raises(ValueError, match=r"tools/example_graphs\.py what gives MESH"):
        example_graph("ZigMaNew", {**facts, "ZigMaNew": new_node({"mesh": "MESH"}, ["IMAGE"])})
    with pytest.raises(ValueError, match=r"tools/example_graphs\.py what takes SIGMAS"):
        example_graph("ZigMaNew", {**facts, "ZigMaNew": new_node({}, ["SIGMAS"])})
    with pytest.raises(ValueError, match="expected the id of a node that the host knows"):
        example_graph("ZigMaNone", facts)
