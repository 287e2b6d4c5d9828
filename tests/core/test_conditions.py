"""What a file says of its null condition and its labels, and that sampling goes by it."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from zigma.autoencoder import TinyAutoencoder
from zigma.checkpoint import CheckpointError, load_bundle, read_checkpoint, save_checkpoint
from zigma.cli import main
from zigma.conditions import ConditionFacts
from zigma.config import ZigMaConfig
from zigma.model import ZigMa
from zigma.sampling import SamplingSettings, initial_noise, sample
from zigma.text import TextEncoderConfig, WordTextEncoder

NAMES = ("red fox", "Owl", "tench, Tinca tinca", "crane", "crane", "nothing")
ONCE = SamplingSettings(steps=2, solver="euler", guidance=1.0)
GUIDED = SamplingSettings(steps=2, solver="euler", guidance=3.0)


def model(**fields) -> ZigMa:
    torch.manual_seed(0)
    model = ZigMa(ZigMaConfig(**{"in_channels": 4, "embed_dim": 32, "depth": 2, "img_dim": (4, 6), "patch_size": 2,
                                 "num_classes": 6, **fields}))  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():  # at its initial zeros a model would not look at its condition
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape) / parameter[0].numel() ** 0.5)
    return model


def text_parts() -> dict:
    torch.manual_seed(0)
    return {"text_encoder": WordTextEncoder(TextEncoderConfig(("red", "fox"), length=4, width=16))}


def written(path, condition, **fields):
    parts = text_parts() if fields.get("has_text") else {}
    save_checkpoint(model(**fields), path, autoencoder=TinyAutoencoder(4), condition=condition, **parts)
    return path


@given(st.one_of(st.none(), st.integers(0, 5)), st.one_of(st.none(), st.lists(st.text("ab ,", min_size=1), min_size=6,
                                                                             max_size=6)))  # fmt: skip
def test_facts_come_back_from_metadata(null, names):
    if names is not None and not all(name.strip() for name in names):
        with pytest.raises(ValueError, match="none of them empty"):
            ConditionFacts(null, names)
        return
    facts = ConditionFacts(null, names)
    config = ZigMaConfig(4, 32, 1, 4, num_classes=6)
    assert ConditionFacts.read({"zigma.condition": facts.to_json()}, config, own_text_encoder=False) == facts


@pytest.mark.parametrize("null", [0, 5, None])
def test_a_file_keeps_its_facts_through_reading_writing_and_converting(tmp_path, null):
    facts = ConditionFacts(null, NAMES)
    path = written(tmp_path / "a.safetensors", facts)
    assert read_checkpoint(path).condition == load_bundle(path).condition == facts
    assert facts.has_null == (null is not None)
    assert main(["convert", str(path), str(tmp_path / "b.safetensors")]) == 0
    assert read_checkpoint(tmp_path / "b.safetensors").condition == facts


def test_facts_can_be_told_when_converting(tmp_path):
    path = written(tmp_path / "a.safetensors", None)
    (tmp_path / "names.txt").write_text("\n".join(NAMES), encoding="utf-8")
    told = ["--null-label", "5", "--label-names", str(tmp_path / "names.txt")]
    assert main(["convert", str(path), str(tmp_path / "b.safetensors"), *told]) == 0
    assert read_checkpoint(tmp_path / "b.safetensors").condition == ConditionFacts(5, NAMES)


def test_files_that_say_nothing_are_what_they_were(tmp_path):
    text = {"has_text": True, "d_context": 16, "num_classes": -1}
    own = written(tmp_path / "own.safetensors", None, **text)
    with safe_open(own, "pt") as file:
        assert "zigma.condition" not in file.metadata()
    assert read_checkpoint(own).condition.has_null
    save_checkpoint(model(**text), tmp_path / "bare.safetensors")
    assert not read_checkpoint(tmp_path / "bare.safetensors").condition.has_null
    assert not read_checkpoint(written(tmp_path / "class.safetensors", None)).condition.has_null
    save_file(load_file(own), tmp_path / "foreign.safetensors")  # and one that describes nothing
    state = {key: value for key, value in load_file(own).items() if not key.startswith(("text_encoder.", "vae."))}
    save_file(state, tmp_path / "foreign.safetensors")
    foreign = read_checkpoint(tmp_path / "foreign.safetensors", scan_type="zigzagN8", img_dim=(4, 6))
    assert foreign.condition == ConditionFacts(null=False)


@pytest.mark.parametrize(
    "fields, stated, sentence",
    [
        ({}, {"null": 6}, "got the null label 6, but expected one of this model's labels, 0 to 5"),
        ({}, {"null": True}, "got the null label True"),
        ({}, {"label_names": ["a", "b"]}, "got 2 names of labels, but the model has 6 labels"),
        ({}, {"null": "five"}, "got the null condition 'five'"),
        ({}, {"label_names": "abcdef"}, "have to be a list of texts"),
        ({}, {"label_names": ["a"] * 5 + [" "]}, "none of them empty"),
        ({}, {"nil": 3}, "expected an object with label_names, null"),
        ({"num_classes": -1}, {"null": 0}, "the model takes no condition"),
        ({"num_classes": -1}, {"label_names": ["a"]}, "the model has no labels"),
        ({"num_classes": -1, "has_text": True, "d_context": 16}, {"null": 3}, "expected true or false"),
    ],
)
def test_facts_that_contradict_the_model_are_refused(tmp_path, fields, stated, sentence):
    path = tmp_path / "a.safetensors"
    save_checkpoint(model(**fields), path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, {**metadata, "zigma.condition": json.dumps(stated)})
    with pytest.raises(CheckpointError, match=sentence):
        read_checkpoint(path)
    if stated.keys() != {"nil"}:
        with pytest.raises(ValueError, match=sentence):
            save_checkpoint(model(**fields), path, condition=ConditionFacts(**stated))


def test_labels_are_found_by_number_and_name():
    facts = ConditionFacts(5, NAMES)
    for which, label in ((3, 3), ("3", 3), ("red fox", 0), (" RED fox ", 0), ("owl", 1), ("tench, Tinca tinca", 2)):
        assert facts.label(which, 6) == label
    for text, labels in (
        ("3", [3]), ("3, 5,1", [3, 5, 1]), ("owl, red fox,5", [1, 0, 5]), ("tench, Tinca tinca", [2]),
        ("tench, Tinca tinca\nowl, 4\n", [2, 1, 4]),
    ):  # fmt: skip
        assert facts.labels(text, 6) == labels, text
    for wrong, words in (
        ("ufo", "none is called 'ufo'; expected numbers from 0 to 5, or names such as red fox, Owl"),
        (6, "got 6, but expected numbers from 0 to 5"), (-1, "got -1"),
        ("crane", "by its number: 'crane' is the name of 3, 4"),
        (True, "got True"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            facts.label(wrong, 6)
    with pytest.raises(ValueError, match="the text is empty"):
        facts.labels(" ,\n", 6)
    with pytest.raises(ValueError, match="has no names for them"):
        ConditionFacts().label("fox", 6)


def test_guidance_leads_away_from_the_stated_null_label(tmp_path):
    bundle = load_bundle(written(tmp_path / "a.safetensors", ConditionFacts(5, NAMES)))
    network = bundle.model
    x = initial_noise(bundle, 1, 0)
    for i in range(2):
        t = torch.tensor([i / 2])
        v, null = (network(x, t, torch.tensor([label])) for label in (2, 5))
        x = x + (null + 3 * (v - null)) / 2
    expected = bundle.autoencoder.decode(bundle.latent.to_vae(x))
    for prompts in ([2], ["2"], ["Tench, tinca TINCA"], torch.tensor([2]), np.array([2]), [np.int64(2)]):
        torch.testing.assert_close(sample(bundle, prompts, settings=GUIDED), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        sample(bundle, [5], settings=GUIDED), sample(bundle, [5], settings=ONCE), atol=1e-5, rtol=1e-4
    )  # fmt: skip
    other = sample(bundle, [2], settings=GUIDED, negative="owl")
    assert not torch.allclose(other, expected, atol=1e-4)


def test_without_a_null_label_there_is_no_guidance(tmp_path):
    bundle = load_bundle(written(tmp_path / "a.safetensors", ConditionFacts(None, NAMES)))
    assert sample(bundle, ["owl"], settings=ONCE).isfinite().all()
    with pytest.raises(ValueError, match="no null label: set guidance to 1"):
        sample(bundle, ["owl"], settings=GUIDED)


def test_guidance_by_an_untrained_null_is_warned_of(tmp_path, caplog):
    text = {"has_text": True, "d_context": 16, "num_classes": -1}
    for null, warned in ((True, 0), (False, 1)):
        bundle = load_bundle(written(tmp_path / f"{null}.safetensors", ConditionFacts(null), **text))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            sample(bundle, ["fox"], settings=GUIDED)
            sample(bundle, ["fox"], settings=ONCE)
        assert sum("not trained on" in record.getMessage() for record in caplog.records) == warned
    with pytest.raises(ValueError, match="takes texts"):
        sample(bundle, [3], settings=ONCE)


def test_the_command_line_takes_names_and_inspect_shows_them(tmp_path, capsys):
    path = written(tmp_path / "a.safetensors", ConditionFacts(5, NAMES))
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert "class, 6 labels, named red fox, Owl" in text and "null condition: label 5" in text
    draw = ["sample", "--model", str(path), "--output", str(tmp_path / "p.png"), "--steps", "2", "--cfg", "2"]
    assert main([*draw, "--label", "owl", "--label", "3"]) == 0
    assert main([*draw, "--label", "ufo"]) == 2
    assert "none is called 'ufo'" in capsys.readouterr().err
    own = written(tmp_path / "t.safetensors", None, has_text=True, d_context=16, num_classes=-1)
    assert main(["sample", "--model", str(own), "--output", str(tmp_path / "q.png"), "--label", "fox"]) == 2
    assert "no class model" in capsys.readouterr().err


def test_noise_of_a_video_is_drawn_channels_before_frames(tmp_path):
    path = tmp_path / "v.safetensors"
    save_checkpoint(model(num_classes=-1, scan_type="video_sst", video_frames=3), path)
    noise = initial_noise(load_bundle(path), 2, 7)
    drawn = torch.randn((2, 4, 3, 4, 6), generator=torch.Generator().manual_seed(7))
    assert torch.equal(noise, drawn.transpose(1, 2))
