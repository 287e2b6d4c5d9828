"""The pack in a real ComfyUI: checks inside its process, and workflows through its server.

Hosts: COMFYUI_PATH (one or several), the host this pack is installed in, ~/comfy/ComfyUI, ~/ComfyUI*. Each runs under
its own virtual environment's interpreter, or COMFYUI_PYTHON.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
from pathlib import Path

import pytest
from compare_pictures import DECIBELS, decibels, frames_of, kept
from found_hosts import NEEDS_HOST, hosts
from PIL import Image

from zigma.assets import available_models

ROOT = Path(__file__).resolve().parents[2]
INSIDE = Path(__file__).with_name("inside.py")
CHECKS = [
    name
    for file in sorted(INSIDE.parent.glob("inside*.py"))
    for name in re.findall(r"^def (check_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
]

pytestmark = [pytest.mark.host, NEEDS_HOST]


@pytest.fixture(scope="session")
def answers(host, base):
    """Every check's problem, or None, from one process inside the host."""
    command = [hosts.interpreter(host), INSIDE, host, base]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=base)
    lines = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("CHECK ")]
    assert lines, f"{host} ran no checks:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return {line["name"]: line["problem"] for line in lines}


@pytest.mark.parametrize("name", CHECKS)
def test_inside(answers, name):
    assert name in answers, f"the process ended before this check; it ran {list(answers)}"
    if answers[name]:
        pytest.fail(answers[name], pytrace=False)


def graph(**changes) -> dict:
    """The shipped workflow on the tiny model; changes as node__input=value."""
    workflow = json.loads((ROOT / "workflows/api/text_to_image.json").read_text(encoding="utf-8"))
    changes = {"1__model_name": "tiny.safetensors", "2__text": "red fox", "5__steps": 4, **changes}
    for key, value in changes.items():
        node, name = key.split("__")
        workflow[node]["inputs"][name] = value
    return workflow


def test_a_workflow_runs_through_the_server(server):
    pictures = server.run(graph())
    sizes = [Image.open(io.BytesIO(data)).size for data in pictures.values()]
    assert sizes == [(4 * 48, 4 * 32)] * 4


def test_files_of_a_users_models_are_found_and_nothing_is_written_beside_them(server, more_models):
    """As `make comfyui` lets a host find those of its own models/."""
    before = sorted(more_models.rglob("*"))
    drawn = [server.run(graph(**{"1__model_name": f"{name}.safetensors"})) for name in ("user's", "tiny")]
    mine, tiny = ([Image.open(io.BytesIO(png)).tobytes() for png in pictures.values()] for pictures in drawn)
    assert mine and mine == tiny
    assert sorted(more_models.rglob("*")) == before


def test_mistakes_come_back_as_one_sentence(server):
    with pytest.raises(hosts.HostError, match=r"ZigMaModelLoader: .*gone\.safetensors"):
        server.run(graph(**{"1__model_name": "gone.safetensors"}))
    with pytest.raises(hosts.HostError, match=r"ZigMaModelLoader: .*broken\.safetensors.*get the file again"):
        server.run(graph(**{"1__model_name": "broken.safetensors"}))
    with pytest.raises(hosts.HostError, match="ZigMaEmptyLatent: set the width to 32: got 40, expected a multiple"):
        server.run(graph(**{"4__width": 40}))


def test_the_server_shows_help_pages_and_tooltips(server):
    facts = server.ask("/object_info/ZigMaSampler")["ZigMaSampler"]
    assert facts["input"]["required"]["steps"][1]["tooltip"] and facts["display_name"] == "ZigMa Sampler"
    import urllib.request

    with urllib.request.urlopen(f"{server.url}/extensions/ZigMa/docs/ZigMaSampler.md") as page:
        assert page.read().decode().startswith("# ZigMa Sampler")


@pytest.mark.skipif(not available_models(), reason="the demo model is not in place")
def test_the_demo_is_in_the_list_without_a_copy(server):
    options = server.ask("/object_info/ZigMaModelLoader")["ZigMaModelLoader"]["input"]["required"]["model_name"]
    names = options[0] if isinstance(options[0], list) else options[1]["options"]
    assert names[0] == "demo" and "tiny.safetensors" in names


@pytest.mark.parametrize("path", sorted((ROOT / "workflows/api").glob("*.json")), ids=lambda path: path.stem)
@pytest.mark.skipif(not available_models(), reason="NOT TESTED: the demo model is not in place")
def test_every_shipped_workflow_draws_its_stored_picture(server, path):
    pictures = list(server.run(json.loads(path.read_text(encoding="utf-8"))).values())
    for data in pictures:
        assert len(set(frames_of(data)[0].convert("L").tobytes())) > 20, "an empty picture"
    assert decibels(frames_of(pictures[0]), kept(path.stem)) >= DECIBELS
