"""Checks inside a ComfyUI (see inside.py): LoRAs, merges and training, on every parameter of the model."""

from __future__ import annotations

import importlib

from host_process import BASE, close, empty, encode, loaded, refused, stock_pictures
from inside_files import logged, state_of, stock_node

import comfy.model_management as management  # isort: skip
import folder_paths  # isort: skip
import torch  # isort: skip
from safetensors.torch import save_file  # isort: skip

CPU = torch.device("cpu")
LORAS = BASE / "models" / "loras"
KINDS = ("tiny.safetensors", "kind_both_ways.safetensors", "kind_shared.safetensors", "kind_places.safetensors")


def other_weights(pack, name: str = "tiny.safetensors"):
    """A second MODEL of the same architecture whose every parameter differs; loose ones too."""
    model = loaded(pack, name)[0]
    generator = torch.Generator().manual_seed(7)
    for parameter in model.model.diffusion_model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def output(model, state=None) -> torch.Tensor:
    """Of the network as it is, or of these weights by hand."""
    network = model.model.diffusion_model
    torch.manual_seed(3)
    x, t = torch.randn(2, network.config.in_channels, *network.config.img_dim), torch.tensor([0.3, 0.8])
    y = torch.randn(2, 6, 16) if network.config.has_text else None
    if state is None:
        return network(x, t, y)
    return torch.func.functional_call(network, state, (x, t, y))


def patched_output(model, budget: int = 0) -> torch.Tensor:
    """With the weights as the host loads them, all of them or within a budget of bytes."""
    management.unload_all_models()
    try:
        if budget:
            model.partially_load(CPU, budget)
        else:
            model.patch_model(CPU)
        return output(model)
    finally:
        model.unpatch_model(CPU)


def merge(a, b, ratio: float):
    return stock_node("ModelMergeSimple")().merge(a, b, ratio)[0]


