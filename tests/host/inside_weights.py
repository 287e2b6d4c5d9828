"""Checks inside a ComfyUI (see inside.py): its patches, casts and offloading reach every weight, whatever reads it.

The law: a host MODEL with a LoRA is the plain ZigMa with weights patched by hand. One file of the stock LoRA loader for
each layer (the same one in all blocks), so that a kernel which reads a weight past the host fails by itself.
"""

from __future__ import annotations

import contextlib
import os
import re
from types import SimpleNamespace

from host_process import BASE, TINY, close, empty, encode, loaded, stock

import comfy.hooks  # isort: skip
import comfy.model_management as management  # isort: skip
import comfy.samplers  # isort: skip
import torch  # isort: skip
from safetensors.torch import save_file  # isort: skip

LIMIT = 1e-5
MODELS = (TINY, "class.safetensors", "kind_both_ways.safetensors", "kind_shared.safetensors")
CPU = torch.device("cpu")
ONE_BYTE = 1  # a budget in which no layer is loaded: each patches its weights when it is used


@contextlib.contextmanager
def backend(name: str):
    os.environ["ZIGMA_SCAN_BACKEND"] = name
    try:
        yield
    finally:
        del os.environ["ZIGMA_SCAN_BACKEND"]


WAYS = ("native", "native, layers share memory", "torch")


@contextlib.contextmanager
def way(pack, name: str):
    """A backend; a tiny model's layers share memory only if told to, and then without gradients."""
    scratch = pack.part("zigma.scratch")
    kept, taken = scratch.WORTH_IT_FROM, []
    shares = name == WAYS[1]
    if shares:
        scratch.WORTH_IT_FROM, take = 0, scratch.Scratch._take
        scratch.Scratch._take = lambda self, *what: taken.append(what) or take(self, *what)
    try:
        with backend(name.partition(",")[0]), torch.set_grad_enabled(not shares):
            yield
    finally:
        scratch.WORTH_IT_FROM = kept
        if shares:
            scratch.Scratch._take = take
    assert bool(taken) == shares


@contextlib.contextmanager
def stored_as(dtype: torch.dtype):
    """Models are loaded in this dtype and computed with in float32: what the host does on devices that lack it."""
    kept = management.unet_dtype, management.unet_manual_cast
    management.unet_dtype, management.unet_manual_cast = (lambda **_: dtype), (lambda *_, **__: torch.float32)
    try:
        yield
    finally:
        management.unet_dtype, management.unet_manual_cast = kept


def subject(pack, name: str = TINY, dtype: torch.dtype = torch.float32) -> SimpleNamespace:
    """A host MODEL, the plain network with the same weights, and inputs for both."""
    torch.manual_seed(0)
    with stored_as(dtype) if dtype != torch.float32 else contextlib.nullcontext():
        model = loaded(pack, name)[0]
    plain = pack.checkpoint.load_bundle(pack.file.with_name(name)).model
    exact = pack.part("zigma.mixer").FLOAT32_PARAMETERS  # A and D, whatever the others are stored as
    state = {
        key: value.clone() if key.rpartition(".")[2] in exact else value.to(dtype, copy=True).float()
        for key, value in plain.state_dict().items()
    }
    assert model.model.diffusion_model.dtype == dtype
    y = torch.randn(3, 6, 16) if plain.config.has_text else torch.tensor([4, 0, 2])
    return SimpleNamespace(
        zigma=pack.part("zigma.model").ZigMa, model=model, plain=plain, state=state, x=torch.randn(3, 4, 4, 6),
        t=torch.tensor([0.25, 0.5, 0.875]), y=y,
    )  # fmt: skip


def expected(it, state) -> torch.Tensor:
    it.plain.load_state_dict(state)
    return it.plain(it.x, it.t, it.y)


def velocity(it, model, budget: int = 0) -> torch.Tensor:
    """From the network, with its weights as the host loads them: all, or as many as fit into a budget of bytes."""
    network = model.model.diffusion_model
    try:
        if budget:
            model.partially_load(CPU, budget)
            assert model.model.model_lowvram
        else:
            model.patch_model(CPU)
        if it.plain.config.has_text:
            return -network(it.x, 1 - it.t, it.y)
        return it.zigma.forward(network, it.x, it.t, it.y)  # labels have no way through a graph yet
    finally:
        model.unpatch_model(CPU)


def same(got, want, *what) -> None:
    try:
        close(got, want, LIMIT)
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from error


def layers(state) -> dict[str, list[str]]:
    """Layer with its block as * -> those of every block. A_log, D, pos_embed: no host patches them."""
    found: dict[str, list[str]] = {}
    for key in state:
        if key.endswith(".weight"):
            name = key.removesuffix(".weight")
            found.setdefault(re.sub(r"^blocks\.\d+", "blocks.*", name), []).append(name)
    return found


