"""`python -m zigma train CONFIG.toml`, and the same under `accelerate launch scripts/finetune.py CONFIG.toml`."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from .assemble import Plan, make_plan, make_trainer
from .outputs import export, save_sheet
from .preflight import estimate
from .processes import OneProcess, find_processes
from .progress import progress_bars
from .report import write_report
from .run_folder import RunFolder
from .settings import Settings
from .trackers import Trackers
from .trainer import Trainer

__all__ = ["shipped_configurations", "train"]

log = logging.getLogger(__name__)


def shipped_configurations() -> dict[str, Path]:
    """Name -> file of the configurations that come with the pack."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "configs").glob("*.toml"))}


def train(
    settings: Settings, *, dry_run: bool = False, processes: OneProcess | None = None, show: bool = True
) -> Iterator[str]:
    """A whole run, line by line: the report on the data, then what was written where.

    Args:
        settings: of the run; a folder that holds it already is gone on with.
        dry_run: stop after the report.
        processes: this process, or this one of many; None asks the environment.
        show: draw progress bars.

    Raises:
        ValueError: there are problems with the data; nothing was begun. KeyboardInterrupt: after SIGINT or SIGTERM,
            when the checkpoint is written.
    """
    processes = processes or find_processes(settings.run.device)
    first = processes.rank == 0
    # Before the data are looked at: a second run in the folder is refused at once.
    holding = RunFolder(Path(settings.run.folder)).locked() if first and not dry_run else nullcontext()
    with holding:
        yield from _whole_run(settings, dry_run, processes, show)


def _whole_run(settings: Settings, dry_run: bool, processes, show: bool) -> Iterator[str]:
    first = processes.rank == 0
    with progress_bars(show and first) as progress:
        plan = make_plan(settings, progress)
        if plan.preflight.problems and not dry_run:
            yield plan.preflight.text()
            raise ValueError(plan.preflight.problems[0])
        trainer = make_trainer(plan, processes, progress) if not plan.preflight.problems else None
    lines = trainer_lines(plan, trainer) if trainer is not None else []  # a step is measured by all processes together
    if first:
        yield plan.preflight.text(lines)
    if dry_run:
        return
    trainer.resume()
    trackers = Trackers(trainer.folder, settings.run, dataclasses.asdict(settings), show) if first else None
    try:
        finished = _run(trainer, trackers)
        sheet = save_sheet(trainer) if finished else None
        if sheet is not None and trackers is not None:
            trackers.sheet(trainer.step, sheet)
    finally:
        if trackers is not None:
            trackers.close()
    if not finished and not first:
        return
    if not finished:
        yield f"stopped at step {trainer.step}, with a checkpoint: the same command goes on from there"
        raise KeyboardInterrupt
    path = export(trainer, sheet)
    if not first:
        return
    yield str(write_report(trainer.folder, settings, path, plan.preflight.text()))
    yield str(path)


def trainer_lines(plan: Plan, trainer: Trainer) -> list[str]:
    """Size of the model, time and memory, as measured by one step that changes nothing."""
    run = plan.settings.run
    learning = sum(p.numel() for _, p in trainer.learning())
    whole = sum(p.numel() for p in trainer.net.parameters())
    words = trainer.net.text_encoder
    lines = [
        f"Model: {whole / 1e6:.2f} M parameters, {learning / 1e6:.3g} M learn; condition: {trainer.subject.kind}"
        + (f", {len(words.ids)} words" if words is not None else "")
        + f"; latents of {' x '.join(map(str, trainer.examples.latents[0][0].shape))}; {run.precision} on "
        f"{trainer.device}"
    ]
    seconds, memory = measured_step(trainer)
    state = 4 * learning * 4  # two moments and an average beside the weights; what is frozen is not kept again
    done = max((checkpoint.step for checkpoint in trainer.folder.whole()), default=0)
    return lines + estimate(
        seconds, run.steps, done=done, steps_per_epoch=trainer.order.steps_per_epoch, memory=memory,
        available=_memory_of(trainer.device), disk=state * (run.keep_last + run.keep_best),
        free=shutil.disk_usage(next(path for path in trainer.folder.path.absolute().parents if path.is_dir())).free,
    )  # fmt: skip


def measured_step(trainer: Trainer) -> tuple[float, int]:
    """(seconds, bytes) of a step's loss and gradients, the second of two; weights and generators stay as they are."""
    order, generator = copy.deepcopy(trainer.order.state_dict()), trainer.generator.get_state()
    seconds = 0.0
    with torch.random.fork_rng(devices=[]):
        if trainer.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            started = time.perf_counter()
            trainer.gradients()
            seconds = time.perf_counter() - started
    trainer.order.load_state_dict(order)
    trainer.generator.set_state(generator)
    trainer.optimizer.zero_grad()
    moments = 8 * sum(p.numel() for _, p in trainer.parts)
    return seconds, _peak(trainer.device) + moments


def _memory_of(device: torch.device) -> int | None:
    """Bytes that it has, or None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def _peak(device: torch.device) -> int:
    """Bytes in use at most so far: on the GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
        import sys

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    except ImportError:  # Windows
        return 0


def _run(trainer: Trainer, trackers: Trackers | None) -> bool:
    """Train, with everything that happens on the way; the first process has trackers."""
    samples = trainer.settings.samples
    last_sheet = time.monotonic()

    def on_step(trainer: Trainer, loss: float) -> None:
        nonlocal last_sheet
        if trackers is not None:
            trackers.follow(trainer, loss)
        if samples.every and any(trainer.processes.largest(time.monotonic() - last_sheet > 60 * samples.every)):
            try:
                path = save_sheet(trainer)
                if path is not None and trackers is not None:
                    trackers.sheet(trainer.step, path)
            except (OSError, ValueError, RuntimeError) as error:  # what has been learnt matters more
                log.warning("no pictures at step %d, the run goes on: %s", trainer.step, error)
            last_sheet = time.monotonic()

    with _signals(trainer):
        return trainer.run(on_step)


@contextmanager
def _signals(trainer: Trainer) -> Iterator[None]:
    """The first SIGINT or SIGTERM ends the run after its step, with a checkpoint; the next one at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame) -> None:
        if trainer.stopping:
            raise KeyboardInterrupt
        log.warning("stopping after this step, with a checkpoint; once more stops at once")
        trainer.stopping = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
