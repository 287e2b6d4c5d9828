"""Scan orders in a host: given as numbers or as a schedule, two at once, drawn, and mistakes in them."""

from __future__ import annotations

import json
import logging

import torch
from host_process import close, empty, encode, loaded, refused, stock_pictures
from PIL import Image

HEIGHT, WIDTH = 2, 3  # tokens of the tiny model; a token is 16 pixels


def order_of(pack, kind, index, height=HEIGHT, width=WIDTH):
    return pack.part("zigma.scan_orders").scan_order(kind, index, height=height, width=width)


def schedule_in(pack, model):
    return model.model_options["transformer_options"][pack.part("nodes.layer_orders").SCAN_ORDERS]


def scan_order(pack, model, order="zigzag", variants="0-7", layers="all", seed=0, **more):
    return pack.node("ZigMaScanOrder").execute(model, order, variants, layers, seed, **more).result


def logged(call):
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    try:
        return call(), [text for text in records if text.startswith("ZigMa Scan Order")]
    finally:
        logging.getLogger().removeHandler(handler)


def check_a_custom_order_equals_the_registrys(pack):
    model, clip, vae = loaded(pack)
    latent = empty(pack, model)
    registry = scan_order(pack, model, "hilbert", "0, 3")[0]
    numbers = [order_of(pack, "hilbert", index).tolist() for index in (0, 3)]
    expected = stock_pictures(registry, clip, vae, latent)
    for text in (
        json.dumps(numbers), json.dumps(numbers, indent=1), "\n".join(" ".join(map(str, order)) for order in numbers),
        "\n\n".join("\n".join(", ".join(map(str, o[r : r + WIDTH])) for r in (0, WIDTH)) for o in numbers),
    ):  # fmt: skip
        custom = scan_order(pack, model, "custom", custom=text)[0]
        assert torch.equal(stock_pictures(custom, clip, vae, latent), expected)
    second = scan_order(pack, model, "custom", "1", "0", custom=json.dumps(numbers))[0]
    close(
        stock_pictures(second, clip, vae, latent),
        stock_pictures(scan_order(pack, model, "hilbert", "3", "0")[0], clip, vae, latent), 1e-9,
    )  # fmt: skip


def check_a_custom_order_is_for_one_grid(pack):
    model, clip, vae = loaded(pack)
    turned = empty(pack, model, width=32, height=48)  # as many tokens, another grid
    custom = " ".join(map(str, order_of(pack, "hilbert", 0).tolist()))
    changed = scan_order(pack, model, "custom", custom=custom)[0]
    refused(lambda: stock_pictures(changed, clip, vae, turned), "got 3 x 2 tokens, expected 2 x 3", "make the latent")
    text = " ".join(map(str, order_of(pack, "hilbert", 0, 3, 2).tolist()))
    fitting = scan_order(pack, model, "custom", custom=text, width=32, height=48)[0]
    same = scan_order(pack, model, "hilbert", "0")[0]
    assert torch.equal(stock_pictures(fitting, clip, vae, turned), stock_pictures(same, clip, vae, turned))


def check_a_schedule_equals_chained_nodes(pack):
    model, *_ = loaded(pack)
    chained = scan_order(pack, scan_order(pack, model, "sweep", "3", "0")[0], "random", "5", "1", 7)[0]
    written = scan_order(pack, model, seed=7, schedule="0: sweep 3  # a remark\n\n 1: random 5 ")[0]
    assert schedule_in(pack, written) == schedule_in(pack, chained) == (("sweep", 3, 0), ("random", 5, 7))
    later = scan_order(pack, model, schedule="all: zigzag 0-7\n1: hilbert 2")[0]
    assert schedule_in(pack, later) == (("zigzag", 0, 0), ("hilbert", 2, 0))
    back = scan_order(pack, later, "as trained", layers="1")[0]
    assert schedule_in(pack, back) == (("zigzag", 0, 0), None)
    _, _, report = scan_order(pack, model, "sweep", schedule="0: as trained")
    assert "order, variants and layers are not" in report
    assert schedule_in(pack, scan_order(pack, model, "bidirectional")[0])[1] == ("bidirectional", 1, 0)


def check_only_a_departure_from_the_training_is_warned_of(pack):
    model, *_ = loaded(pack)  # trained with zigzag 0 and 1
    for more in ({}, {"order": "as trained"}, {"schedule": "0: zigzag 0"},
                 {"order": "custom", "layers": "0", "custom": "0 1 2 5 4 3"}):  # fmt: skip
        (_, _, report), warnings = logged(lambda more=more: scan_order(pack, model, **more))
        assert not warnings and "all layers read in the order that the model was trained with" in report, more
    (_, _, report), warnings = logged(lambda: scan_order(pack, model, "sweep", "0", "0"))
    assert len(warnings) == 1 and "1 of 2 layers" in warnings[0] and "layer 0: 40%" in warnings[0], warnings
    assert warnings[0].split(": ", 1)[1] in report and len(report.splitlines()) == 5
    (_, _, report), warnings = logged(lambda: scan_order(pack, model, custom="0 1 2 5 4 3"))
    assert "custom numbers are not in use" in report
    attention, *_ = loaded(pack, "kind_attention.safetensors")
    _, warnings = logged(lambda: scan_order(pack, attention, "sweep"))
    assert "mix by attention" in warnings[0]


