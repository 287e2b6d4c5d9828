"""One run: batches, loss, update, average, checkpoints; the same again, bit for bit, after any interruption.

    trainer = make_trainer(make_plan(read_settings(Path("style.toml"))))     # assemble.py
    with trainer.folder.locked():
        trainer.resume()
        finished = trainer.run()

What a checkpoint holds is `Trainer.state`: weights, average, optimiser, loss scale, place in the data, and the state of
every generator that a step draws from. A step is a function of that state and nothing else (but for [run] minutes,
which asks the clock).
"""

from __future__ import annotations

import dataclasses
import logging
import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn

from ..autoencoder import Autoencoder
from ..latent_format import LatentFormat
from .average import Average
from .buckets import BatchOrder
from .captions import Labels, NoConditions, Texts
from .objective import Objective
from .optim import schedule
from .optimizers import make_optimizer
from .processes import OneProcess
from .run_folder import RunFolder
from .settings import Settings, differences, settings_from, to_toml
from .subject import Subject

__all__ = ["Examples", "LossIsNotFiniteError", "Trainer"]

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Settings that make the weights, or the batches, what they are: a run keeps them for its life.
FIXED = ("[model] start_from", "[model] weights", "[model] config", "[model] preset", "[adapter] ", "[flow] path",
         "[flow] prediction", "[text] encoder", "[text] width", "[text] length", "[run] seed", "[run] batch_size",
         "[optimizer] name", "[model] train", "[model] freeze", "[run] ema")  # fmt: skip
# What else may have changed the examples.
OF_EXAMPLES = ("[text] trigger", "[data] size", "[data] buckets", "[data] bucket_step", "[data] flips", "[data] crops",
               "[data] validation", "[data] categories", "[data] names_as_captions")  # fmt: skip


class LossIsNotFiniteError(RuntimeError):
    """Several losses in a row were no numbers."""


@dataclasses.dataclass
class Examples:
    """What a run learns from.

    Attributes:
        names: of the pictures, as the data call them.
        latents: of each picture its variants (crops, mirrored ones), (c, h, w) or (f, c, h, w) as of the model.
        flipped: of each variant, whether it is mirrored.
        held_out: indices of the pictures that only the validation loss sees.
        format: of the latents. digest: of everything above: a resumed run has to find the same.
    """

    names: list[str]
    latents: list[list[Tensor]]
    flipped: list[list[bool]]
    held_out: list[int]
    format: LatentFormat
    digest: str = ""

    def groups(self, indices: Sequence[int]) -> list[int]:
        """A number for each picture's size."""
        shapes = sorted({tuple(self.latents[i][0].shape) for i in indices})
        return [shapes.index(tuple(self.latents[i][0].shape)) for i in indices]


