"""One process or many, behind one face.

Every process draws the same batch, noise and times, and computes its share of them; the gradients are averaged. So a
run's batches, and its loss curve, are those of one process with the same batch size, however many share the work.

Many processes are a matter of accelerate: `accelerate launch scripts/finetune.py CONFIG.toml`. Each holds all weights
(DDP), or its part of them where accelerate's configuration chooses FSDP (sharded.py).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .adapters import Adapters
    from .settings import Settings
    from .subject import Conditioned

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


def find_processes(device: str) -> OneProcess:
    """Many, if a launcher says that this process is one of several; with sharded weights, if accelerate says so.

    Raises:
        ValueError: torch cannot use the device, or accelerate is configured for another way to share the work.
        ImportError: accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return OneProcess(pick_device(device))
    _refuse_other_ways()
    if _is_chosen("FSDP"):
        from .sharded import ShardedProcesses

        return ShardedProcesses()
    return ManyProcesses()


def _is_chosen(way: str) -> bool:
    """By accelerate's configuration, of which `accelerate launch` makes variables."""
    return os.environ.get(f"ACCELERATE_USE_{way}", "").lower() == "true"


def _refuse_other_ways() -> None:
    for way, name in (("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron-LM")):
        if _is_chosen(way):
            raise ValueError(
                f"accelerate is configured for {name}, expected MULTI_GPU or FSDP version 2: choose one of them in "
                "`accelerate config`"
            )
    sizes = {
        way: int(os.environ.get(f"PARALLELISM_CONFIG_{way.upper()}_SIZE", "1"))
        for way in ("dp_replicate", "dp_shard", "tp", "cp", "sp")
    }
    chosen = [way for way, size in sizes.items() if size > 1]
    if len(chosen) > 1 or (chosen and not chosen[0].startswith("dp_")):
        asked = " and ".join(f"{way}_size {sizes[way]}" for way in chosen)
        raise ValueError(
            f"parallelism_config of accelerate's configuration has {asked}, expected none of them or dp_shard_size "
            "alone: all processes either share out the pictures (MULTI_GPU) or the weights (FSDP version 2)"
        )


class OneProcess:
    """All the work is this process's; and what a trainer asks of any process.

    Attributes:
        rank, count: which of how many. device: where this one computes.
        shards: who has which part of the weights, where they are shared out (sharded.py); None: everybody has all.
    """

    rank, count = 0, 1
    shards = None

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def check(self, settings: Settings) -> None:
        """ValueError for settings that these processes cannot follow."""

    def prepare(self, net: nn.Module) -> nn.Module:
        """The network whose forward is called in training."""
        return net

    def parts(self, named: Sequence[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
        """What this process updates of parameters of the prepared network; shares their memory."""
        return list(named)

    def take_gradients(self) -> None:
        """After the last backward pass of a step: bring the gradients to where the parts are."""

    def whole(self, value: Tensor, part: nn.Parameter) -> Tensor:
        """Of a value for each number of a part, that of the whole parameter, for a checkpoint of the first process."""
        return value

    def part(self, value: Tensor, part: nn.Parameter) -> Tensor:
        """Of a value for each number of a whole parameter, what belongs to this process's part."""
        return value

    def whole_network(self, net: Conditioned, adapters: Adapters | None) -> tuple[Conditioned, Adapters | None] | None:
        """A network that the first process can use alone, with its adapters; elsewhere None.

        All processes have to ask for it. It is for reading: the weights may be those of `net`, or copies.
        """
        return (net, adapters) if self.rank == 0 else None

    def scaler(self, enabled: bool) -> torch.amp.GradScaler:
        """Of the loss, for float16."""
        return torch.amp.GradScaler(self.device.type, enabled=enabled)

    @property
    def reading(self) -> dict[str, Any]:
        """How checkpoints are read: arguments of RunFolder.read_last."""
        return {"device": self.device}

    def share(self, batch: Tensor | None) -> Tensor | None:
        """This process's part of a batch (b, ...)."""
        return batch

    def without_sync(self, net: nn.Module) -> AbstractContextManager:
        """Within it gradients of a prepared network stay where they are."""
        return nullcontext()

    def mean(self, value: Tensor) -> float:
        """Of one number of each process."""
        return value.item()

    def norm(self, value: Tensor) -> float:
        """Of a vector, from the norm of this process's part of it."""
        return value.item()

    def largest(self, *values: float) -> list[float]:
        """Of each value the largest that any process has: what depends on a clock or a signal has to be agreed on."""
        return list(values)

    def wait(self) -> None:
        """Until all processes are here."""


class ManyProcesses(OneProcess):
    """This process is one of several, started by `accelerate launch` (or torchrun), each with all weights.

    Raises:
        ImportError: accelerate is not installed.
    """

    def __init__(self) -> None:
        try:
            from accelerate import Accelerator
        except ImportError as error:
            raise ImportError("training with several processes needs accelerate: pip install accelerate") from error
        self._accelerator = Accelerator(cpu=not torch.cuda.is_available())
        super().__init__(self._accelerator.device)
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
