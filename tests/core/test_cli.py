"""The command line and `sample`, on a tiny random model that carries all its parts."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from zigma.assets import model_path
from zigma.autoencoder import TinyAutoencoder
from zigma.checkpoint import LatentFormat, load_bundle, save_checkpoint
from zigma.cli import DEMO_PROMPTS, main
from zigma.config import ZigMaConfig
from zigma.guidance import classifier_free
from zigma.model import ZigMa
from zigma.sampling import SamplingSettings, sample
from zigma.solvers import solve_ode
from zigma.text import TextEncoderConfig, WordTextEncoder

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"steps": 3, "solver": "heun", "guidance": 2.0}


def randomised(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every parameter drawn anew: at its initial zeros a model would not look at its condition."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
    return module.eval()


def write_model(path: Path, **config) -> Path:
    fields = {"in_channels": 4, "embed_dim": 32, "depth": 2, "img_dim": (4, 6), "patch_size": 2, **config}
    config = ZigMaConfig(**fields)
    text = None
    if config.has_text:
        vocabulary = ["red", "green", "apple", "fox"]
        text = randomised(WordTextEncoder(TextEncoderConfig(vocabulary=vocabulary, length=6, width=16)), 1)
    latent = LatentFormat(channels=4, downscale=8, scale=0.5, shift=0.25)
    autoencoder = TinyAutoencoder(4).eval()
    save_checkpoint(
        randomised(ZigMa(config), 0), path, {"zigma.sampling": json.dumps(SETTINGS)},
        text_encoder=text, autoencoder=autoencoder, latent=latent,
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def model_file(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny.safetensors", has_text=True, d_context=16)


@pytest.fixture(scope="module")
def class_file(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "classes.safetensors", num_classes=3)


def pixels(path: Path) -> torch.Tensor:
    picture = Image.open(path)
    return torch.tensor(list(picture.tobytes())).view(picture.height, picture.width, 3)


def failure(capsys, *arguments) -> str:
    """The one sentence that a command ends with."""
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse leaves this way
        status = stop.code
    printed = capsys.readouterr()
    assert status == 2 and not printed.out
    assert len(printed.err.strip().splitlines()) == 1 and "Traceback" not in printed.err
    return printed.err


# What sampling computes


def test_sample_is_its_definition(model_file):
    """Noise, guided velocity, Heun's method, the latent format and the decoder, written out once more."""
    bundle = load_bundle(model_file)
    got = sample(bundle, ["red apple"], count=2, seed=5)
    noise = torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        condition, null = bundle.text_encoder.encode(["red apple", "red apple"]), bundle.text_encoder.encode([""])
        velocity = classifier_free(bundle.model, condition, null, 2.0)
        x = solve_ode(velocity, noise, steps=3, method="heun")
        expected = bundle.autoencoder.decode(x / 0.5 + 0.25)
    assert got.shape == (2, 3, 32, 48)
    torch.testing.assert_close(got, expected)


def test_a_picture_does_not_depend_on_its_company(model_file):
    """Batch = single, in any order, whatever the size of the batches."""
    bundle = load_bundle(model_file)
    together = sample(bundle, ["red apple", "fox", ""], count=2, batch_size=4)
    for position, prompt in enumerate(["red apple", "fox", ""]):
        alone = sample(bundle, [prompt], count=2, batch_size=1)
        torch.testing.assert_close(together[2 * position : 2 * position + 2], alone, atol=1e-5, rtol=0)
    assert not torch.allclose(together[0], together[2], atol=1e-3), "two prompts, one picture"
    assert not torch.allclose(together[0], together[1], atol=1e-3), "two noises, one picture"


@pytest.mark.parametrize("solver, steps, calls", [("euler", 4, [(0, 8), (1, 8), (4, 8), (8, 8)]), ("dopri5", 1, None)])
def test_progress_reaches_its_total(model_file, solver, steps, calls):
    seen = []
    settings = SamplingSettings(steps=steps, solver=solver)
    sample(load_bundle(model_file), ["fox"] * 3, settings=settings, batch_size=2, progress=lambda *n: seen.append(n))
    done = [n for n, _ in seen]
    assert done == sorted(done) and seen[-1][0] == seen[-1][1]
    assert calls is None or set(calls) <= set(seen)


def test_settings_come_from_the_file(model_file):
    bundle = load_bundle(model_file)
    assert SamplingSettings.from_metadata(bundle.metadata) == SamplingSettings(**SETTINGS)
    assert SamplingSettings.from_metadata({}) == SamplingSettings()
    torch.testing.assert_close(
        sample(bundle, ["fox"]), sample(bundle, ["fox"], settings=SamplingSettings(**SETTINGS)), atol=0, rtol=0
    )


# Commands


