"""The word-level text encoder as a CLIP of the host: its tokenizer, its model, its weights."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import torch
from torch import Tensor

from ..zigma.checkpoint import CheckpointFile
from ..zigma.host_files import TEXT_DESCRIPTION, text_to_tensor
from ..zigma.text import TextEncoderConfig, WordTextEncoder, split_words

__all__ = ["HostTexts", "build_clip", "has_words", "text_config_of"]


class HostTextModel(torch.nn.Module):
    """The word-level text encoder behind the interface of the host's CLIP objects."""

    def __init__(self, zigma_config: TextEncoderConfig, dtype=None, device=None, model_options=None) -> None:
        super().__init__()
        self.dtypes = {dtype}
        self.encoder = WordTextEncoder(zigma_config, operations=comfy.ops.manual_cast, device=device, dtype=dtype)

    def set_clip_options(self, options: dict) -> None:
        """Layer and projection choices of CLIP: this encoder has none."""

    def reset_clip_options(self) -> None:
        """Nothing to reset."""

    def load_sd(self, state: dict[str, Tensor]):
        """Load the encoder's tensors."""
        return self.encoder.load_state_dict(state)

    def encode_token_weights(self, tokens: dict[str, list]) -> tuple[Tensor, None]:
        """[(word id, weight), ...] -> features (b, length, width); weight 1 is neutral, 0 the empty prompt."""
        device = comfy.model_management.text_encoder_device()
        pairs = torch.tensor(tokens["zigma"], dtype=torch.float64)  # (b, length, 2): ids stay exact
        ids, weights = pairs[..., 0].long().to(device), pairs[..., 1].to(device, torch.float32)
        features = self.encoder(ids).float()
        if (weights != 1).any():
            empty = self.encoder(torch.zeros_like(ids)).float()
            features = empty + (features - empty) * weights[..., None]
        return features.to(comfy.model_management.intermediate_device()), None


class HostTokenizer:
    """Prompts as the host writes them, "(word:1.2)" included, to word ids with weights."""

    def __init__(self, config: TextEncoderConfig, embedding_directory=None, tokenizer_data=None) -> None:
        self.config = config
        self.words = WordTextEncoder(config, device="meta")  # its vocabulary; the weights are elsewhere

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_) -> dict[str, list]:
        """{"zigma": [[(id, weight), ...]]}, one row of the encoder's length; logs what it cannot see."""
        parts = comfy.sd1_clip.token_weights(comfy.sd1_clip.escape_important(text), 1.0)
        parts = [(comfy.sd1_clip.unescape_important(part), weight) for part, weight in parts]
        self.words.warn([" ".join(part for part, _ in parts)])
        ids = self.words.ids
        row = [(ids[word], weight) for part, weight in parts for word in split_words(part) if word in ids]
        row = row[: self.config.length]
        return {"zigma": [row + [(0, 1.0)] * (self.config.length - len(row))]}

    def untokenize(self, token_weight_pair: list) -> list:
        """Each pair with its word, as some nodes show them."""
        names = ("", *self.config.vocabulary)
        return [(pair, names[pair[0]]) for pair in token_weight_pair]

    def state_dict(self) -> dict[str, Tensor]:
        """What the host's savers write beside the encoder's weights: what the encoder is."""
        return {TEXT_DESCRIPTION: text_to_tensor(self.config.to_json())}


def build_clip(file: CheckpointFile):
    """A host CLIP with the text encoder of a file, or None if it has none. In float32: it is tiny."""
    if file.text_config is None:
        return None
    target = comfy.supported_models_base.ClipTarget(functools.partial(HostTokenizer, file.text_config), HostTextModel)
    target.params = {"zigma_config": file.text_config}
    parameters = sum(tensor.numel() for tensor in file.text_state.values())
    clip = comfy.sd.CLIP(target, parameters=parameters, model_options={"dtype": torch.float32})
    clip.cond_stage_model.eval().requires_grad_(False)
    clip.load_sd(file.text_state)
    return clip


def text_config_of(clip, width: int) -> TextEncoderConfig:
    """What the word-level encoder inside a host CLIP is, for a model of text features of this width.

    Raises:
        ValueError: it is another kind of text encoder, or of another width.
    """
    if not has_words(clip):
        raise ValueError(
            f"leave clip unconnected and load that text encoder by its own node: got a CLIP of the kind "
            f"{type(clip.cond_stage_model).__name__}, expected the one of a ZigMa Model Loader"
        )
    config = clip.tokenizer.config
    if config.width != width:
        raise ValueError(
            f"connect the CLIP of this model: got one with features of width {config.width}, expected {width}"
        )
    return config


def has_words(clip) -> bool:
    """Whether a host CLIP is the word-level encoder of a model file."""
    return isinstance(clip.tokenizer, HostTokenizer)


class HostTexts:
    """A frozen CLIP of the host as the trainer asks a text encoder: texts -> features (n, m, d) on a device."""

    def __init__(self, clip, device: torch.device) -> None:
        self.clip, self.device = clip, device
        self.length = self._features("").shape[1]

    def encode(self, texts: Sequence[str]) -> Tensor:
        """As stock CLIP Text Encode; what is longer than one window of the encoder is cut, as released models had it.

        Ordinary tensors, whatever mode the encoder's own are of.
        """
        return torch.cat([self._features(text)[:, : self.length] for text in texts]).clone()

    def _features(self, text: str) -> Tensor:
        with torch.inference_mode():
            return self.clip.encode_from_tokens(self.clip.tokenize(text)).to(self.device, torch.float32)
