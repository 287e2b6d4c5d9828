"""The latent cache: what comes out is what would be computed now, whatever has happened to the files."""

from __future__ import annotations

import errno
import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from zigma.autoencoder import TinyAutoencoder
from zigma.training import latent_cache
from zigma.training.dataset import read_dataset
from zigma.training.latent_cache import LatentCache, Prepared, autoencoder_digest, encode_dataset, encode_texts
from zigma.training.picture_files import fit


def autoencoder(seed: int = 0) -> TinyAutoencoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TinyAutoencoder(4).eval().requires_grad_(False)


def pictures(folder, count: int = 3, size=(16, 24)):
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        levels = np.random.default_rng(n).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(levels).save(folder / f"{n}.png")
    return read_dataset(folder)


def encoded(dataset, vae, cache=None, size=(16, 16), **options):
    return encode_dataset(dataset, vae, [size] * len(dataset), cache=cache, **options)


def flat(result) -> list[torch.Tensor]:
    return [value for variants in result.latents for value in variants]


def same(a, b) -> bool:
    return len(flat(a)) == len(flat(b)) and all(torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))


class Counting:
    """An autoencoder that counts the pictures that it is given."""

    def __init__(self, vae, monkeypatch) -> None:
        self.count, real = 0, vae.encode

        def encode(images):
            self.count += len(images)
            return real(images)

        monkeypatch.setattr(vae, "encode", encode)


def test_pixels_without_an_autoencoder(tmp_path):
    dataset = pictures(tmp_path / "data")
    result = encoded(dataset, None, flips=True)
    assert result.flipped == [[False, True]] * 3 and result.buckets == [0, 0, 0] and result.bucket_sizes == [(16, 16)]
    expected = fit(dataset.picture(1), (16, 16)).float() / 127.5 - 1
    assert torch.equal(result.latents[1][0], expected) and torch.equal(result.latents[1][1], expected.flip(-1))
    assert min(v.min() for v in flat(result)) >= -1 and max(v.max() for v in flat(result)) <= 1


def test_latents_are_the_autoencoders(tmp_path):
    dataset, vae = pictures(tmp_path / "data"), autoencoder()
    result = encoded(dataset, vae, crops=3, flips=True)
    assert [len(variants) for variants in result.latents] == [6, 6, 6]
    assert result.flipped[0] == [False, True] * 3
    for number, (place, flip) in enumerate(Prepared((16, 16), True, 3).variants((16, 24))):
        pixels = fit(dataset.picture(2), (16, 16), place, flip).float() / 127.5 - 1
        assert torch.equal(result.latents[2][number], vae.encode(pixels[None])[0])
    mean, std = result.moments()
    together = torch.stack(flat(result)).movedim(1, 0).flatten(1)
    assert torch.allclose(mean, together.mean(1), atol=1e-6)
    assert torch.allclose(std, together.std(1, correction=0), atol=1e-6)


def test_sizes_by_sample_become_buckets(tmp_path):
    dataset = pictures(tmp_path / "data")
    result = encode_dataset(dataset, autoencoder(), [(16, 24), (8, 8), (16, 24)])
    assert result.bucket_sizes == [(8, 8), (16, 24)] and result.buckets == [1, 0, 1]
    assert [tuple(variants[0].shape) for variants in result.latents] == [(4, 2, 3), (4, 1, 1), (4, 2, 3)]
    with pytest.raises(ValueError, match="got 1 sizes for 3 samples"):
        encode_dataset(dataset, None, [(8, 8)])
    with pytest.raises(ValueError, match="divisible by 8"):
        encoded(dataset, autoencoder(), size=(12, 12))


