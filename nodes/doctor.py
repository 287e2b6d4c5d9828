"""What a model is and whether it is well, as text."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Iterator

import comfy.model_management
import torch
from comfy_api.latest import io

from ..zigma.diagnosis import (
    architecture_lines,
    bad_tensors,
    chosen_backend,
    environment_lines,
    metadata_lines,
    size_line,
    weights_line,
)
from ..zigma.model import ZigMa
from .comfy_model import as_zigma
from .comfy_patches import misfits
from .layer_orders import grid_of, schedule_of
from .schema import schema
from .shown_text import shown

log = logging.getLogger(__name__)

SLOW = 5.0  # seconds of one evaluation from which on a single one has to do


class ZigMaModelDoctor(io.ComfyNode):
    """A report on a MODEL, and on a CLIP and VAE beside it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What the host shows."""
        return schema(
            node_id="ZigMaModelDoctor",
            display_name="ZigMa Model Doctor",
            description="Says what a ZigMa model is, whether its numbers are sound, whether CLIP and VAE fit it, which "
            "scan backend runs here and why, and how long a picture will take.",
            search_aliases=["zigma doctor", "model info", "inspect model", "benchmark", "why slow", "nan"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="A ZigMa model, with whatever LoRAs, merges and scan orders it has."),
                io.Int.Input("steps", default=50, min=1, max=10000, tooltip="Of the sampling that is estimated."),
                io.Float.Input(
                    "cfg", default=3.0, min=0.0, max=100.0, step=0.1,
                    tooltip="Of the sampling that is estimated: any other than 1 takes twice as long.",
                ),
                io.Int.Input(
                    "width", default=0, min=0, max=8192, step=8,
                    tooltip="Of the picture, in pixels; 0 is the width the model was trained on.",
                ),
                io.Int.Input(
                    "height", default=0, min=0, max=8192, step=8,
                    tooltip="Of the picture, in pixels; 0 is the height the model was trained on.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="Checked against the model: do its features fit?"),
                io.Vae.Input("vae", optional=True, tooltip="Checked against the model: do its latents fit?"),
            ],
            outputs=[io.String.Output(display_name="report", tooltip="The report, also shown in the node.")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, steps: int, cfg: float, width: int, height: int, clip=None, vae=None) -> io.NodeOutput:
        """What is wrong first, then all facts."""
        network = as_zigma(model)
        sides = tuple(network.config.patch_size * side for side in grid_of(model, network, width, height))
        comfy.model_management.load_models_gpu([model])
        problems = list(_problems(model, clip, vae))
        speed = list(_timing(model, sides, steps, cfg, problems))
        lines = ["PROBLEMS" if problems else "No problem found.", *(f"  {problem}" for problem in problems)]
        sections = {
            f"MODEL {model.model.zigma_file.path.name}": _facts(model), "SPEED": speed,
            "MEMORY": _memory(model, sides), "MACHINE": environment_lines(),
        }  # fmt: skip
        for title, facts in sections.items():
            lines += ["", title, *(f"  {fact}" for fact in facts)]
        return shown("\n".join(lines), cls)


def _facts(model) -> Iterator[str]:
    """What the model is, by its file and by what a graph has made of it."""
    network, file = as_zigma(model), model.model.zigma_file
    yield from architecture_lines(file.config, file.latent, file.token_orders, file.condition)
    yield size_line("in memory", network.state_dict())
    yield f"computed in: {_short(_compute_dtype(model))}"
    yield weights_line(file.metadata)
    beside = {"text encoder": file.text_state, "VAE": file.vae_state}
    yield "the file carries: " + ", ".join(["denoiser", *(n for n, state in beside.items() if state is not None)])
    yield _orders(model)
    yield from _patches(model)
    yield from metadata_lines({key: value for key, value in file.metadata.items() if key.startswith("zigma.")})


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _compute_dtype(model) -> torch.dtype:
    return model.get_model_object("manual_cast_dtype") or model.model.get_dtype()


def _problems(model, clip, vae) -> Iterator[str]:
    """What keeps the model from drawing well, each with what to do."""
    config, latent = as_zigma(model).config, model.model.zigma_file.latent
    for tensor in bad_tensors(as_zigma(model).state_dict()):
        yield f"damaged weights, get the file or the LoRA again: {tensor}"
    for key in _misfits(model):
        yield f"a patch has another shape than its weight and is left out, use a LoRA of this model: {key}"
    if clip is not None:
        features = clip.encode_from_tokens(clip.tokenize("")).shape[-1]
        if not config.has_text:
            yield "the model takes no text: leave clip unconnected"
        elif features != config.d_context:
            yield f"use another text encoder: this CLIP has features of width {features}, expected {config.d_context}"
    if vae is not None:
        channels, downscale = vae.latent_channels, vae.spacial_compression_decode()
        if channels != latent.channels:
            yield f"use another VAE: this one has latents of {channels} channels, expected {latent.channels}"
        elif downscale != latent.downscale:
            yield f"use another VAE: this one divides sides by {downscale}, expected {latent.downscale}"
        for tensor in bad_tensors(vae.get_sd()):
            yield f"damaged VAE, get its file again: {tensor}"


def _misfits(model) -> list[str]:
    state = model.model.state_dict()
    patches = ((key, entry) for key, entries in model.patches.items() for entry in entries)
    # A patch of a part of a weight has that part's shape.
    return [key for key, entry in patches if entry[3] is None and misfits({key: entry[1]}, state)]


def _orders(model) -> str:
    schedule = schedule_of(model, as_zigma(model).config.depth)
    changed = [f"layer {i}: {entry[0]} {entry[1]}" for i, entry in enumerate(schedule) if entry is not None]
    if not changed:
        return "orders in use: as trained"
    names = ", ".join(changed[:8]) + ", ..." * (len(changed) > 8)
    return f"orders in use: as trained but for {len(changed)} of {len(schedule)} layers ({names})"


def _patches(model) -> Iterator[str]:
    yield f"patches (LoRA, merge): on {len(model.patches)} of {len(as_zigma(model).state_dict())} weights"
    if model.weight_wrapper_patches:
        yield f"weights made at use by another node: {len(model.weight_wrapper_patches)}"
    if model.object_patches:
        yield f"replaced by other nodes: {', '.join(sorted(model.object_patches))}"


def _memory(model, sides: tuple[int, int]) -> Iterator[str]:
    management, device = comfy.model_management, model.load_device
    free, total = management.get_free_memory(device), management.get_total_memory(device)
    yield f"weights: {model.model_size() / 2**20:.0f} MiB, of which {model.loaded_size() / 2**20:.0f} are on {device}"
    needed = model.memory_required([2, as_zigma(model).config.in_channels, *sides])
    yield f"set aside for one guided picture, as ComfyUI reckons: {needed / 2**20:.0f} MiB"
    yield f"{device}: {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"


@torch.no_grad()
def _timing(model, sides: tuple[int, int], steps: int, cfg: float, problems: list[str]) -> Iterator[str]:
    """Measure evaluations as sampling makes them, both guided halves in one batch."""
    network, device, dtype = as_zigma(model), model.load_device, _compute_dtype(model)
    yield f"scan backend: {(backend := chosen_backend(device, dtype))}"
    if backend.startswith("none"):
        problems.append(f"nothing can be drawn, change or unset ZIGMA_SCAN_BACKEND: {backend.removeprefix('none: ')}")
        return
    config = network.config
    guided = cfg != 1 and config.conditioning != "none"
    batch, frames = 1 + guided, [config.video_frames] if config.video_frames else []
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, *frames, config.in_channels, *sides, generator=generator).to(device, dtype)
    y = None
    if config.has_text:
        y = torch.randn(batch, 16, config.d_context, generator=generator).to(device, dtype)
    elif config.conditioning == "class":
        y = torch.zeros(batch, dtype=torch.long, device=device)
    taken = []
    for _ in range(4):
        comfy.model_management.throw_exception_if_processing_interrupted()
        started = time.perf_counter()
        total = float(ZigMa.forward(network, x, torch.full((batch,), 0.5, device=device), y).float().sum())
        taken.append(time.perf_counter() - started)  # after the sum, which waits for the device
        if taken[-1] > SLOW:
            break
    if total != total or abs(total) == float("inf"):
        problems.append(f"its output is not finite in {_short(dtype)}: choose weight_dtype float32 in the loader")
    seconds = statistics.median(taken[1:] or taken)  # the first one prepares things
    size = " x ".join(str(side * model.model.zigma_file.latent.downscale) for side in sides)
    yield f"one evaluation at {size} pixels, batch {batch}{' (guided)' if guided else ''}: {_time(seconds)}"
    yield f"one picture, {steps} steps of euler, cfg {cfg:g}: {_time(seconds * steps)}, and the VAE's decoding"
    yield "heun and midpoint evaluate twice in a step, rk4 four times"


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"
