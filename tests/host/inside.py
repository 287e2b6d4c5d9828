"""Checks that run inside a ComfyUI, under its interpreter: `python inside.py HOST BASE [CHECK...]` prints JSON lines.

No pytest there: a check is a function that asserts. The models are tiny random ones in BASE/models/diffusion_models.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

from host_process import (
    BASE,
    CHOSEN,
    close,
    command_line,
    empty,
    encode,
    load_pack,
    loaded,
    our_pictures,
    refused,
    stock,
    stock_pictures,
)

import comfy.sd  # isort: skip
import comfy.utils  # isort: skip
import torch  # isort: skip


def check_every_node_has_tooltips_and_a_help_page(pack):
    names = [name for name in stock.NODE_CLASS_MAPPINGS if name.startswith("ZigMa")]
    assert sorted(names) == sorted(node.define_schema().node_id for node in pack.part("nodes").NODES), names
    for name in names:
        schema = pack.node(name).define_schema()
        for slot in [*schema.inputs, *schema.outputs]:
            assert slot.tooltip, (name, slot)
        assert schema.description and (BASE / "custom_nodes/ZigMa/web/docs" / f"{name}.md").is_file()
        page = (BASE / "custom_nodes/ZigMa/web/docs" / f"{name}.md").read_text(encoding="utf-8")
        missing = [slot.id for slot in schema.inputs if slot.id not in page]
        assert not missing, f"{name}.md does not speak of {missing}"


def check_the_nodes_declare_here_what_the_contract_says(pack):
    """The contract is written with a stand-in of a host: here is a real one. Lists of files are the machine's own."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "nodes"))
    contract = importlib.import_module("contract")
    stated = json.loads(contract.CURRENT.read_text(encoding="utf-8"))
    declared = {}
    for node in pack.part("nodes").NODES:
        schema = node.define_schema()
        declared[schema.node_id] = json.loads(json.dumps(contract.contract_of(schema)))
    assert declared.keys() == stated.keys()
    for name, facts in declared.items():
        for here, there in zip(facts["inputs"], stated[name]["inputs"], strict=True):
            if "options" in there and here["id"].endswith("_name"):
                assert set(there.pop("options")) <= set(here.pop("options")), (name, here)
        assert facts == stated[name], (name, facts, stated[name])


def check_ksampler_equals_the_command_line(pack):
    model, clip, vae = loaded(pack)
    close(stock_pictures(model, clip, vae, empty(pack, model)), command_line(pack))


def check_every_kind_of_model_equals_the_command_line(pack):
    names = sorted(path.name for path in pack.file.parent.glob("kind_*.safetensors"))
    assert len(names) == 6, names
    for name in names:
        model, clip, vae = loaded(pack, name)
        close(stock_pictures(model, clip, vae, empty(pack, model)), command_line(pack, name=name))


def check_stable_diffusions_vae_equals_the_hosts(pack):
    torch.manual_seed(0)
    with torch.inference_mode(False):
        ours = pack.part("zigma.autoencoder_kl").AutoencoderKL()
    vae = comfy.sd.VAE(sd={key: value.clone() for key, value in ours.state_dict().items()})
    latents = torch.randn(1, 4, 8, 6)
    close(vae.decode(latents), ours.decode(latents).movedim(1, -1) / 2 + 0.5)
    pictures = torch.rand(1, 64, 48, 3)
    close(vae.encode(pictures), ours.encode(pictures.movedim(-1, 1) * 2 - 1))  # both give the mean


def check_a_batch_and_no_guidance_equal_the_command_line(pack):
    model, clip, vae = loaded(pack)
    got = stock_pictures(model, clip, vae, empty(pack, model, batch=3), cfg=1.0, steps=20)
    close(got, command_line(pack, count=3, steps=20, guidance=1.0))


def check_our_sampler_equals_ksampler(pack):
    model, clip, vae = loaded(pack)
    latent = empty(pack, model, batch=2)
    close(our_pictures(pack, model, clip, vae, latent), stock_pictures(model, clip, vae, latent))


def check_our_solvers_equal_the_command_line(pack):
    model, clip, vae = loaded(pack)
    for solver in ("heun", "midpoint", "rk4", "dopri5"):
        close(
            our_pictures(pack, model, clip, vae, empty(pack, model), solver=solver),
            command_line(pack, solver=solver),
            1e-2,
        )


def check_an_sde_repeats_with_its_seed_and_differs_from_the_ode(pack):
    model, clip, vae = loaded(pack)
    draw = [
        our_pictures(pack, model, clip, vae, empty(pack, model), solver="sde-euler-maruyama", seed=s) for s in (3, 3, 4)
    ]
    assert torch.equal(draw[0], draw[1]) and not torch.allclose(draw[0], draw[2], atol=1e-3)
    assert not torch.allclose(draw[0], our_pictures(pack, model, clip, vae, empty(pack, model)), atol=1e-3)


