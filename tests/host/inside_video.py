"""Checks inside a host of models that draw videos, whose latents are (b, c, f, h, w) there."""

from __future__ import annotations

from contextlib import contextmanager

from host_process import close, empty, encode, loaded, refused, stock

import latent_preview  # isort: skip
import torch  # isort: skip

VIDEO = "video.safetensors"
SAME = 1e-5  # of pictures: the tiny autoencoder makes little of a latent


def ksampler(pack, latent, prompt="red fox", cfg=2.0, denoise=1.0, sampler="euler", steps=10):
    model, clip, _ = loaded(pack, VIDEO)
    positive, negative = encode(clip, prompt), encode(clip, "")
    return stock.common_ksampler(
        model, 3, steps, cfg, sampler, "simple", positive, negative, latent, denoise=denoise
    )[0]["samples"]  # fmt: skip


def frames(pack, samples):
    return pack.node("ZigMaVAEDecode").execute({"samples": samples}, loaded(pack, VIDEO)[2], 1).result[0]


def from_command_line(pack, **settings):
    """(b f, h, w, 3), as IMAGE has them."""
    bundle = pack.checkpoint.load_bundle(pack.file.with_name(VIDEO))
    count = settings.pop("count", 1)
    chosen = pack.sampling.SamplingSettings(**{"steps": 10, "solver": "euler", "guidance": 2.0, **settings})
    with torch.inference_mode(False):
        videos = pack.sampling.sample(bundle, ["red fox"], count=count, seed=3, settings=chosen)
    return videos.flatten(0, 1).movedim(1, -1) / 2 + 0.5


def check_a_video_equals_the_command_lines(pack):
    model, *_ = loaded(pack, VIDEO)
    latent = empty(pack, model)
    assert latent["samples"].shape == (1, 4, 3, 4, 6)
    for cfg in (1.0, 2.0):
        pictures = frames(pack, ksampler(pack, latent, cfg=cfg))
        assert pictures.shape == (3, 32, 48, 3)
        close(pictures, from_command_line(pack, guidance=cfg), SAME)
    assert not torch.allclose(pictures[0], pictures[2], atol=20 * SAME)


def check_a_batch_of_videos_equals_the_command_lines(pack):
    model, *_ = loaded(pack, VIDEO)
    pictures = frames(pack, ksampler(pack, empty(pack, model, batch=2)))
    close(pictures, from_command_line(pack, count=2), SAME)


def check_our_sampler_draws_videos_as_ksampler_does(pack):
    model, clip, _ = loaded(pack, VIDEO)
    latent, node = empty(pack, model), pack.node("ZigMaSampler")
    texts = encode(clip, "red fox"), encode(clip, "")
    ours = node.execute(model, *texts, latent, 3, 10, 2.0, "euler", 1.0).result[0]["samples"]
    close(ours, ksampler(pack, latent), 1e-4)
    drawn = node.execute(model, *texts, latent, 3, 10, 2.0, "midpoint", 1.0).result[0]["samples"]
    close(frames(pack, drawn), from_command_line(pack, solver="midpoint"), SAME)
    for solver in ("dopri5", "sde-euler-maruyama"):
        assert node.execute(model, *texts, latent, 3, 10, 2.0, solver, 1.0).result[0]["samples"].isfinite().all()


def check_stock_samplers_draw_videos(pack):
    model, *_ = loaded(pack, VIDEO)
    for sampler in ("heun", "dpmpp_2m", "euler_ancestral", "uni_pc"):
        samples = ksampler(pack, empty(pack, model), sampler=sampler, steps=6)
        assert samples.shape == (1, 4, 3, 4, 6) and samples.isfinite().all(), sampler


def check_another_number_of_frames_and_another_size_work(pack):
    model, *_ = loaded(pack, VIDEO)
    latent = pack.node("ZigMaEmptyLatent").execute(model, 64, 32, 2, 5).result[0]
    assert latent["samples"].shape == (2, 4, 5, 4, 8)
    pictures = frames(pack, ksampler(pack, latent))
    assert pictures.shape == (10, 32, 64, 3) and pictures.isfinite().all()


def check_the_latents_scale_is_the_channels(pack):
    """Scale and shift differ by channel in this file; frames, of which there are as many as not, stay out of it."""
    model, *_ = loaded(pack, VIDEO)
    form, latent = model.get_model_object("latent_format"), torch.randn(2, 4, 3, 4, 6)
    for frame in range(3):
        expected = form.zigma.to_model(latent[:, :, frame])
        assert torch.equal(form.process_in(latent)[:, :, frame], expected)
    close(form.process_out(form.process_in(latent)), latent, 1e-5)
    assert form.latent_dimensions == 3 and loaded(pack)[0].get_model_object("latent_format").latent_dimensions == 2


