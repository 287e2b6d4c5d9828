"""From a folder of pictures to a file that needs nothing else, by the command that users run."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from zigma.assets import model_path
from zigma.checkpoint import load_bundle, read_checkpoint, save_checkpoint
from zigma.cli import main
from zigma.conditions import ConditionFacts
from zigma.config import ZigMaConfig
from zigma.latent_format import LatentFormat
from zigma.model import ZigMa
from zigma.sampling import SamplingSettings, sample
from zigma.text import TextEncoderConfig, WordTextEncoder
from zigma.training.adapters import load_adapters
from zigma.training.assemble import make_plan, make_trainer
from zigma.training.command import shipped_configurations
from zigma.training.outputs import averaged_bundle
from zigma.training.settings import read_settings, settings_from

COLOURS = ("red", "green", "blue", "black", "white", "orange", "purple", "yellow")
TINY = {"embed_dim": 32, "depth": 2, "patch_size": 2}


def pictures(folder: Path, captions: bool = True, count: int = 8) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in COLOURS[:count]:
        Image.new("RGB", (20, 16), name).save(folder / f"{name}.png")
        if captions:
            (folder / f"{name}.txt").write_text(f"a {name} square\n", encoding="utf-8")
    return folder


def tables(folder: Path, path: Path, /, **more: dict) -> dict:
    base = {
        "run": {"folder": str(folder), "steps": 4, "batch_size": 4, "precision": "fp32", "device": "cpu"},
        "data": {"path": str(path), "size": 16}, "model": {"config": TINY},
        "text": {"width": 16, "length": 4}, "samples": {"steps": 2, "every": 0},
    }  # fmt: skip
    return {name: {**base.get(name, {}), **more.get(name, {})} for name in {*base, *more}}


def trainer_of(folder: Path, path: Path, /, **more: dict):
    return make_trainer(make_plan(settings_from(tables(folder, path, **more))))


def write_config(path: Path, content: dict) -> Path:
    from zigma.training.settings import to_toml

    path.write_text(to_toml(settings_from(content)), encoding="utf-8")
    return path


def test_a_run_leaves_a_file_that_needs_nothing_else(tmp_path, capsys):
    data = pictures(tmp_path / "pictures")
    config = write_config(tmp_path / "a.toml", tables(tmp_path / "run", data, data={"validation": 0.2}))
    assert main(["train", str(config), "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "captions: 8 of 8" in out and "kept for validation: 2" in out and "steps in an epoch: 1.5 of 4" in out
    path = tmp_path / "run" / "model.safetensors"
    assert out.strip().endswith(str(path))
    bundle = load_bundle(path)
    assert bundle.latent.pixel_space and bundle.condition.has_null
    training = json.loads(bundle.metadata["zigma.training"])
    assert training["steps"] == 4 and training["settings"]["run"]["batch_size"] == 4
    assert training["settings"]["data"]["path"] == "pictures"
    assert str(tmp_path) not in json.dumps(bundle.metadata), "a file that is shared names somebody's folders"
    assert bundle.metadata["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")
    assert sample(bundle, ["a red square"]).shape == (1, 3, 16, 16)
    names = {entry.name for entry in (tmp_path / "run").iterdir()}
    assert {"settings.toml", "log.jsonl", "report.html", "samples", "checkpoints"} <= names
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") >= 2 and "http" not in page.replace("http-equiv", "")
    assert read_settings(tmp_path / "run" / "settings.toml") == read_settings(config)
    assert main(["train", str(config), "--quiet"]) == 0  # finished: nothing to train, the same file again
    assert main(["sample", "--model", str(path), "--prompt", "red", "--output", str(tmp_path / "o.png")]) == 0


def test_a_dry_run_says_all_and_does_nothing(tmp_path, capsys):
    data = pictures(tmp_path / "pictures")
    (data / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    config = write_config(tmp_path / "a.toml", tables(tmp_path / "run", data))
    assert main(["train", str(config), "--dry-run", "--quiet"]) == 0
    out = capsys.readouterr().out
    for words in ("broken.jpg", "of 4", "time: about", "memory: about", "M parameters", "learn"):
        assert words in out, words
    assert not (tmp_path / "run" / "checkpoints").exists() and not (tmp_path / "run" / "log.jsonl").exists()
    assert main(["train", str(config), "--set", "run.batch_size=40", "--dry-run", "--quiet"]) == 0
    assert "batch of 40 is larger than the 8 samples" in capsys.readouterr().out
    assert main(["train", str(config), "--set", "run.batch_size=40", "--quiet"]) == 2
    assert "set batch_size to at most 8" in capsys.readouterr().err


def test_measuring_a_step_changes_nothing(tmp_path):
    from zigma.training.command import measured_step

    data = pictures(tmp_path / "pictures")
    one, two = (trainer_of(tmp_path / name, data) for name in ("one", "two"))
    measured_step(two)
    for trainer in (one, two):
        trainer.resume()
    assert [one.train_step() for _ in range(3)] == [two.train_step() for _ in range(3)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["data.path=nowhere"], "nowhere"),
        (["run.device=cuda"], "cannot be used here"),
        (["data.size=15"], "multiples of 2 pixels"),
        (["run.stepz=1"], "did you mean 'steps'"),
        (["model.start_from=nothing.safetensors"], "nothing.safetensors"),
        (["model.freeze=['blocks.9.*']"], "'blocks.9.*', which fits no parameter"),
        (["model.config={embed_dim=32, depht=2}"], "lacks depth"),
        (["run.tensorboard"], "expected TABLE.KEY=VALUE"),
    ],
)
def test_a_mistake_ends_with_one_sentence(tmp_path, capsys, changes, words):
    config = write_config(tmp_path / "a.toml", tables(tmp_path / "run", pictures(tmp_path / "pictures")))
    options = [part for change in changes for part in ("--set", change)]
    if torch.cuda.is_available() and "run.device=cuda" in changes:
        pytest.skip("there is a CUDA device here")
    assert main(["train", str(config), "--quiet", *options]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and "Traceback" not in error


def test_a_folder_in_use_is_refused(tmp_path, capsys):
    from zigma.training.run_folder import RunFolder

    config = write_config(tmp_path / "a.toml", tables(tmp_path / "run", pictures(tmp_path / "pictures")))
    with RunFolder(tmp_path / "run").locked():
        assert main(["train", str(config), "--quiet"]) == 2
    assert "is in use by" in capsys.readouterr().err


def test_the_configurations_that_are_shipped_can_be_read(capsys):
    assert main(["train", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("demo", "released", "style_lora"))
    for path in shipped_configurations().values():
        settings = read_settings(path)
        assert settings.run.folder.startswith("runs/") and "#" in path.read_text(encoding="utf-8")


def test_interrupting_saves_and_the_same_command_goes_on(tmp_path):
    data = pictures(tmp_path / "pictures")
    settings = tables(tmp_path / "run", data, run={"steps": 100000, "save_every": 0.0})
    config = write_config(tmp_path / "a.toml", settings)
    command = [sys.executable, "-m", "zigma", "train", str(config), "--quiet"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        log, deadline = tmp_path / "run" / "log.jsonl", time.monotonic() + 120
        while not log.is_file() and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        out, errors = run.communicate(timeout=120)
    assert run.returncode == 130, errors
    assert "with a checkpoint: the same command goes on from there" in out and "Traceback" not in errors
    trainer = trainer_of(tmp_path / "run", data, run={"steps": 100000, "save_every": 0.0})
    assert trainer.resume() and f"stopped at step {trainer.step}," in out


# What is trained


def base_model(tmp_path: Path, **fields) -> Path:
    """A small text model of 16 x 16 pixels, as a file."""
    torch.manual_seed(1)
    config = ZigMaConfig(in_channels=3, img_dim=16, use_pe=2, has_text=True, d_context=16, **TINY, **fields)
    model = ZigMa(config)
    with torch.no_grad():
        for block in model.blocks:
            torch.nn.init.normal_(block.adaLN_modulation[-1].weight, std=0.2)
    encoder = WordTextEncoder(TextEncoderConfig(("a", "red", "square"), length=4, width=16))
    save_checkpoint(
        model, tmp_path / "base.safetensors", text_encoder=encoder, latent=LatentFormat(3, downscale=1),
        condition=ConditionFacts(null=False),
    )  # fmt: skip
    return tmp_path / "base.safetensors"


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_an_adapters_file_draws_what_the_run_drew(tmp_path, kind):
    base = base_model(tmp_path)
    data = pictures(tmp_path / "pictures", count=3)
    more = {"model": {"start_from": str(base), "config": {}}, "adapter": {"kind": kind, "rank": 2},
            "optimizer": {"lr": 0.05}, "run": {"batch_size": 2}}  # fmt: skip
    trainer = trainer_of(tmp_path / "run", data, **more)
    before = {key: value.clone() for key, value in trainer.net.model.state_dict().items()}
    trainer.resume()
    losses = [trainer.train_step() for _ in range(4)]
    assert all(torch.equal(value, before[key]) for key, value in trainer.net.model.state_dict().items())
    from zigma.training.outputs import export

    path = export(trainer)
    drawn = {"prompts": ["red square"], "seed": 1, "settings": SamplingSettings(5, "euler", 2.0)}
    with averaged_bundle(trainer) as bundle:
        expected = sample(bundle, **drawn)
    plain = load_bundle(base)
    without = sample(plain, **drawn)
    load_adapters(plain.model, path)
    torch.testing.assert_close(sample(plain, **drawn), expected, atol=1e-3, rtol=0)
    assert (expected - without).abs().max() > 1e-2
    trainer.save()
    again = trainer_of(tmp_path / "run", data, **more)
    again.resume()
    assert len(losses) == 4 and again.train_step() == trainer.train_step()


def test_a_full_fine_tune_learns_new_words_and_gains_a_null(tmp_path):
    base = base_model(tmp_path)
    more = {"model": {"start_from": str(base), "config": {}}, "data": {"size": 0}}
    trainer = trainer_of(tmp_path / "run", pictures(tmp_path / "pictures"), **more)
    encoder, old = trainer.net.text_encoder, read_checkpoint(base)
    assert encoder.config.vocabulary[:3] == ("a", "red", "square") and "purple" in encoder.ids
    assert torch.equal(encoder.words.weight[:4], old.text_state["words.weight"])
    assert trainer.subject.condition.null is True and old.condition.null is False
    keys = trainer.net.model.state_dict()
    assert all(torch.equal(keys[key], value) for key, value in old.state_dict.items())
    more["model"]["train"] = ["*norm*", "final*"]
    frozen = trainer_of(tmp_path / "frozen", tmp_path / "pictures", **more)
    learning = {name for name, _ in frozen.learning() if name.startswith("model.")}
    assert learning and all("norm" in name or "final" in name for name in learning)


def test_classes_get_a_row_for_none_and_keep_their_names(tmp_path):
    data = tmp_path / "classes"
    for name in ("cat", "dog"):
        pictures(data / name, captions=False, count=3)
    trainer = trainer_of(tmp_path / "run", data, run={"batch_size": 2})
    assert trainer.subject.kind == "labels" and trainer.subject.condition == ConditionFacts(2, ("cat", "dog", "(none)"))
    trainer.resume()
    trainer.train_step()
    from zigma.training.outputs import export

    path = export(trainer)
    assert sample(load_bundle(path), ["dog", "cat"]).shape == (2, 3, 16, 16)
    torch.manual_seed(0)
    published = ZigMa(ZigMaConfig(in_channels=3, img_dim=16, num_classes=2, **TINY))
    save_checkpoint(published, tmp_path / "c.safetensors", latent=LatentFormat(3, downscale=1),
                    condition=ConditionFacts(None, ("dog", "cat")))  # fmt: skip
    tuned = trainer_of(tmp_path / "two", data, model={"start_from": str(tmp_path / "c.safetensors"), "config": {}})
    assert tuned.net.model.config.num_classes == 3 and tuned.subject.condition.null == 2
    assert tuned.conditions.labels == [1, 1, 1, 0, 0, 0]  # by name, not by place
    (data / "fox").mkdir()
    pictures(data / "fox", captions=False, count=2)
    with pytest.raises(ValueError, match=r"the classes fox, but .* knows dog, cat"):
        trainer_of(tmp_path / "three", data, model={"start_from": str(tmp_path / "c.safetensors"), "config": {}})


def test_aspect_ratios_keep_to_their_buckets(tmp_path):
    data = pictures(tmp_path / "pictures")
    for number in range(4):
        Image.new("RGB", (40, 20), (40 * number, 0, 0)).save(data / f"wide-{number}.png")
    trainer = trainer_of(tmp_path / "run", data, data={"buckets": True, "bucket_step": 4, "flips": True})
    shapes = {tuple(variants[0].shape) for variants in trainer.examples.latents}
    assert len(shapes) > 1 and all(len(variants) == 2 for variants in trainer.examples.latents)
    trainer.resume()
    seen = {tuple(trainer.next_batch()[1].shape[1:]) for _ in range(12)}
    assert seen == shapes
    trainer.train_step()


def test_video_clips_train_a_video_model(tmp_path):
    for clip in ("a", "b", "c"):
        folder = tmp_path / "clips" / clip
        folder.mkdir(parents=True)
        for frame in range(3):
            Image.new("RGB", (16, 16), (80 * frame, 0, 0)).save(folder / f"{frame}.png")
    trainer = trainer_of(
        tmp_path / "run", tmp_path / "clips", run={"batch_size": 2}, text={"encoder": "none"}, data={"kind": "frames"}
    )
    assert trainer.net.model.config.video_frames == 3 and trainer.examples.latents[0][0].shape == (3, 3, 16, 16)
    trainer.resume()
    trainer.train_step()
    from zigma.training.outputs import save_sheet

    assert save_sheet(trainer).is_file()


@pytest.mark.parametrize(("path", "prediction"), [("gvp", "noise"), ("vp", "score"), ("gvp", "velocity")])
def test_a_model_of_another_path_draws_the_data_it_learned(tmp_path, path, prediction):
    """One picture, learned by heart, is what comes out, whatever path and prediction it was learned by."""
    data = tmp_path / "one"
    data.mkdir()
    weighting = "none" if prediction == "velocity" else "min-snr"
    for name in ("a", "b"):
        Image.new("RGB", (4, 4), (230, 40, 40)).save(data / f"{name}.png")
    trainer = trainer_of(
        tmp_path / "run", data, flow={"path": path, "prediction": prediction, "weighting": weighting},
        text={"encoder": "none"}, data={"size": 4}, run={"steps": 700, "batch_size": 2, "ema": 0.9},
        optimizer={"lr": 5e-3}, samples={"steps": 20},
    )  # fmt: skip
    trainer.resume()
    for _ in range(700):
        trainer.train_step()
    with averaged_bundle(trainer) as bundle:
        assert json.loads(bundle.metadata["zigma.flow"]) == {"path": path, "prediction": prediction}
        picture = sample(bundle)
    from zigma.training.outputs import export

    tuned = {"start_from": str(export(trainer)), "config": {}}
    with pytest.raises(ValueError, match=rf"on the {path} path to predict {prediction}, but \[flow\] asks for linear"):
        trainer_of(tmp_path / "tuned", data, model=tuned, text={"encoder": "none"}, run={"batch_size": 2})
    expected = torch.tensor([230.0, 40.0, 40.0])[:, None, None] / 127.5 - 1
    assert (picture - expected).abs().mean() < 0.25  # noise, or a picture of another path, is off by 0.7


def test_the_demo_model_takes_a_lora(tmp_path):
    data = pictures(tmp_path / "pictures", count=2)
    settings = read_settings(
        shipped_configurations()["style_lora"],
        {"data.path": str(data), "run.folder": str(tmp_path / "run"), "run.batch_size": "2", "run.precision": "fp32"},
    )
    plan = make_plan(settings)
    assert plan.downscale == 8 and plan.base.path == model_path("demo")
    trainer = make_trainer(plan)
    trainer.resume()
    first = trainer.train_step()
    assert first < 20 and dataclasses.asdict(settings)["adapter"]["rank"] == 16
    assert sum(p.numel() for _, p in trainer.learning()) < 1_000_000


def test_eight_pictures_are_learned_by_heart(tmp_path):
    """Retrieval of 8 of 8 within a bounded number of steps: each caption draws the picture nearest to its own."""
    trainer = trainer_of(
        tmp_path / "run", pictures(tmp_path / "pictures"), run={"steps": 400, "batch_size": 8, "ema": 0.95},
        optimizer={"name": "muon", "lr": 3e-3, "muon_lr": 1e-2}, text={"dropout": 0.0}, samples={"steps": 10},
        data={"size": 8},
    )  # fmt: skip
    trainer.resume()
    trainer.run()
    captions = [trainer.conditions.texts(i)[0] for i in range(8)]
    with averaged_bundle(trainer) as bundle:
        drawn = sample(bundle, captions, batch_size=8).flatten(1)
    own = torch.stack([variants[0] for variants in trainer.examples.latents]).flatten(1)
    assert torch.cdist(drawn, own).argmin(1).tolist() == list(range(8))


def test_a_sheet_that_fails_costs_nothing(tmp_path, caplog):
    data, folder = pictures(tmp_path / "pictures"), tmp_path / "run"
    config = write_config(tmp_path / "a.toml", tables(folder, data, samples={"every": 1e-6}))
    folder.mkdir()
    (folder / "samples").write_text("in the way")
    assert main(["train", str(config), "--quiet"]) == 2  # the last sheet, when all is learnt and written
    assert "no pictures at step 1, the run goes on" in caplog.text
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())][-1] == "0000004"


def test_a_name_that_is_no_utf_8_is_a_name(tmp_path):
    data = pictures(tmp_path / "pictures", count=3)
    try:
        os.rename(next(data.glob("*.png")), os.fsencode(data) + b"/caf\xe9.png")
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    config = write_config(tmp_path / "a.toml", tables(tmp_path / "run", data, run={"batch_size": 2}))
    assert main(["train", str(config), "--quiet"]) == 0


def test_a_report_that_a_console_cannot_write_ends_no_run(tmp_path):
    data = pictures(tmp_path / "pictures", count=3)
    (data / "日本.jpg").write_bytes(b"no picture")
    config = write_config(tmp_path / "a.toml", tables(tmp_path / "run", data))
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(
        [sys.executable, "-m", "zigma", "train", str(config), "--dry-run", "--quiet"], capture_output=True, text=True,
        env=environment, cwd=Path(__file__).resolve().parents[2], check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "\\u65e5\\u672c.jpg" in done.stdout, done.stderr
