"""Training: a resumed run equals a straight one, the average is what it says, and the finished file stands alone."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from PIL import Image

from zigma.autoencoder import TinyAutoencoder
from zigma.checkpoint import load_bundle, read_checkpoint
from zigma.cli import main
from zigma.sampling import sample
from zigma.training.data import encode_pictures, read_pictures, vocabulary_of
from zigma.training.emoji import PackedPictures, write_packed
from zigma.training.old_trainer import Captions, Trainer
from zigma.training.recipe import Recipe

TINY = Recipe(
    embed_dim=16, depth=2, text_width=16, text_length=4, steps=8, batch_size=4, warmup=0.1, bf16=False, sample_steps=2,
    patch_size=2, ema_decay=0.5, lr=1e-2,
)  # fmt: skip


def tiny_pictures(count: int = 6, size: int = 8) -> PackedPictures:
    """Squares of one colour each, named by it."""
    colours = ["red", "green", "blue", "black", "white", "grey"]
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 1, 1), generator=generator).expand(-1, -1, size, size)
    items = [
        {"captions": [f"{name} square", name], "style": "flat", "category": "Odd" if i % 2 else "Even"}
        for i, name in enumerate(colours[:count])
    ]
    return PackedPictures(images.to(torch.uint8).contiguous(), items)


def trainer_in(folder, recipe: Recipe = TINY) -> Trainer:
    pictures = tiny_pictures()
    return Trainer(encode_pictures(pictures, None), vocabulary_of(pictures), folder, recipe)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {**trainer.net.state_dict(), **{f"average.{k}": v for k, v in trainer.average.state_dict().items()}}


@pytest.mark.parametrize("muon_lr", [0.0, 0.01])
def test_a_resumed_run_equals_a_straight_one(tmp_path, muon_lr):
    recipe = dataclasses.replace(TINY, muon_lr=muon_lr, drop_path_rate=0.3)
    straight = trainer_in(tmp_path / "straight", recipe)
    torch.manual_seed(5)  # stochastic depth draws from torch's own generator
    losses = [straight.train_step() for _ in range(6)]

    first = trainer_in(tmp_path / "resumed", recipe)
    torch.manual_seed(5)
    for _ in range(3):
        first.train_step()
    first.save()
    torch.manual_seed(99)  # another process starts anywhere
    second = trainer_in(tmp_path / "resumed", recipe)
    assert second.step == 3
    assert [second.train_step() for _ in range(3)] == losses[3:]
    for key, value in weights(straight).items():
        assert torch.equal(value, weights(second)[key]), key


def test_another_run_in_the_same_folder_is_refused(tmp_path):
    trainer_in(tmp_path).save()
    with pytest.raises(ValueError, match=r"another config.*choose another folder"):
        trainer_in(tmp_path, dataclasses.replace(TINY, depth=3))


def test_every_picture_comes_once_before_any_comes_again(tmp_path):
    trainer = trainer_in(tmp_path)
    seen = torch.cat([trainer.next_batch()[0] for _ in range(3)])  # two epochs of six pictures
    for epoch in seen.split(6):
        colours = {tuple(picture[:, 0, 0].tolist()) for picture in epoch}
        assert len(colours) == 6


def test_the_average_follows_its_formula(tmp_path):
    trainer = trainer_in(tmp_path)
    trainer.train_step()
    expected = {key: value.clone() for key, value in trainer.net.named_parameters()}  # the first step is copied
    for _ in range(3):
        trainer.train_step()
        for key, value in trainer.net.named_parameters():
            expected[key] = TINY.ema_decay * expected[key] + (1 - TINY.ema_decay) * value
    for key, value in trainer.average.module.named_parameters():
        torch.testing.assert_close(value, expected[key])


def test_the_loss_falls_and_every_weight_learns(tmp_path):
    trainer = trainer_in(tmp_path, dataclasses.replace(TINY, steps=60))
    before = {key: value.clone() for key, value in trainer.net.named_parameters()}
    losses = [trainer.train_step() for _ in range(60)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    still = [key for key, value in trainer.net.named_parameters() if torch.equal(value, before[key])]
    assert still == []


def test_captions_are_dropped_and_styled_at_the_rates_of_the_recipe(tmp_path):
    trainer = trainer_in(tmp_path)
    encoder = trainer.net.text_encoder
    recipe = dataclasses.replace(TINY, caption_dropout=0.25, style_rate=0.5)
    words = Captions(trainer.data.items, encoder, recipe).draw([0] * 4000, torch.Generator().manual_seed(0))
    null = (words == encoder.tokenize("")).all(1).float().mean()
    styled = (words == encoder.ids["flat"]).any(1).float().mean()
    assert null == pytest.approx(0.25, abs=0.03) and styled == pytest.approx(0.375, abs=0.03)
    kinds = {tuple(row) for row in words.tolist()}
    assert len(kinds) == 5  # nothing, two captions, each with and without the style


def test_a_run_leaves_a_file_that_needs_nothing_else(tmp_path):
    trainer = trainer_in(tmp_path, dataclasses.replace(TINY, sample_prompts="red, blue square"))
    path = trainer.run()
    bundle = load_bundle(path)
    assert bundle.latent.pixel_space and json.loads(bundle.metadata["zigma.training"])["steps"] == TINY.steps
    assert json.loads(bundle.metadata["zigma.sampling"]) == {"steps": 2, "solver": "euler", "guidance": 3.0}
    assert sample(bundle, ["red"]).shape == (1, 3, 8, 8)
    assert [p.name for p in (tmp_path / "samples").iterdir()] == ["0000008.png"]
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["step"] == TINY.steps


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_a_file_states_whether_the_empty_caption_was_trained(tmp_path, rate):
    trainer = trainer_in(tmp_path / "run", dataclasses.replace(TINY, caption_dropout=rate))
    assert read_checkpoint(trainer.export(tmp_path / "m.safetensors")).condition.null is (rate > 0)


def test_a_run_starts_from_the_weights_of_a_file_and_matches_words_by_name(tmp_path):
    first = trainer_in(tmp_path / "first")
    first.train_step()
    path = first.export(tmp_path / "first.safetensors", dtype=torch.float32)
    pictures = tiny_pictures(4)  # without two of the colours
    pictures.items[0]["captions"] = ["apple"]  # a word that the file does not know
    data = encode_pictures(pictures, None)
    second = Trainer(data, vocabulary_of(pictures), tmp_path / "second", TINY)
    fresh = second.net.text_encoder.words.weight.clone()
    second.start_from(path)
    for name, value in first.average.module.model.state_dict().items():
        assert torch.equal(second.net.model.state_dict()[name], value), name
    old, new = first.average.module.text_encoder, second.net.text_encoder
    for word in ("green", "square", "flat"):
        assert torch.equal(new.words.weight[new.ids[word]], old.words.weight[old.ids[word]])
    assert torch.equal(new.words.weight[new.ids["apple"]], fresh[new.ids["apple"]])
    assert torch.equal(new.encode(["green"]), old.encode(["green"]))

    second.train_step()
    second.save()
    resumed = Trainer(data, vocabulary_of(pictures), tmp_path / "second", TINY)
    resumed.start_from(path)  # a resumed run keeps what it has learned
    assert torch.equal(resumed.net.model.norm_f.weight, second.net.model.norm_f.weight)
    with pytest.raises(ValueError, match="has depth 2, but this run 3"):
        trainer_in(tmp_path / "third", dataclasses.replace(TINY, depth=3)).start_from(path)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    trainer = trainer_in(tmp_path)
    trainer.data.latents[:] = float("nan")
    with pytest.raises(RuntimeError, match=r"the loss became nan at step 0: .*--lr"):
        trainer.train_step()


def test_latents_are_normalised_and_cached(tmp_path, monkeypatch):
    pictures, cache = tiny_pictures(size=16), tmp_path / "latents.safetensors"
    torch.manual_seed(0)
    autoencoder = TinyAutoencoder(5).eval()
    data = encode_pictures(pictures, autoencoder, cache)
    assert data.latents.shape == (6, 5, 2, 2) and data.format.downscale == 8
    torch.testing.assert_close(data.latents.mean((0, 2, 3)), torch.zeros(5), atol=1e-4, rtol=0)
    torch.testing.assert_close(data.latents.std((0, 2, 3)), torch.ones(5), atol=1e-4, rtol=0)
    expected = autoencoder.encode(pictures.images.float() / 127.5 - 1)
    torch.testing.assert_close(data.format.to_vae(data.latents), expected, atol=1e-4, rtol=1e-4)
    with monkeypatch.context() as patched:
        patched.setattr(TinyAutoencoder, "encode", lambda *_: pytest.fail("the cache was not used"))
        assert torch.equal(encode_pictures(pictures, autoencoder, cache).latents, data.latents)
    pictures.images[0] = 255 - pictures.images[0]  # other pictures under the same name
    assert not torch.equal(encode_pictures(pictures, autoencoder, cache).latents, data.latents)


def test_a_folder_is_read_with_its_captions_and_its_faults_are_named(tmp_path, caplog):
    Image.new("RGB", (20, 10), (255, 0, 0)).save(tmp_path / "Red-Fox.png")
    Image.new("RGBA", (10, 10), (0, 0, 0, 0)).save(tmp_path / "b.png")  # transparent: white
    (tmp_path / "b.txt").write_text("A Ghost!\nwhite sheet\n", encoding="utf-8")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    pictures = read_pictures(tmp_path, size=8)
    assert [item["captions"] for item in pictures.items] == [["red fox"], ["a ghost", "white sheet"]]
    assert pictures.images.shape == (2, 3, 8, 8) and (pictures.images[1] == 255).all()
    assert (pictures.images[0, 0] == 255).all() and not pictures.images[0, 1:].any()
    assert "1 pictures cannot be read" in caplog.text and "broken.jpg" in caplog.text
    assert "1 of 2 pictures have no .txt" in caplog.text
    with pytest.raises(ValueError, match="has no pictures: expected files ending in"):
        (tmp_path / "empty").mkdir()
        read_pictures(tmp_path / "empty")


def test_the_command_trains_on_a_packed_file(tmp_path, capsys):
    write_packed(tiny_pictures(), tmp_path / "packed.safetensors")
    options = ["--embed-dim", "16", "--depth", "1", "--text-width", "16", "--steps", "2", "--batch-size", "2"]
    options += ["--bf16", "no", "--sample-steps", "1", "--patch-size", "4"]
    data, out = ["--data", str(tmp_path / "packed.safetensors")], ["--out", str(tmp_path / "run")]
    assert main(["train", *data, *out, "--categories", "Even", *options]) == 0
    path = capsys.readouterr().out.strip()
    assert main(["sample", "--model", path, "--prompt", "red", "--output", str(tmp_path / "out.png")]) == 0
    assert main(["train", *data, *out, "--categories", "Evil", *options]) == 2
    assert "got the categories Evil" in capsys.readouterr().err


def test_bfloat16_trains(tmp_path):
    trainer = trainer_in(tmp_path, dataclasses.replace(TINY, bf16=True, steps=40))
    losses = [trainer.train_step() for _ in range(40)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