def check_a_stock_empty_latent_does_as_well(pack):
    model, clip, vae = loaded(pack)
    ours = empty(pack, model, width=48, height=32)["samples"]
    stock_latent = stock.EmptyLatentImage().generate(48, 32, 1)[0]
    assert ours.shape[2:] == stock_latent["samples"].shape[2:]
    close(stock_pictures(model, clip, vae, stock_latent), stock_pictures(model, clip, vae, {"samples": ours}), 1e-6)


def check_another_size_works(pack):
    model, clip, vae = loaded(pack)
    pictures = our_pictures(pack, model, clip, vae, empty(pack, model, width=64, height=32))
    assert pictures.shape == (1, 32, 64, 3) and pictures.isfinite().all()


def check_image_to_image_keeps_more_with_less_denoise(pack):
    model, clip, vae = loaded(pack)
    source = stock_pictures(model, clip, vae, empty(pack, model), prompt="fox", seed=9)
    latent = stock.VAEEncode().encode(vae, source)[0]
    kept = our_pictures(pack, model, clip, vae, latent, denoise=0.01)
    round_trip = stock.VAEDecode().decode(vae, latent)[0]
    assert (kept - round_trip).abs().mean() < 0.1 * (
        our_pictures(pack, model, clip, vae, latent) - round_trip
    ).abs().mean()


def check_scan_orders_reach_the_model_and_leave_the_original_alone(pack):
    model, clip, vae = loaded(pack)
    latent, node = empty(pack, model), pack.node("ZigMaScanOrder")
    before = stock_pictures(model, clip, vae, latent)
    changed, drawing, _ = node.execute(model, "hilbert", "0-7", "all", 0).result
    assert drawing.shape[0] == 1 and drawing.shape[-1] == 3
    other = stock_pictures(changed, clip, vae, latent)
    assert not torch.allclose(other, before, atol=1e-4)
    assert torch.equal(stock_pictures(model, clip, vae, latent), before)
    own = node.execute(model, "zigzag", "0-7", "all", 0).result[0]  # what the model was made with
    assert torch.equal(stock_pictures(own, clip, vae, latent), before)
    bundle = pack.checkpoint.load_bundle(pack.file)
    orders = [pack.part("zigma.scan_orders").scan_order("hilbert", i, height=2, width=3) for i in range(2)]
    x, t = torch.randn(1, 4, *bundle.model.config.img_dim), torch.tensor([0.3])
    y = bundle.text_encoder.encode(["fox"])
    v = -changed.model.diffusion_model(
        x, 1 - t, y, transformer_options=changed.model_options["transformer_options"]
    )  # fmt: skip
    close(v, bundle.model(x, t, y, token_orders=orders), 1e-5)


def check_two_scan_order_nodes_make_one_schedule(pack):
    model, *_ = loaded(pack)
    node = pack.node("ZigMaScanOrder")
    first = node.execute(model, "sweep", "3", "0", 0).result[0]
    second = node.execute(first, "random", "5", "1", 7).result[0]
    key = pack.part("nodes.layer_orders").SCAN_ORDERS
    assert second.model_options["transformer_options"][key] == (("sweep", 3, 0), ("random", 5, 7))
    assert first.model_options["transformer_options"][key] == (("sweep", 3, 0), None)


def check_a_lora_patches_the_kernels_weights_too(pack):
    """A patch on a weight that a kernel reads, not its layer: felt, and gone without the patch."""
    model, clip, vae = loaded(pack)
    latent = empty(pack, model)
    before = stock_pictures(model, clip, vae, latent)
    # Not A_log, D and pos_embed: a host leaves patches of parameters outside leaf modules out, of any model.
    for name in ("blocks.0.mixer.conv1d.weight", "blocks.1.norm.weight", "blocks.0.mixer.in_proj.weight"):
        patched = model.clone()
        key = f"diffusion_model.{name}"
        weight = comfy.utils.get_attr(model.model, key)
        assert patched.add_patches({key: ("diff", (torch.ones_like(weight),))}, 1.0) == [key]
        assert not torch.allclose(stock_pictures(patched, clip, vae, latent), before, atol=1e-4), name
    assert torch.equal(stock_pictures(model, clip, vae, latent), before)


def check_prompt_weights_and_unknown_words(pack):
    _, clip, _ = loaded(pack)
    plain, weighted, none = (encode(clip, text)[0][0] for text in ("red fox", "red (fox:1.5)", "red (fox:0)"))
    assert not torch.allclose(plain, weighted) and not torch.allclose(weighted, none)
    bundle = pack.checkpoint.load_bundle(pack.file)
    close(plain, bundle.text_encoder.encode(["red fox"]), 1e-5)
    close(encode(clip, "")[0][0], bundle.text_encoder.encode([""]), 1e-5)
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    encode(clip, "red ufo")
    logging.getLogger().removeHandler(handler)
    assert any("lacks them: ufo" in text for text in records), records