def lora(it, names: list[str]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A LoRA file for these layers, and the weights that it should come to."""
    file, patched = {}, dict(it.state)
    for name in names:
        host, weight = f"diffusion_model.{name}", it.state[f"{name}.weight"]
        size = 0.3 * weight.std().clamp(min=0.3)
        if weight.dim() == 2:
            up, down = torch.randn(len(weight), 2), torch.randn(2, weight.shape[1]) * size
            file |= {f"{host}.lora_up.weight": up, f"{host}.lora_down.weight": down}
            patched[f"{name}.weight"] = weight + up @ down
        else:
            file[f"{host}.diff"] = torch.randn(weight.shape) * size
            patched[f"{name}.weight"] = weight + file[f"{host}.diff"]
        if f"{name}.bias" in it.state:
            file[f"{host}.diff_b"] = torch.randn(len(weight)) * 0.3
            patched[f"{name}.bias"] = it.state[f"{name}.bias"] + file[f"{host}.diff_b"]
    return file, patched


def with_lora(model, file: dict[str, torch.Tensor], strength: float = 1.0):
    """Through the stock node, from models/loras."""
    folder = BASE / "models" / "loras"
    folder.mkdir(exist_ok=True)
    (folder / "some.safetensors").unlink(missing_ok=True)  # a former one may still be mapped
    save_file({key: value.contiguous() for key, value in file.items()}, folder / "some.safetensors")
    patched = stock.LoraLoaderModelOnly().load_lora_model_only(model, "some.safetensors", strength)[0]
    targets = {re.sub(r"\.(lora_\w+\.weight|diff)$", ".weight", key).replace(".diff_b", ".bias") for key in file}
    assert set(patched.patches) == targets, set(patched.patches) ^ targets
    return patched


def check_a_lora_on_each_layer_equals_weights_patched_by_hand(pack):
    """Loaded whole and loaded layer by layer, in both of a CPU's backends; without the LoRA all is as it was."""
    for name in MODELS:
        it = subject(pack, name)
        before = {key: value.clone() for key, value in it.model.model.diffusion_model.state_dict().items()}
        files = {layer: lora(it, names) for layer, names in layers(it.state).items()}
        if name == TINY:
            mixer = {f"blocks.*.mixer.{part}" for part in ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")}
            text = {f"blocks.*.msa.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")}
            others = {"blocks.*.norm", "norm_f", "blocks.*.adaLN_modulation.1", "y_embedder"}
            assert mixer | text | others <= files.keys(), files.keys()
        for scan in WAYS:
            with way(pack, scan):
                own = velocity(it, it.model)
                close(own, expected(it, it.state), LIMIT)
                for layer, (file, state) in files.items():
                    patched, want = with_lora(it.model, file), expected(it, state)
                    assert not torch.allclose(want, own, atol=1e-3), f"{name}: {layer} changes nothing"
                    for budget in (0, ONE_BYTE):
                        same(velocity(it, patched, budget), want, name, layer, scan, budget)
                assert torch.equal(velocity(it, it.model), own)
        after = it.model.model.diffusion_model.state_dict()
        assert all(torch.equal(after[key], before[key]) for key in before)


def check_offloading_and_casting_change_no_result(pack):
    """Stored in float32, bfloat16 or float16, loaded whole, in part or not at all, with and without a LoRA on all."""
    for name in MODELS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            it = subject(pack, name, dtype)
            names = [name for group in layers(it.state).values() for name in group]
            if dtype != torch.float32:  # of embeddings alone, hosts patch 16-bit weights in 16 bits
                names = [name for name in names if "embedding_table" not in name]
            file, state = lora(it, names)
            patched = with_lora(it.model, file, 0.1)
            state = {key: it.state[key] + 0.1 * (value - it.state[key]) for key, value in state.items()}
            for scan in WAYS:
                with way(pack, scan):
                    for budget in (0, ONE_BYTE, it.model.model_size() // 2):
                        same(velocity(it, it.model, budget), expected(it, it.state), name, dtype, scan, budget)
                    same(velocity(it, patched, ONE_BYTE), expected(it, state), name, dtype, scan, "LoRA")
                    if dtype == torch.float32:  # loaded layers hold patched weights rounded to their own dtype
                        for budget in (0, it.model.model_size() // 2):
                            same(velocity(it, patched, budget), expected(it, state), name, scan, budget, "LoRA")


@contextlib.contextmanager
def counted(model):
    """The batch sizes that the first layer's keys are computed for."""
    layer, sizes = model.model.diffusion_model.blocks[0].msa.to_k, []
    handle = layer.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    try:
        yield sizes
    finally:
        handle.remove()


def sample(pack, model, positive, negative, steps=5, cfg=2.0, seed=3):
    latent = empty(pack, model)
    return stock.common_ksampler(model, seed, steps, cfg, "euler", "simple", positive, negative, latent)[0]["samples"]


@contextlib.contextmanager
def nothing_kept(model):
    """Each step encodes its conditions anew."""
    network = model.model.diffusion_model
    network.begin_run = lambda weights_stay: network.end_run()
    try:
        yield
    finally:
        del network.begin_run


def check_a_run_encodes_its_conditions_once(pack):
    model, clip, _ = loaded(pack)
    red, fox, none = (encode(clip, text) for text in ("red", "fox", ""))
    with nothing_kept(model), counted(model) as sizes:
        want = [sample(pack, model, text, none) for text in (red, fox)]
    assert len(sizes) == 10
    with counted(model) as sizes:
        got = [sample(pack, model, text, none) for text in (red, fox)]
    assert sizes == [2, 2], sizes
    for a, b in zip(got, want, strict=True):
        close(a, b, 1e-6)
    assert not torch.allclose(got[0], got[1], atol=1e-3)
    assert model.model.diffusion_model._encoded is None
    areas = stock.ConditioningSetArea().append(red, 32, 32, 0, 0, 1.0)[0] + fox  # two sizes: batches of their own
    with counted(model) as sizes:
        got = sample(pack, model, areas, none)
    assert 2 <= len(sizes) < 10, sizes
    with nothing_kept(model):
        close(got, sample(pack, model, areas, none), 1e-6)


def check_another_run_of_one_guider_encodes_anew(pack):
    """Its conditions keep their identity from run to run; the weights need not stay."""
    model, clip, _ = loaded(pack)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(encode(clip, "red"), encode(clip, ""))
    noise, latent = torch.randn(1, 4, 4, 6), torch.zeros(1, 4, 4, 6)
    sampler, sigmas = comfy.samplers.sampler_object("euler"), torch.linspace(1, 0, 5)
    with counted(model) as sizes:
        first = guider.sample(noise, latent, sampler, sigmas)
        assert torch.equal(guider.sample(noise, latent, sampler, sigmas), first)
        assert sizes == [1, 1], sizes


def check_a_lora_on_keys_is_felt_by_the_next_run_and_by_that_alone(pack):
    model, clip, _ = loaded(pack)
    red, none = encode(clip, "red"), encode(clip, "")
    state = model.model.diffusion_model.state_dict()
    it = SimpleNamespace(state={key: value.clone() for key, value in state.items()})
    file, _ = lora(it, [name for layer in ("to_k", "to_v") for name in layers(state)[f"blocks.*.msa.{layer}"]])
    before = sample(pack, model, red, none)
    patched = with_lora(model, file)
    felt = sample(pack, patched, red, none)
    assert not torch.allclose(felt, before, atol=1e-3)
    with nothing_kept(model):
        close(felt, sample(pack, patched, red, none), 1e-6)
    assert torch.equal(sample(pack, model, red, none), before)


def check_hooks_that_patch_within_a_run_are_felt(pack):
    """A LoRA on one prompt alone: the weights change between the batches of a step."""
    model, clip, _ = loaded(pack)
    red, none = encode(clip, "red"), encode(clip, "")
    state = model.model.diffusion_model.state_dict()
    it = SimpleNamespace(state={key: value.clone() for key, value in state.items()})
    file, _ = lora(it, layers(state)["blocks.*.msa.to_k"])
    hooks = comfy.hooks.create_hook_lora(file, 1.0, 0.0)
    hooked = comfy.hooks.set_hooks_for_conditioning(red, hooks)
    for positive, negative in ((hooked, none), (hooked, red), (hooked + red, none)):
        got = sample(pack, model, positive, negative)
        with nothing_kept(model):
            close(got, sample(pack, model, positive, negative), 1e-6)
        assert not torch.allclose(got, sample(pack, model, red, negative), atol=1e-4)


def check_an_interrupted_run_keeps_nothing(pack):
    model, clip, _ = loaded(pack)
    red, network = encode(clip, "red"), model.model.diffusion_model

    def stop(step, denoised, x, total):
        assert network._encoded
        raise KeyboardInterrupt

    noise, latent = torch.randn(1, 4, 4, 6), torch.zeros(1, 4, 4, 6)
    sigmas = torch.linspace(1, 0, 5)
    with contextlib.suppress(KeyboardInterrupt):
        sampler = comfy.samplers.sampler_object("euler")
        comfy.samplers.sample(model, noise, red, red, 1.0, CPU, sampler, sigmas, latent_image=latent, callback=stop)
        raise AssertionError("the run was not stopped")
    assert network._encoded is None


def check_weights_made_at_use_are_made_in_every_step(pack):
    """A function of a node that wraps a weight may give another one at another time."""
    model, clip, _ = loaded(pack)
    wrapped, calls = model.clone(), []
    wrapped.add_weight_wrapper(
        "diffusion_model.blocks.0.msa.to_k.weight", lambda weight: calls.append(1) or weight * len(calls)
    )  # fmt: skip
    sample(pack, wrapped, encode(clip, "red"), encode(clip, ""), steps=4)
    assert len(calls) == 4, calls
