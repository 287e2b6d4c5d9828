"""One process or many, behind one face.

Every process draws the same batch, noise and times, and computes its share of them; the gradients are averaged. So a
run's batches, and its loss curve, are those of one process with the same batch size, however many share the work.

Many processes are a matter of accelerate: `accelerate launch scripts/finetune.py CONFIG.toml`.
"""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

__all__ = ["ManyProcesses", "OneProcess", "find_processes", "pick_device"]

log = logging.getLogger(__name__)


def pick_device(name: str) -> torch.device:
    """The device of a [run] table: "auto" is the best that is there.

    Raises:
        ValueError: torch cannot use it here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # a build without CUDA says so in an AssertionError
        reason = str(error).splitlines()[0]
        raise ValueError(f'[run] device is {name!r}, which cannot be used here ({reason}): try "cpu"') from error
    return torch.device(name)


def find_processes(device: str) -> OneProcess | ManyProcesses:
    """Many, if a launcher says that this process is one of several."""
    return ManyProcesses() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else OneProcess(pick_device(device))


class OneProcess:
    """All the work is this process's."""

    rank, count = 0, 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def prepare(self, net: nn.Module) -> nn.Module:
        """The network whose forward is called in training."""
        return net

    def share(self, batch: Tensor | None) -> Tensor | None:
        """This process's part of a batch (b, ...)."""
        return batch

    def without_sync(self, net: nn.Module) -> AbstractContextManager:
        """Within it gradients of a prepared network stay where they are."""
        return nullcontext()

    def mean(self, value: Tensor) -> float:
        """Of one number of each process."""
        return value.item()

    def largest(self, *values: float) -> list[float]:
        """Of each value the largest that any process has: what depends on a clock or a signal has to be agreed on."""
        return list(values)

    def wait(self) -> None:
        """Until all processes are here."""


class ManyProcesses:
    """This process is one of several, started by `accelerate launch` (or torchrun).

    Raises:
        ImportError: accelerate is not installed.
    """

    def __init__(self) -> None:
        try:
            from accelerate import Accelerator
        except ImportError as error:
            raise ImportError("training with several processes needs accelerate: pip install accelerate") from error
        self._accelerator = Accelerator(cpu=not torch.cuda.is_available())
        if str(self._accelerator.distributed_type).endswith("FSDP"):
            raise ValueError("sharded weights (FSDP) are not supported: choose MULTI_GPU in `accelerate config`")
        self.device = self._accelerator.device
        self.rank, self.count = self._accelerator.process_index, self._accelerator.num_processes
        log.info("process %d of %d, on %s", self.rank, self.count, self.device)

    def prepare(self, net: nn.Module) -> nn.Module:
        """As of one process."""
        return self._accelerator.prepare_model(net)

    def share(self, batch: Tensor | None) -> Tensor | None:
        """As of one process; ValueError for a batch that the processes do not divide."""
        if batch is None:
            return None
        if len(batch) % self.count:
            raise ValueError(
                f"{len(batch)} pictures at once do not divide among {self.count} processes: [run] batch_size has to be "
                "a multiple of accumulate times the number of processes"
            )
        return batch.chunk(self.count)[self.rank]

    def without_sync(self, net: nn.Module) -> AbstractContextManager:
        """As of one process."""
        return self._accelerator.no_sync(net)

    def mean(self, value: Tensor) -> float:
        """As of one process."""
        return self._accelerator.reduce(value.detach().float(), "mean").item()

    def largest(self, *values: float) -> list[float]:
        """As of one process."""
        gathered = self._accelerator.gather(torch.tensor([values], dtype=torch.float64, device=self.device))
        return gathered.amax(0).tolist()

    def wait(self) -> None:
        """As of one process."""
        self._accelerator.wait_for_everyone()
