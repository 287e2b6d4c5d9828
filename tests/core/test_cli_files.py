"""The command line with the files of others: convert, inspect, videos, Stable Diffusion's VAE, CLIP or its features."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from zigma import ZigMa, ZigMaConfig, load_checkpoint, save_checkpoint
from zigma.autoencoder import TinyAutoencoder
from zigma.checkpoint import LatentFormat, load_bundle
from zigma.cli import main
from zigma.mixer import FLOAT32_PARAMETERS
from zigma.sampling import SamplingSettings, sample
from zigma.sheet import save_animation


def run(*arguments) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def failure(capsys, *arguments) -> str:
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    error = capsys.readouterr().err.strip()
    return error.splitlines()[-1]


@pytest.fixture
def vae(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "vae.safetensors"
    save_file(TinyAutoencoder(4).state_dict(), path)
    return path


def test_a_published_file_becomes_one_that_describes_itself(root, tmp_path, vae, capsys):
    source, out = root / "tests/data/published_checkpoint.pt", tmp_path / "model.safetensors"
    run("convert", source, out, "--vae", vae)
    expected = load_checkpoint(source)
    for key, value in load_checkpoint(out).state_dict().items():
        assert torch.equal(value, expected.state_dict()[key])
    with safe_open(out, framework="pt") as file:
        assert file.metadata()["zigma.train_steps"] == "90000"
    run("inspect", out)
    said = capsys.readouterr().out
    assert "width 64, depth 4" in said and "token orders: zigzagN8" in said and "autoencoder: " in said
    run("sample", "--model", out, "--output", tmp_path / "a.png", "--steps", 2, "--solver", "euler")
    run("sample", "--model", source, "--vae", vae, "--output", tmp_path / "b.png", "--steps", 2, "--solver", "euler")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert Image.open(tmp_path / "a.png").size == (64, 64)


def test_convert_keeps_or_changes_the_numbers_format(root, tmp_path):
    half = tmp_path / "half.safetensors"
    run("convert", root / "tests/data/published_checkpoint.pt", half, "--dtype", "float16")
    for key, value in load_file(half).items():  # a rounded A is another decay
        precise = key.rpartition(".")[2] in FLOAT32_PARAMETERS
        assert value.dtype == (torch.float32 if precise else torch.float16), key
    run("convert", half, tmp_path / "again.safetensors")  # loses nothing, gains nothing
    assert all(torch.equal(v, load_file(half)[k]) for k, v in load_file(tmp_path / "again.safetensors").items())


def test_weights_and_switches_reach_the_file(root, tmp_path):
    source = root / "tests/data/published_checkpoint.pt"
    run("convert", source, tmp_path / "m.safetensors", "--weights", "model", "--legacy-permutation")
    model = load_checkpoint(tmp_path / "m.safetensors")
    assert model.config.legacy_permutation
    assert torch.equal(model.norm_f.weight, load_checkpoint(source, weights="model").norm_f.weight)


def test_a_state_dict_and_a_published_yaml_make_a_model(tmp_path, capsys):
    model = ZigMa(ZigMaConfig(4, 16, 2, (4, 6), 2, scan_type="hilbertN8"))
    torch.save(model.state_dict(), tmp_path / "w.pt")
    said = failure(capsys, "convert", tmp_path / "w.pt", tmp_path / "o.safetensors")
    assert "do not tell scan_type and img_dim" in said and "--scan-type" in said
    run("convert", tmp_path / "w.pt", tmp_path / "o.safetensors", "--scan-type", "hilbertN8", "--img-dim", "4x6")
    assert load_checkpoint(tmp_path / "o.safetensors").config == model.config
    (tmp_path / "m.yaml").write_text(
        "params: {img_dim: [4, 6], in_channels: 4, patch_size: 2, embed_dim: 16, depth: 2, scan_type: hilbertN8}"
    )
    run("convert", tmp_path / "w.pt", tmp_path / "y.safetensors", "--config", tmp_path / "m.yaml")
    assert load_checkpoint(tmp_path / "y.safetensors").config == model.config


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["convert", "{pt}", "out.pt"], "expected a name that ends in .safetensors"),
        (["convert", "{tmp}/m.safetensors", "{tmp}/m.safetensors"], "is the input itself"),
        (["convert", "{tmp}/none.pt", "{tmp}/o.safetensors"], "no model file"),
        (["convert", "{tmp}/m.safetensors", "{tmp}/o.safetensors", "--scan-type", "v2"], "describes its model itself"),
        (["inspect", "{pt}", "--img-dim", "8x8x8"], "height x width"),
        (["inspect", "{pt}", "--config", "{pt}"], "is no YAML"),
        (["sample", "--model", "{pt}", "--output", "{tmp}/a.png"], "give one with --vae"),
        (["sample", "--model", "{video}", "--output", "{tmp}/a.png"], "ends in .webp, .mp4"),
        (["sample", "--model", "{text}", "--features", "{tmp}/f.npy", "--output", "{tmp}/a.png"], "f.npy"),
        (["sample", "--model", "{text}", "--prompt", "a", "--output", "{tmp}/a.png"], "--clip"),
        (["sample", "--fps", "5", "--output", "{tmp}/a.png"], "got --fps 5, but no video is written"),
        (["sample", "--model", "{video}", "--fps", "5", "--sheet", "--output", "{tmp}/a.png"], "no video is written"),
    ],
)
def test_mistakes_get_a_sentence(root, tmp_path, capsys, arguments, sentence):
    pt = root / "tests/data/published_checkpoint.pt"
    run("convert", pt, tmp_path / "m.safetensors")
    names = {"pt": pt, "tmp": tmp_path, "video": video_file(tmp_path), "text": text_file(tmp_path)}
    assert sentence in failure(capsys, *(argument.format(**names) for argument in arguments))


def video_file(folder, **fields):
    torch.manual_seed(0)
    config = ZigMaConfig(4, 16, 3, (4, 6), 2, scan_type="video_sst", video_frames=3, tpe=True, **fields)
    path = folder / "video.safetensors"
    save_checkpoint(ZigMa(config), path, autoencoder=TinyAutoencoder(4), latent=LatentFormat(4, scale=0.5))
    return path


def text_file(folder):
    torch.manual_seed(0)
    config = ZigMaConfig(4, 16, 2, (4, 4), has_text=True, d_context=16)
    path = folder / "text.safetensors"
    save_checkpoint(ZigMa(config), path, autoencoder=TinyAutoencoder(4))
    return path


@pytest.mark.parametrize("suffix", [".webp", ".mp4"])
def test_a_video_model_draws_videos(tmp_path, suffix):
    if suffix == ".mp4":
        av = pytest.importorskip("av", reason="av is not installed (pip install -e .[test])")
    out = tmp_path / f"clip{suffix}"
    run("sample", "--model", video_file(tmp_path), "--output", out, "--count", 2, "--steps", 2, "--fps", 5)
    assert [path.name for path in sorted(tmp_path.glob("clip*"))] == [f"clip-1{suffix}", f"clip-2{suffix}"]
    path = tmp_path / f"clip-1{suffix}"
    bundle = load_bundle(tmp_path / "video.safetensors")
    expected = sample(bundle, count=2, settings=SamplingSettings(steps=2))
    assert expected.shape == (2, 3, 3, 32, 48)
    levels = ((expected[0] + 1) * 127.5).round()
    if suffix == ".webp":
        picture = Image.open(path)
        assert picture.n_frames == 3
        for i in range(3):
            picture.seek(i)
            picture.load()
            assert picture.info["duration"] == 200
            frame = torch.tensor(list(picture.convert("RGB").tobytes())).view(32, 48, 3).permute(2, 0, 1)
            assert torch.equal(frame.float(), levels[i])
        return
    with av.open(str(path)) as video:
        assert video.streams.video[0].average_rate == 5
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in video.decode(video=0)]
    assert len(frames) == 3
    for frame, level in zip(frames, levels, strict=True):
        assert (frame.permute(2, 0, 1).float() - level).abs().mean() < 12  # chroma at half the resolution


def test_frames_of_a_video_fill_a_sheet(tmp_path):
    out = tmp_path / "sheet.png"
    run("sample", "--model", video_file(tmp_path), "--output", out, "--steps", 1, "--sheet")
    assert Image.open(out).width > 3 * 48


def test_frames_that_cannot_be_written_are_named(tmp_path, monkeypatch):
    frame = Image.new("RGB", (9, 7))
    with pytest.raises(ValueError, match="got 0 frames"):
        save_animation([], tmp_path / "a.webp")
    with pytest.raises(ValueError, match=r"a name that ends in \.webp, \.mp4"):
        save_animation([frame], tmp_path / "a.gif")
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install av, or write a \.webp"):
        save_animation([frame], tmp_path / "a.mp4")
    assert list(tmp_path.iterdir()) == []


def test_features_from_a_file_stand_in_for_prompts(tmp_path, capsys):
    model, features = text_file(tmp_path), torch.randn(2, 5, 16)
    save_file({"features": features}, tmp_path / "f.safetensors")
    run(
        "sample",
        "--model",
        model,
        "--features",
        tmp_path / "f.safetensors",
        "--output",
        tmp_path / "a.png",
        "--steps",
        1,
    )
    bundle = load_bundle(model)
    expected = sample(bundle, features, settings=SamplingSettings(steps=1))
    for i, image in enumerate(expected, 1):
        drawn = torch.tensor(list(Image.open(tmp_path / f"a-{i}.png").tobytes())).view(32, 32, 3).permute(2, 0, 1)
        assert torch.equal(drawn.float(), ((image + 1) * 127.5).round())
    with pytest.raises(ValueError, match="come without a null condition"):
        sample(bundle, features, settings=SamplingSettings(steps=1, guidance=2.0))
    with pytest.raises(ValueError, match=r"takes \(n, tokens, 16\)"):
        sample(bundle, features[..., :4])