def check_video_to_video_keeps_more_with_less_denoise(pack):
    vae = loaded(pack, VIDEO)[2]
    source = torch.rand(3, 32, 48, 3)
    latent = pack.node("ZigMaVAEEncode").execute(source, vae, True).result[0]
    assert latent["samples"].shape == (1, 4, 3, 4, 6)
    for frame in range(3):
        close(latent["samples"][0, :, frame], vae.encode(source[frame : frame + 1])[0], 1e-5)
    little, much = (ksampler(pack, latent, denoise=d, steps=20) for d in (0.1, 1.0))
    assert (little - latent["samples"]).abs().mean() < 0.5 * (much - latent["samples"]).abs().mean()


def check_a_noise_mask_keeps_what_it_covers(pack):
    samples = torch.randn(1, 4, 3, 4, 6)
    half = torch.zeros(1, 32, 48)
    half[:, :, 24:] = 1
    for mask in (half, half.repeat(3, 1, 1)):  # of all frames, and of each
        latent = stock.SetLatentNoiseMask().set_mask({"samples": samples}, mask)[0]
        drawn = ksampler(pack, latent)
        close(drawn[..., :2], samples[..., :2], 1e-4)
        assert (drawn[..., 4:] - samples[..., 4:]).abs().mean() > 0.1
    third = torch.zeros(3, 32, 48)
    third[2] = 1
    drawn = ksampler(pack, stock.SetLatentNoiseMask().set_mask({"samples": samples}, third)[0])
    close(drawn[:, :, 0], samples[:, :, 0], 1e-4)
    assert (drawn[:, :, 2] - samples[:, :, 2]).abs().mean() > 0.1


def check_a_preview_is_one_frame(pack):
    model, *_ = loaded(pack, VIDEO)
    form = model.get_model_object("latent_format")
    previewer = latent_preview.Latent2RGBPreviewer(form.latent_rgb_factors, form.latent_rgb_factors_bias)
    latent = torch.randn(2, 4, 3, 4, 6)
    preview = previewer.decode_latent_to_preview(latent)
    assert preview.size == (6, 4)
    expected = previewer.decode_latent_to_preview(latent[:1, :, 0])
    assert preview.tobytes() == expected.tobytes()


@contextmanager
def without_keeping(model):
    network = model.model.diffusion_model
    network.begin_run = lambda weights_stay: None
    try:
        yield
    finally:
        del network.begin_run


def check_keeping_a_runs_conditions_changes_no_video(pack):
    model, clip, _ = loaded(pack, VIDEO)
    texts, latent = (encode(clip, "red fox"), encode(clip, "")), empty(pack, model)
    def draw():
        return stock.common_ksampler(model, 3, 4, 2.0, "euler", "simple", *texts, latent)[0]["samples"]

    kept = draw()
    with without_keeping(model):
        close(kept, draw(), 1e-6)


def check_latents_of_the_other_kind_are_named(pack):
    model, clip, _ = loaded(pack)
    video, *_ = loaded(pack, VIDEO)
    texts = encode(clip, "fox"), encode(clip, "")

    def draw(model, latent):
        return stock.common_ksampler(model, 0, 2, 2.0, "euler", "simple", *texts, {"samples": latent})

    for five in (torch.zeros(1, 4, 3, 4, 6), torch.ones(1, 4, 3, 4, 6)):
        refused(lambda five=five: draw(model, five), "use ZigMa Empty Latent", "draws pictures", "(1, 4, 3, 4, 6)")
    for four in (torch.zeros(3, 4, 4, 6), torch.ones(3, 4, 4, 6)):
        refused(lambda four=four: draw(video, four), "use ZigMa Empty Latent", "frames_as_video", "of 3 frames")
    node = pack.node("ZigMaEmptyLatent")
    refused(lambda: node.execute(model, 0, 0, 1, 3), "set frames to 0", "draws pictures")
    refused(lambda: node.execute(video, 0, 0, 1, 1), "set frames to 0, or to 2", "of 3 frames")
    assert node.execute(model, 0, 0, 1, 1).result[0]["samples"].shape == (1, 4, 4, 6)


def check_latents_of_other_models_are_named(pack):
    model, clip, _ = loaded(pack)
    texts = encode(clip, "fox"), encode(clip, "")

    def draw(latent, sampler):
        if sampler == "stock":
            return stock.common_ksampler(model, 0, 2, 2.0, "euler", "simple", *texts, latent)[0]["samples"]
        return pack.node("ZigMaSampler").execute(model, *texts, latent, 0, 2, 2.0, "euler", 1.0).result[0]["samples"]

    for sampler in ("stock", "ours"):
        sd3 = {"samples": torch.ones(1, 16, 4, 6)}
        refused(lambda s=sampler, x=sd3: draw(x, s), "use ZigMa Empty Latent", "16 channels", "SD3", "works on 4")
        odd = stock.EmptyLatentImage().generate(40, 24, 1)[0]
        refused(lambda s=sampler, x=odd: draw(x, s), "set the height to 16 or 32", "got 24 pixels", "multiple of 16")
        empty16 = {"samples": torch.zeros(1, 16, 4, 6)}  # which hosts cut to the channels of the model
        assert draw(empty16, sampler).shape == (1, 4, 4, 6)