def check_a_merge_moves_every_parameter(pack):
    """Ratio 0 is the second model, 1 the first, and between them the weights are averages: A_log and D as well."""
    loose = pack.part("nodes.comfy_patches").loose_parameters
    for name in KINDS:
        a, b = loaded(pack, name)[0], other_weights(pack, name)
        assert {key.rpartition(".")[2] for key in loose(a.model)} >= {"A_log", "D", "pos_embed"}
        first, second = state_of(a), state_of(b)
        half = {key: 0.5 * first[key] + 0.5 * second[key] for key in first}
        for ratio, state in ((0.0, second), (1.0, first), (0.5, half)):
            merged, want = merge(a, b, ratio), output(a, state)
            for budget in (0, 1, a.model_size() // 2):
                close(patched_output(merged, budget), want, 1e-5)
        assert not torch.allclose(output(a, half), output(a, first), atol=1e-3)
        only_loose = {**first, **{key.removeprefix("diffusion_model."): None for key in loose(a.model)}}
        only_loose = {key: half[key] if value is None else value for key, value in only_loose.items()}
        assert not torch.allclose(output(a, only_loose), output(a, first), atol=1e-3)
        assert torch.equal(patched_output(merge(a, b, 0.0)), output(b))
        after = state_of(a)
        assert all(torch.equal(after[key], first[key]) for key in first)


def check_a_patch_of_a_loose_parameter_is_applied_once_and_taken_back(pack):
    model = loaded(pack)[0]
    before = state_of(model)
    keys = [f"diffusion_model.{name}" for name in ("blocks.0.mixer.A_log", "blocks.1.mixer.D", "pos_embed")]
    patched = model.clone()
    assert type(patched) is type(model)
    patched.add_patches({key: ("diff", (torch.ones_like(before[key[16:]]),)) for key in keys}, 0.5)

    def expect(amount: float, what: str):
        now = state_of(model)
        for key, value in before.items():
            if amount and f"diffusion_model.{key}" in keys:
                close(now[key], value + amount, 1e-6)
            else:
                assert torch.equal(now[key], value), (what, key)

    half = model.model_size() // 2
    for _ in range(2):
        patched.partially_load(CPU, 1)
        expect(0.5, "in part")
        patched.partially_load(CPU, half)
        expect(0.5, "more of it")
        patched.partially_unload(CPU, half)
        expect(0.5, "less of it")
        patched.partially_load(CPU, 10 * model.model_size())
        expect(0.5, "all")
        patched.unpatch_model(CPU)
        expect(0.0, "unpatched")
    twice = patched.clone()
    twice.add_patches({key: ("diff", (torch.ones_like(before[key[16:]]),)) for key in keys}, 1.0)
    for it, amount in ((patched, 0.5), (twice, 1.5), (model, 0.0), (twice, 1.5), (patched, 0.5)):
        management.load_models_gpu([it])
        expect(amount, "one after the other")
    management.unload_all_models()
    expect(0.0, "unloaded")


def check_stored_in_16_bits_loose_parameters_are_patched_in_theirs(pack):
    model = pack.node("ZigMaModelLoader").execute("tiny.safetensors", "bfloat16").result[0]
    before = state_of(model)
    patched = model.clone()
    names = ("blocks.0.mixer.A_log", "pos_embed")
    patched.add_patches({f"diffusion_model.{n}": ("diff", (torch.full_like(before[n], 0.3),)) for n in names}, 1.0)
    patched.patch_model(CPU)
    now = state_of(model)
    assert torch.equal(now[names[0]], before[names[0]] + 0.3) and now[names[0]].dtype == torch.float32
    assert torch.equal(now[names[1]], (before[names[1]].float() + torch.full_like(before[names[1]], 0.3)).bfloat16())
    patched.unpatch_model(CPU)
    assert all(torch.equal(state_of(model)[key], before[key]) for key in before)


def check_other_merge_nodes_reach_loose_parameters(pack):
    a, b = loaded(pack)[0], other_weights(pack)
    first, second = state_of(a), state_of(b)
    added = stock_node("ModelAdd")().merge(a, b)[0]
    close(patched_output(added), output(a, {key: first[key] + second[key] for key in first}), 1e-4)
    difference = stock_node("ModelSubtract")().merge(a, b, 1.0)[0]
    difference.patch_model(CPU)
    now = state_of(a)
    difference.unpatch_model(CPU)
    for key in first:
        close(now[key], first[key] - second[key], 1e-6)


LAYERS = ("blocks.0.mixer.in_proj", "blocks.1.mixer.out_proj", "blocks.0.msa.to_q", "x_embedder.proj")


def lora_file(pack, state, layout: str, name: str, layers=LAYERS, scale=0.2):
    """A LoRA in one of the usual key layouts, and the weights it comes to."""
    generator = torch.Generator().manual_seed(11)
    down_name, up_name, prefix = {
        "generic": ("lora_A.weight", "lora_B.weight", "diffusion_model."),
        "generic up and down": ("lora_down.weight", "lora_up.weight", "diffusion_model."),
        "kohya": ("lora_down.weight", "lora_up.weight", "lora_unet_"),
        "peft": ("lora_A.weight", "lora_B.weight", "base_model.model."),
    }[layout]
    file, patched = {}, dict(state)
    for layer in layers:
        weight = state[f"{layer}.weight"]
        up = scale * torch.randn(len(weight), 2, generator=generator)
        down = torch.randn(2, weight[0].numel(), generator=generator)
        stem = prefix + (layer.replace(".", "_") if layout == "kohya" else layer)
        file |= {f"{stem}.{down_name}": down, f"{stem}.{up_name}": up, f"{stem}.alpha": torch.tensor(1.0)}
        patched[f"{layer}.weight"] = weight + 0.5 * (up @ down).view_as(weight)  # alpha / rank
    LORAS.mkdir(exist_ok=True)
    save_file(file, LORAS / name)
    return file, patched


def with_ours(pack, model, name: str, strength: float = 1.0):
    return pack.node("ZigMaLoraLoader").execute(model, name, strength).result[0]


def check_loras_in_the_usual_layouts_are_read_and_taken_back(pack):
    import nodes as stock

    model, clip, _ = loaded(pack)
    before = state_of(model)
    for layout in ("generic", "generic up and down", "kohya", "peft"):
        name = f"{layout}.safetensors"
        _, state = lora_file(pack, before, layout, name)
        want = output(model, state)
        ways = {"ours": lambda name=name: with_ours(pack, model, name)}
        if layout != "peft":  # the host knows that layout for other models
            ways["model only"] = lambda name=name: stock.LoraLoaderModelOnly().load_lora_model_only(model, name, 1.0)[0]
            ways["stock"] = lambda name=name: stock.LoraLoader().load_lora(model, clip, name, 1.0, 1.0)[0]
        for way, load in ways.items():
            lines: list = []
            made: list = []
            lines = logged(lambda load=load, made=made: made.append(load()))
            assert not [line for line in lines if "not loaded" in line.lower() or "in part only" in line], lines
            for budget in (0, 1):
                close(patched_output(made[0], budget), want, 1e-5)
            assert len(made[0].patches) == len(LAYERS), (layout, way)
            after = state_of(model)
            assert all(torch.equal(after[key], before[key]) for key in before)
        half = with_ours(pack, model, name, 0.5)
        between = {key: before[key] + 0.5 * (value - before[key]) for key, value in state.items()}
        close(patched_output(half), output(model, between), 1e-5)


def check_two_loras_add_up_and_the_model_itself_stays(pack):
    model, clip, vae = loaded(pack)
    before = state_of(model)
    _, first = lora_file(pack, before, "generic", "one.safetensors", LAYERS[:2])
    _, both = lora_file(pack, first, "kohya", "two.safetensors", LAYERS[1:])
    plain = stock_pictures(model, clip, vae, empty(pack, model))
    stacked = with_ours(pack, with_ours(pack, model, "one.safetensors"), "two.safetensors")
    close(patched_output(stacked), output(model, both), 1e-5)
    assert not torch.allclose(stock_pictures(stacked, clip, vae, empty(pack, model)), plain, atol=1e-4)
    assert torch.equal(stock_pictures(model, clip, vae, empty(pack, model)), plain)


def check_a_lora_of_another_model_is_a_sentence(pack):
    model, *_ = loaded(pack)
    LORAS.mkdir(exist_ok=True)
    pairs = {
        f"lora_unet_down_blocks_0_attentions_0_proj_in.lora_{way}.weight": torch.zeros(2, 2) for way in ("up", "down")
    }
    save_file(pairs, LORAS / "sd.safetensors")
    refused(
        lambda: with_ours(pack, model, "sd.safetensors"),
        "trained for this model",
        "none of the 2 tensors",
        "lora_unet_down",
    )
    wide = {key: torch.zeros([2 * side for side in value.shape]) for key, value in state_of(model).items()}
    lora_file(pack, wide, "generic", "wide.safetensors")
    refused(lambda: with_ours(pack, model, "wide.safetensors"), "of a ZigMa of another size", "4 weights")
    file, _ = lora_file(pack, state_of(model), "generic", "part.safetensors")
    extra = {f"diffusion_model.blocks.99.mixer.in_proj.lora_{way}.weight": torch.zeros(2, 2) for way in "AB"}
    bad = {"diffusion_model.blocks.1.mixer.in_proj.diff": torch.zeros(3)}
    save_file({**file, **extra, **bad}, LORAS / "part.safetensors")
    made: list = []
    lines = logged(lambda: made.append(with_ours(pack, model, "part.safetensors")))
    sentence = next(line for line in lines if "in part only" in line)
    assert "4 weights are patched, 1 have another shape" in sentence and "2 of its tensors" in sentence, sentence
    assert len(made[0].patches) == 4
    node = pack.node("ZigMaLoraLoader")
    assert node.validate_inputs("sd.safetensors") is True
    assert "gone.safetensors" in node.validate_inputs("gone.safetensors")


def trained(model, latent, positive, **more):
    """The stock node that trains a LoRA, whichever way its host calls it."""
    node = stock_node("TrainLoraNode")
    settings = {
        "batch_size": 1, "grad_accumulation_steps": 1, "steps": 4, "learning_rate": 0.02, "rank": 2,
        "optimizer": "AdamW", "loss_function": "MSE", "seed": 0, "training_dtype": "fp32", "lora_dtype": "fp32",
        "algorithm": "LoRA", "gradient_checkpointing": True, "existing_lora": "[None]", **more,
    }  # fmt: skip
    if hasattr(node, "train"):
        algorithms = importlib.import_module("comfy.weight_adapter").adapter_maps
        settings["algorithm"] = next(name for name in algorithms if name.lower() == settings["algorithm"].lower())
        return node().train(model, latent, positive, **settings)
    schema = node.define_schema()
    for slot in schema.inputs:  # what this host has beyond the older one's
        if slot.id not in {*settings, "model", "latents", "positive"}:
            settings[slot.id] = slot.default
    options = next(slot.options for slot in schema.inputs if slot.id == "algorithm")
    settings["algorithm"] = next(name for name in options if name.lower() == settings["algorithm"].lower())
    wrap = (lambda value: [value]) if schema.is_input_list else (lambda value: value)
    result = node.execute(
        **{key: wrap(value) for key, value in settings.items()}, model=wrap(model), latents=wrap(latent),
        positive=wrap(positive),
    ).result  # fmt: skip
    return (None, *result) if len(result) == 3 else result


def check_stock_training_makes_a_lora_that_changes_the_picture(pack):
    for name in ("tiny.safetensors", "kind_both_ways.safetensors"):
        model, clip, vae = loaded(pack, name)
        before, plain = state_of(model), stock_pictures(model, clip, vae, empty(pack, model))
        torch.manual_seed(0)
        latent = {"samples": torch.randn(2, 4, 4, 6)}
        for checkpointing in (True, False):
            _, lora, losses, steps = trained(
                model, latent, [*encode(clip, "red fox"), *encode(clip, "fox")], gradient_checkpointing=checkpointing
            )  # fmt: skip
            losses = torch.tensor(losses["loss"])
            assert len(losses) == 4 == steps and losses.isfinite().all(), losses
            assert all(torch.is_tensor(value) and value.isfinite().all() for value in lora.values())
            moved = [key for key, value in lora.items() if "lora_down" in key and value.abs().max() > 0]
            assert any("mixer.in_proj" in key for key in moved) and any("msa.to_k" in key for key in moved), moved
            loose = pack.part("nodes.comfy_patches").loose_parameters(model.model)
            assert not [key for key in lora if key in loose]
            LORAS.mkdir(exist_ok=True)
            save_file(
                {key: value.detach().clone().contiguous() for key, value in lora.items()}, LORAS / "made.safetensors"
            )
            for load in (
                lambda model=model: with_ours(pack, model, "made.safetensors"),
                lambda model=model, lora=lora: loaded_by_stock(model, lora),
            ):
                drawn = stock_pictures(load(), clip, vae, empty(pack, model))
                assert drawn.isfinite().all() and not torch.allclose(drawn, plain, atol=1e-4)
            assert torch.equal(stock_pictures(model, clip, vae, empty(pack, model)), plain)
            after = state_of(model)
            assert all(torch.equal(after[key].float(), before[key].float()) for key in before)


def loaded_by_stock(model, lora):
    node = stock_node("LoraModelLoader")
    if hasattr(node, "load_lora_model"):
        return node().load_lora_model(model, lora, 1.0)[0]
    return node.execute(model, lora, 1.0).result[0]


def check_loras_are_listed(pack):
    assert folder_paths.get_folder_paths("loras")
    slot = next(slot for slot in pack.node("ZigMaLoraLoader").define_schema().inputs if slot.id == "lora_name")
    assert isinstance(slot.options, list)
