"""Checks inside a host of VAEs: loading every layout, encoding, decoding whole, in tiles and by frames."""

from __future__ import annotations

import logging

from host_process import BASE, close, loaded, refused, stock

import comfy.model_management  # isort: skip
import comfy.utils  # isort: skip
import torch  # isort: skip


def load(pack, name):
    return pack.node("ZigMaVAELoader").execute(name).result[0]


def decode(pack, vae, samples, enlarge=1, tile=0):
    return pack.node("ZigMaVAEDecode").execute({"samples": samples}, vae, enlarge, tile).result[0]


def check_a_vae_file_is_what_the_stock_loader_makes_of_it(pack):
    ours, theirs = load(pack, "tiny_vae.safetensors"), stock.VAELoader().load_vae("tiny_vae.safetensors")[0]
    latent, pictures = torch.randn(2, 4, 4, 6), torch.rand(2, 32, 48, 3)
    close(decode(pack, ours, latent), stock.VAEDecode().decode(theirs, {"samples": latent})[0], 1e-6)
    close(ours.encode(pictures), theirs.encode(pictures), 1e-6)


def check_the_vae_inside_a_model_file_loads_alone(pack):
    latent = torch.randn(1, 4, 4, 6)
    inside = loaded(pack)[2]
    close(decode(pack, load(pack, "tiny.safetensors"), latent), decode(pack, inside, latent), 1e-6)
    assert list(pack.part("nodes.vae").vae_files())[: len(pack.part("zigma.assets").available_models())] == list(
        pack.part("zigma.assets").available_models()
    )
    for name in pack.part("zigma.assets").available_models():
        vae = load(pack, name)
        assert decode(pack, vae, torch.zeros(1, vae.latent_channels, 8, 8)).shape == (1, 64, 64, 3)


def check_pixel_space_is_a_vae_like_the_stock_one(pack):
    """For pictures that a model of pixels is to change; the loader of such a model gives the same."""
    ours, theirs = load(pack, "pixel_space"), stock.VAELoader().load_vae("pixel_space")[0]
    pictures = torch.rand(2, 8, 12, 3)
    latent = pack.node("ZigMaVAEEncode").execute(pictures, ours).result[0]["samples"]
    assert latent.shape == (2, 3, 8, 12)
    assert torch.equal(latent, stock.VAEEncode().encode(theirs, pictures)[0]["samples"])
    assert torch.equal(latent, loaded(pack, "pixels.safetensors")[2].encode(pictures))
    close(latent, pictures.movedim(-1, 1) * 2 - 1, 1e-6)
    close(decode(pack, ours, latent), pictures, 1e-6)


def check_autoencoders_narrower_than_stable_diffusions_load(pack):
    """By the sizes of their tensors; with and without the convolutions round the latent."""
    core = pack.part("zigma.autoencoder")
    for name in ("narrow.safetensors", "narrow_plain.safetensors"):
        path = BASE / "models" / "vae" / name
        vae = load(pack, name)
        with torch.inference_mode(False):
            plain = core.load_autoencoder(path)
        assert (vae.latent_channels, vae.spacial_compression_decode(), vae.spacial_compression_encode()) == (6, 2, 2)
        latent, pictures = torch.randn(1, 6, 8, 12), torch.rand(2, 16, 24, 3)
        close(decode(pack, vae, latent), plain.decode(latent).movedim(1, -1) / 2 + 0.5, 1e-4)
        close(vae.encode(pictures), plain.encode(pictures.movedim(-1, 1) * 2 - 1), 1e-4)
        refused(lambda vae=vae: decode(pack, vae, torch.zeros(1, 4, 8, 8)), "latent of 4 channels and a VAE for 6")


def check_a_file_without_a_vae_is_named(pack):
    refused(lambda: load(pack, "bare.safetensors"), "bare.safetensors", "is unusable as an autoencoder")
    refused(lambda: load(pack, "broken.safetensors"), "broken.safetensors", "is unusable as an autoencoder")
    refused(lambda: load(pack, "gone.safetensors"), "put the file into models/vae", "gone.safetensors")


def check_a_missing_vae_is_named(pack):
    pixels = torch.zeros(1, 32, 48, 3)
    refused(lambda: decode(pack, None, torch.zeros(1, 4, 4, 6)), "connect a VAE", "ZigMa VAE Loader")
    refused(lambda: pack.node("ZigMaVAEEncode").execute(pixels, None), "connect a VAE", "ZigMa VAE Loader")


