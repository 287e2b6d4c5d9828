"""Checks inside a ComfyUI (see inside.py): model files, loaded, saved by us and by the host, and refused."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

from host_process import BASE, close, empty, encode, loaded, our_pictures, refused, stock_pictures

import folder_paths  # isort: skip
import torch  # isort: skip
from comfy.cli_args import args  # isort: skip
from safetensors import safe_open  # isort: skip
from safetensors.torch import load_file, save_file  # isort: skip

OWN = BASE / "models" / "zigma"
OUTPUT = BASE / "output"


def stock_node(name: str):
    """A node of the host that is not in nodes.py."""
    import importlib

    for module in ("nodes_model_merging", "nodes_train", "nodes_hooks"):
        found = importlib.import_module(f"comfy_extras.{module}")
        if hasattr(found, name):
            return getattr(found, name)
    raise AssertionError(f"this host has no {name}")


def newest(folder: Path) -> Path:
    return max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)


def into_models(path: Path, name: str) -> str:
    OWN.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, OWN / name)
    return name


def saved(pack, model, **more) -> Path:
    path = pack.node("ZigMaSaveModel").execute(model, "zigma/test", more.pop("dtype", "keep"), **more).result[0]
    assert Path(path).parent == OUTPUT / "zigma", path
    return Path(path)


def state_of(model) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.model.diffusion_model.state_dict().items()}


def same_state(got, expected) -> None:
    assert got.keys() == expected.keys(), got.keys() ^ expected.keys()
    for key, value in expected.items():
        assert got[key].dtype == value.dtype and torch.equal(got[key], value), key


def logged(action) -> list[str]:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    try:
        action()
    finally:
        logging.getLogger().removeHandler(handler)
    return records


def fox(pack, model, clip, vae):
    return stock_pictures(model, clip, vae, empty(pack, model))


def check_the_zigma_folder_is_listed_and_shared_names_stay_apart(pack):
    files = pack.part("nodes.load").model_files
    assert str(OWN) in folder_paths.get_folder_paths("zigma")
    checkpoints = BASE / "models" / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    shutil.copy(pack.file, checkpoints / "shared.safetensors")
    shutil.copy(pack.file.with_name("bare.safetensors"), OWN / into_models(pack.file, "shared.safetensors"))
    into_models(pack.file, "alone.pth")
    into_models(pack.file, "alone.txt")
    elsewhere = BASE / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    shutil.copy(pack.file, elsewhere / "far.safetensors")
    folder_paths.add_model_folder_path("zigma", str(elsewhere))  # as extra_model_paths.yaml does
    names = files()
    assert names["shared.safetensors"] == checkpoints / "shared.safetensors"
    assert names["shared.safetensors [zigma]"] == OWN / "shared.safetensors"
    assert names["alone.pth"] == OWN / "alone.pth" and names["far.safetensors"] == elsewhere / "far.safetensors"
    assert "alone.txt" not in names and "broken.safetensors" in names
    options = list(names)
    assert options.index("alone.pth") < options.index("broken.safetensors"), "models/zigma comes first"
    assert loaded(pack, "shared.safetensors")[1] is not None and loaded(pack, "shared.safetensors [zigma]")[1] is None
    shutil.copy(pack.file, BASE / "models/diffusion_models/shared.safetensors")
    assert files()["shared.safetensors"] == BASE / "models/diffusion_models/shared.safetensors"  # as it always was
    assert files()["shared.safetensors [checkpoints]"] == checkpoints / "shared.safetensors"
    for folder in (BASE / "models/diffusion_models", checkpoints):
        (folder / "shared.safetensors").unlink()


def check_a_name_that_is_gone_is_refused_before_the_run(pack):
    node = pack.node("ZigMaModelLoader")
    assert node.validate_inputs("tiny.safetensors") is True
    sentence = node.validate_inputs("gone.safetensors")
    assert isinstance(sentence, str) and "gone.safetensors" in sentence and "\n" not in sentence
    lora = pack.node("ZigMaLoraLoader")
    assert node.validate_inputs(None) is True and lora.validate_inputs(None) is True, "a name that a node will give"
    assert isinstance(node.validate_inputs(["tiny.safetensors"]), str) and isinstance(lora.validate_inputs([]), str)


def check_links_into_nowhere_are_left_out(pack):
    """Of a drive that is not mounted, say: the host lists their names."""
    links = [BASE / "models" / folder / "unplugged.safetensors" for folder in ("checkpoints", "vae")]
    for link in links:
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to("/nowhere/unplugged.safetensors")
    try:
        for name in ("ZigMaModelLoader", "ZigMaVAELoader"):
            options = pack.node(name).INPUT_TYPES()["required"]
            assert "unplugged" not in str(options) and "tiny.safetensors" in str(options), name
    finally:
        for link in links:
            link.unlink()


def check_a_changed_file_or_choice_is_loaded_again(pack):
    node = pack.node("ZigMaModelLoader")
    name = into_models(pack.file, "changing.safetensors")
    first = node.fingerprint_inputs(name)
    assert node.fingerprint_inputs(model_name=name) == first
    assert node.fingerprint_inputs(name, "bfloat16") != first != node.fingerprint_inputs(name, "auto", "raw")
    import os

    os.utime(OWN / name, (1, 1))
    assert node.fingerprint_inputs(name) != first


def check_weights_are_stored_as_asked_for(pack):
    model, clip, vae = loaded(pack)
    want = fox(pack, model, clip, vae)
    for name, limit in (("float32", 0), ("bfloat16", 0.1), ("float16", 0.02), ("float8_e4m3fn", 1), ("float8_e5m2", 1)):
        rounded = pack.node("ZigMaModelLoader").execute("tiny.safetensors", name).result[0]
        parameters = dict(rounded.model.diffusion_model.named_parameters())
        assert parameters["blocks.0.mixer.in_proj.weight"].dtype == getattr(torch, name), name
        assert parameters["blocks.0.mixer.A_log"].dtype == torch.float32
        got = fox(pack, rounded, clip, vae)
        assert got.isfinite().all() and (got - want).abs().max() <= limit, (name, (got - want).abs().max())
        assert name == "float32" or not torch.equal(got, want), f"{name} rounds nothing"


def check_a_published_pt_is_loaded_and_saved_as_safetensors(pack):
    source = Path(__file__).parents[1] / "data" / "published_checkpoint.pt"
    name = into_models(source, "published.pt")
    pictures = {}
    for weights in ("ema", "raw"):
        model, clip, vae = pack.node("ZigMaModelLoader").execute(name, "auto", weights).result
        assert clip is None and vae is None
        path = saved(pack, model)
        file = pack.checkpoint.read_checkpoint(path)
        same_state(
            file.state_dict,
            pack.checkpoint.read_checkpoint(source, pack.part("nodes.load").WEIGHTS[weights]).state_dict,
        )
        assert file.metadata["zigma.weights"] == {"ema": "ema", "raw": "model"}[weights]
        assert file.metadata["zigma.train_steps"] and file.latent.scale == 0.18215
        again = loaded(pack, into_models(path, f"published_{weights}.safetensors"))[0]
        pictures[weights] = [velocity(it) for it in (model, again)]
        assert torch.equal(*pictures[weights])
    assert not torch.allclose(pictures["ema"][0], pictures["raw"][0])
    lines = logged(lambda: pack.node("ZigMaModelLoader").execute("tiny.safetensors", "auto", "raw"))
    assert any("one set of weights" in line for line in lines), lines


def velocity(model, y=None) -> torch.Tensor:
    torch.manual_seed(5)
    network = model.model.diffusion_model
    x = torch.randn(2, network.config.in_channels, *network.config.img_dim)
    return network(x, torch.tensor([0.25, 0.75]), y)


def check_what_our_saver_writes_gives_the_same_picture(pack):
    model, clip, vae = loaded(pack)
    path = saved(pack, model, clip=clip, vae=vae)
    want = fox(pack, model, clip, vae)
    again = loaded(pack, into_models(path, "again.safetensors"))
    same_state(state_of(again[0]), state_of(model))
    assert torch.equal(fox(pack, *again), want)
    form, own = (it.get_model_object("latent_format").zigma for it in (again[0], model))
    assert form == own and again[0].model.diffusion_model.config == model.model.diffusion_model.config
    bundle = pack.checkpoint.load_bundle(path)
    assert bundle.autoencoder is not None and bundle.text_encoder.config == clip.tokenizer.config
    second = saved(pack, model)
    assert second != path and path.exists()
    bare = loaded(pack, into_models(second, "bare_again.safetensors"))
    assert bare[1] is None and bare[2] is None
    half = pack.checkpoint.read_checkpoint(saved(pack, model, dtype="bfloat16", clip=clip))
    assert half.state_dict["blocks.0.mixer.in_proj.weight"].dtype == torch.bfloat16
    assert half.state_dict["blocks.0.mixer.A_log"].dtype == torch.float32


def check_every_kind_of_model_is_saved_by_us_and_by_the_host(pack):
    names = sorted(path.name for path in pack.file.parent.glob("kind_*.safetensors"))
    for name in [*names, "pixels.safetensors"]:
        model, clip, vae = loaded(pack, name)
        stock_node("ModelSave")().save(model, "models/host")
        for path in (saved(pack, model), newest(OUTPUT / "models")):
            again = loaded(pack, into_models(path, "kind_again.safetensors"))
            same_state(state_of(again[0]), state_of(model))
            assert torch.equal(fox(pack, again[0], clip, vae), fox(pack, model, clip, vae)), name


def check_the_graph_is_in_the_metadata_unless_it_may_not(pack):
    model, *_ = loaded(pack)
    node = pack.node("ZigMaSaveModel")
    kept, node.hidden = node.hidden, SimpleNamespace(
        prompt={"1": "graph"}, extra_pnginfo={"workflow": {"nodes": []}}, unique_id="7"
    )  # fmt: skip
    try:
        path = node.execute(model, "zigma/test", "keep").result[0]
        with safe_open(path, "pt") as file:
            assert json.loads(file.metadata()["prompt"]) == {"1": "graph"} and "workflow" in file.metadata()
        again = loaded(pack, into_models(Path(path), "graph.safetensors"))[0]
        args.disable_metadata = True
        with safe_open(node.execute(again, "zigma/test", "keep").result[0], "pt") as file:
            assert not {"prompt", "workflow"} & file.metadata().keys(), file.metadata().keys()
    finally:
        args.disable_metadata = False
        node.hidden = kept


def check_scan_orders_are_baked_in_when_asked_for(pack):
    model, clip, vae = loaded(pack)
    changed = pack.node("ZigMaScanOrder").execute(model, "random", "3", "1", 5).result[0]
    want = fox(pack, changed, clip, vae)
    path = saved(pack, changed, bake_scan_orders=True)
    assert torch.equal(fox(pack, loaded(pack, into_models(path, "baked.safetensors"))[0], clip, vae), want)
    plain: list[Path] = []
    lines = logged(lambda: plain.append(saved(pack, changed)))
    assert any("bake_scan_orders" in line for line in lines), lines
    again = loaded(pack, into_models(plain[0], "plain.safetensors"))[0]
    assert torch.equal(fox(pack, again, clip, vae), fox(pack, model, clip, vae))
    # Own orders of a model stay its own, in the host's files too.
    baked = loaded(pack, "baked.safetensors")[0]
    stock_node("ModelSave")().save(baked, "models/host")
    again = loaded(pack, into_models(newest(OUTPUT / "models"), "baked_again.safetensors"))[0]
    assert torch.equal(fox(pack, again, clip, vae), want)


def check_a_lora_and_a_merge_are_worked_into_the_file(pack):
    model, clip, vae = loaded(pack)
    patches, own = {}, state_of(model)
    for key, value in own.items():
        patches[f"diffusion_model.{key}"] = ("diff", (torch.full_like(value, 0.01),))
    patched = model.clone()
    patched.add_patches(patches, 1.0)
    want = fox(pack, patched, clip, vae)
    stock_node("ModelSave")().save(patched, "models/host")
    for path in (saved(pack, patched), newest(OUTPUT / "models")):
        again = loaded(pack, into_models(path, "patched.safetensors"))[0]
        for key, value in own.items():
            close(state_of(again)[key], value + 0.01, 1e-6)
        assert torch.equal(fox(pack, again, clip, vae), want)
    assert not torch.equal(fox(pack, model, clip, vae), want)


def check_a_text_encoder_keeps_its_own_patches(pack):
    model, clip, _ = loaded(pack)
    changed = clip.clone()
    key = next(key for key in clip.cond_stage_model.state_dict() if key.endswith(".weight"))
    changed.add_patches({key: ("diff", (torch.ones_like(clip.cond_stage_model.state_dict()[key]),))}, 1.0)
    want = encode(changed, "red fox")[0][0]
    again = loaded(pack, into_models(saved(pack, model, clip=changed), "text.safetensors"))[1]
    close(encode(again, "red fox")[0][0], want, 1e-6)
    assert not torch.allclose(encode(clip, "red fox")[0][0], want)


def check_the_hosts_checkpoint_saver_keeps_all_three(pack):
    model, clip, vae = loaded(pack)
    want = fox(pack, model, clip, vae)
    stock_node("CheckpointSave")().save(model, clip, vae, "models/whole")
    path = newest(OUTPUT / "models")
    keys = load_file(path).keys()
    assert any(key.startswith("first_stage_model.") for key in keys) and "zigma.description" in keys
    again = loaded(pack, into_models(path, "whole.safetensors"))
    same_state(state_of(again[0]), state_of(model))
    assert torch.equal(fox(pack, *again), want)
    assert pack.checkpoint.load_bundle(path).text_encoder is not None
    form, own = (it.get_model_object("latent_format").zigma for it in (again[0], model))
    assert form == own
    # And from there into our own format.
    third = loaded(pack, into_models(saved(pack, *again[:1], clip=again[1], vae=again[2]), "third.safetensors"))
    assert torch.equal(fox(pack, *third), want)
    model, clip, vae = loaded(pack, "pixels.safetensors")
    stock_node("CheckpointSave")().save(model, clip, vae, "models/whole")
    again = loaded(pack, into_models(newest(OUTPUT / "models"), "whole.safetensors"))
    assert torch.equal(
        our_pictures(pack, *again, empty(pack, again[0])), our_pictures(pack, model, clip, vae, empty(pack, model))
    )


def check_parts_of_other_models_are_not_saved_with_ours(pack):
    model, clip, _ = loaded(pack)
    other = SimpleNamespace(tokenizer=object(), cond_stage_model=torch.nn.Linear(1, 1))
    refused(lambda: saved(pack, model, clip=other), "leave clip unconnected", "of the kind Linear")
    wide = SimpleNamespace(get_sd=lambda: {"decoder.conv": torch.zeros(1)})
    refused(lambda: saved(pack, model, vae=wide), "leave vae unconnected")
    pixels, _, _ = loaded(pack, "class.safetensors")
    refused(lambda: saved(pack, pixels, clip=clip), "connect the CLIP of this model")
    wrapped = model.clone()
    wrapped.add_weight_wrapper("diffusion_model.blocks.0.mixer.in_proj.weight", lambda weight: weight * 2)
    refused(lambda: saved(pack, wrapped), "save the LoRA by itself")


def check_files_of_other_kinds_are_named(pack):
    tensor, other = torch.zeros(1), torch.zeros(1)
    kinds = {
        "sdxl": ({"conditioner.embedders.0.x": tensor, "model.diffusion_model.input_blocks.0.0.weight": other},
                 ("Stable Diffusion XL", "Load Checkpoint")),
        "flux": ({"double_blocks.0.img_attn.proj.weight": tensor}, ("Flux", "Load Diffusion Model")),
        "lora": ({"lora_unet_down_blocks_0.lora_up.weight": tensor}, ("a LoRA", "models/loras")),
        "vae": ({"decoder.conv_in.weight": tensor, "encoder.conv_in.weight": other}, ("a VAE", "Load VAE")),
    }  # fmt: skip
    OWN.mkdir(exist_ok=True)
    for name, (tensors, words) in kinds.items():
        save_file(tensors, OWN / f"foreign_{name}.safetensors")
        refused(lambda name=name: loaded(pack, f"foreign_{name}.safetensors"), *words)
        torch.save({"state_dict": tensors}, OWN / f"foreign_{name}.ckpt")
        refused(lambda name=name: loaded(pack, f"foreign_{name}.ckpt"), *words)
    model = pack.checkpoint.load_bundle(pack.file).model
    torch.save(model.state_dict(), OWN / "untold.pt")
    refused(
        lambda: loaded(pack, "untold.pt"), "do not tell scan_type", "python -m zigma convert untold.pt", "--scan-type"
    )


def check_the_host_can_make_the_model_anew(pack):
    """Newer hosts do, for hooks and torch.compile where weights are loaded piece by piece."""
    model, clip, vae = loaded(pack)
    build, arguments = model.cached_patcher_init[:2]
    again = build(*arguments, disable_dynamic=True)
    assert again.model is not model.model
    same_state(state_of(again), state_of(model))
    assert torch.equal(fox(pack, again, clip, vae), fox(pack, model, clip, vae))


def check_a_model_holds_its_weights_once(pack):
    model, *_ = loaded(pack)
    file = model.model.model_config.unet_config["zigma_file"]
    assert not file.state_dict and not file.vae_state and not file.text_state