def check_two_orders_of_one_model_at_once_equal_each_alone(pack):
    model, clip, vae = loaded(pack)
    latent = empty(pack, model)
    names = ("sweep", "hilbert", "diagonal")
    alone = {}
    for name in names:
        alone[name] = stock_pictures(scan_order(pack, loaded(pack)[0], name)[0], clip, vae, latent)
    own = stock_pictures(model, clip, vae, latent)
    clones = {name: scan_order(pack, model, name)[0] for name in names}
    for _ in range(2):
        for name in names:
            assert torch.equal(stock_pictures(clones[name], clip, vae, latent), alone[name])
    assert torch.equal(stock_pictures(model, clip, vae, latent), own)


def check_calls_that_take_turns_prepare_each_order_once(pack):
    model, clip, _ = loaded(pack)
    network = model.model.diffusion_model
    prepared, prepare = [], network._as_scans
    network._as_scans = lambda orders, *rest: (prepared.append(orders), prepare(orders, *rest))[1]
    x, sigma, text = torch.randn(2, 4, 4, 6), torch.tensor([0.4, 0.4]), encode(clip, "fox")[0][0].expand(2, -1, -1)
    custom = json.dumps(order_of(pack, "sweep", 5).tolist())
    clones = [scan_order(pack, model, "sweep")[0], scan_order(pack, model, "hilbert", layers="1")[0],
              scan_order(pack, model, "custom", custom=custom)[0]]  # fmt: skip
    results = [
        network(x, sigma, text, transformer_options=clone.model_options["transformer_options"])
        for _ in range(4)
        for clone in clones
    ]
    assert len(prepared) == 3, f"prepared {len(prepared)} times"
    for i, result in enumerate(results):
        assert torch.equal(result, results[i % 3])
    assert not torch.allclose(results[0], results[1], atol=1e-4)
    del network._as_scans


def check_few_schedules_are_kept(pack):
    model, *_ = loaded(pack)
    network = model.model.diffusion_model
    for seed in range(30):
        changed = scan_order(pack, model, "random", "0", "0", seed)[0]
        network._scheduled(schedule_in(pack, changed), torch.zeros(1, 4, 4, 6))
    assert len(network._overridden) == pack.part("nodes.comfy_model").KEPT_SCHEDULES


def video_network(pack):
    """A video model as the loader will give it: build_model refuses it today, the network does not."""
    file = pack.checkpoint.read_checkpoint(pack.file.with_name("video.safetensors"))
    import comfy.ops

    network = pack.part("nodes.comfy_model").HostZigMa(
        zigma_file=file, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init
    )  # fmt: skip
    model, *_ = loaded(pack)
    model = model.clone()
    model.model.diffusion_model = network
    return model, network


def check_of_a_video_model_spatial_layers_alone_change(pack):
    model, network = video_network(pack)  # video_sst at depth 2 has no temporal layer: make the second one
    network.schedule = pack.part("zigma.scan_orders").LayerSchedule("video_st", 2, video=True)
    changed, drawing, report = scan_order(pack, model, "hilbert", "0")
    assert schedule_in(pack, changed) == (("hilbert", 0, 0), None)
    assert drawing.shape[0] == 1 and report.splitlines()[-1].split()[:3] == ["1", "time", "forwards"]
    refused(lambda: scan_order(pack, model, "hilbert", "0", "0-1"), "leave the layers 1 out", "through time")
    refused(lambda: scan_order(pack, model, schedule="1: sweep"), "line 1 of the schedule", "leave the layers 1 out")
    network.eval()  # without stochastic depth; and the host's layers come without values
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, sigma, context = torch.randn(2, 4, 3, 4, 6), torch.tensor([0.3, 0.8]), torch.randn(2, 6, 16)  # (b, c, f, h, w)
    orders = [order_of(pack, "hilbert", 0), torch.arange(3)]
    space, time = network._scheduled(schedule_in(pack, changed), x.transpose(1, 2))
    assert torch.equal(space, orders[0]) and torch.equal(time, orders[1])
    got = network(x, sigma, context, transformer_options=changed.model_options["transformer_options"])
    plain = type(network).__mro__[1].forward(network, x.transpose(1, 2), 1 - sigma, context, token_orders=orders)
    close(got, -plain.transpose(1, 2), 1e-5)
    assert got.std() > 0.05  # of which that is little
    network.schedule = pack.part("zigma.scan_orders").LayerSchedule("v2", 2, video=True)
    refused(lambda: scan_order(pack, model, "hilbert", "0"), "read all frames at once")


def preview(pack, model, layers="all", width=0, height=0, size=0, columns=0, **more):
    return pack.node("ZigMaScanOrderPreview").execute(model, layers, width, height, size, columns, **more).result


