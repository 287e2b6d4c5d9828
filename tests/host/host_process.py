"""The ComfyUI around the checks: its command line and folders, and what several checks need of it.

Importing it starts the host: the arguments are those of inside.py, and ZIGMA_HOST_FLAGS has more flags of the host.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace

HOST, BASE, CHOSEN = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
sys.path.insert(0, str(HOST))
sys.argv = ["main.py", "--cpu", "--base-directory", str(BASE), "--database-url", "sqlite:///:memory:"]
sys.argv += os.environ.get("ZIGMA_HOST_FLAGS", "").split()

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.sd  # noqa: E402
import torch  # noqa: E402

import nodes as stock  # noqa: E402

TINY = "tiny.safetensors"


def load_pack() -> SimpleNamespace:
    """The pack as the host loads it: by path, under a name of the host's making."""
    if not asyncio.run(stock.load_custom_node(str(BASE / "custom_nodes" / "ZigMa"), module_parent="custom_nodes")):
        raise RuntimeError("the host could not load the pack")
    # By their own attributes: a lazy module answers to any name.
    modules = [m for m in list(sys.modules.values()) if "comfy_entrypoint" in vars(m)]
    entry = next(m for m in modules if "ZigMa" in str(m.__file__))

    def part(name: str):
        return importlib.import_module(f"{entry.__name__}.{name}")

    return SimpleNamespace(
        part=part, node=lambda name: stock.NODE_CLASS_MAPPINGS[name], sampling=part("zigma.sampling"),
        checkpoint=part("zigma.checkpoint"), file=BASE / "models" / "diffusion_models" / TINY,
    )  # fmt: skip


def loaded(pack, name: str = TINY):
    return pack.node("ZigMaModelLoader").execute(name).result


def encode(clip, text: str):
    return stock.CLIPTextEncode().encode(clip, text)[0]


def stock_pictures(model, clip, vae, latent, prompt="red fox", seed=3, steps=10, cfg=2.0, denoise=1.0):
    positive, negative = encode(clip, prompt), encode(clip, "")
    latent = stock.common_ksampler(
        model, seed, steps, cfg, "euler", "simple", positive, negative, latent, denoise=denoise
    )[0]  # fmt: skip
    return stock.VAEDecode().decode(vae, latent)[0]


def our_pictures(
    pack, model, clip, vae, latent, prompt="red fox", seed=3, steps=10, cfg=2.0, solver="euler", denoise=1.0
):
    positive, negative = encode(clip, prompt), encode(clip, "")
    sampler, decode = pack.node("ZigMaSampler"), pack.node("ZigMaVAEDecode")
    latent = sampler.execute(model, positive, negative, latent, seed, steps, cfg, solver, denoise).result[0]
    return decode.execute(latent, vae, 1).result[0]


def empty(pack, model, batch=1, width=0, height=0):
    return pack.node("ZigMaEmptyLatent").execute(model, width, height, batch).result[0]


def command_line(pack, prompt="red fox", count=1, name=TINY, **settings):
    """What the command line draws: IMAGE (b, h, w, 3) in [0, 1]."""
    bundle = pack.checkpoint.load_bundle(pack.file.with_name(name))
    chosen = pack.sampling.SamplingSettings(**{"steps": 10, "solver": "euler", "guidance": 2.0, **settings})
    with torch.inference_mode(False):
        prompts = None if prompt is None else [prompt]
        images = pack.sampling.sample(bundle, prompts, count=count, seed=3, settings=chosen)
    return images.movedim(1, -1) / 2 + 0.5


def close(got, expected, limit=1e-5):
    assert got.shape == expected.shape, (got.shape, expected.shape)
    difference = (got - expected).abs().max().item()
    assert difference < limit, f"differs by {difference:.2e}, limit {limit:.0e}"


def refused(call, *words):
    try:
        call()
    except ValueError as error:
        assert all(word in str(error) for word in words) and "\n" not in str(error), str(error)
        return
    raise AssertionError(f"nothing was refused; expected a sentence with {words}")