def check_conditioning_nodes_work(pack):
    model, clip, _ = loaded(pack)
    red, fox = encode(clip, "red"), encode(clip, "fox")
    for conditioning in (
        stock.ConditioningCombine().combine(red, fox)[0], stock.ConditioningConcat().concat(red, fox)[0],
        stock.ConditioningAverage().addWeighted(red, fox, 0.5)[0], stock.ConditioningZeroOut().zero_out(red)[0],
    ):  # fmt: skip
        latent = stock.common_ksampler(model, 0, 4, 2.0, "euler", "simple", conditioning, red, empty(pack, model))[0]
        assert latent["samples"].isfinite().all()


def check_the_stock_vae_loader_reads_the_autoencoder_alone(pack):
    _, _, vae = loaded(pack)
    alone = stock.VAELoader().load_vae("tiny_vae.safetensors")[0]
    latent = {"samples": torch.randn(1, 4, 4, 6)}
    close(stock.VAEDecode().decode(alone, latent)[0], stock.VAEDecode().decode(vae, latent)[0], 1e-5)


def check_a_model_in_pixel_space_works(pack):
    model, clip, vae = loaded(pack, "pixels.safetensors")
    pictures = our_pictures(pack, model, clip, vae, empty(pack, model))
    assert pictures.shape == (1, 4, 6, 3)
    close(stock_pictures(model, clip, vae, empty(pack, model)), pictures)


def check_a_file_without_parts_gives_what_it_has(pack):
    model, clip, vae = loaded(pack, "bare.safetensors")
    assert model is not None and clip is None and vae is None


def check_mistakes_are_named(pack):
    model, clip, vae = loaded(pack)
    text = encode(clip, "fox")
    node, sampler = pack.node("ZigMaScanOrder"), pack.node("ZigMaSampler")
    refused(lambda: loaded(pack, "gone.safetensors"), "got the model 'gone.safetensors'", "put it there")
    refused(lambda: loaded(pack, "broken.safetensors"), "cannot be read as safetensors", "get the file again")
    refused(lambda: empty(pack, model, width=40), "multiple of 16 pixels", "set the width to 32")
    refused(lambda: node.execute(model, "zigzag", "9", "all", 0), "expected numbers from 0 to 7: there is no 9")
    refused(lambda: node.execute(model, "zigzag", "0", "2", 0), "got the layers '2'", "from 0 to 1")
    refused(lambda: node.execute(model, "zigzag", "x", "all", 0), "got the variants 'x', expected numbers and ranges")
    refused(lambda: node.execute(model, "random", "all", "all", 0), "expected a few")
    wrong = {"samples": torch.ones(1, 5, 4, 6)}
    refused(
        lambda: sampler.execute(model, text, text, wrong, 0, 4, 2.0, "euler", 1.0), "latent of 5 channels", "works on 4"
    )
    refused(lambda: pack.node("ZigMaVAEDecode").execute(wrong, vae, 1), "latent of 5 channels and a VAE for 4")
    foreign = [[torch.zeros(1, 77, 768), {}]]
    latent = empty(pack, model)
    refused(
        lambda: sampler.execute(model, foreign, foreign, latent, 0, 4, 2.0, "euler", 1.0),
        "got text features",
        "text encoder",
    )
    alien = SimpleNamespace(model=SimpleNamespace(diffusion_model=torch.nn.Linear(1, 1)))
    refused(lambda: node.execute(alien, "zigzag", "0", "all", 0), "of the kind Linear, expected a ZigMa")


def check_previews_are_pictures(pack):
    import latent_preview

    model, *_ = loaded(pack)
    form = model.get_model_object("latent_format")
    assert len(form.latent_rgb_factors) == form.latent_channels == 4
    previewer = latent_preview.Latent2RGBPreviewer(form.latent_rgb_factors, form.latent_rgb_factors_bias)
    assert previewer.decode_latent_to_preview(torch.randn(1, 4, 4, 6)).size == (6, 4)


def all_checks() -> dict:
    """Name -> function, of this file and of every inside_*.py beside it."""
    modules = [importlib.import_module(file.stem) for file in sorted(Path(__file__).parent.glob("inside_*.py"))]
    names = {name: value for module in modules for name, value in vars(module).items()} | globals()
    return {name: value for name, value in names.items() if name.startswith("check_")}


def main() -> None:
    torch.set_num_threads(1)  # the tensors are small: on a busy machine more threads wait for each other for minutes
    pack = load_pack()
    with torch.inference_mode():  # as the host runs nodes
        for name, check in all_checks().items():
            if not CHOSEN or name in CHOSEN:
                try:
                    check(pack)
                    problem = None
                except BaseException:
                    problem = traceback.format_exc()
                print("CHECK " + json.dumps({"name": name, "problem": problem}), flush=True)


if __name__ == "__main__":
    main()
