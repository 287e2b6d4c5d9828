"""What the shipped workflows draw is what the command line draws, as far as that can; no host is needed to say so.

The stored pictures were drawn by a host, and hosts are compared with them in test_host.py.
"""

from __future__ import annotations

import json

import pytest
from compare_pictures import DECIBELS, decibels, kept
from tiny_models import write_examples

from zigma.assets import available_models
from zigma.checkpoint import load_bundle
from zigma.sampling import SamplingSettings, sample
from zigma.sheet import enlarge, to_pictures

pytestmark = pytest.mark.skipif(not available_models(), reason="NOT TESTED: the demo model is not in place")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_examples(folder)
    return {"demo": available_models()["demo"], **{path.name: path for path in folder.iterdir()}}


def facts(root, name):
    """(model name, batch, settings, seed, enlargement) as the workflow states them."""
    api = json.loads((root / f"workflows/api/{name}.json").read_text(encoding="utf-8"))
    inputs = {node["class_type"]: node["inputs"] for node in api.values()}
    run = inputs["ZigMaSampler"]
    settings = SamplingSettings(steps=run["steps"], solver=run["solver"], guidance=run["cfg"])
    loader, latent, decode = (inputs[f"ZigMa{kind}"] for kind in ("ModelLoader", "EmptyLatent", "VAEDecode"))
    return loader["model_name"], latent["batch_size"], settings, run["seed"], decode["enlarge"]


@pytest.mark.parametrize(
    ("name", "prompt"), [("text_to_image", "panda face"), ("label_to_image", 1), ("video", "red fox")]
)
def test_a_workflow_draws_what_the_command_line_draws(root, models, name, prompt):
    model, count, settings, seed, factor = facts(root, name)
    drawn = sample(load_bundle(models[model]), [prompt], count=count, seed=seed, settings=settings)[0]
    frames = drawn if drawn.dim() == 4 else drawn[None]
    pictures = [enlarge(picture, factor) for picture in to_pictures(frames)]
    assert decibels(pictures, kept(name)) >= DECIBELS


def test_a_small_difference_is_seen(root):
    """What 40 dB lets through: not another picture of the same prompt, nor one lighter by a hundredth and a half."""
    picture = kept("text_to_image")[0]
    lighter = picture.point(lambda level: min(255, level + 4))
    assert decibels([picture], [picture]) > 1000 > DECIBELS > decibels([lighter], [picture])
