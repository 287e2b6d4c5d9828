"""What a run trains: a network, new or from a file, with what its pictures and captions have to be for it."""

from __future__ import annotations

import dataclasses
import fnmatch
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..assets import available_models
from ..autoencoder import Autoencoder, autoencoder_from_state_dict, load_autoencoder
from ..checkpoint import CheckpointFile, read_checkpoint
from ..conditions import ConditionFacts
from ..config import ZigMaConfig
from ..flow import PATHS
from ..latent_format import LatentFormat
from ..model import ZigMa
from ..sampling import flow_of
from ..text import TextEncoderConfig, WordTextEncoder
from .captions import Described, vocabulary_of
from .settings import Settings

__all__ = ["Conditioned", "Subject", "base_file", "make_subject", "read_base_autoencoder"]

log = logging.getLogger(__name__)


class Conditioned(nn.Module):
    """The denoiser and, where it has one of its own, the text encoder that is trained with it."""

    def __init__(self, model: ZigMa, text_encoder: WordTextEncoder | None) -> None:
        super().__init__()
        self.model, self.text_encoder = model, text_encoder

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        """x (b, [f,] c, h, w), t (b,), word ids, features, labels or None -> the prediction, as x."""
        y = condition if self.text_encoder is None else self.text_encoder(condition)
        return self.model(x, t, y)


@dataclasses.dataclass
class Subject:
    """A network ready to be trained, and the facts that its file will state.

    Attributes:
        net: in training mode, float32, on the CPU.
        condition: the null condition that the run trains, and the names of labels.
        latent: None from scratch, until the data's own scale is known.
        clip: whether texts are features of a frozen CLIP.
    """

    net: Conditioned
    condition: ConditionFacts
    latent: LatentFormat | None
    clip: bool = False

    @property
    def kind(self) -> str:
        """"words", "clip", "labels" or "none"."""
        if self.net.text_encoder is not None:
            return "words"
        return {"text": "clip", "class": "labels", "none": "none"}[self.net.model.config.conditioning]


def base_file(settings: Settings) -> CheckpointFile | None:
    """The file that a run starts from, read and checked; None from scratch.

    Raises:
        CheckpointError, ValueError: it is no model.
    """
    name = settings.model.start_from
    if not name:
        return None
    path = Path(name)
    if not path.is_file():
        path = available_models().get(name, path)
    return read_checkpoint(path, settings.model.weights, **settings.model.config)


def read_base_autoencoder(settings: Settings, base: CheckpointFile | None) -> Autoencoder | None:
    """[data] autoencoder, else the base file's own; None for pixels.

    Raises:
        ValueError: the model works on latents, and there is no autoencoder to make any.
    """
    if settings.data.autoencoder:
        shipped = available_models().get(settings.data.autoencoder)
        return load_autoencoder(shipped or Path(settings.data.autoencoder)).eval().requires_grad_(False)
    if base is None or base.latent.pixel_space:
        return None
    if base.vae_state is None:
        raise ValueError(
            f"{base.path} works on latents and carries no autoencoder: give one as [data] autoencoder (for the "
            "released models that of Stable Diffusion, such as sd-vae-ft-ema)"
        )
    return autoencoder_from_state_dict(base.vae_state).float().eval().requires_grad_(False)