def test_a_second_run_reads_the_cache(tmp_path, monkeypatch):
    dataset, vae = pictures(tmp_path / "data"), autoencoder()
    digest = autoencoder_digest(vae)
    counting = Counting(vae, monkeypatch)
    first = encoded(dataset, vae, LatentCache(tmp_path / "cache", digest), flips=True)
    assert counting.count == 6
    steps = []
    again = encoded(
        read_dataset(tmp_path / "data"), vae, LatentCache(tmp_path / "cache", digest), flips=True,
        progress=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    assert counting.count == 6 and same(first, again) and steps == [(3, 3)]
    # What decides a latent is in the fingerprint: none of these may find the entries.
    for options in ({"flips": False}, {"crops": 2, "flips": True}, {"size": (8, 8), "flips": True}):
        before = counting.count
        encoded(dataset, vae, LatentCache(tmp_path / "cache", digest), **options)
        assert counting.count > before, options
    assert same(first, encoded(dataset, vae, LatentCache(tmp_path / "cache", digest), flips=True))


def test_a_changed_autoencoder_never_reuses_the_cache(tmp_path, caplog):
    dataset, old, new = pictures(tmp_path / "data"), autoencoder(0), autoencoder(0)
    encoded(dataset, old, LatentCache(tmp_path / "cache", autoencoder_digest(old)))
    with torch.no_grad():
        new.taesd_encoder[0].bias[3] += 1e-3  # one number
    assert autoencoder_digest(new) != autoencoder_digest(old)
    with caplog.at_level(logging.INFO):
        cache = LatentCache(tmp_path / "cache", autoencoder_digest(new))
        result = encoded(dataset, new, cache)
    assert sum("another encoder" in message for message in caplog.messages) == 1
    assert same(result, encoded(dataset, new)) and not same(result, encoded(dataset, old))
    with pytest.raises(ValueError, match="got a cache of another autoencoder"):
        encoded(dataset, old, cache)


def test_a_changed_picture_is_encoded_again(tmp_path, monkeypatch):
    dataset, vae = pictures(tmp_path / "data"), autoencoder()
    encoded(dataset, vae, LatentCache(tmp_path / "cache", autoencoder_digest(vae)))
    Image.new("RGB", (24, 16), "red").save(tmp_path / "data" / "1.png")
    counting = Counting(vae, monkeypatch)
    changed = read_dataset(tmp_path / "data")
    result = encoded(changed, vae, LatentCache(tmp_path / "cache", autoencoder_digest(vae)))
    assert counting.count == 1 and same(result, encoded(changed, vae))


def test_the_digest_tells_names_shapes_types_and_numbers_apart():
    layers = [torch.nn.Linear(2, 3, bias=False), torch.nn.Linear(3, 2, bias=False)]
    for layer in layers:
        torch.nn.init.ones_(layer.weight)
    halves = torch.nn.Linear(2, 3, bias=False).half()
    torch.nn.init.ones_(halves.weight)
    renamed = torch.nn.ParameterDict({"w": layers[0].weight})
    digests = {autoencoder_digest(module) for module in [*layers, halves, renamed, None]}
    assert len(digests) == 5
    first, again, other = (autoencoder_digest(autoencoder(seed)) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "other entry", "text"])
def test_a_damaged_entry_is_found_out_and_made_again(tmp_path, caplog, damage):
    dataset, vae = pictures(tmp_path / "data"), autoencoder()
    digest = autoencoder_digest(vae)
    first = encoded(dataset, vae, LatentCache(tmp_path / "cache", digest))
    paths = sorted((tmp_path / "cache").rglob("*.safetensors"))
    assert len(paths) == 3
    data = bytearray(paths[0].read_bytes())
    data[-5] ^= 1
    paths[0].write_bytes({
        "flipped": bytes(data), "cut": paths[0].read_bytes()[:-7], "empty": b"", "other entry": paths[1].read_bytes(),
        "text": b"not a cache entry",
    }[damage])  # fmt: skip
    with caplog.at_level(logging.WARNING):
        assert same(encoded(dataset, vae, LatentCache(tmp_path / "cache", digest)), first)
    assert len([m for m in caplog.messages if paths[0].name in m and "encoding it again" in m]) == 1
    caplog.clear()
    assert same(encoded(dataset, vae, LatentCache(tmp_path / "cache", digest)), first)
    assert caplog.messages == []  # it was repaired


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    cache = LatentCache(tmp_path, "encoder")
    value = torch.arange(6.0).view(2, 3)
    cache.put("file", "variant", value)
    path = cache.path("file", "variant")
    whole = path.read_bytes()
    assert torch.equal(cache.get("file", "variant"), value)
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= 1 << (place % 8)
        path.write_bytes(data)
        got = cache.get("file", "variant")
        # Some bytes of the header say nothing about the numbers; then these are intact.
        assert got is None or (torch.equal(got, value) and got.dtype == value.dtype), place
    assert cache.damaged > 100
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        assert cache.get("file", "variant") is None


def test_many_damaged_entries_do_not_fill_the_log(tmp_path, caplog):
    cache = LatentCache(tmp_path, "encoder")
    for n in range(20):
        cache.put(str(n), "v", torch.ones(2))
        cache.path(str(n), "v").write_bytes(b"x")
        assert cache.get(str(n), "v") is None
    assert len(caplog.messages) == 6 and cache.damaged == 20


