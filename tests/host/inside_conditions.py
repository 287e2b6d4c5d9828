"""Checks inside a host of what a model is asked to draw: labels, texts, their null, and mistakes with them."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from types import SimpleNamespace

from host_process import BASE, close, command_line, empty, encode, loaded, refused, stock

import comfy.sd  # isort: skip
import comfy.sd1_clip  # isort: skip
import comfy.supported_models_base  # isort: skip
import comfy.utils  # isort: skip
import torch  # isort: skip

CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
SAME = 1e-5  # of pictures: the tiny autoencoder makes little of a latent, so that 1e-3 would hide a wrong condition
NULL, PLAIN = "class_null.safetensors", "class.safetensors"


def labels(pack, model, label=0, name=""):
    return pack.node("ZigMaLabelConditioning").execute(model, label, name).result


def ksampler(model, positive, negative, latent, cfg=2.0, steps=10, seed=3):
    return stock.common_ksampler(model, seed, steps, cfg, "euler", "simple", positive, negative, latent)[0]


def pictures(pack, file, label=0, name="", batch=1, **settings):
    model, _, vae = loaded(pack, file)
    return stock.VAEDecode().decode(vae, ksampler(model, *labels(pack, model, label, name), empty(pack, model, batch),
                                                  **settings))[0]  # fmt: skip


@contextmanager
def logged():
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    try:
        yield records
    finally:
        logging.getLogger().removeHandler(handler)


def check_labels_with_guidance_equal_the_command_line(pack):
    close(pictures(pack, NULL, 2), command_line(pack, 2, name=NULL), SAME)
    close(pictures(pack, NULL, 0, "Red Panda"), command_line(pack, "red panda", name=NULL), SAME)
    assert not torch.allclose(pictures(pack, NULL, 2), pictures(pack, NULL, 1), atol=20 * SAME)
    assert not torch.allclose(pictures(pack, NULL, 2), pictures(pack, NULL, 2, cfg=1.0), atol=20 * SAME)


def check_labels_without_guidance_equal_the_command_line(pack):
    for file in (NULL, PLAIN):
        close(pictures(pack, file, 1, cfg=1.0), command_line(pack, 1, name=file, guidance=1.0), SAME)


def check_our_sampler_takes_labels_as_ksampler_does(pack):
    model, _, _ = loaded(pack, NULL)
    positive, negative = labels(pack, model, 3)
    latent = empty(pack, model, 2)
    ours = pack.node("ZigMaSampler").execute(model, positive, negative, latent, 3, 10, 2.0, "euler", 1.0).result[0]
    close(ours["samples"], ksampler(model, positive, negative, latent)["samples"])


def check_a_batch_has_one_label_for_each_picture(pack):
    model, _, _ = loaded(pack, NULL)
    latent, seen = empty(pack, model, 3), []

    def look(apply, given):
        seen.append(given["c"]["zigma_y"].tolist())
        return apply(given["input"], given["timestep"], **given["c"])

    watched = model.clone()
    watched.set_model_unet_function_wrapper(look)
    mixed = ksampler(watched, *labels(pack, model, 0, "owl, 2,\nfox"), latent, steps=2)["samples"]
    assert all(sorted(row) == sorted([1, 2, 0, 4, 4, 4]) for row in seen) and len(seen) == 2, seen
    for place, label in enumerate((1, 2, 0)):
        alone = ksampler(model, *labels(pack, model, label), latent, steps=2)["samples"]
        close(mixed[place], alone[place], 1e-5)
    two = labels(pack, model, 0, "owl, 2")
    refused(lambda: ksampler(model, *two, latent), "one for each picture", "2 labels and 3 pictures")


def check_stock_conditioning_nodes_work_with_labels(pack):
    model, _, _ = loaded(pack, NULL)
    fox, null = labels(pack, model, 0)
    owl, _ = labels(pack, model, 1)
    latent = empty(pack, model)
    zero = stock.ConditioningZeroOut().zero_out(owl)[0]
    assert torch.equal(
        ksampler(model, fox, zero, latent)["samples"], ksampler(model, fox, null, latent)["samples"]
    )  # fmt: skip
    with logged() as records:
        for changed in (
            stock.ConditioningConcat().concat(fox, owl)[0], stock.ConditioningAverage().addWeighted(fox, owl, 0.5)[0]
        ):  # fmt: skip
            assert torch.equal(
                ksampler(model, changed, null, latent)["samples"], ksampler(model, fox, null, latent)["samples"]
            )  # fmt: skip
    assert any("cannot be concatenated" in text for text in records), records
    both = ksampler(model, stock.ConditioningCombine().combine(fox, owl)[0], null, latent)["samples"]
    other = ksampler(model, stock.ConditioningCombine().combine(owl, fox)[0], null, latent)["samples"]
    close(both, other, 1e-5)
    assert not torch.allclose(both, ksampler(model, fox, null, latent)["samples"], atol=1e-4)


def check_a_missing_null_class_is_named_when_guidance_asks_for_it(pack):
    model, _, _ = loaded(pack, PLAIN)
    positive, negative = labels(pack, model, 1)
    latent = empty(pack, model)
    zero = stock.ConditioningZeroOut().zero_out(positive)[0]
    for null in (negative, zero):
        assert ksampler(model, positive, null, latent, cfg=1.0)["samples"].isfinite().all()
        refused(lambda null=null: ksampler(model, positive, null, latent), "set cfg to 1", "null condition")
    other, _ = labels(pack, model, 2)  # guidance away from another class needs no null
    assert ksampler(model, positive, other, latent)["samples"].isfinite().all()


def check_a_model_without_conditions_says_that_cfg_does_nothing(pack):
    model, _, _ = loaded(pack, "unconditional.safetensors")
    any_text = [[torch.zeros(1, 7, 5), {}]]
    with logged() as records:
        plain = ksampler(model, any_text, any_text, empty(pack, model), cfg=1.0)["samples"]
        assert not any("cfg" in text for text in records), records
        close(ksampler(model, any_text, any_text, empty(pack, model), cfg=3.0)["samples"], plain, 1e-4)
    assert sum("set cfg to 1" in text for text in records) == 1, records


def check_labels_that_there_are_not_are_named(pack):
    model, _, _ = loaded(pack, NULL)
    refused(lambda: labels(pack, model, 5), "got 5", "numbers from 0 to 4", "fox, owl")
    refused(lambda: labels(pack, model, 0, "ufo"), "none is called 'ufo'", "fox, owl")
    refused(lambda: labels(pack, model, 0, "fox, 9"), "got 9", "from 0 to 4")
    plain, _, _ = loaded(pack, PLAIN)
    refused(lambda: labels(pack, plain, 0, "fox"), "none is called 'fox'", "no names")
    strange, latent = [[torch.ones(1, 1, 1), {"zigma_y": torch.tensor([7])}]], empty(pack, model)  # another model's
    refused(lambda: ksampler(model, strange, strange, latent), "ZigMa Label Conditioning", "got [7]", "0 to 4")


def check_texts_and_labels_do_not_take_each_others_place(pack):
    classes, _, _ = loaded(pack, NULL)
    model, clip, _ = loaded(pack)
    text, label = encode(clip, "fox"), labels(pack, classes, 0)[0]
    latent = empty(pack, model)
    refused(lambda: ksampler(classes, text, text, latent), "connect ZigMa Label Conditioning", "got a text")
    refused(lambda: ksampler(model, label, label, latent), "CLIP Text Encode", "got a label")
    refused(lambda: labels(pack, model, 0), "connect CLIP Text Encode", "'text'")
    node = pack.node("ZigMaTextConditioning")
    refused(lambda: node.execute(clip, "fox", "", classes), "connect ZigMa Label Conditioning", "'class'")


def check_text_conditioning_equals_the_stock_nodes(pack):
    model, clip, _ = loaded(pack)
    node = pack.node("ZigMaTextConditioning")
    positive, negative = node.execute(clip, "red (fox:1.4)", "", model).result
    apple = node.execute(clip, "", "apple").result[1]
    for ours, text in ((positive, "red (fox:1.4)"), (negative, ""), (apple, "apple")):
        expected = encode(clip, text)
        assert torch.equal(ours[0][0], expected[0][0]) and ours[0][1].keys() == expected[0][1].keys()


def check_mistakes_with_texts_are_named(pack):
    model, *_ = loaded(pack)
    node = pack.node("ZigMaTextConditioning")
    refused(lambda: node.execute(None, "fox", ""), "connect a text encoder", "CLIPLoader", "ViT-L/14")
    wide = SimpleNamespace(
        tokenize=lambda text: text, encode_from_tokens_scheduled=lambda tokens: [[torch.zeros(1, 77, 768), {}]]
    )
    refused(lambda: node.execute(wide, "fox", "", model), "text encoder that belongs", "width 768", "expected width 16")
    foreign = [[torch.zeros(1, 77, 768), {}]]
    refused(lambda: ksampler(model, foreign, foreign, empty(pack, model)), "width 768", "expected width 16")
    none = [[None, {}]]
    refused(lambda: ksampler(model, none, none, empty(pack, model)), "got none", "expected width 16")


def check_guidance_by_an_untrained_null_is_warned_of(pack):
    model, clip, _ = loaded(pack, "untrained.safetensors")
    node = pack.node("ZigMaTextConditioning")
    for negative, given, warned in (("", model, True), ("apple", model, False), ("", loaded(pack)[0], False)):
        with logged() as records:
            node.execute(clip, "fox", negative, given)
        assert any("set cfg to 1" in text for text in records) == warned, (negative, records)


def check_the_hosts_clip_gives_the_last_hidden_states(pack):
    """What released models were trained on: a tiny random CLIP of that kind, and transformers' features for it."""
    path = BASE / "clip.safetensors"
    if not path.is_file():
        print("NOT TESTED: the host's CLIP against transformers', which the tests' own environment lacks")
        return
    state = comfy.utils.load_torch_file(str(path))
    ids, features = state.pop("ids"), state.pop("features")
    target = comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel)
    options = {"clip_l_model_config": CLIP, "dtype": torch.float32}
    clip = comfy.sd.CLIP(target, parameters=1, model_options=options)
    missing, unexpected = clip.load_sd(state)
    assert not [key for key in missing if "text_projection" not in key and "logit_scale" not in key], missing
    assert not [key for key in unexpected if "position_ids" not in key], unexpected
    tokens = clip.tokenize("a red fox")["l"]
    assert [pair[0] for pair in tokens[0]] == ids[0].tolist()  # padded as for the published features
    close(encode(clip, "a red fox")[0][0], features, 1e-4)