def make_subject(
    settings: Settings, base: CheckpointFile | None, pictures: Sequence[Described], label_names: Sequence[str],
    channels: int, sides: tuple[int, int], frames: int = 0,
) -> Subject:  # fmt: skip
    """The network of a run.

    Args:
        settings, base: of the run, as `base_file` read it.
        pictures, label_names: of the data; a label of theirs counts in label_names.
        channels, sides, frames: of the latents that the data become.

    Raises:
        ValueError: the data do not fit the model.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.run.seed)
        if base is None:
            subject = _from_scratch(settings, pictures, label_names, channels, sides, frames)
        else:
            subject = _from_file(settings, base, pictures, label_names, frames)
    _freeze(subject.net, settings)
    return subject


def _from_scratch(settings, pictures, label_names, channels, sides, frames) -> Subject:
    kind = settings.text.encoder
    if kind == "auto":
        kind = "labels" if label_names else "words" if any(picture.captions for picture in pictures) else "none"
    fields = {"use_pe": 2, "drop_path_rate": 0.0, **settings.model.config}
    fields |= {"in_channels": channels, "img_dim": sides, "video_frames": frames}
    fields["use_checkpoint"] = settings.run.checkpointing
    if frames:
        fields.setdefault("scan_type", "video_sst")
    null: int | bool | None = None
    names = None
    if kind == "labels":
        if not label_names:
            raise ValueError("[text] encoder is 'labels', but the data have none: expected one folder for each class")
        names = (*label_names, "(none)")
        null, fields["num_classes"] = len(label_names), len(names)
    elif kind in ("words", "clip"):
        null = settings.text.dropout > 0
        width, length = (settings.text.width, settings.text.length) if kind == "words" else (768, 77)
        fields |= {"has_text": True, "d_context": fields.get("d_context", width), "n_context_token": length}
    config = ZigMaConfig.preset(settings.model.preset, **fields) if settings.model.preset else _config(fields)
    encoder = None
    if kind == "words":
        words = vocabulary_of(pictures, settings.text, settings.data.flips)
        encoder = WordTextEncoder(TextEncoderConfig(words, settings.text.length, config.d_context))
    generator = torch.Generator().manual_seed(settings.run.seed)
    model = ZigMa(config, generator=generator)
    return Subject(Conditioned(model, encoder), ConditionFacts(null, names), None, kind == "clip")


def _config(fields: dict) -> ZigMaConfig:
    missing = [name for name in ("embed_dim", "depth") if name not in fields]
    if missing:
        raise ValueError(f"[model.config] lacks {', '.join(missing)}: give them, or a preset, or a model to start from")
    known = {field.name for field in dataclasses.fields(ZigMaConfig)}
    strange = sorted(set(fields) - known)
    if strange:
        raise ValueError(f"[model.config] has the unknown {', '.join(strange)}: expected fields of ZigMaConfig")
    return ZigMaConfig(**fields)


def _from_file(settings, base: CheckpointFile, pictures, label_names, frames) -> Subject:
    config = dataclasses.replace(base.config, use_checkpoint=settings.run.checkpointing)
    if bool(frames) != bool(config.video_frames):
        is_, has = ("a video model", "pictures") if config.video_frames else ("a model of pictures", "clips")
        raise ValueError(f"{base.path} is {is_}, but the data are {has}: choose others")
    path, prediction = flow_of(base.metadata)
    stated = (next(name for name, kind in PATHS.items() if isinstance(path, kind)), prediction)
    if stated != (settings.flow.path, settings.flow.prediction):
        raise ValueError(
            f"{base.path} was trained on the {stated[0]} path to predict {stated[1]}, but [flow] asks for "
            f"{settings.flow.path} and {settings.flow.prediction}: give it what it was trained with"
        )
    state, condition = dict(base.state_dict), base.condition
    if config.conditioning == "class":
        config, state, condition = _classes(settings, base, config, state, label_names)
    elif config.conditioning == "text":
        condition = ConditionFacts(null=condition.has_null or settings.text.dropout > 0)
        if not any(picture.captions for picture in pictures) and not settings.text.trigger:
            raise ValueError(f"{base.path} is a text model, but no picture has a caption: write some or a trigger")
    model = ZigMa(config, base.token_orders, generator=torch.Generator().manual_seed(settings.run.seed))
    model.load_state_dict({key: value.float() for key, value in state.items()})
    encoder = None
    if base.text_config is not None:
        encoder = _text_encoder(settings, base, pictures)
    return Subject(Conditioned(model, encoder), condition, base.latent, config.has_text and encoder is None)


def _classes(settings, base, config, state, label_names):
    """The base's classes, with a row for "none" if the run trains one and the file has none."""
    names = base.condition.label_names
    if not label_names:
        raise ValueError(f"{base.path} is a class model, but the data have no labels: expected a folder for each class")
    unknown = [name for name in label_names if names is not None and name not in names]
    if unknown or (names is None and len(label_names) > config.num_classes):
        raise ValueError(
            f"the data have the classes {', '.join(unknown or label_names)[:200]}, but {base.path} knows "
            f"{', '.join(names)[:200] if names else f'{config.num_classes} classes without names'}: name the folders so"
        )
    condition = base.condition
    if not condition.has_null and settings.text.dropout > 0 and settings.adapter.kind == "none":
        key = "y_embedder.embedding_table.weight"
        state[key] = torch.cat([state[key], state[key].float().mean(0, keepdim=True).to(state[key])])
        condition = ConditionFacts(config.num_classes, None if names is None else (*names, "(none)"))
        config = dataclasses.replace(config, num_classes=config.num_classes + 1)
    return config, state, condition


def _text_encoder(settings, base: CheckpointFile, pictures) -> WordTextEncoder:
    """The file's encoder; one that learns too gets the data's new words beside those it knows."""
    learns = settings.text.train and settings.adapter.kind == "none"
    words = vocabulary_of(pictures, settings.text, settings.data.flips)
    known = base.text_config.vocabulary
    new = tuple(word for word in words if word not in known)
    if new and not learns:
        log.warning(
            "%d words of the captions are unknown to the text encoder, which does not learn here, and are not seen: %s",
            len(new), ", ".join(new[:20]) + ", ..." * (len(new) > 20),
        )  # fmt: skip
        new = ()
    encoder = WordTextEncoder(dataclasses.replace(base.text_config, vocabulary=known + new))
    state = {key: value.float() for key, value in base.text_state.items()}
    fresh = encoder.words.weight.detach()[1 + len(known) :]
    encoder.load_state_dict({**state, "words.weight": torch.cat([state["words.weight"], fresh])})
    return encoder


def _freeze(net: Conditioned, settings: Settings) -> None:
    """Let learn what [model] train and freeze, and [text] train say."""
    table, names = settings.model, [name for name, _ in net.model.named_parameters()]
    for key, patterns in (("train", table.train), ("freeze", table.freeze)):
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                raise ValueError(
                    f"[model] {key} has {pattern!r}, which fits no parameter: expected names such as "
                    f"{', '.join(names[:6])}"
                )
    for name, parameter in net.model.named_parameters():
        learns = any(fnmatch.fnmatchcase(name, pattern) for pattern in table.train)
        frozen = any(fnmatch.fnmatchcase(name, pattern) for pattern in table.freeze)
        parameter.requires_grad_(parameter.requires_grad and learns and not frozen)
    if net.text_encoder is not None:
        net.text_encoder.requires_grad_(settings.text.train and settings.adapter.kind == "none")