class Trainer:
    """A run that is ready to begin, or to go on.

    Attributes:
        parts: names and parameters that this process updates, of what learns: all of it but for sharded weights.

    Args:
        settings: of the run.
        subject: the network, on the CPU.
        examples, conditions: what it learns from, index by index.
        adapters: parameters that learn in place of the network's (adapters.py), or None.
        autoencoder: for sheets and the finished file; None in pixel space.
        processes: this one, or this one of many.
        facts: about data and base model, for the finished file's metadata.
        clip: the frozen text encoder of a run that has one, for sheets.

    Raises:
        ValueError: a batch that cannot be divided, nothing that learns, settings that the processes cannot follow.
    """

    def __init__(
        self, settings: Settings, subject: Subject, examples: Examples, conditions: Texts | Labels | NoConditions, *,
        adapters=None, autoencoder: Autoencoder | None = None, processes: OneProcess | None = None,
        facts: dict | None = None, clip=None,
    ) -> None:  # fmt: skip
        run = settings.run
        self.settings, self.subject, self.examples, self.conditions = settings, subject, examples, conditions
        self.adapters, self.autoencoder, self.facts, self.clip = adapters, autoencoder, facts or {}, clip
        self.processes = processes or OneProcess(torch.device("cpu"))
        self.processes.check(settings)
        self.device = self.processes.device
        self.folder = RunFolder(Path(run.folder), run.keep_last, run.keep_best)
        self.net = subject.net
        if adapters is not None:
            self.net.adapter = adapters.module  # moves and is shared among processes with the network
        self.net.to(self.device)
        self.objective = Objective(settings.flow)
        # Before anything keeps views of parameters, as Muon does: it may give them other memory.
        self.prepared: nn.Module = self.processes.prepare(self.net)
        self.parts = self.processes.parts(self.learning())
        self.average = Average(self.parts, run.ema)
        self.optimizer = make_optimizer(self.parts, settings.optimizer, self.processes.shards)
        self.scaler = self.processes.scaler(enabled=run.precision == "fp16")
        held_out = set(examples.held_out)
        self.seen = [i for i in range(len(examples.names)) if i not in held_out]
        self.order = BatchOrder(examples.groups(self.seen), run.batch_size, run.seed)
        self.generator = torch.Generator().manual_seed(run.seed + 1)  # captions, variants, noise and times
        if run.compile:
            self.prepared = torch.compile(self.prepared)
        self.step, self.seconds, self.strange = 0, 0.0, 0
        self.validation: float | None = None  # the last, of the weights after step `validated_at`
        self.validated_at = -1
        self.stopping = False

    def learning(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters of what learns."""
        if self.adapters is not None:
            return [(f"adapter.{i}", p) for i, p in enumerate(self.adapters.parameters())]
        return [(name, p) for name, p in self.net.named_parameters() if p.requires_grad]

    @property
    def progress(self) -> float:
        """Finished part of the run, 0 to 1."""
        run = self.settings.run
        timed = self.seconds / (60 * run.minutes) if run.minutes else 0.0
        return min(1.0, max(self.step / run.steps, timed))

    def next_batch(self) -> tuple[list[int], Tensor, Tensor | None]:
        """Indices of pictures, their latents (b, ...) and their conditions (b, ...)."""
        chosen = [self.seen[i] for i in self.order.next()]
        rolls = torch.rand(len(chosen), generator=self.generator).tolist()
        variants = [int(roll * len(self.examples.latents[i])) for i, roll in zip(chosen, rolls, strict=True)]
        latents = torch.stack([self.examples.latents[i][v] for i, v in zip(chosen, variants, strict=True)])
        flipped = [self.examples.flipped[i][v] for i, v in zip(chosen, variants, strict=True)]
        return chosen, latents, self.conditions.draw(chosen, flipped, self.generator)

    def train_step(self) -> float:
        """One update; returns the loss.

        Raises:
            LossIsNotFiniteError: the last [run] nan_limit losses were no numbers. Such a step changes no weight.
        """
        table = self.settings.optimizer
        self.optimizer.set_lr_scale(schedule(self.progress, table.schedule, table.warmup, table.hold))
        total, chosen = self.gradients()
        if not (math.isfinite(total) and self._clip(table.clip)):
            return self._not_finite(total, chosen)
        self.strange = 0
        for optimizer in self.optimizer.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        self.average.update()
        self.step += 1
        return total

    def gradients(self) -> tuple[float, list[int]]:
        """The loss of the next batch, and which pictures that was; its gradients are where they belong."""
        run = self.settings.run
        self.net.train()
        chosen, latents, condition = self.next_batch()
        x0, t = self.objective.draw(latents, self.generator)
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for part in range(run.accumulate):
            batch = [None if x is None else x.chunk(run.accumulate)[part] for x in (latents, x0, t, condition)]
            x1, noise, times, given = (self._mine(x) for x in batch)
            last = part == run.accumulate - 1
            with nullcontext() if last else self.processes.without_sync(self.prepared):
                loss = self.objective.losses(self._velocity(self.prepared, given), x1, noise, times).mean()
                self.scaler.scale(loss / run.accumulate).backward()
            total += loss.detach() / run.accumulate
        self.processes.take_gradients()
        return self.processes.mean(total), chosen  # waits for the device once, not after each part

    def _mine(self, x: Tensor | None) -> Tensor | None:
        share = self.processes.share(x)
        return None if share is None else share.to(self.device)

    def _velocity(self, net: nn.Module, condition: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
        dtype = DTYPES[self.settings.run.precision]

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
                return net(x, t, condition)

        return velocity

    def _clip(self, limit: float) -> bool:
        """Shorten the gradient to `limit` (0: leave it); False if it is no number, which would spoil every weight.

        With loss scaling the scaler finds that out itself, and halves its scale.
        """
        for optimizer in self.optimizer.optimizers:
            self.scaler.unscale_(optimizer)
        gradients = [p.grad for _, p in self.parts if p.grad is not None]
        norm = self.processes.norm(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))))
        if not math.isfinite(norm):
            return self.scaler.is_enabled()
        if limit and norm > limit:  # few steps: elsewhere nothing has to be multiplied by 1
            torch._foreach_mul_(gradients, limit / norm)
        return True

    def _not_finite(self, value: float, chosen: list[int]) -> float:
        self.strange += 1
        names = ", ".join(self.examples.names[i] for i in chosen[:8]) + ", ..." * (len(chosen) > 8)
        if self.strange >= self.settings.run.nan_limit:
            raise LossIsNotFiniteError(
                f"the loss, {value} at last, or its gradient was no number {self.strange} times in a row at step "
                f"{self.step}, last with {names}: the checkpoint before is good; resume with a lower [optimizer] lr, "
                "or with precision fp32, or look at these pictures"
            )
        log.warning(
            "the loss, %s, or its gradient is no number at step %d, with %s: this batch changes nothing", value,
            self.step, names,
        )  # fmt: skip
        self.step += 1
        return value

    @torch.no_grad()
    def validate(self) -> float | None:
        """The loss of the pictures that are held out, of the averaged weights; None if there are none."""
        if not self.examples.held_out:
            return None
        pairs = [
            (self.examples.latents[i][0][None], self.conditions.fixed(i, self.examples.flipped[i][0]))
            for i in self.examples.held_out
        ]

        def predict(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
            given = None if condition is None else condition.to(self.device).expand(len(x), *condition.shape[1:])
            return self._velocity(self.net, given)(x, t)

        training = self.net.training
        self.net.eval()
        try:
            with self.average.in_place():
                self.validation = self.objective.validation_loss(predict, pairs, self.device)
        finally:
            self.net.train(training)
        self.validated_at = self.step
        return self.validation

    # Checkpoints

    def state(self) -> dict:
        """Everything that the steps to come depend on; all processes have to ask for it, that of the first is whole."""
        whole = self.processes.whole
        return {
            "learning": {name: whole(p.detach(), p) for name, p in self.parts},
            "average": self.average.state_dict(whole), "optimizer": self.optimizer.state_dict(whole),
            "scaler": self.scaler.state_dict(), "step": self.step,
            "seconds": self.seconds, "strange": self.strange, "validation": self.validation,
            "validated_at": self.validated_at,
            "order": self.order.state_dict(), "generator": self.generator.get_state(), "random": _random_states(),
            "settings": dataclasses.asdict(self.settings), "digest": self.examples.digest,
        }  # fmt: skip

    def save(self) -> None:
        """Write a checkpoint; of many processes the first does."""
        state = self.state()
        if self.processes.rank == 0:
            judged = self.validation if self.validated_at == self.step else None
            self.folder.write(state, self.step, judged)
        self.processes.wait()

    def resume(self) -> bool:
        """Go on from the folder's last checkpoint; False if it has none.

        Raises:
            ValueError: the folder belongs to a run that this one cannot go on with, or no checkpoint can be read.
        """
        if self.processes.rank == 0:
            self.folder.remove_partial()
        found = self.folder.read_last(**self.processes.reading)
        if found is None:
            torch.manual_seed(self.settings.run.seed)
            random.seed(self.settings.run.seed)
            numpy.random.seed(self.settings.run.seed)
            return False
        checkpoint, state = found
        self._check_same(settings_from(state["settings"]), state["digest"])
        with torch.no_grad():
            for name, part in self.parts:
                part.copy_(self.processes.part(state["learning"][name], part))
        self.average.load_state_dict(state["average"], self.processes.part)
        self.optimizer.load_state_dict(state["optimizer"], self.processes.part)
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds, self.strange = state["step"], state["seconds"], state["strange"]
        self.validation, self.validated_at = state["validation"], state["validated_at"]
        self.order.load_state_dict(state["order"])
        self.generator.set_state(state["generator"].cpu())
        _set_random_states(state["random"])
        log.info("resumed %s at step %d, %.1f minutes", checkpoint.path, self.step, self.seconds / 60)
        return True

    def _check_same(self, before: Settings, digest: str) -> None:
        changed = differences(before, self.settings)
        other_examples = digest != self.examples.digest
        fixed = (*FIXED, *OF_EXAMPLES) if other_examples else FIXED
        refused = [line for line in changed if line.startswith(fixed)]
        if refused:
            raise ValueError(
                f"{self.folder.path} holds a run with other settings ({'; '.join(refused)}): put them back, or choose "
                "another [run] folder"
            )
        if other_examples:
            raise ValueError(
                f"the pictures of {self.folder.path}, or what goes with them (captions, labels, autoencoder), have "
                "changed since that run began: put them back, or choose "
                "another [run] folder and start from this one's model"
            )
        for line in changed:
            log.warning("changed since the run began: %s", line)

    # The whole run

    def run(self, on_step: Callable[[Trainer, float], None] | None = None) -> bool:
        """Train to the end, or until `stopping` is set; checkpoints on the way, and one at the end of it.

        Args:
            on_step: called after each update with this and its loss; what it does takes no training time.

        Returns:
            Whether the run is finished.
        """
        run = self.settings.run
        if self.processes.rank == 0:
            (self.folder.path / "settings.toml").write_text(to_toml(self.settings), encoding="utf-8")
        saved_at, saved_step = self.seconds, self.step
        stopping = False
        while self.progress < 1 and not stopping:
            started = time.perf_counter()
            loss = self.train_step()
            self.seconds += time.perf_counter() - started
            due = bool(run.save_steps and self.step % run.save_steps == 0)
            if self.examples.held_out and self.step % run.validate_every == 0:
                self.validate()
                best = self.folder.best()
                due = due or (run.keep_best and (best is None or self.validation < best.loss))
            if on_step is not None:
                on_step(self, loss)
            self.seconds, stopping, due = self.processes.largest(self.seconds, self.stopping, due)
            if due or (run.save_every and self.seconds - saved_at > 60 * run.save_every):
                self.save()
                saved_at, saved_step = self.seconds, self.step
        if self.step != saved_step or not self.folder.whole():
            self.save()
        return self.progress >= 1


def _random_states() -> dict:
    """Of torch (stochastic depth, dropout), CUDA, numpy and Python, as torch.save keeps them without pickled code."""
    name, keys, place, has_gauss, gauss = numpy.random.get_state()
    return {
        "torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, torch.from_numpy(keys.astype(numpy.int64)), place, has_gauss, gauss],
        "python": list(random.getstate()),
    }  # fmt: skip


def _set_random_states(states: dict) -> None:
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
    name, keys, place, has_gauss, gauss = states["numpy"]
    numpy.random.set_state((name, keys.cpu().numpy().astype(numpy.uint32), place, has_gauss, gauss))
    version, inner, gauss = states["python"]
    random.setstate((version, tuple(inner), gauss))
