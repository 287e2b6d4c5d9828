"""Where a run's figures go: a progress bar, the log in its folder, TensorBoard and wandb where they are asked for."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .run_folder import RunFolder
from .tables import RunTable

if TYPE_CHECKING:
    from .trainer import Trainer

__all__ = ["Trackers"]

log = logging.getLogger(__name__)

ENTRIES = 400  # lines of log.jsonl in a whole run, about


class Trackers:
    """Everything that follows a run.

    Args:
        folder, table: of the run.
        progress: whether to draw a bar.

    Raises:
        ImportError: a package that was asked for is not installed.
    """

    def __init__(self, folder: RunFolder, table: RunTable, settings: dict[str, Any], progress: bool = True) -> None:
        from tqdm import tqdm

        self.folder, self.table = folder, table
        self.every = max(1, table.steps // ENTRIES)
        self._losses: list[float] = []
        self._bar = tqdm(total=table.steps, unit="step", desc="training", disable=not progress, mininterval=0.5)
        self._tensorboard = self._wandb = None
        if table.tensorboard:
            self._tensorboard = _writer(folder.path / "tensorboard")
        if table.wandb:
            self._wandb = _wandb_run(folder.path, settings)

    def follow(self, trainer: Trainer, loss: float) -> None:
        """After an update: its loss, and the validation loss if there is a new one."""
        self._step(trainer.step, loss, trainer.seconds / 60, trainer.optimizer.optimizers[-1].param_groups[0]["lr"])
        if trainer.validated_at == trainer.step:
            self._write({"step": trainer.step, "validation_loss": trainer.validation})

    def _step(self, step: int, loss: float, minutes: float, lr: float) -> None:
        self._losses.append(loss)
        speed = step * self.table.batch_size / max(60 * minutes, 1e-9)
        self._bar.set_postfix(loss=f"{sum(self._losses[-50:]) / len(self._losses[-50:]):.4f}", img_s=f"{speed:.1f}")
        self._bar.update(step - self._bar.n)
        if step % self.every == 0 or step >= self.table.steps:
            finite = [value for value in self._losses if value == value]
            mean = sum(finite) / len(finite) if finite else None
            self._losses = []
            self._write({"step": step, "minutes": round(minutes, 3), "loss": mean, "lr": lr})

    def sheet(self, step: int, path: Path) -> None:
        """After a sample sheet."""
        if self._tensorboard is not None:
            import numpy
            from PIL import Image

            with Image.open(path) as picture:
                self._tensorboard.add_image("samples", numpy.asarray(picture.convert("RGB")), step, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            self._wandb.log({"samples": wandb.Image(str(path))}, step=step)

    def _write(self, entry: dict[str, Any]) -> None:
        self.folder.log_entry(entry)
        numbers = {key: value for key, value in entry.items() if key != "step" and value is not None}
        if self._tensorboard is not None:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(key, value, entry["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=entry["step"])

    def close(self) -> None:
        """After the run."""
        self._bar.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _writer(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("[run] tensorboard needs its package: pip install tensorboard, or set it to false") from error
    return SummaryWriter(folder)


def _wandb_run(folder: Path, settings: dict[str, Any]):
    try:
        import wandb
    except ImportError as error:
        raise ImportError("[run] wandb needs its package: pip install wandb, or set it to false") from error
    # One run there for one run here, however often it is resumed.
    kept = folder / "wandb_id"
    name = kept.read_text(encoding="utf-8").strip() if kept.is_file() else ""
    run = wandb.init(
        project="zigma", name=folder.name, id=name or None, dir=str(folder), config=settings, resume="allow"
    )
    kept.write_text(run.id + "\n", encoding="utf-8")
    return run
