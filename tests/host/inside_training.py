"""Checks inside a ComfyUI (see inside.py): training in the graph, beside the trainer and the samplers without a host."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy
from host_process import BASE, close, encode, loaded, refused, stock
from inside_adapters import host_latent, own_latent
from inside_files import state_of

import comfy.model_management as management  # isort: skip
import comfy.utils  # isort: skip
import folder_paths  # isort: skip
import torch  # isort: skip
from PIL import Image  # isort: skip

RUNS = Path(folder_paths.get_output_directory()) / "zigma_training"
CAPTIONS = ("red fox", "green apple", "red apple", "fox")


def pictures(name: str = "squares", size: tuple[int, int] = (48, 32)) -> str:
    """A folder of four pictures in the host's input folder."""
    folder = Path(folder_paths.get_input_directory()) / name
    folder.mkdir(parents=True, exist_ok=True)
    for number, caption in enumerate(CAPTIONS):
        picture = Image.new("RGB", size, (60 * number, 200 - 40 * number, 90))
        picture.paste((250, 240, 20 * number), (8, 4 + 3 * number, 30, 20))
        picture.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption, encoding="utf-8")
    return name


def dataset(pack, folder: str = "", **changes):
    given = {"kind": "auto", "size": 0, "buckets": False, "flips": False, "names_as_captions": False, "trigger": ""}
    return pack.node("ZigMaDataset").execute(folder, **given | changes).result


def trained(pack, parts, run_name: str, **changes):
    """Outputs of ZigMaTrain on `parts` (model, clip, vae); a fresh run unless `again`."""
    if not changes.pop("again", False):
        shutil.rmtree(RUNS / run_name, ignore_errors=True)
    data = changes.pop("data", None) or dataset(pack, pictures())[0]
    given = {
        "method": "lora", "steps": 6, "batch_size": 2, "learning_rate": 0.05, "rank": 4, "seed": 1,
        "precision": "fp32", "caption_dropout": 0.1, "sample_every": 0, "prompts": "red fox",
    }  # fmt: skip
    model, clip, vae = parts
    return pack.node("ZigMaTrain").execute(
        model, data, **given | changes, run_name=run_name, clip=clip, vae=vae
    ).result  # fmt: skip


def weights(path: str | Path) -> dict[str, torch.Tensor]:
    return comfy.utils.load_torch_file(str(path), safe_load=True)


def same_weights(a, b) -> None:
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def check_a_lora_trained_here_draws_what_it_draws_without_a_host(pack):
    parts = loaded(pack)
    before, plain = state_of(parts[0]), host_latent(pack, parts[0], parts[1])
    for method in ("lora", "lokr"):
        model, clip, file, losses, samples = trained(pack, parts, f"own_{method}", method=method, sample_every=3)
        assert clip is parts[1] and Path(file) == RUNS / f"own_{method}" / f"{method}.safetensors"
        got = host_latent(pack, model, clip)
        assert (got - plain).abs().max() > 0.05 * plain.std(), f"{method} changes nothing"
        with torch.inference_mode(False), torch.no_grad():
            bundle = pack.checkpoint.load_bundle(pack.file)
            pack.part("zigma.training.adapters").load_adapters(bundle.model, file)
        close(got, own_latent(pack, bundle), 1e-3 * plain.std().item())
        assert [entry["step"] for entry in losses] == list(range(1, 7))
        assert samples.dim() == 4 and samples.shape[-1] == 3 and samples.std() > 0.01
        assert (RUNS / f"own_{method}" / "samples" / "0000003.png").is_file()
    assert torch.equal(host_latent(pack, *parts[:2]), plain)
    after = state_of(parts[0])
    assert all(torch.equal(after[key], before[key]) for key in before)
