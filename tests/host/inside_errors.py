"""Checks inside a ComfyUI (see inside.py): what artists get wrong most, as one list.

Every entry of the table "When something is wrong" in docs/comfyui.md is provoked here, by the name that it has there;
the sentence that comes has to be the one that the table shows.
"""

from __future__ import annotations

import re

from host_process import BASE, empty, encode, loaded, stock
from inside_training import dataset, pictures, trained

import torch  # isort: skip
from safetensors.torch import save_file  # isort: skip

PAGE = BASE / "custom_nodes" / "ZigMa" / "docs" / "comfyui.md"
HEADING = "## When something is wrong"


def sampled(model, positive, negative, latent, steps=2, cfg=2.0):
    return stock.common_ksampler(model, 0, steps, cfg, "euler", "simple", positive, negative, latent)[0]


def mistakes(pack) -> dict:
    """Name in the table -> what makes it."""
    parts = model, clip, vae = loaded(pack)
    plain, _, _ = loaded(pack, "class.safetensors")  # of a class model without a null label
    text, none, latent = encode(clip, "fox"), encode(clip, ""), empty(pack, model)
    label = pack.node("ZigMaLabelConditioning").execute(plain, 0, "").result[0]
    null = pack.node("ZigMaLabelConditioning").execute(plain, 0, "").result[1]
    wide = [[torch.zeros(1, 77, 768), {}]]
    folder = pack.file.parent
    sd, flux = torch.zeros(320, 4, 3, 3), torch.zeros(3072, 64)
    save_file({"model.diffusion_model.input_blocks.0.0.weight": sd}, folder / "sd.safetensors")
    save_file({"double_blocks.0.img_attn.qkv.weight": flux, "img_in.weight": flux + 0}, folder / "flux.safetensors")
    loras = BASE / "models" / "loras"
    loras.mkdir(exist_ok=True)
    layer = "lora_unet_down_blocks_0_attentions_0_proj_in"
    other = {f"{layer}.lora_{way}.weight": torch.zeros(4, 4) for way in ("up", "down")}
    save_file(other, loras / "of_another_model.safetensors")
    nothing = BASE / "input" / "nothing"
    nothing.mkdir(exist_ok=True)
    trained(pack, parts, "begun", steps=1)
    return {
        "latent channels": lambda: sampled(model, text, none, {"samples": torch.ones(1, 16, 4, 6)}),
        "a video's latent": lambda: sampled(model, text, none, {"samples": torch.zeros(1, 4, 3, 4, 6)}),
        "sizes": lambda: empty(pack, model, width=40),
        "another text encoder": lambda: sampled(model, wide, wide, latent),
        "a label out of range": lambda: pack.node("ZigMaLabelConditioning").execute(plain, 99, ""),
        "cfg without a null": lambda: sampled(plain, label, null, empty(pack, plain)),
        "a LoRA of another model": lambda: pack.node("ZigMaLoraLoader").execute(
            model, "of_another_model.safetensors", 1.0
        ),
        "a Stable Diffusion file": lambda: loaded(pack, "sd.safetensors"),
        "a Flux file": lambda: loaded(pack, "flux.safetensors"),
        "no VAE": lambda: pack.node("ZigMaVAEDecode").execute(latent, None, 1),
        "no steps": lambda: pack.node("ZigMaScheduler").execute(0, 1.0, "uniform", 1.0),
        "pictures to train on that are not there": lambda: dataset(pack, "gone"),
        "a folder without pictures": lambda: dataset(pack, "nothing"),
        "a batch of more pictures than there are": lambda: trained(pack, parts, "wrong", batch_size=5),
        "training a text model without its text encoder": lambda: trained(pack, (model, None, vae), "wrong"),
        "a run's name that another model's run has": lambda: trained(
            pack, loaded(pack, "kind_shared.safetensors"), "begun", again=True
        ),
        "a run whose pictures have changed": lambda: trained(
            pack, parts, "begun", again=True, data=dataset(pack, pictures("others", (32, 48)))[0]
        ),
    }  # fmt: skip


def documented() -> dict[str, str]:
    """Name -> the words of its row's sentence, as the page shows it."""
    part = PAGE.read_text(encoding="utf-8").partition(HEADING)[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| ([^|`]+?) \| `([^`]+)` \|", part, re.MULTILINE))


def check_every_mistake_of_the_list_gets_the_sentence_that_the_page_shows(pack):
    shown, made = documented(), mistakes(pack)
    assert shown.keys() == made.keys(), shown.keys() ^ made.keys()
    for name, make in made.items():
        try:
            make()
        except (ValueError, FileNotFoundError) as error:
            words = [part.strip() for part in shown[name].split("...")]
            assert all(word in str(error) for word in words), f"{name}: {error}"
            assert "\n" not in str(error), f"{name}: {error}"
        else:
            raise AssertionError(f"{name}: nothing was refused")