def check_encoding_pictures_equals_the_stock_node(pack):
    vae, pictures = loaded(pack)[2], torch.rand(3, 32, 48, 3)
    ours = pack.node("ZigMaVAEEncode").execute(pictures, vae).result[0]["samples"]
    assert torch.equal(ours, stock.VAEEncode().encode(vae, pictures)[0]["samples"])
    video = pack.node("ZigMaVAEEncode").execute(pictures, vae, True).result[0]["samples"]
    assert torch.equal(video, ours.transpose(0, 1)[None])
    transparent = torch.cat([pictures, torch.rand(3, 32, 48, 1)], dim=-1)
    assert torch.equal(pack.node("ZigMaVAEEncode").execute(transparent, vae).result[0]["samples"], ours)


def check_sizes_that_the_vae_does_not_divide_are_cropped_and_said(pack):
    vae, node, pictures, records = loaded(pack)[2], pack.node("ZigMaVAEEncode"), torch.rand(1, 37, 50, 3), []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    cropped = node.execute(pictures, vae).result[0]["samples"]
    logging.getLogger().removeHandler(handler)
    assert torch.equal(cropped, node.execute(pictures[:, 2:34, 1:49], vae).result[0]["samples"])
    assert any("cropped the pictures from 50 x 37 to 48 x 32" in text for text in records), records
    refused(lambda: node.execute(torch.rand(1, 6, 50, 3), vae), "use a larger picture", "at least 8 x 8")


def check_decoding_frames_is_decoding_each(pack):
    vae, latent = loaded(pack)[2], torch.randn(2, 4, 3, 4, 6)
    pictures = decode(pack, vae, latent)
    assert pictures.shape == (6, 32, 48, 3)
    for video in range(2):
        for frame in range(3):
            close(pictures[3 * video + frame], vae.decode(latent[video : video + 1, :, frame])[0], 1e-5)
    assert decode(pack, vae, latent, enlarge=2).shape == (6, 64, 96, 3)
    tiled = decode(pack, vae, torch.randn(1, 4, 2, 4, 24), tile=64)
    assert tiled.shape == (2, 32, 192, 3) and tiled.isfinite().all()


def check_tiles_equal_the_whole_picture(pack):
    """But for what a decoder sees beyond its tile: that is little, and nothing where a tile is the picture."""
    vae, latent = loaded(pack)[2], torch.randn(1, 4, 40, 48)
    whole = decode(pack, vae, latent)
    assert torch.equal(whole, stock.VAEDecode().decode(vae, {"samples": latent})[0])
    spread = (whole - whole.mean()).abs().mean()
    for tile in (128, 256):
        tiled = decode(pack, vae, latent, tile=tile)
        assert tiled.shape == whole.shape == (1, 320, 384, 3)
        assert (tiled - whole).abs().mean() < 0.02 * spread, (tile, (tiled - whole).abs().mean() / spread)
    assert not torch.equal(decode(pack, vae, latent, tile=128), whole)
    assert torch.equal(decode(pack, vae, latent, tile=384), whole)
    stock_tiled = stock.VAEDecodeTiled().decode(vae, {"samples": latent}, 256, 64)[0]
    assert torch.equal(decode(pack, vae, latent, tile=256), stock_tiled)
    refused(lambda: decode(pack, vae, latent, tile=32), "set tile_size to 0, or to 64 or more")


def check_a_host_short_of_memory_still_turns_to_tiles(pack):
    vae, latent = loaded(pack)[2], torch.randn(1, 4, 70, 70)
    whole, network, calls = decode(pack, vae, latent), vae.first_stage_model, []
    plain = network.decode

    def short(z, *arguments, **more):
        calls.append(tuple(z.shape))
        if len(calls) == 1:
            raise comfy.model_management.OOM_EXCEPTION("out of memory")
        return plain(z, *arguments, **more)

    network.decode = short
    try:
        got = decode(pack, vae, latent)
    finally:
        del network.decode
    assert len(calls) > 4 and calls[0] == (1, 4, 70, 70)
    assert got.shape == whole.shape and (got - whole).abs().mean() < 0.02
