"""A tiny CLIP text model as transformers saves one: random weights, a vocabulary of single letters, width 16."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch


def write_tiny_clip(folder: Path) -> Path:
    """Fill the folder; skips the test where transformers is not installed."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install -e .[test])")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, eos_token_id=len(words) - 1, bos_token_id=len(words) - 2,
    )  # fmt: skip
    transformers.CLIPTextModel(config).save_pretrained(folder)
    return folder
