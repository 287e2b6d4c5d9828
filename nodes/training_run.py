"""A training run inside the host: from what a graph gives to settings of the trainer, and from its run back to a graph.

The run is a folder below the host's output folder, as `python -m zigma train` makes one: a run that is there is gone on
with, and Stop leaves a checkpoint behind.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import numpy
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

from ..zigma.checkpoint import CheckpointFile
from ..zigma.flow import PATHS
from ..zigma.model_file import write_checkpoint
from ..zigma.sampling import flow_of
from ..zigma.training.assemble import Plan, make_plan, make_trainer
from ..zigma.training.outputs import export, save_sheet
from ..zigma.training.processes import OneProcess
from ..zigma.training.report import write_report
from ..zigma.training.run_folder import RunFolder
from ..zigma.training.settings import Settings
from ..zigma.training.tables import (
    AdapterTable,
    DataTable,
    FlowTable,
    ModelTable,
    OptimizerTable,
    RunTable,
    SampleTable,
    TextTable,
)  # fmt: skip
from ..zigma.training.trackers import Trackers
from ..zigma.training.trainer import Trainer
from .comfy_model import as_zigma
from .comfy_text import HostTexts, has_words
from .save import whole_file

__all__ = ["METHODS", "Finished", "TrainingData", "base_of", "folder_of", "settings_of", "times_lost", "train"]

log = logging.getLogger(__name__)

LONGEST_NAME = 255  # bytes, of a folder on the file systems that people have
METHODS = ("lora", "lokr", "full")
BASE, BASE_DIGEST = "base.safetensors", "zigma.run_base"
PREVIEW = 768  # pixels of a sheet's longer side, in the node

_runs: dict[Path, tuple[int, bool]] = {}  # folder -> times that it was lost, whether it is there as far as we know


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """What ZIGMA_DATASET is: fields of DataTable, and the trigger word of TextTable."""

    path: str
    kind: str = "auto"
    size: int = 0
    buckets: bool = False
    flips: bool = False
    names_as_captions: bool = False
    trigger: str = ""


@dataclasses.dataclass(frozen=True)
class Finished:
    """What a run came to.

    Attributes:
        file: the model, or the adapter. sheet: the last samples.
        entries: of the log, with "step" and "loss". data: the report on the pictures.
        steps: that it has done, more than were asked for where it had them already.
    """

    file: Path
    sheet: Path | None
    entries: list[dict]
    data: str
    steps: int


def folder_of(run_name: str) -> Path:
    """Where a run of this name is.

    Raises:
        ValueError: it is no name of a folder.
    """
    name = run_name.strip()
    if not name or re.search(r'[\\/:*?"<>|\x00-\x1f]', name) or not name.strip("."):
        raise ValueError(f"give run_name a plain name for a folder, such as my_style: got {run_name!r}")
    if len(name.encode()) > LONGEST_NAME:
        raise ValueError(f"give run_name a shorter name: got {len(name)} characters, and {LONGEST_NAME} bytes fit")
    return Path(folder_paths.get_output_directory()) / "zigma_training" / name


def times_lost(folder: Path) -> int:
    """How often a run of this process has been deleted from its folder since: one that was has to be run again."""
    if _runs.get(folder, (0, False))[1] and not folder.exists():
        _runs[folder] = (_runs[folder][0] + 1, False)
    return _runs.get(folder, (0, False))[0]


def base_of(model, clip, vae, folder: Path) -> Path:
    """The file that a run starts from: what the graph gives, LoRAs and merges included, written into the run's folder.

    Raises:
        ValueError: it is no ZigMa, a part of it is missing or of another kind, or the run was begun with another.
    """
    config, latent = as_zigma(model).config, model.model.zigma_file.latent
    if config.has_text and clip is None:
        raise ValueError(
            "connect clip: this model draws from texts, and captions are encoded by the CLIP of the ZigMa Model Loader "
            "(or, for released models, by CLIPLoader with CLIP ViT-L/14, type stable_diffusion)"
        )
    if vae is None and not latent.pixel_space:
        raise ValueError(
            "connect vae: this model works on latents, and pictures are encoded by the VAE of the ZigMa Model Loader, "
            "or by the one it was trained with, from ZigMa VAE Loader"
        )
    if clip is not None and not config.has_text:
        log.warning("clip is not used: this model does not draw from texts")
    words = clip if config.has_text and has_words(clip) else None
    file = whole_file(model, words, vae, bake_scan_orders=True)
    digest, path = _digest(file), folder / BASE
    if path.is_file() and _stated_digest(path) == digest:
        return path
    if RunFolder(folder).whole():
        raise ValueError(
            f"choose another run_name: {folder} holds a run that was begun with another model, text encoder or VAE, "
            "and can only go on with those"
        )
    write_checkpoint(file, path, more={BASE_DIGEST: digest})
    return path


def _digest(file: CheckpointFile) -> str:
    """SHA-256 of what is trained: weights of all parts, and the architecture."""
    digest = hashlib.sha256(f"{file.config.to_json()} {file.latent} {file.condition}".encode())
    for tensors in (file.state_dict, file.text_state or {}, file.vae_state or {}):
        for key, value in sorted(tensors.items()):
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    for order in file.token_orders or ():
        digest.update(repr(order.tolist()).encode())
    return digest.hexdigest()


def _stated_digest(path: Path) -> str | None:
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get(BASE_DIGEST)
    except (SafetensorError, OSError):
        return None


def settings_of(
    folder: Path, base: Path, file: CheckpointFile, data: TrainingData, *, method: str, steps: int, batch_size: int,
    learning_rate: float, rank: int, seed: int, precision: str, caption_dropout: float, prompts: str,
) -> Settings:  # fmt: skip
    """The settings of a run; a learning rate of 0 is the one that suits the method.

    Args:
        folder, base: as `folder_of` and `base_of` gave them. file: of the host's MODEL, for its flow.

    Raises:
        ValueError: a value that the trainer cannot take.
    """
    adapter = method != "full"
    path, prediction = flow_of(file.metadata)
    device = comfy.model_management.get_torch_device()
    return Settings(
        run=RunTable(
            folder=str(folder), steps=steps, batch_size=batch_size, precision=precision, device=device.type, seed=seed,
            ema=0.98 if adapter else 0.999, save_every=2.0,
        ),
        data=DataTable(
            path=data.path, kind=data.kind, names_as_captions=data.names_as_captions, size=data.size,
            buckets=data.buckets, flips=data.flips,
        ),
        model=ModelTable(start_from=str(base)),
        text=TextTable(dropout=caption_dropout, trigger=data.trigger.strip()),
        adapter=AdapterTable(kind=method, rank=rank) if adapter else AdapterTable(),
        flow=FlowTable(
            path=next(name for name, kind in PATHS.items() if isinstance(path, kind)), prediction=prediction
        ),
        optimizer=OptimizerTable(
            lr=learning_rate or (2e-3 if adapter else 1e-4), weight_decay=0.0, warmup=0.05, hold=0.5
        ),
        samples=SampleTable(prompts=tuple(line.strip() for line in prompts.splitlines() if line.strip()), every=0),
    )  # fmt: skip


def train(settings: Settings, clip=None, *, sample_every: int = 0, say: Callable[[str], None] = log.info) -> Finished:
    """Run to the end, from wherever the folder's last checkpoint stands.

    Args:
        clip: the host's CLIP of a text model; None for models without texts.
        sample_every: steps between sheets; 0 draws only the last.
        say: is told how it goes.

    Raises:
        ValueError: pictures, model and settings do not fit together, or not the run that is there.
        comfy.model_management.InterruptProcessingException: Stop was pressed; the checkpoint is written.
    """
    # Training needs the memory, and the host has its models in their own files or in the run's base.
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    device = comfy.model_management.get_torch_device()
    bars: dict[str, comfy.utils.ProgressBar] = {}  # one would not be drawn while a later stage is behind an earlier one

    def progress(what: str, done: int, total: int) -> None:
        _ask()
        bars.setdefault(what, comfy.utils.ProgressBar(total)).update_absolute(done, total)

    # Nodes run in inference mode, whose tensors cannot be trained.
    # A second run in the folder is refused before its pictures are encoded.
    holding = RunFolder(Path(settings.run.folder)).locked()
    with holding, torch.inference_mode(False), torch.enable_grad(), _randomness_of_its_own():
        plan = make_plan(settings, progress)
        if plan.preflight.problems:
            raise ValueError(plan.preflight.problems[0])
        frozen = None if clip is None or has_words(clip) else HostTexts(clip, device)
        process = OneProcess(device)
        trainer = make_trainer(plan, process, progress, frozen)
        _check_prompts(trainer)
        try:
            trainer.resume()
        except ValueError as error:
            raise ValueError(f"choose another run_name, or: {error}") from error
        _follow(trainer, sample_every, say)
        return _finish(trainer, plan)


def _ask(*_) -> None:
    """Whether Stop was pressed."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def _check_prompts(trainer: Trainer) -> None:
    """That sheets can be drawn: they come after hours."""
    prompts = trainer.settings.samples.prompts
    if prompts and trainer.subject.kind == "none":
        raise ValueError("leave prompts empty: this model draws without any condition")
    for label in prompts if trainer.subject.kind == "labels" else ():
        trainer.subject.condition.label(label, trainer.net.model.config.num_classes)