def test_sample_writes_what_it_says(model_file, tmp_path, capsys):
    output = tmp_path / "new" / "fox.png"
    assert main(["sample", "--model", str(model_file), "--prompt", "fox", "--output", str(output)]) == 0
    assert capsys.readouterr().out.split() == [str(output)]
    expected = sample(load_bundle(model_file), ["fox"])[0]
    difference = pixels(output).permute(2, 0, 1) / 127.5 - 1 - expected
    assert difference.abs().max() <= 0.5 / 127.5 + 1e-5

    main(["sample", "--model", str(model_file), "--prompt", "fox", "--output", str(output), "--upscale", "3"])
    assert pixels(output).shape == (96, 144, 3)


def test_options_reach_the_sampler(model_file, tmp_path):
    output = tmp_path / "fox.png"
    given = ["--seed", "3", "--steps", "2", "--solver", "euler", "--cfg", "1.5", "--negative", "red"]
    assert main(["sample", "--model", str(model_file), "--prompt", "fox", "--output", str(output), *given]) == 0
    settings = SamplingSettings(steps=2, solver="euler", guidance=1.5)
    expected = sample(load_bundle(model_file), ["fox"], seed=3, settings=settings, negative="red")[0]
    assert (pixels(output).permute(2, 0, 1) / 127.5 - 1 - expected).abs().max() <= 0.5 / 127.5 + 1e-5


