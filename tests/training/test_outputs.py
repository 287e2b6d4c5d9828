"""What follows a run, and runs whose parts come from other packages."""

from __future__ import annotations

import base64
import io
import json
import sys

import pytest
import torch
from PIL import Image
from test_command import TINY, pictures, tables, trainer_of, write_config
from tiny_clip import write_tiny_clip
from tiny_run import numbers, tiny_settings, tiny_trainer

from zigma.checkpoint import load_bundle, read_checkpoint, save_checkpoint
from zigma.cli import main
from zigma.latent_format import LatentFormat
from zigma.model import ZigMa
from zigma.sampling import sample
from zigma.training.latent_cache import LatentCache
from zigma.training.outputs import export, save_sheet
from zigma.training.report import loss_plot
from zigma.training.run_folder import RunFolder
from zigma.training.trackers import Trackers


def test_tensorboard_gets_losses_and_sheets(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    data = pictures(tmp_path / "pictures")
    run = {"steps": 4, "tensorboard": True, "validate_every": 2}
    config = write_config(tmp_path / "a.toml", tables(tmp_path / "run", data, run=run, data={"validation": 0.2}))
    assert main(["train", str(config), "--quiet"]) == 0
    events = reader.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    logged = {entry["step"]: entry["loss"] for entry in RunFolder(tmp_path / "run").log_entries() if "loss" in entry}
    assert {event.step: event.value for event in events.Scalars("loss")} == pytest.approx(logged, rel=1e-5)
    assert [event.step for event in events.Scalars("validation_loss")] == [2, 4]
    assert [event.step for event in events.Images("samples")] == [4]


def test_wandb_gets_losses_and_sheets_and_one_run_for_one_folder(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    data = pictures(tmp_path / "pictures")
    for steps in (4, 8):
        run = {"steps": steps, "wandb": True, "validate_every": 2}
        made = tables(tmp_path / "run", data, run=run, data={"validation": 0.2})
        assert main(["train", str(write_config(tmp_path / "a.toml", made)), "--quiet"]) == 0
    records = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(records) == 2 and len({path.name for path in records}) == 1, records
    for path in records:
        written = path.read_bytes()
        assert b"validation_loss" in written and b"samples" in written
        assert list(path.parent.glob("files/media/images/samples_*.png"))


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_tracker_whose_package_is_missing_names_the_remedy(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=f"pip install {name}, or set it to false"):
        Trackers(RunFolder(tmp_path), tiny_settings(tmp_path, run={name: True}).run, {}, progress=False)


def test_losses_are_drawn(tmp_path):
    entries = [{"step": i, "loss": 1 / i} for i in range(1, 50)] + [{"step": 40, "validation_loss": 0.3}]
    picture = loss_plot(entries, (400, 300))
    assert picture.size == (400, 300) and len(picture.getcolors(400 * 300)) > 20
    with pytest.raises(ValueError, match="no losses yet"):
        loss_plot([])


def test_a_finished_file_shows_a_sample(tmp_path):
    trainer = trainer_of(tmp_path / "run", pictures(tmp_path / "pictures"), text={"trigger": "zz"})
    trainer.resume()
    trainer.train_step()
    sheet = save_sheet(trainer)
    bundle = load_bundle(export(trainer, sheet))
    _, _, data = bundle.metadata["modelspec.thumbnail"].partition(";base64,")
    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        assert picture.format == "JPEG" and max(picture.size) <= 256
    assert bundle.metadata["modelspec.trigger_phrase"] == "zz" and "zz" in bundle.text_encoder.ids


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_a_finished_file_has_the_dtype_that_was_asked_for_and_a_and_d_keep_float32(tmp_path, dtype):
    data = pictures(tmp_path / "pictures")
    trainer = trainer_of(tmp_path / "run", data, run={"output_dtype": dtype})
    trainer.resume()
    trainer.train_step()
    state = read_checkpoint(export(trainer)).state_dict
    wanted = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    for key, value in state.items():
        precise = key.rpartition(".")[2] in ("A_log", "D")
        assert value.dtype == (torch.float32 if precise else wanted), key


def test_a_compiled_model_trains_the_same(tmp_path):
    if sys.platform == "win32":
        pytest.skip("torch.compile needs a C++ compiler on Windows")
    plain, compiled = (
        tiny_trainer(tmp_path / name, run={"compile": name == "compiled"}, model={"config": TINY})
        for name in ("plain", "compiled")
    )
    for trainer in (plain, compiled):
        trainer.resume()
    try:
        losses = [compiled.train_step() for _ in range(3)]
    except Exception as error:  # of torch's own: no compiler here
        if "compiler" in str(error).lower():
            pytest.skip(f"torch.compile cannot run here: {str(error).splitlines()[0]}")
        raise
    assert losses == pytest.approx([plain.train_step() for _ in range(3)], rel=1e-4)
    compiled.save()
    again = tiny_trainer(tmp_path / "compiled", model={"config": TINY})  # a compiled run goes on without compiling
    again.resume()
    assert all(torch.equal(value, numbers(compiled)[key]) for key, value in numbers(again).items())


def test_a_released_text_model_is_tuned_on_the_features_of_its_clip(tmp_path, monkeypatch):
    """Weights without an encoder, as released: captions go through CLIP, once; guidance works afterwards."""
    clip = tmp_path / "clip"
    clip.mkdir()
    write_tiny_clip(clip)
    from zigma.config import ZigMaConfig

    torch.manual_seed(0)
    model = ZigMa(ZigMaConfig(in_channels=3, img_dim=16, has_text=True, d_context=16, n_context_token=77, **TINY))
    save_checkpoint(model, tmp_path / "released.safetensors", latent=LatentFormat(3, downscale=1))
    data = pictures(tmp_path / "pictures")
    more = {"model": {"start_from": str(tmp_path / "released.safetensors"), "config": {}},
            "text": {"clip": str(clip), "dropout": 0.2}}  # fmt: skip
    trainer = trainer_of(tmp_path / "run", data, **more)
    assert trainer.subject.kind == "clip" and trainer.subject.condition.null is True
    assert trainer.conditions.fixed(0).shape == (1, 77, 16)
    trainer.resume()
    trainer.train_step()
    assert save_sheet(trainer).is_file()
    with monkeypatch.context() as patched:
        patched.setattr(LatentCache, "put", lambda *_: pytest.fail("a caption was encoded again"))
        trainer_of(tmp_path / "run", data, **more)
    bundle = load_bundle(export(trainer))
    assert bundle.text_encoder is None and bundle.condition.has_null
    bundle.text_encoder = trainer.clip
    assert sample(bundle, ["a b"]).shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match="features of width 16, but the model takes 8"):
        wide = ZigMa(ZigMaConfig(in_channels=3, img_dim=16, has_text=True, d_context=8, **TINY))
        save_checkpoint(wide, tmp_path / "other.safetensors", latent=LatentFormat(3, downscale=1))
        more["model"]["start_from"] = str(tmp_path / "other.safetensors")
        trainer_of(tmp_path / "other", data, **more)


def test_latents_of_an_autoencoder_are_normalised_and_said_so(tmp_path):
    from zigma.autoencoder import TinyAutoencoder

    torch.manual_seed(0)
    autoencoder = TinyAutoencoder(5).eval()
    from safetensors.torch import save_file

    save_file(autoencoder.state_dict(), tmp_path / "vae.safetensors")
    generator = torch.Generator().manual_seed(0)
    data = tmp_path / "pictures"
    data.mkdir()
    for i in range(6):
        noise = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(noise).save(data / f"{i}.png")
    trainer = trainer_of(
        tmp_path / "run", data, data={"size": 32, "autoencoder": str(tmp_path / "vae.safetensors")},
        text={"encoder": "none"},
    )  # fmt: skip
    latents = torch.stack([variants[0] for variants in trainer.examples.latents])
    format = trainer.examples.format
    assert latents.shape == (6, 5, 4, 4) and format.downscale == 8 and len(format.rgb_factors) == 5
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(5), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3), correction=0), torch.ones(5), atol=1e-3, rtol=0)
    stated = json.loads(load_bundle(export(trainer)).metadata["zigma.data"])
    assert stated == {"pictures": 6, "kind": "captions"}
