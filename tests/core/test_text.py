"""The word-level text encoder."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zigma.text import TextEncoderConfig, WordTextEncoder, split_words

WORDS = ("ghost", "red", "fox", "face")


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return WordTextEncoder(TextEncoderConfig(WORDS, length=4, width=8)).eval()


@given(st.text())
def test_splitting_is_stable_and_keeps_letters_and_digits(text):
    words = split_words(text)
    assert split_words(" ".join(words)) == words and all(word.isalnum() and word == word.lower() for word in words)


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
