"""Checks inside a ComfyUI (see inside.py): LoRA and LoKr files that the trainer writes, in stock and own loaders."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

from host_process import close, empty, encode, loaded, refused, stock, stock_pictures
from inside_files import logged, same_state, state_of
from inside_patches import KINDS, LORAS, output, patched_output, with_ours

import torch  # isort: skip
from comfy.weight_adapter.base import factorization  # isort: skip

SETTINGS = {
    "lora": {"kind": "lora", "rank": 3, "alpha": 1.5},
    "thin lokr": {"kind": "lokr", "rank": 2, "alpha": 6.0, "factor": 4},
    "whole lokr": {"kind": "lokr", "rank": 64, "alpha": 64.0},
    "lokr of both": {"kind": "lokr", "rank": 5, "alpha": 2.0},
}


def trained(pack, fields: dict, file: str, model: str = "tiny.safetensors") -> SimpleNamespace:
    """Adapters of random factors on a model outside the host, and their file in models/loras."""
    training = pack.part("zigma.training.adapters")
    with torch.inference_mode(False), torch.no_grad():
        bundle = pack.checkpoint.load_bundle(pack.file.with_name(model))
        generator = torch.Generator().manual_seed(5)
        adapters = training.add_adapters(bundle.model, training.AdapterSettings(**fields), generator)
        for parameter in adapters.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        LORAS.mkdir(exist_ok=True)
        training.save_adapters(adapters, LORAS / file, {"note": "random"})
    return SimpleNamespace(bundle=bundle, adapters=adapters)


def with_stock(model, file: str, strength: float = 1.0):
    return stock.LoraLoaderModelOnly().load_lora_model_only(model, file, strength)[0]


def quietly(action: Callable):
    """What it returns, if no line in the log says that something was left out."""
    made: list = []
    lines = logged(lambda: made.append(action()))
    assert not [line for line in lines if "not loaded" in line or "in part only" in line or "ERROR" in line], lines
    return made[0]


def host_latent(pack, model, clip) -> torch.Tensor:
    """What stock KSampler draws of "red fox", as the model has latents."""
    positive, negative = encode(clip, "red fox"), encode(clip, "")
    latent = stock.common_ksampler(model, 3, 10, 2.0, "euler", "simple", positive, negative, empty(pack, model))[0]
    return model.get_model_object("latent_format").process_in(latent["samples"])


def own_latent(pack, bundle) -> torch.Tensor:
    """The same without a host."""
    part = pack.part
    with torch.inference_mode(False), torch.no_grad():
        y, null = bundle.text_encoder.encode(["red fox"]), bundle.text_encoder.encode([""])
        velocity = part("zigma.guidance").classifier_free(bundle.model, y, null, 2.0)
        return part("zigma.solvers").solve_ode(velocity, pack.sampling.initial_noise(bundle, 1, 3), 10, "euler")


def same(got: torch.Tensor, expected: torch.Tensor) -> None:
    close(got, expected, 1e-3 * expected.std().item())


def check_adapters_draw_in_the_host_what_they_draw_here(pack):
    model, clip, vae = loaded(pack)
    weights, plain = state_of(model), host_latent(pack, model, clip)
    for name, fields in SETTINGS.items():
        file = f"{name}.safetensors"
        here = trained(pack, fields, file)
        for strength in (1.0, -0.5):
            here.adapters.strength = strength
            want = own_latent(pack, here.bundle)
            assert (want - plain).abs().max() > 0.1 * plain.std(), f"{name} does nothing"
            for load in (lambda *a: with_ours(pack, *a), with_stock):
                made = quietly(partial(load, model, file, strength))
                assert len(made.patches) == len(here.adapters.names), name
                same(quietly(partial(host_latent, pack, made, clip)), want)
        here.adapters.strength = 1.0
        drawn = pack.sampling.SamplingSettings(steps=10, solver="euler", guidance=2.0)
        with torch.inference_mode(False):
            pictures = pack.sampling.sample(here.bundle, ["red fox"], seed=3, settings=drawn)
        got = stock_pictures(with_ours(pack, model, file), clip, vae, empty(pack, model))
        close(got, pictures.movedim(1, -1) / 2 + 0.5)

        assert torch.equal(host_latent(pack, model, clip), plain), f"{name} stays when it is gone"
        same_state(state_of(model), weights)
        here.adapters.remove()
        same(own_latent(pack, here.bundle), plain)


def check_adapters_of_every_kind_of_model_patch_what_they_merge(pack):
    for kind in KINDS:
        model = loaded(pack, kind)[0]
        before = state_of(model)
        for name, fields in SETTINGS.items():
            here = trained(pack, fields, "kind.safetensors", kind)
            want = output(model, here.adapters.merged_state_dict())
            for load in (lambda *a: with_ours(pack, *a), with_stock):
                for budget in (0, 1):
                    close(patched_output(load(model, "kind.safetensors"), budget), want, 1e-5)
            same_state(state_of(model), before)
            assert not torch.allclose(want, output(model), atol=1e-2), (kind, name)


def check_an_adapter_of_another_size_is_a_sentence(pack):
    """Whatever its kind: a host logs it, and leaves it out."""
    model = loaded(pack, "pixels.safetensors")[0]
    parts = {name: pack.part(f"zigma.{name}") for name in ("model", "checkpoint")}
    with torch.inference_mode(False):
        config = dataclasses.replace(model.model.diffusion_model.config, embed_dim=48, dt_rank=None)
        wide = pack.file.with_name("wide.safetensors")
        parts["checkpoint"].save_checkpoint(parts["model"].ZigMa(config), wide)
    for fields in SETTINGS.values():
        trained(pack, fields, "wide.safetensors", wide.name)
        refused(lambda: with_ours(pack, model, "wide.safetensors"), "of a ZigMa of another size", "14 weights")
    wide.unlink()


def check_the_host_splits_sides_as_we_do(pack):
    ours = pack.part("zigma.training.adapter_layers").factorization
    for size in (*range(1, 300), 512, 768, 1024, 1536, 3072):
        for factor in (-1, 1, 2, 3, 4, 8, 16, 100):
            assert ours(size, factor) == factorization(size, factor), (size, factor)