def check_the_preview_draws_the_given_orders(pack):
    model, *_ = loaded(pack)
    changed = scan_order(pack, model, "sweep", "0", "1")[0]
    drawing, report = preview(pack, changed)
    assert drawing.dim() == 4 and drawing.shape[3] == 3 and drawing.min() >= 0 and drawing.max() <= 1
    lines = report.splitlines()
    assert lines[-2].split()[:4] == ["0", "all", "zigzag", "0"] and lines[-1].split()[:4] == ["1", "all", "sweep", "0"]
    assert lines[-1].split()[-5:-1] == ["1", "0.80", "3", "1.9"], lines[-1]
    one, report = preview(pack, changed, "1", width=128, height=64, size=500)
    assert "4 x 8 tokens" in report and one.shape[2] >= 500 and len(report.splitlines()) == 5
    both, _ = preview(pack, scan_order(pack, model, "sweep", "0")[0])
    assert both.shape[2] < drawing.shape[2], "layers that read alike share a drawing"


def check_the_preview_draws_over_a_picture(pack):
    model, *_ = loaded(pack)
    picture = torch.zeros(2, 70, 100, 3)
    picture[..., 1] = 0.5
    drawing, report = preview(pack, model, "0", size=288, image=picture, opacity=1.0)
    assert "cut to 96 x 64" in report and "the first of 2" in report and "4 x 6 tokens" in report
    green = ((drawing[0] - torch.tensor([0, 0.5, 0])).abs() < 0.01).all(-1)
    assert 0.3 < green.sum() / (288 * 192) < 0.95, green.sum()
    rgba = torch.cat([picture, torch.ones(2, 70, 100, 1)], -1)
    assert torch.equal(preview(pack, model, "0", size=288, image=rgba, opacity=1.0)[0], drawing)
    square, report = preview(pack, model, "0", 64, 64, 200, image=picture)
    assert "4 x 4 tokens" in report and "cut to 70 x 70" in report and square.shape[2] < drawing.shape[2]
    refused(lambda: preview(pack, model, image=torch.zeros(1, 8, 40, 3)), "give a picture of 16 x 16 pixels", "40 x 8")
    refused(lambda: preview(pack, model, width=50), "multiple of 16 pixels", "set the width to 48")
    refused(lambda: preview(pack, model, "2"), "got the layers '2'")


def check_a_sheet_holds_all_pictures_in_order(pack):
    node = pack.node("ZigMaPictureSheet")
    colours = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]])
    red, green, blue = (colour.expand(1, 20, 30, 3) for colour in colours)
    sheet = node.execute(torch.cat([red, green]), "a\n\nc", 3, "", images_5=blue).result[0]
    places = [((sheet[0] - colour).abs() < 0.01).all(-1).nonzero() for colour in colours]
    assert [len(place) for place in places] == [600] * 3
    assert places[0][:, 1].max() < places[1][:, 1].min() and places[1][:, 1].max() < places[2][:, 1].min()
    large = node.execute(red, "", 0, "A title", enlarge=3).result[0]
    assert ((large[0] - colours[0]).abs() < 0.01).all(-1).sum() == 9 * 600
    refused(lambda: node.execute(torch.cat([red, green]), "one", 0, ""), "got 1 captions for 2 pictures", "one line")
    assert Image.fromarray((sheet[0] * 255).byte().numpy()).size == (sheet.shape[2], sheet.shape[1])


def check_mistakes_in_orders_are_named(pack):
    model, *_ = loaded(pack)

    def custom(text, *words):
        refused(lambda: scan_order(pack, model, "custom", custom=text), *words)

    custom("", "write the numbers of the order in the field custom")
    custom("0 1 2 3 4 4", "write each number from 0 to 5 once", "5 is missing", "4 is there more than once")
    custom("0 1 2 3 4 9", "5 is missing, 9 is out of range")
    custom("0 1 2 3 4", "got 5, expected 6", "2 x 3 tokens (a picture of 48 x 32 pixels)")
    custom("0 1 2 3 4 5\n0 1 2 3 4", "custom order 1", "got 5, expected 6")
    custom("0 1 2 x 4 5", "whole numbers only", "'x'")
    custom("[[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4.5, 5]]", "custom order 1", "'4.5'")

    def schedule(text, *words):
        refused(lambda: scan_order(pack, model, schedule=text), *words)

    schedule("0: zigzag\n1: spiral 2", "line 2 of the schedule", "'spiral 2'", "zigzag, sweep")
    schedule("0-7: zigzag", "line 1 of the schedule", "there is no 2")
    schedule("0 zigzag", "write line 1 of the schedule as '0-3: zigzag 0-7'")
    schedule("0: zigzag 8", "line 1", "from 0 to 7: there is no 8")
    schedule("0: custom 0", "line 1", "in the field custom")
    schedule("# nothing", "got remarks only")
    refused(lambda: scan_order(pack, model, "custom", "1", custom="0 1 2 3 4 5"), "there is no 1")