def _follow(trainer: Trainer, sample_every: int, say: Callable[[str], None]) -> None:
    """Train, showing what can be seen on the way; the host's interruption passes on when the checkpoint is written."""
    run, interruption, told = trainer.settings.run, None, 0.0
    bar = comfy.utils.ProgressBar(run.steps)
    trackers = Trackers(trainer.folder, run, dataclasses.asdict(trainer.settings), progress=False)

    def on_step(trainer: Trainer, loss: float) -> None:
        nonlocal interruption, told
        trackers.follow(trainer, loss)
        try:
            _ask()
            preview = None
            if sample_every and trainer.step % sample_every == 0 and trainer.step < run.steps:
                preview = _preview(save_sheet(trainer, progress=_ask))
            if time.monotonic() - told > 1:
                told = time.monotonic()
                say(f"step {trainer.step} of {run.steps}, loss {loss:.4f}")
            bar.update_absolute(trainer.step, run.steps, preview)  # hosts ask here too whether to stop
        except comfy.model_management.InterruptProcessingException as error:
            interruption, trainer.stopping = error, True

    try:
        trainer.run(on_step)
    finally:
        trackers.close()
    if interruption is not None:
        log.info("stopped at step %d, with a checkpoint: queue the graph again to go on from there", trainer.step)
        raise interruption


def _preview(sheet: Path | None) -> tuple | None:
    """A sheet as the host's progress bar takes pictures."""
    if sheet is None:
        return None
    with Image.open(sheet) as picture:
        return ("JPEG", picture.convert("RGB"), PREVIEW)


def _finish(trainer: Trainer, plan: Plan) -> Finished:
    sheet = save_sheet(trainer, progress=_ask)
    file = export(trainer, sheet)
    text = plan.preflight.text()
    write_report(trainer.folder, trainer.settings, file, text)
    _runs[trainer.folder.path] = (times_lost(trainer.folder.path), True)
    return Finished(file, sheet, trainer.folder.log_entries(), text, trainer.step)


@contextmanager
def _randomness_of_its_own() -> Iterator[None]:
    """The host's generators are afterwards what they were."""
    python, arrays = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)
