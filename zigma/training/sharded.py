"""Sharded weights (FSDP): each process keeps some rows of every weight, of its gradient and of the optimiser's state.

torch's fully_shard, the second version of FSDP, brings the rows of a block together while the block computes, and
leaves the sums of the gradients' rows where the rows are. Between two steps every parameter is, for this process, a
plain tensor: its *part*. Optimiser, average, clipping and loss scaling work on parts as on any parameters; what needs
whole ones (checkpoints, Muon, a sheet of samples) asks `Shards`.

Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", arXiv 2304.11277.

Glossary: n rows of a parameter (its first dimension)   rows = ceil(n / processes), of which the last processes may have
fewer, or none
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..model import ZigMa
from ..text import WordTextEncoder
from .adapters import Adapters
from .processes import ManyProcesses
from .settings import Settings
from .subject import Conditioned

__all__ = ["ShardedProcesses", "Shards"]

log = logging.getLogger(__name__)


class ShardedProcesses(ManyProcesses):
    """This process is one of several, each with its part of the weights.

    Of accelerate's settings for FSDP only reshard_after_forward matters: what is sharded together follows from the
    model, checkpoints always hold whole tensors, and autocast ([run] precision) is the mixed precision.

    accelerate's own wrapping is not used: it knows FSDP on accelerators only, not between processes on a CPU, and wraps
    modules by their class, where keys and values of all layers are needed before the first layer.

    Raises:
        ImportError: accelerate is not installed, or torch is too old.
        ValueError: accelerate is configured for something that is not supported.
    """

    def __init__(self) -> None:
        self._reshard = _plugin().reshard_after_forward
        super().__init__()
        if self._accelerator.mixed_precision != "no":
            log.warning("mixed_precision of accelerate's configuration is not used: [run] precision says it")
        self.shards = Shards(self.rank, self.count)
        log.info("weights are sharded (FSDP): part %d of %d of each is here", self.rank + 1, self.count)

    def check(self, settings: Settings) -> None:
        """As of one process."""
        if settings.run.compile:
            raise ValueError("[run] compile and sharded weights (FSDP) do not go together: set compile to false")
        if settings.optimizer.name == "adamw8bit":
            raise ValueError(
                "[optimizer] name 'adamw8bit' keeps its state in blocks of numbers, which sharded weights (FSDP) would "
                "cut: take 'adamw'"
            )

    def prepare(self, net: Conditioned) -> Conditioned:
        """As of one process: the same network, its parameters now DTensors but within its forward.

        Its own `forward` is the only way to use it: the model within has its weights only there.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        # Of each block: its outputs are views, which nothing changes in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
        mesh = init_device_mesh(self.device.type, (self.count,))
        for block in net.model.blocks:
            if block.msa is not None:  # keys and values of all layers are made before the first one computes
                for layer in (block.msa.to_k, block.msa.to_v):
                    fully_shard(layer, mesh=mesh, reshard_after_forward=self._reshard)
            fully_shard(block, mesh=mesh, reshard_after_forward=self._reshard)
        fully_shard(net, mesh=mesh)

        def let_go(*_) -> None:
            # What stays whole for a backward pass that does not come would not see the weights change.
            if not torch.is_grad_enabled():
                for module in net.modules():
                    if isinstance(module, FSDPModule):
                        module.reshard()

        net.register_forward_hook(let_go)
        return net

    def parts(self, named: Sequence[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
        """As of one process."""
        return [(name, self.shards.part_of(parameter)) for name, parameter in named]

    def take_gradients(self) -> None:
        """As of one process."""
        self.shards.take_gradients()

    def whole(self, value: Tensor, part: nn.Parameter) -> Tensor:
        """As of one process: on the CPU of the first; elsewhere nothing."""
        return self.shards.first(value, part)

    def part(self, value: Tensor, part: nn.Parameter) -> Tensor:
        """As of one process."""
        return self.shards.part(value, part)

    def whole_network(self, net: Conditioned, adapters: Adapters | None) -> tuple[Conditioned, Adapters | None] | None:
        """As of one process: a plain copy, on the first process's device."""
        from torch.distributed.tensor import DTensor

        def gathered(value: Tensor) -> Tensor:
            if not isinstance(value, DTensor):  # a constant beside an adapter's parameters
                return value
            return self.shards.gather(value.detach().to_local(), value.shape)

        weights = {name: gathered(p) for name, p in net.named_parameters() if not name.startswith("adapter.")}
        changes = {} if adapters is None else {key: gathered(v) for key, v in adapters.state_dict().items()}
        self.wait()  # the others may end now, and what they have sent has to have arrived
        if self.rank != 0:
            return None
        copy = _plain(net, weights)
        return copy, None if adapters is None else adapters.on_another(copy.model, changes)

    def scaler(self, enabled: bool) -> torch.amp.GradScaler:
        """As of one process: infinities in the parts of others count."""
        return _SharedScaler(self.device.type, enabled=enabled)

    @property
    def reading(self) -> dict[str, Any]:
        """As of one process: no process holds all of a file."""
        return {"device": "cpu", "mmap": True}

    def without_sync(self, net: nn.Module) -> AbstractContextManager:
        """As of one process, but gradients are summed each time: whole ones would take the memory that is saved."""
        return nullcontext()

    def norm(self, value: Tensor) -> float:
        """As of one process."""
        squares = value.detach().double().square()
        dist.all_reduce(squares)
        return squares.sqrt().item()


class Shards:
    """Who has which rows of which parameter.

    Everything but `part` and `take_gradients` is done by all processes at once.
    """

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count
        self._owners: dict[nn.Parameter, nn.Parameter] = {}  # part -> sharded parameter

    def part_of(self, parameter: nn.Parameter) -> nn.Parameter:
        """This process's rows of a sharded parameter, as a plain parameter that shares their memory."""
        part = nn.Parameter(parameter.detach().to_local(), requires_grad=parameter.requires_grad)
        self._owners[part] = parameter
        return part

    def take_gradients(self) -> None:
        """Gradients from the sharded parameters to their parts."""
        for part, parameter in self._owners.items():
            part.grad = None if parameter.grad is None else parameter.grad.to_local()
            parameter.grad = None

    def everywhere(self, value: Tensor, part: nn.Parameter) -> Tensor:
        """The whole, on all processes, of values for each number of a part (of its shape, or flattened).

        What has no dimensions is one value for all.
        """
        if value.dim() == 0:
            return value
        shape = self._owners[part].shape
        padded = self._padded(value, shape)
        gathered = [torch.empty_like(padded) for _ in range(self.count)]
        dist.all_gather(gathered, padded)
        return torch.cat(gathered)[: shape[0]].reshape(-1, *value.shape[1:])

    def first(self, value: Tensor, part: nn.Parameter) -> Tensor:
        """As `everywhere`, on the CPU of the first process; elsewhere nothing."""
        return value if value.dim() == 0 else self.gather(value, self._owners[part].shape).cpu()

    def gather(self, value: Tensor, shape: torch.Size) -> Tensor:
        """The whole of this process's rows of a tensor of `shape`, on the first process; elsewhere nothing."""
        padded = self._padded(value, shape)
        gathered = [torch.empty_like(padded) for _ in range(self.count)] if self.rank == 0 else None
        dist.gather(padded, gathered)
        if gathered is None:
            return value.new_empty(0)
        return torch.cat(gathered)[: shape[0]].reshape(-1, *value.shape[1:])

    def part(self, value: Tensor, part: nn.Parameter) -> Tensor:
        """This process's rows of what `everywhere` gives; a copy."""
        if value.dim() == 0:
            return value.clone()
        n = self._owners[part].shape[0]
        rows = -(-n // self.count)
        mine = value.reshape(n, -1)[self.rank * rows : (self.rank + 1) * rows]
        return mine.reshape(len(mine) * len(value) // n, *value.shape[1:]).clone()

    def _padded(self, value: Tensor, shape: torch.Size) -> Tensor:
        """(rows, ...) with zeros below what a process has less than others."""
        n, width = shape[0], shape.numel() // shape[0]
        padded = value.new_zeros(-(-n // self.count), width)
        padded.view(-1)[: value.numel()] = value.reshape(-1)
        return padded


class _SharedScaler(torch.amp.GradScaler):
    """A GradScaler whose processes skip a step together.

    torch's ShardedGradScaler does the same, but not for fused optimisers: it hands them what was found as a (1,).
    """

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        super().unscale_(optimizer)
        if self.is_enabled():
            for found in self._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values():
                dist.all_reduce(found, dist.ReduceOp.MAX)


def _plain(net: Conditioned, weights: dict[str, Tensor]) -> Conditioned:
    """An equal network without shards, in evaluation mode, that has these tensors for weights."""
    model = ZigMa(net.model.config, net.model.token_orders, device="meta")
    encoder = None if net.text_encoder is None else WordTextEncoder(net.text_encoder.config, device="meta")
    copy = Conditioned(model, encoder)
    copy.load_state_dict(weights, assign=True)
    return copy.eval().requires_grad_(False)


def _plugin():
    """accelerate's settings for FSDP, of its configuration or the variables FSDP_..., if they are supported."""
    try:
        from accelerate.utils import FullyShardedDataParallelPlugin
    except ImportError as error:
        raise ImportError("training with several processes needs accelerate: pip install accelerate") from error
    try:
        from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"sharded weights (FSDP) need torch 2.6 or newer, and this is {torch.__version__}: pip install -U torch, "
            "or choose MULTI_GPU in `accelerate config`"
        ) from error
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"accelerate is configured for version {plugin.fsdp_version} of FSDP, expected version 2: choose it in "
            "`accelerate config`, or give `accelerate launch` --fsdp_version 2"
        )
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError("fsdp_offload_params of accelerate's configuration is not supported: set it to false")
    if plugin.activation_checkpointing:
        raise ValueError(
            "fsdp_activation_checkpointing of accelerate's configuration is not supported: set it to false, and "
            "[run] checkpointing to true"
        )
    return plugin