def test_a_full_disk_costs_the_cache_and_not_the_run(tmp_path, caplog, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    dataset, vae = pictures(tmp_path / "data"), autoencoder()
    monkeypatch.setattr(latent_cache, "write_safetensors", full)
    with caplog.at_level(logging.WARNING):
        result = encoded(dataset, vae, LatentCache(tmp_path / "cache", autoencoder_digest(vae)))
    assert same(result, encoded(dataset, vae))
    assert len([m for m in caplog.messages if "No space left" in m]) == 1


def test_a_killed_encoding_goes_on_where_it_was(tmp_path, monkeypatch):
    """Entries before the interruption stay, no half entry is left, and the result is the straight one bit by bit."""
    dataset, vae = pictures(tmp_path / "data", 20), autoencoder()
    straight, digest = encoded(dataset, vae), autoencoder_digest(vae)

    def stop(done, total):
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encoded(dataset, vae, LatentCache(tmp_path / "cache", digest), progress=stop)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 10
    assert not list((tmp_path / "cache").rglob("*.tmp"))
    counting = Counting(vae, monkeypatch)
    assert same(encoded(dataset, vae, LatentCache(tmp_path / "cache", digest)), straight)
    assert counting.count == 10


def test_a_latent_that_is_no_number_stops_with_the_name(tmp_path):
    dataset, vae = pictures(tmp_path / "data"), autoencoder()
    vae.taesd_encoder[0].bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"the latent of 0.png is not finite"):
        encoded(dataset, vae, LatentCache(tmp_path / "cache", autoencoder_digest(vae)))


def test_another_dtype_leaves_the_autoencoder_alone(tmp_path):
    dataset, vae = pictures(tmp_path / "data"), autoencoder()
    digest = autoencoder_digest(vae)
    cache = LatentCache(tmp_path / "cache", digest)
    half = encoded(dataset, vae, cache, dtype=torch.bfloat16)
    assert autoencoder_digest(vae) == digest
    full = encoded(dataset, vae, cache)
    assert not same(half, full) and all(v.dtype == torch.float32 for v in flat(half))
    assert all(torch.allclose(a, b, atol=0.1) for a, b in zip(flat(half), flat(full), strict=True))


def test_clips(tmp_path):
    for clip in ("a", "b"):
        pictures(tmp_path / "clips" / clip, 3)
    dataset, vae = read_dataset(tmp_path / "clips", "frames"), autoencoder()
    cache = LatentCache(tmp_path / "cache", autoencoder_digest(vae))
    result = encoded(dataset, vae, cache, flips=True)
    assert [tuple(v.shape) for v in flat(result)] == [(3, 4, 2, 2)] * 4
    frame = fit(dataset.clip(0)[1], (16, 16), flip=True).float() / 127.5 - 1
    assert torch.equal(result.latents[0][1][1], vae.encode(frame[None])[0])
    assert same(encoded(dataset, vae, cache, flips=True), result)
    short = encoded(dataset, vae, cache, flips=True, frames=2)
    assert torch.equal(short.latents[1][0], result.latents[1][0][:2])
    with pytest.raises(ValueError, match="a has 3 frames, but 9 are needed"):
        encoded(dataset, vae, cache, frames=9)


def test_without_a_folder_nothing_is_kept():
    cache = LatentCache(None, "encoder")
    cache.put("file", "variant", torch.ones(2))
    assert cache.get("file", "variant") is None and cache.path("file", "variant") is None


def test_text_features(tmp_path):
    asked = []

    def encode(texts):
        asked.extend(texts)
        return torch.stack([torch.full((2, 3), float(len(text)), dtype=torch.float16) for text in texts])

    texts = ["a cat", "a dog and a cat", "", "a cat"]
    for _ in range(2):
        features = encode_texts(texts, encode, cache=LatentCache(tmp_path, "clip"), batch_size=2)
        assert list(features) == ["a cat", "a dog and a cat", ""]
        assert all(value.shape == (2, 3) and (value == len(text)).all() for text, value in features.items())
        assert features[""].dtype == torch.float16
    assert asked == ["a cat", "a dog and a cat", ""]
    encode_texts(texts, encode, cache=LatentCache(tmp_path, "another clip"))
    assert len(asked) == 6


@settings(deadline=None)
@given(st.integers(2, 60), st.integers(2, 60), st.integers(1, 40), st.integers(1, 40), st.integers(1, 5), st.booleans())
def test_variants_are_different_and_have_their_mirrors(height, width, h, w, crops, flips):
    variants = Prepared((h, w), flips, crops).variants((height, width))
    assert len(set(variants)) == len(variants) and variants[0][1] is False
    places = sorted({place for place, _ in variants})
    assert len(variants) == len(places) * (2 if flips else 1) and len(places) in (1, crops)
    assert places == [0.5] or (places[0] == 0 and places[-1] == 1)
    if height * w == width * h:
        assert places == [0.5]  # nothing stands out, so that every crop were the same


def test_impossible_preparations():
    for size, crops in (((0, 8), 1), ((8, 8), 0)):
        with pytest.raises(ValueError, match="expected at least 1"):
            Prepared(size, crops=crops)