def test_several_pictures_are_numbered(model_file, tmp_path, capsys):
    prompts = ["--prompt", "fox", "--prompt", "red apple"]
    main(["sample", "--model", str(model_file), *prompts, "--count", "5", "--output", str(tmp_path / "p.png")])
    names = [f"p-{number:02d}.png" for number in range(1, 11)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert [Path(line).name for line in capsys.readouterr().out.split()] == names


def test_a_sheet_holds_every_picture(model_file, tmp_path):
    output = tmp_path / "sheet.png"
    arguments = ["--prompt", "fox", "--prompt", "", "--count", "3", "--sheet", "--output", str(output)]
    assert main(["sample", "--model", str(model_file), *arguments]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
    height, width, _ = pixels(output).shape
    assert height > 2 * 32 and width > 3 * 48


def test_a_class_model_takes_labels(class_file, tmp_path, capsys):
    arguments = ["sample", "--model", class_file, "--output", tmp_path / "p.png", "--cfg", "1"]
    assert main([str(a) for a in arguments] + ["--label", "2", "--label", "0"]) == 0
    assert len(capsys.readouterr().out.split()) == 2
    assert "expected numbers from 0 to 2" in failure(capsys, *arguments, "--label", "3")
    assert "takes a label from 0 to 2" in failure(capsys, *arguments)


def test_inspect_tells_what_the_file_holds(model_file, capsys):
    assert main(["inspect", str(model_file)]) == 0
    out = capsys.readouterr().out
    denoiser = sum(parameter.numel() for parameter in load_bundle(model_file).model.parameters())
    for fact in (f"{denoiser:,} parameters", "float32", "zigzagN8", "4 x 4 x 6, 2 x 3 tokens", "width 16", "1/8"):
        assert fact in out, fact
    assert "heun" in out and "apple" in out, "metadata are missing"


def test_scan_order_prints_the_step_of_each_token(capsys):
    assert main(["scan-order", "zigzag", "--index", "1", "--height", "2", "--width", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[1:3]] == [["0", "3", "4"], ["1", "2", "5"]]
    assert lines[3:] == ["order: 0 3 4 1 2 5", "jumps: 0", "continuity: 1.00"]


def test_scan_order_draws(tmp_path, capsys):
    assert main(["scan-order", "hilbert", "--png", str(tmp_path / "all.png")]) == 0
    assert main(["scan-order", "hilbert", "--index", "1", "--png", str(tmp_path / "one.png")]) == 0
    assert Image.open(tmp_path / "all.png").width > 2 * Image.open(tmp_path / "one.png").width


def test_scan_order_draws_over_a_picture_and_prints_its_measures(tmp_path, capsys):
    under, out = tmp_path / "under.png", tmp_path / "out.png"
    Image.new("RGB", (96, 64), (10, 90, 40)).save(under)
    size = ["--height", "4", "--width", "6"]
    assert main(["scan-order", "sweep", "--index", "0", *size, "--over", str(under), "--png", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["order", "jumps", "continuity", "longest", "step", "neighbours"]
    assert lines[2].split() == ["sweep", "0", "3", "0.87", "6", "3.4", "apart"]
    drawn = Image.open(out)
    assert drawn.size == (96, 64) and drawn.getpixel((16, 0)) == (10, 90, 40) != drawn.getpixel((24, 8))
    assert "say with --png" in failure(capsys, "scan-order", "sweep", "--over", under)
    turned = Image.new("RGBA", (64, 96), (200, 0, 0, 0))  # a telephone's picture, lying, of nothing but transparency
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(under, exif=exif)
    assert main(["scan-order", "sweep", "--index", "0", *size, "--over", str(under), "--png", str(out)]) == 0
    drawn = Image.open(out)
    assert drawn.size == (96, 64) and drawn.getpixel((16, 0)) == (255, 255, 255) and capsys.readouterr().out
    under.write_text("no picture")
    assert "cannot be read" in failure(capsys, "scan-order", "sweep", "--over", under, "--png", out)


def test_doctor_names_versions_and_backends(capsys):
    from zigma.selective_scan import explain_backends

    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"torch {torch.__version__}" in out
    assert all(f"  {name}: {state}" in out for name, state in explain_backends().items())


def test_demo_draws_a_sheet_with_the_shipped_model(model_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("zigma.assets.available_models", lambda: {"demo": model_file})
    output = tmp_path / "output" / "demo.png"
    assert main(["demo", "--prompt", "fox", "--output", str(output)]) == 0
    assert "6 pictures in" in (said := capsys.readouterr().out) and str(output) in said
    assert Image.open(output).width > 3 * 2 * 48


def test_the_demo_asks_only_for_what_its_model_knows():
    bundle = load_bundle(model_path("demo"))
    unknown = {prompt: bundle.text_encoder.unknown_words(prompt) for prompt in DEMO_PROMPTS}
    assert not any(unknown.values()), unknown
    assert len(set(DEMO_PROMPTS)) == len(DEMO_PROMPTS)


# Mistakes


@pytest.mark.parametrize(
    "extra, sentence",
    [
        (["--solver", "magic"], "got the solver 'magic', but expected one of euler"),
        (["--steps", "0"], "got '0', but expected a whole number from 1"),
        (["--steps", "-3"], "got '-3', but expected a whole number from 1"),
        (["--count", "x"], "got 'x', but expected a whole number from 1"),
        (["--steps", "4", "--solver", "dopri5"], "leave --steps out"),
        (["--device", "tpu9"], "device 'tpu9' cannot be used here"),
        (["--label", "1"], "not allowed with argument"),
        (["--output", "p.docx"], "expected a name that ends in .png"),
        (["--speed", "3"], "unrecognized arguments: --speed 3"),
    ],
)
def test_a_wrong_option_gets_a_sentence(model_file, tmp_path, capsys, extra, sentence):
    arguments = ["sample", "--model", model_file, "--prompt", "fox", "--output", tmp_path / "p.png", *extra]
    assert sentence in failure(capsys, *arguments)
    assert not list(tmp_path.iterdir())


def test_a_wrong_file_gets_a_sentence(model_file, tmp_path, capsys):
    output = tmp_path / "p.png"
    assert "no model file nowhere.safetensors" in failure(
        capsys, "sample", "--model", "nowhere.safetensors", "--prompt", "a", "--output", output
    )
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(model_file.read_bytes()[:5000])
    for command in (["sample", "--prompt", "a", "--output", output, "--model"], ["inspect"]):
        assert str(cut) in failure(capsys, *command, cut)


def test_an_output_that_cannot_be_written_is_found_before_the_work(model_file, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for output in (tmp_path / "file" / "p.png", tmp_path / "folder.png"):
        message = failure(capsys, "sample", "--model", model_file, "--prompt", "fox", "--output", output)
        assert str(output.parent if "file" in output.parts else output) in message
        assert "sampling" not in message


def test_a_text_model_without_prompts_is_refused(model_file, tmp_path, capsys):
    message = failure(capsys, "sample", "--model", model_file, "--output", tmp_path / "p.png")
    assert "takes a text for each picture" in message


def test_an_unknown_order_lists_the_known_ones(capsys):
    message = failure(capsys, "scan-order", "spiral")
    assert "'spiral'" in message and "zigzag" in message


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="unknown token order"):
        main(["scan-order", "spiral", "--debug"])


def test_the_module_runs_and_answers_before_torch_is_there():
    """--help does not wait for torch, and an unread pipe is no error."""
    command = [sys.executable, "-X", "importtime", "-m", "zigma", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and re.search(r"^ +sample ", done.stdout, re.MULTILINE)
    # zigma/__init__ may bring torch; what the commands need beyond it may not be there yet.
    assert not {"PIL.Image", "tqdm"} & {line.split()[-1] for line in done.stderr.splitlines()}

    command = [sys.executable, "-m", "zigma", "scan-order", "zigzag", "--height", "64", "--width", "64"]
    reader = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    reader.stdout.readline()
    reader.stdout.close()
    assert reader.wait(60) == 141 and reader.stderr.read() == b""
    reader.stderr.close()
