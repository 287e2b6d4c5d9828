"""From a configuration to a run that is ready: data read and looked over, pictures encoded, network and adapters made.

    plan = make_plan(settings)          # everything that can be wrong with the data is known here
    print(plan.preflight.text())
    trainer = make_trainer(plan)
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from pathlib import Path

import torch
from torch import Tensor

from ..autoencoder import Autoencoder
from ..checkpoint import CheckpointFile
from ..latent_format import LatentFormat
from ..text import ClipTextEncoder
from .adapters import add_adapters
from .captions import Described, Labels, NoConditions, Texts
from .dataset import Dataset, read_dataset
from .latent_cache import LatentCache, Prepared, autoencoder_digest, encode_dataset, encode_texts
from .picture_files import fit
from .preflight import Preflight, inspect_data
from .processes import OneProcess
from .progress import Progress, named
from .settings import Settings
from .subject import Subject, base_file, make_subject, read_base_autoencoder
from .trainer import Examples, Trainer

__all__ = ["Plan", "held_out_pictures", "make_plan", "make_trainer"]

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Plan:
    """What a run will do, before anything is computed.

    Attributes:
        sizes: (height, width) in pixels that each sample is brought to.
        downscale: pixels of a latent's side.
        preflight: what there is to say about the data.
    """

    settings: Settings
    dataset: Dataset
    base: CheckpointFile | None
    autoencoder: Autoencoder | None
    sizes: list[tuple[int, int]]
    downscale: int
    preflight: Preflight


def make_plan(settings: Settings, progress: Progress | None = None) -> Plan:
    """Read the data and the base model, and look for everything that would go wrong later.

    Args:
        settings: of the run.
        progress: called while the pictures are opened, each once.

    Raises:
        ValueError, OSError: nothing usable is there. What is only strange is in the plan's preflight.
    """
    data = settings.data
    base = base_file(settings)
    autoencoder = read_base_autoencoder(settings, base)
    dataset = read_dataset(
        Path(data.path), data.kind, categories=data.categories, progress=named(progress, "opening pictures")
    )
    if data.names_as_captions:
        dataset = dataset.captioned_by_name()
    downscale = _downscale(autoencoder)
    if base is not None and base.latent.downscale != downscale:
        raise ValueError(
            f"the autoencoder makes one latent pixel of {downscale} x {downscale}, but {base.path} was made for "
            f"{base.latent.downscale} x {base.latent.downscale}: give the autoencoder of that model"
        )
    unit = downscale * _patch_size(settings, base)
    size = _size(settings, base, dataset, downscale, unit)
    step = data.bucket_step or unit
    if step % unit:
        raise ValueError(f"[data] bucket_step is {step}, expected a multiple of {unit} pixels (one token of the model)")
    frames = base.config.video_frames if base is not None else 0
    preflight = inspect_data(
        dataset, size=size, buckets=data.buckets, step=step, batch_size=settings.run.batch_size, flips=data.flips,
        crops=data.crops, frames=frames, captions_needed=_reads_captions(settings, base, dataset),
        labels_needed=base is not None and base.config.conditioning == "class", validation=data.validation,
    )  # fmt: skip
    return Plan(settings, dataset, base, autoencoder, preflight.targets, downscale, preflight)


def _downscale(autoencoder: Autoencoder | None) -> int:
    if autoencoder is None:
        return 1
    probe = torch.zeros(1, 3, 64, 64, dtype=next(autoencoder.parameters()).dtype)
    with torch.no_grad():
        return 64 // autoencoder.encode(probe).shape[-1]


def _patch_size(settings: Settings, base: CheckpointFile | None) -> int:
    if base is not None:
        return base.config.patch_size
    preset = settings.model.preset.replace("_", "/").partition("/")[2]
    return int(preset) if preset.isdigit() else int(settings.model.config.get("patch_size", 1))


def _size(settings, base, dataset: Dataset, downscale: int, unit: int) -> tuple[int, int]:
    size = settings.data.size
    if not size and base is not None:
        size = tuple(side * downscale for side in base.config.img_dim)
    if not size and dataset.kind == "packed":
        size = dataset.samples[0].size
    if not size:
        raise ValueError("[data] size is missing: from scratch nothing says how large the pictures are, give a side")
    size = size if isinstance(size, tuple) else (size, size)
    if any(side % unit for side in size):
        near = " x ".join(str(max(1, round(side / unit)) * unit) for side in size)
        raise ValueError(f"[data] size is {size[0]} x {size[1]}, expected multiples of {unit} pixels: try {near}")
    return size


def _reads_captions(settings: Settings, base: CheckpointFile | None, dataset: Dataset) -> bool:
    if base is not None:
        return base.config.conditioning == "text"
    return settings.text.encoder in ("words", "clip") or (settings.text.encoder == "auto" and not dataset.label_names)


def make_trainer(
    plan: Plan, processes: OneProcess | None = None, progress: Progress | None = None, texts=None
) -> Trainer:
    """Encode the pictures (or read them from the cache) and make the run.

    Args:
        plan: of the run.
        processes: this process, or this one of many; None is one on the CPU.
        progress: called while pictures and captions are encoded.
        texts: a frozen text encoder in place of [text] clip, with encode(texts) -> features (n, m, d).

    Raises:
        ValueError: the data do not fit the model, or too few are left to learn from.
    """
    settings, dataset = plan.settings, plan.dataset
    device = torch.device("cpu") if processes is None else processes.device
    described = [Described(tuple(sample.captions), sample.style, sample.label) for sample in dataset.samples]
    digest = autoencoder_digest(plan.autoencoder)
    folder = Path(settings.data.cache) if settings.data.cache else Path(settings.run.folder) / "cache"
    frames = plan.base.config.video_frames if plan.base is not None else 0
    encoded = encode_dataset(
        dataset, plan.autoencoder, plan.sizes, flips=settings.data.flips, crops=settings.data.crops,
        cache=LatentCache(folder, digest), device=device, frames=frames, progress=named(progress, "encoding pictures"),
    )  # fmt: skip
    first = encoded.latents[0][0]
    subject = make_subject(
        settings, plan.base, described, dataset.label_names, first.shape[-3], tuple(first.shape[-2:]),
        len(first) if first.dim() == 4 else 0,
    )  # fmt: skip
    format = subject.latent or _own_format(encoded.moments(), plan, first.shape[-3])
    latents = [[format.to_model(variant) for variant in variants] for variants in encoded.latents]
    if subject.latent is None:
        format = _with_preview(format, latents, plan)
    examples = Examples(
        [sample.name for sample in dataset.samples], latents, encoded.flipped,
        held_out_pictures(dataset, settings.data.validation), format, _digest(plan, described, digest),
    )  # fmt: skip
    adapters = None
    if settings.adapter.kind != "none":
        adapters = add_adapters(
            subject.net.model, settings.adapter.settings(), torch.Generator().manual_seed(settings.run.seed)
        )  # fmt: skip
    if plan.autoencoder is not None:
        plan.autoencoder.to(device)  # where sheets are decoded
    conditions, clip = _conditions(plan, subject, described, folder, device, progress, texts)
    return Trainer(
        settings, subject, examples, conditions, adapters=adapters, autoencoder=plan.autoencoder, processes=processes,
        facts=_facts(plan), clip=clip,
    )  # fmt: skip


def _own_format(moments: tuple[Tensor, Tensor], plan: Plan, channels: int) -> LatentFormat:
    """Zero mean and unit variance in every channel, which is what the flow's noise has; pixels stay as they are."""
    if plan.autoencoder is None:
        return LatentFormat(channels, downscale=1)
    mean, std = moments
    scale = tuple((1 / std.clamp(min=1e-6)).tolist())
    return LatentFormat(channels, plan.downscale, scale=scale, shift=tuple(mean.tolist()))


