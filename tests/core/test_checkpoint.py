"""Model files: what is saved is loaded, and every way in which a file can be wrong has its sentence."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from zigma import CheckpointError, ZigMa, ZigMaConfig, load_checkpoint, save_checkpoint
from zigma.autoencoder import TinyAutoencoder
from zigma.checkpoint import LatentFormat, load_bundle, read_checkpoint
from zigma.mixer import FLOAT32_PARAMETERS
from zigma.scan_orders import scan_order
from zigma.text import TextEncoderConfig, WordTextEncoder

CONFIG = ZigMaConfig(in_channels=4, embed_dim=16, depth=2, img_dim=(2, 3), has_text=True, d_context=8, use_pe=2)
LATENT = LatentFormat(
    4, scale=(1.0, 2.0, 0.5, 3.0), shift=(0.0, 1.0, -1.0, 0.5), rgb_factors=[[0.1, 0.2, 0.3]] * 4, rgb_bias=[0, 0, 0]
)  # fmt: skip


def build(orders=None):
    torch.manual_seed(0)
    text = WordTextEncoder(TextEncoderConfig(["fox", "red"], length=3, width=8))
    return ZigMa(CONFIG, orders).eval(), text.eval(), TinyAutoencoder(4).eval()


@pytest.fixture
def path(tmp_path):
    model, text, autoencoder = build()
    path = tmp_path / "model.safetensors"
    save_checkpoint(model, path, {"author": "me"}, text_encoder=text, autoencoder=autoencoder, latent=LATENT)
    return path


def change(path, tensors=None, metadata=None, drop=()):
    """Rewrite a file with other entries."""
    with safe_open(path, framework="pt") as file:
        held = {key: file.get_tensor(key) for key in file.keys() if key not in drop}  # noqa: SIM118
        facts = {key: value for key, value in file.metadata().items() if key not in drop}
    save_file({**held, **(tensors or {})}, path, metadata={**facts, **(metadata or {})})


def test_what_is_saved_is_loaded(path):
    model, text, autoencoder = build()
    bundle = load_bundle(path)
    x, t = torch.randn(2, 4, 2, 3), torch.rand(2)
    y = text.encode(["red fox", ""])
    assert torch.equal(bundle.text_encoder.encode(["red fox", ""]), y)
    assert torch.equal(bundle.model(x, t, y), model(x, t, y))
    assert torch.equal(load_checkpoint(path)(x, t, y), model(x, t, y))
    assert torch.equal(bundle.autoencoder.decode(x), autoencoder.decode(x))
    assert bundle.latent == LATENT and bundle.metadata["author"] == "me"
    assert bundle.model.config == CONFIG and bundle.text_encoder.config == text.config
    assert not any(p.requires_grad for p in bundle.model.parameters()) and not bundle.model.training


def test_the_keys_of_the_model_are_bare_and_those_of_the_others_prefixed(path):
    model, text, autoencoder = build()
    with safe_open(path, framework="pt") as file:
        keys = set(file.keys())
    expected = set(model.state_dict())
    expected |= {f"text_encoder.{key}" for key in text.state_dict()}
    expected |= {f"vae.{key}" for key in autoencoder.state_dict()}
    assert keys == expected


def test_orders_travel_with_the_file_and_shared_ones_are_stored_once(tmp_path):
    hilbert = scan_order("hilbert", height=2, width=3)
    model, _, _ = build([hilbert, hilbert.clone()])
    save_checkpoint(model, tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        assert [key for key in file.keys() if "order" in key] == ["token_orders.0"]  # noqa: SIM118
    loaded = load_checkpoint(tmp_path / "m.safetensors")
    assert len(loaded.token_orders) == 2 and all(torch.equal(order, hilbert) for order in loaded.token_orders)
    x, t, y = torch.randn(1, 4, 2, 3), torch.rand(1), torch.randn(1, 3, 8)
    assert torch.equal(loaded(x, t, y), model(x, t, y))
    assert not any("order" in key for key in model.state_dict())


def test_half_precision_is_kept_in_the_file_and_widened_on_loading(path, tmp_path):
    model, _, _ = build()
    path = tmp_path / "half.safetensors"
    save_checkpoint(model, path, dtype=torch.float16)
    for key, value in read_checkpoint(path).state_dict.items():
        precise = key.rpartition(".")[2] in FLOAT32_PARAMETERS
        assert value.dtype == (torch.float32 if precise else torch.float16), key
    save_checkpoint(model, path, dtype=torch.float16, precise=False)
    assert {value.dtype for value in read_checkpoint(path).state_dict.values()} == {torch.float16}
    assert {p.dtype for p in load_checkpoint(path).parameters()} == {torch.float32}
    loaded = load_checkpoint(path, dtype=torch.bfloat16)
    rest = {p.dtype for name, p in loaded.named_parameters() if name.rpartition(".")[2] not in FLOAT32_PARAMETERS}
    assert rest == {torch.bfloat16}
    with pytest.raises(ValueError, match="got the dtype 'bfloat16', expected one of torch's"):
        load_checkpoint(path, dtype="bfloat16")


def test_the_latent_format_is_undone():
    z = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(LATENT.to_vae(LATENT.to_model(z)), z)
    torch.testing.assert_close(LATENT.to_model(z)[:, 1], (z[:, 1] - 1) * 2)
    assert LatentFormat(3, downscale=1).pixel_space and not LATENT.pixel_space


def test_a_failed_write_leaves_the_old_file_and_nothing_else(path, monkeypatch):
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(build()[0], path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_written_file_can_be_read_by_others(path):
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def refused(path, *words):
    with pytest.raises(CheckpointError) as caught:
        load_bundle(path)
    sentence = str(caught.value)
    assert sentence.startswith(f"{path}: ") and "\n" not in sentence
    for word in words:
        assert word in sentence, sentence


def test_wrong_files_are_refused(path, tmp_path):
    refused(tmp_path / "none.safetensors", "there is no such file")
    refused(tmp_path, "it is a folder")
    (tmp_path / "model.gguf").write_bytes(b"")
    refused(tmp_path / "model.gguf", "its name ends in '.gguf'", "expected .safetensors or one of .pt")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    refused(tmp_path / "empty.safetensors", "cannot be read as safetensors")
    (tmp_path / "half.safetensors").write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(tmp_path / "half.safetensors", "cannot be read as safetensors", "get the file again")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    refused(tmp_path / "other.safetensors", "no x_embedder.proj.weight and blocks.0: it is no ZigMa")


@pytest.mark.parametrize(
    ("tensors", "metadata", "drop", "words"),
    [
        ({}, {}, ["norm_f.weight"], ["its model lacks 1 tensors (norm_f.weight)"]),
        ({"extra": torch.zeros(1)}, {}, [], ["its model has unknown 1 tensors (extra)"]),
        ({"norm_f.weight": torch.zeros(3)}, {}, [], ["norm_f.weight of its model has shape (3,), where (16,)"]),
        ({}, {}, ["text_encoder.words.weight"], ["its text encoder lacks 1 tensors"]),
        ({}, {}, ["zigma.text_encoder"], ["has a text encoder, but no 'zigma.text_encoder'"]),
        ({}, {}, ["vae.taesd_decoder.1.weight"], ["its autoencoder is unusable", "taesd_decoder.1.weight"]),
        ({}, {"zigma.config": "{"}, [], ["its metadata is wrong", "not JSON"]),
        ({}, {"zigma.config": '{"colour": 1}'}, [], ["unknown fields colour", "newer version"]),
        ({}, {"zigma.config": CONFIG.to_json().replace('"use_pe": 2', '"use_pe": 7')}, [], ["use_pe is 7"]),
        ({}, {"zigma.latent": '{"channels": 3}'}, [], ["latent format has 3 channels and its model 4"]),
        ({}, {"zigma.latent": '{"channels": 4, "scale": [1.0]}'}, [], ["scale has 1 numbers, expected 4"]),
        ({}, {"zigma.token_orders": "[0, 0]"}, [], ["token orders are unusable (there is no token_orders.0)"]),
        ({}, {"zigma.text_encoder": '{"words": []}'}, [], ["its metadata is wrong"]),
    ],
)
def test_damaged_parts_are_named(path, tensors, metadata, drop, words):
    change(path, tensors, metadata, drop)
    refused(path, *words)


def test_mistakes_in_saving_are_named(tmp_path):
    model = build()[0]
    with pytest.raises(ValueError, match=r"ends in \.safetensors"):
        save_checkpoint(model, tmp_path / "model.pt")
    for metadata in ({"zigma.config": "{}"}, {"steps": 3}):
        with pytest.raises(ValueError, match="expected strings under other names"):
            save_checkpoint(model, tmp_path / "m.safetensors", metadata)
    with pytest.raises(ValueError, match="expected 'ema' or 'model'"):
        load_checkpoint(tmp_path / "m.safetensors", weights="best")


def test_a_configuration_survives_its_text():
    assert ZigMaConfig.from_json(CONFIG.to_json()) == CONFIG
    assert json.loads(CONFIG.to_json())["img_dim"] == [2, 3]
