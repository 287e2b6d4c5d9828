"""The word-level text encoder."""

from __future__ import annotations

import sys
import unicodedata

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_clip import write_tiny_clip

from zigma.text import ClipTextEncoder, TextEncoderConfig, WordTextEncoder, read_features, split_words

WORDS = ("ghost", "red", "fox", "face")


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return WordTextEncoder(TextEncoderConfig(WORDS, length=4, width=8)).eval()


@given(st.text())
def test_splitting_is_stable_and_keeps_letters_and_digits(text):
    words = split_words(text)
    assert split_words(" ".join(words)) == words
    assert all(word == word.lower() and any(map(str.isalnum, word)) for word in words)
    assert all(letter.isalnum() or unicodedata.category(letter)[0] == "M" for word in words for letter in word)


def test_words_of_every_script_are_words():
    assert split_words("Лиса 狐_狸 क़िला, Jalapeño") == ["лиса", "狐", "狸", "क़िला", "jalapeño"]
    assert split_words("cafe\u0301") == split_words("café") == ["café"]


def test_an_emoji_is_read_as_its_name_and_other_signs_separate():
    assert split_words("a 🦊❤️ 5°") == ["a", "fox", "face", "heavy", "black", "heart", "5"]


def test_words_that_no_letter_of_the_alphabet_spells_are_named_too(encoder, caplog):
    encoder.encode(["狐狸 red"])
    assert "lacks them: 狐狸" in caplog.text


def test_words_are_counted_from_one_and_padded_with_zero(encoder):
    assert encoder.tokenize("Red, FOX!").tolist() == [2, 3, 0, 0]
    assert encoder.tokenize("").tolist() == [0, 0, 0, 0]


def test_unknown_words_are_left_out_and_named(encoder, caplog):
    assert encoder.unknown_words("a red ufo, a fox") == ["a", "ufo"]
    assert torch.equal(encoder.encode(["a red ufo, a fox"]), encoder.encode(["red fox"]))
    assert caplog.text.count("vocabulary of 4 words lacks them: a, ufo") == 1


def test_words_beyond_the_length_are_named(encoder, caplog):
    prompt = "red fox face ghost red fox"
    assert torch.equal(encoder.encode([prompt]), encoder.encode(["red fox face ghost"]))
    assert "only the first 4 words of a prompt are read; left out: red fox" in caplog.text


def test_order_and_neighbours_matter_and_a_batch_is_its_prompts(encoder):
    prompts = ["red fox", "fox red", "red", ""]
    features = encoder.encode(prompts)
    assert features.shape == (4, 4, 8)
    for i, prompt in enumerate(prompts):
        torch.testing.assert_close(features[i], encoder.encode([prompt])[0])
    assert not torch.allclose(features[0], features[1]) and not torch.allclose(features[0, 0], features[2, 0])


def test_a_configuration_survives_its_text_and_refuses_nonsense():
    config = TextEncoderConfig(list(WORDS), length=4, width=8)
    assert TextEncoderConfig.from_json(config.to_json()) == config
    for wrong in ({"width": 9}, {"length": 0}, {"vocabulary": ("a", "a")}):
        with pytest.raises(ValueError, match=r"expected|twice"):
            TextEncoderConfig(**{"vocabulary": WORDS, "width": 8, **wrong})


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return write_tiny_clip(tmp_path_factory.mktemp("clip"))


def test_clip_features_are_the_last_hidden_states_of_77_tokens(clip_folder):
    encoder = ClipTextEncoder(clip_folder)
    features = encoder.encode(["a b", "", "a " * 100])
    assert features.shape == (3, 77, 16) and features.dtype == torch.float32
    assert torch.equal(features[0, 0], features[1, 0])  # causal: the start knows nothing of what follows
    assert not torch.allclose(features[0, 1], features[1, 1])
    torch.testing.assert_close(encoder.encode(["a b"])[0], features[0], atol=1e-5, rtol=1e-5)
    ids = encoder.tokenizer(["a b"], padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert torch.equal(encoder.model(ids).last_hidden_state, encoder.encode(["a b"]))


def test_features_are_read_from_files(tmp_path):
    features = torch.randn(3, 5, 4)
    save_file({"features": features.half(), "other": torch.zeros(1)}, tmp_path / "a.safetensors")
    assert torch.equal(read_features(tmp_path / "a.safetensors"), features.half().float())
    save_file({"clip": features}, tmp_path / "one.safetensors")
    assert torch.equal(read_features(tmp_path / "one.safetensors"), features)
    captions = torch.stack([features, features + 1], dim=1)
    numpy.save(tmp_path / "captions.npy", captions.numpy())
    assert torch.equal(read_features(tmp_path / "captions.npy"), features)
    save_file({"a": features, "b": features.clone()}, tmp_path / "two.safetensors")
    numpy.save(tmp_path / "object.npy", numpy.array([{}], dtype=object), allow_pickle=True)
    for name, sentence in (
        ("two.safetensors", "holds no text features"),
        ("object.npy", "allow_pickle"),
        ("a.pt", "a.pt"),
    ):
        with pytest.raises(ValueError, match=sentence):
            read_features(tmp_path / name)


def test_clip_without_transformers_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install transformers, or give precomputed text features"):
        ClipTextEncoder("anything")