def _with_preview(format: LatentFormat, latents: list[list[Tensor]], plan: Plan) -> LatentFormat:
    """With the linear map from latents to colours (least squares on up to 256 pictures), for a host's previews."""
    if format.pixel_space or plan.dataset.clips:
        return format
    inputs, colours = [], []
    for index in range(0, len(latents), max(1, len(latents) // 256)):
        latent, size = latents[index][0], plan.sizes[index]
        place, _ = Prepared(size, plan.settings.data.flips, plan.settings.data.crops).variants(
            plan.dataset.samples[index].size
        )[0]
        pixels = fit(plan.dataset.picture(index), size, place).float() / 127.5 - 1
        colours.append(torch.nn.functional.adaptive_avg_pool2d(pixels, latent.shape[-2:]).flatten(1).T)
        inputs.append(torch.cat([latent, torch.ones_like(latent[:1])]).flatten(1).T)
    solution = torch.linalg.lstsq(torch.cat(inputs), torch.cat(colours)).solution
    return dataclasses.replace(format, rgb_factors=solution[:-1].tolist(), rgb_bias=solution[-1].tolist())


def held_out_pictures(dataset: Dataset, part: float) -> list[int]:
    """The pictures of the validation loss: those whose names hash lowest, so that new pictures do not move old ones."""
    names = [sample.name for sample in dataset.samples]
    count = min(len(names) - 1, max(1, round(part * len(names)))) if part else 0
    # "surrogateescape": a name that is no UTF-8 is a name.
    ranked = sorted(range(len(names)), key=lambda i: hashlib.sha256(names[i].encode(errors="surrogateescape")).digest())
    return sorted(ranked[:count])


def _digest(plan: Plan, described: list[Described], autoencoder: str) -> str:
    """Of everything that batches are made of."""
    digest = hashlib.sha256(f"{autoencoder} {plan.settings.data.flips} {plan.settings.data.crops}".encode())
    digest.update(f"{plan.settings.data.validation} {plan.settings.text.trigger}".encode())
    for index, sample in enumerate(plan.dataset.samples):
        facts = (sample.name, plan.dataset.file_digest(index), plan.sizes[index], dataclasses.astuple(described[index]))
        digest.update(repr(facts).encode())
    return digest.hexdigest()


def _conditions(plan: Plan, subject: Subject, described, folder: Path, device, progress: Progress | None, given):
    """(the conditions, the frozen text encoder or None)"""
    settings, kind = plan.settings, subject.kind
    if kind == "none":
        return NoConditions(), None
    if kind == "labels":
        names, null = subject.condition.label_names, subject.condition.null
        if names is not None:  # the data's labels, in the model's numbers
            numbers = [names.index(name) for name in plan.dataset.label_names]
            described = [dataclasses.replace(one, label=numbers[one.label]) for one in described]
        return Labels(described, settings.text, null if subject.condition.has_null else None), None
    if kind == "words":
        return Texts.of_words(described, settings.text, subject.net.text_encoder), None
    clip = given or ClipTextEncoder(settings.text.clip, device)
    width = clip.encode([""]).shape[-1]
    if width != subject.net.model.config.d_context:
        raise ValueError(
            f"the text encoder {'that is connected' if given else settings.text.clip} makes features of width {width}, "
            f"but the model takes {subject.net.model.config.d_context}: give the encoder that it was trained with"
            + " as [text] clip" * (given is None)
        )
    texts = Texts(described, settings.text, lambda text: features[text])
    sides = (False, True) if settings.data.flips else (False,)
    every = ["", *(text for i in range(len(described)) for side in sides for text in texts.texts(i, side))]
    cache = None if given else LatentCache(folder / "text", autoencoder_digest(clip.model))
    features = encode_texts(every, clip.encode, cache=cache, progress=named(progress, "encoding captions"))
    return texts, clip


def _facts(plan: Plan) -> dict:
    facts = {"kind": plan.dataset.kind}
    if plan.settings.data.categories:
        facts["categories"] = list(plan.settings.data.categories)
    if plan.base is not None:
        facts["base"] = plan.base.path.name
    return facts
