"""The folder of a run: one process at a time, checkpoints that are whole or not there, and what to keep of them.

    runs/style/
        settings.toml           what the run was started with, defaults included
        lock                    held by the process that trains here
        log.jsonl               one line for each entry of the log
        checkpoints/
            0000500/            state.pt, complete.json
            0001000.partial/    of a process that was killed while it wrote: never read, removed by the next one
        samples/                sheets
        model.safetensors       the finished model (or lora.safetensors)

A checkpoint is written into a folder of another name, flushed to the disk, given its marker, and only then renamed:
whatever is killed when, the last whole one stands. The marker holds the size and the SHA-256 of the state, so that a
file that the disk has lost a part of is found out before it is used, and the checkpoint before it serves instead.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

__all__ = ["Checkpoint", "RunFolder", "RunInUseError"]

log = logging.getLogger(__name__)

STATE, MARKER = "state.pt", "complete.json"


class RunInUseError(RuntimeError):
    """Another process trains in this folder."""


class Checkpoint:
    """A whole checkpoint on the disk.

    Attributes:
        path: its folder. step: updates that it stands after. loss: validation loss at that step, or None.
    """

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path, self.facts = path, facts
        self.step: int = facts["step"]
        self.loss: float | None = facts.get("validation_loss")

    def read(self, device: torch.device | str = "cpu", mmap: bool = False) -> dict[str, Any]:
        """The state; ValueError if the file is not what was written. mmap: tensors stay in the file until used."""
        file = self.path / STATE
        if not file.is_file() or file.stat().st_size != self.facts["bytes"] or _digest(file) != self.facts["sha256"]:
            raise ValueError(f"{file} is not as it was written: the checkpoint before it has to serve")
        return torch.load(file, map_location=device, weights_only=True, mmap=mmap)


class RunFolder:
    """The folder of one run.

    Args:
        path: made if it is not there.
        keep_last: how many checkpoints stay. keep_best: whether that of the least validation loss stays too.
    """

    def __init__(self, path: Path, keep_last: int = 2, keep_best: bool = True) -> None:
        self.path, self.keep_last, self.keep_best = Path(path), keep_last, keep_best
        self.path.mkdir(parents=True, exist_ok=True)
        self._unusable: set[Path] = set()  # what was found damaged: it counts for nothing, and stays to be looked at
        self.checkpoints = self.path / "checkpoints"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process.

        The system lets go of the lock when the process ends, however it ends: a lock of a killed run is none.

        Raises:
            RunInUseError: another process holds it.
        """
        handle = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _take(handle):
                try:
                    holder = os.read(handle, 100).decode(errors="replace").strip() or "another process"
                except OSError:  # Windows lets nobody read what is locked
                    holder = "another process"
                raise RunInUseError(
                    f"{self.path} is in use by {holder}: stop that run, or give this one another [run] folder"
                )
            os.ftruncate(handle, 0)
            os.lseek(handle, 0, os.SEEK_SET)
            os.write(handle, f"process {os.getpid()}".encode())
            yield
        finally:
            os.close(handle)  # which lets go of it

    def write(self, state: dict[str, Any], step: int, validation_loss: float | None = None) -> Checkpoint:
        """Add a checkpoint, then remove those that need not stay.

        Raises:
            OSError: the disk is full, say; nothing that was there is lost.
        """
        self.checkpoints.mkdir(exist_ok=True)
        final = self.checkpoints / f"{step:07d}"
        partial = final.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            with (partial / STATE).open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            facts = {
                "step": step, "validation_loss": validation_loss, "bytes": (partial / STATE).stat().st_size,
                "sha256": _digest(partial / STATE),
            }  # fmt: skip
            with (partial / MARKER).open("w", encoding="utf-8") as marker:
                json.dump(facts, marker)
                marker.flush()
                os.fsync(marker.fileno())
        except (OSError, RuntimeError) as error:  # torch's writer, on a full disk, raises the latter
            shutil.rmtree(partial, ignore_errors=True)
            reason = (isinstance(error, OSError) and error.strerror) or error
            raise OSError(
                getattr(error, "errno", errno.EIO),
                f"the checkpoint of step {step} could not be written ({reason}); those "
                "before it are as they were: make room, and resume", str(final),
            ) from error  # fmt: skip
        shutil.rmtree(final, ignore_errors=True)  # of the same step: a run that saves at its end saves twice
        os.replace(partial, final)
        self._unusable.discard(final)
        _sync_folder(self.checkpoints)
        self._tidy()
        return Checkpoint(final, facts)

    def whole(self) -> list[Checkpoint]:
        """All whole checkpoints by step; those whose marker is damaged are named and left out."""
        found = []
        for folder in self._numbered():
            try:
                found.append(Checkpoint(folder, json.loads((folder / MARKER).read_text(encoding="utf-8"))))
            except (OSError, ValueError, KeyError, TypeError) as error:
                log.warning("%s is left out: its marker cannot be read (%s)", folder, error)
        return sorted(found, key=lambda checkpoint: checkpoint.step)

    def _numbered(self) -> list[Path]:
        folders = sorted(self.checkpoints.glob("*")) if self.checkpoints.is_dir() else []
        return [folder for folder in folders if re.fullmatch(r"\d+", folder.name)]

    def read_last(
        self, device: torch.device | str = "cpu", mmap: bool = False
    ) -> tuple[Checkpoint, dict[str, Any]] | None:
        """The last checkpoint whose state is as it was written, with the state; None if there is none.

        Raises:
            ValueError: there are checkpoints, and none of them can be read: starting anew would hide the loss.
        """
        checkpoints = self.whole()
        for checkpoint in reversed(checkpoints):
            try:
                return checkpoint, checkpoint.read(device, mmap)
            except Exception as error:  # whatever a damaged file makes torch.load raise
                log.warning("%s cannot be used: %s", checkpoint.path, error)
                self._unusable.add(checkpoint.path)
        there = self._numbered()
        if there:
            raise ValueError(
                f"none of the {len(there)} checkpoints in {self.checkpoints} can be read: put one back from a "
                "copy, or choose another [run] folder"
            )
        return None

    def best(self) -> Checkpoint | None:
        """The one of the least validation loss, of those that have one."""
        judged = [one for one in self.whole() if one.loss is not None and one.path not in self._unusable]
        return min(judged, key=lambda checkpoint: checkpoint.loss) if judged else None

    def remove_partial(self) -> None:
        """Remove what a killed process left half written."""
        for folder in self.checkpoints.glob("*.partial") if self.checkpoints.is_dir() else ():
            log.warning("removed %s, which was never finished", folder)
            shutil.rmtree(folder, ignore_errors=True)

    def _tidy(self) -> None:
        checkpoints = [checkpoint for checkpoint in self.whole() if checkpoint.path not in self._unusable]
        kept = {checkpoint.path for checkpoint in checkpoints[-self.keep_last :]}
        best = self.best() if self.keep_best else None
        if best is not None:
            kept.add(best.path)
        for checkpoint in checkpoints:
            if checkpoint.path not in kept:
                shutil.rmtree(checkpoint.path, ignore_errors=True)

    def log_entry(self, entry: dict[str, Any]) -> None:
        """Add a line to log.jsonl."""
        with (self.path / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def log_entries(self) -> list[dict[str, Any]]:
        """The lines of log.jsonl; a last line that was cut off is left out.

        A run that was killed goes on before the end of its log: of a step that stands there twice, the later counts.
        """
        path = self.path / "log.jsonl"
        entries: list[dict[str, Any]] = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            while entries and entries[-1]["step"] >= entry["step"] and entries[-1].keys() == entry.keys():
                entries.pop()
            entries.append(entry)
        return entries


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _take(handle: int) -> bool:
    """Lock an open file for this process, if nobody holds it."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sync_folder(path: Path) -> None:
    """Flush a folder's entries, where the system can."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
