"""What a run gives away: sample sheets on the way, and at its end one file that says everything about itself."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from ..checkpoint import Bundle, save_checkpoint
from ..sampling import SamplingSettings, sample
from ..sheet import enlarge, labelled_sheet, save_picture, to_pictures
from .captions import Texts
from .settings import Settings
from .trainer import DTYPES, Trainer

if TYPE_CHECKING:
    from .adapters import Adapters

__all__ = ["averaged_bundle", "export", "save_sheet", "sheet_prompts"]

log = logging.getLogger(__name__)

PATHS = (("run", "folder"), ("data", "path"), ("data", "autoencoder"), ("data", "cache"), ("model", "start_from"),
         ("model", "preset"), ("text", "clip"))  # fmt: skip
THUMBNAIL = 256  # pixels of its longer side


@contextmanager
def averaged_bundle(trainer: Trainer) -> Iterator[Bundle | None]:
    """A Bundle of the averaged weights, in evaluation mode, for as long as the block lasts.

    Of many processes all have to ask for it, and the first gets it, the others None.
    """
    with _averaged(trainer) as found:
        yield None if found is None else found[0]


@contextmanager
def _averaged(trainer: Trainer) -> Iterator[tuple[Bundle, Adapters | None] | None]:
    """The bundle with its adapters."""
    training = trainer.net.training
    trainer.net.eval()
    try:
        with trainer.average.in_place():
            found = trainer.processes.whole_network(trainer.net, trainer.adapters)
            if found is None:
                yield None
                return
            net, adapters = found
            bundle = Bundle(
                net.model, trainer.clip or net.text_encoder, trainer.autoencoder, trainer.examples.format,
                metadata(trainer), trainer.subject.condition,
            )  # fmt: skip
            yield bundle, adapters
    finally:
        trainer.net.train(training)


def metadata(trainer: Trainer) -> dict[str, str]:
    """The facts that a finished file carries beside what describes the model."""
    settings = trainer.settings
    samples = settings.samples
    guidance = samples.guidance if trainer.subject.condition.has_null else 1.0
    facts = {
        "zigma.sampling": json.dumps({"steps": samples.steps, "solver": samples.solver, "guidance": guidance}),
        "zigma.data": json.dumps({"pictures": len(trainer.examples.names), **trainer.facts}),
        "zigma.training": json.dumps(
            {"steps": trainer.step, "minutes": round(trainer.seconds / 60, 1), "validation_loss": trainer.validation,
             "settings": _shareable(settings)}
        ),
    }  # fmt: skip
    if (settings.flow.path, settings.flow.prediction) != ("linear", "velocity"):
        facts["zigma.flow"] = json.dumps({"path": settings.flow.path, "prediction": settings.flow.prediction})
    return facts


def _shareable(settings: Settings) -> dict:
    """All settings, but of whole paths the last part alone: the others name people and their folders."""
    tables = dataclasses.asdict(settings)
    for table, key in PATHS:
        path = Path(tables[table][key])
        if path.is_absolute() or path.as_posix().startswith("~"):
            tables[table][key] = path.name
    return tables


def sheet_prompts(trainer: Trainer) -> list | None:
    """What a sheet shows: the prompts of the settings, else some of the data's captions or labels; None without any."""
    conditions, names = trainer.conditions, trainer.subject.condition.label_names
    if trainer.subject.kind == "none":
        return None
    if trainer.settings.samples.prompts:
        return list(trainer.settings.samples.prompts)
    if isinstance(conditions, Texts):
        texts = sorted({conditions.texts(i)[0] for i in range(len(conditions.pictures))})
    else:
        labels = sorted(set(conditions.labels))
        texts = [names[label] if names else label for label in labels]
    return texts[:: max(1, len(texts) // 24)][:24]


def save_sheet(
    trainer: Trainer, path: Path | None = None, progress: Callable[[int, int], None] | None = None
) -> Path | None:
    """Draw the prompts with the averaged weights, always from the same noise; None where nothing can be decoded.

    Of many processes all have to call it, and the first one draws; the others return None at once.

    Args:
        trainer: of the run.
        path: of the file; samples/<step>.png in the run's folder unless another is given.
        progress: called as progress(done, total) before each step of the sampling.
    """
    table, format = trainer.settings.samples, trainer.examples.format
    if trainer.autoencoder is None and not format.pixel_space:
        return None
    prompts = sheet_prompts(trainer)
    guidance = table.guidance if trainer.subject.condition.has_null else 1.0
    settings = SamplingSettings(steps=table.steps, solver=table.solver, guidance=guidance)
    with averaged_bundle(trainer) as bundle:
        if bundle is None:
            return None
        images = sample(
            bundle, prompts, count=table.count, seed=table.seed, settings=settings, batch_size=12, progress=progress
        )
    names = [str(prompt) or "(empty)" for prompt in prompts or [""] for _ in range(table.count)]
    if images.dim() == 5:  # videos: their frames one after another
        names = [f"{name}, {f}" for name in names for f in range(images.shape[1])]
        images = images.flatten(0, 1)
    pictures = to_pictures(images)
    factor = max(1, 128 // max(pictures[0].size))
    sheet = labelled_sheet(
        [enlarge(picture, factor) for picture in pictures], names, title=f"step {trainer.step}",
        footnote=f"{table.solver}, {table.steps} steps, guidance {guidance:g}, seed {table.seed}",
    )  # fmt: skip
    path = path or trainer.folder.path / "samples" / f"{trainer.step:07d}.png"
    path.parent.mkdir(exist_ok=True)
    return save_picture(sheet, path)


def export(trainer: Trainer, sheet: Path | None = None) -> Path:
    """Write the finished model, or adapter, from the averaged weights.

    Of many processes all have to call it, and the first one writes.

    Args:
        trainer: of the run.
        sheet: a sample sheet, of which a small version goes into the metadata.

    Returns:
        model.safetensors, or the adapter's lora.safetensors, in the run's folder.
    """
    settings, extra = trainer.settings, {}
    extra["modelspec.sai_model_spec"] = "1.0.1"
    extra["modelspec.architecture"] = "zigma" if trainer.adapters is None else f"zigma/{settings.adapter.kind}"
    extra["modelspec.title"] = trainer.folder.path.name
    if settings.text.trigger:
        extra["modelspec.trigger_phrase"] = settings.text.trigger
    if sheet is not None:
        extra["modelspec.thumbnail"] = thumbnail(sheet)
    name = "model" if trainer.adapters is None else settings.adapter.kind
    path = trainer.folder.path / f"{name}.safetensors"
    with _averaged(trainer) as found:
        if found is None:
            return path
        bundle, adapters = found
        facts = bundle.metadata | extra
        if adapters is not None:
            from .adapters import save_adapters

            save_adapters(adapters, path, facts)
        else:
            save_checkpoint(
                bundle.model, path, facts, text_encoder=None if trainer.clip else bundle.text_encoder,
                autoencoder=bundle.autoencoder, latent=bundle.latent, condition=bundle.condition,
                dtype=DTYPES[settings.run.output_dtype], precise=True,
            )  # fmt: skip
    log.info("wrote %s", path)
    return path


def thumbnail(sheet: Path) -> str:
    """A small JPEG of a picture, as browsers and model managers read it from metadata."""
    with Image.open(sheet) as opened:
        picture = opened.convert("RGB")
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