def check_no_condition_draws_what_the_command_line_draws_and_refuses_others(pack):
    node = pack.node("ZigMaNoCondition")
    model, _, vae = loaded(pack, "unconditional.safetensors")
    nothing = node.execute(model).result[0]
    latent = stock.common_ksampler(
        model, 3, 10, 1.0, "euler", "simple", nothing, nothing, empty(pack, model)
    )[0]  # fmt: skip
    picture = stock.VAEDecode().decode(vae, latent)[0]
    close(picture, command_line(pack, name="unconditional.safetensors", prompt=None, guidance=1.0), 1e-4)
    refused(lambda: node.execute(loaded(pack)[0]), "ZigMa Text Conditioning in place of this node")
    refused(lambda: node.execute(loaded(pack, "class.safetensors")[0]), "ZigMa Label Conditioning in place")


def check_an_area_need_not_be_of_whole_tokens(pack):
    """Padded as the host pads for its own models, and what does not belong to it cut off."""
    for name, lengths in (("tiny.safetensors", ()), ("video.safetensors", (3,))):
        model, clip, _ = loaded(pack, name)
        red, fox, none = (encode(clip, text) for text in ("red", "fox", ""))
        areas = stock.ConditioningSetArea().append(red, 40, 24, 0, 0, 1.0)[0] + fox  # 3 rows, 5 columns; patches of 2
        latent = empty(pack, model)
        drawn = ksampler(model, areas, none, latent)["samples"]
        assert drawn.shape == latent["samples"].shape and drawn.isfinite().all()
        assert not torch.allclose(drawn, ksampler(model, fox, none, latent)["samples"], atol=1e-3)
        network, x = model.model.diffusion_model, torch.randn(2, 4, *lengths, 3, 5)
        whole = torch.cat([x, x[..., :1, :]], dim=-2)
        whole = torch.cat([whole, whole[..., :1]], dim=-1)
        sigma, context = torch.tensor([0.3, 0.7]), red[0][0].expand(2, -1, -1)
        close(network(x, sigma, context), network(whole, sigma, context)[..., :3, :5])
