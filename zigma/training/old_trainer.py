"""Training a text-conditioned ZigMa: flow loss, dropped captions, an average of the weights, exact resumption.

    python -m zigma train --data emoji.safetensors --autoencoder vae.safetensors --out runs/emoji --minutes 60

A run lives in its folder: `checkpoint.pt` (everything that resuming needs), `log.jsonl`, `samples/`, and the finished
`model.safetensors`, which the loader node and `python -m zigma sample --model` read without being told anything.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..autoencoder import TinyAutoencoder
from ..checkpoint import Bundle, read_checkpoint, save_checkpoint
from ..conditions import ConditionFacts
from ..flow import PATHS, choose, flow_loss
from ..model import ZigMa
from ..sampling import SamplingSettings, sample
from ..sheet import enlarge, labelled_sheet, save_picture, to_pictures
from ..text import TextEncoderConfig, WordTextEncoder
from .data import EncodedPictures
from .optim import MatrixMuon, OptimizerGroup, cosine_with_warmup
from .recipe import Recipe

__all__ = ["Conditioned", "Trainer"]

log = logging.getLogger(__name__)

# The blocks' projections act as matrices on every token; the other matrices are embeddings or follow the condition.
MUON_WEIGHTS = ("in_proj.weight", "out_proj.weight", "to_q.weight", "to_v.weight", "to_out.0.weight")


class Conditioned(nn.Module):
    """The denoiser and the text encoder that is trained with it."""

    def __init__(self, model: ZigMa, text_encoder: WordTextEncoder) -> None:
        super().__init__()
        self.model, self.text_encoder = model, text_encoder

    def forward(self, x: Tensor, t: Tensor, words: Tensor) -> Tensor:
        """x (b, c, h, w), t (b,), word ids (b, length) -> velocity (b, c, h, w)."""
        return self.model(x, t, self.text_encoder(words))


class Captions:
    """Word ids of a random caption for each picture."""

    def __init__(self, items: list[dict], encoder: WordTextEncoder, recipe: Recipe) -> None:
        self.recipe = recipe
        self.null = encoder.tokenize("")
        self.plain = [[encoder.tokenize(caption) for caption in item["captions"]] for item in items]
        self.styled = [
            [encoder.tokenize(f"{caption} {item['style']}") for caption in item["captions"]] for item in items
        ]  # fmt: skip

    def draw(self, chosen: list[int], generator: torch.Generator) -> Tensor:
        """LongTensor (b, length): one of each picture's captions, with its style at times, or none at all."""
        rolls = torch.rand(len(chosen), 3, generator=generator).tolist()
        rows = []
        for index, (drop, style, which) in zip(chosen, rolls, strict=True):
            table = self.styled if style < self.recipe.style_rate else self.plain
            captions = table[index]
            rows.append(self.null if drop < self.recipe.caption_dropout else captions[int(which * len(captions))])
        return torch.stack(rows)


class Trainer:
    """One run.

    Args:
        data: encoded pictures with captions.
        vocabulary: of the text encoder.
        folder: of the run; a checkpoint found there is resumed.
        recipe: how to train. What shapes the weights has to be the same when a run is resumed.
        autoencoder: for sample sheets and the finished file; None in pixel space.
        device: where to train.
        facts: about the data, kept in the finished file's metadata as "zigma.data".

    Raises:
        ValueError: the folder holds a run with another architecture or other data.
    """

    def __init__(
        self, data: EncodedPictures, vocabulary: tuple[str, ...], folder: Path, recipe: Recipe,
        autoencoder: TinyAutoencoder | None = None, device: torch.device | str = "cpu", facts: dict | None = None,
    ) -> None:  # fmt: skip
        self.data, self.recipe, self.folder, self.autoencoder = data, recipe, Path(folder), autoencoder
        self.device, self.facts = torch.device(device), facts or {}
        self.folder.mkdir(parents=True, exist_ok=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            config = recipe.model_config(data.latents.shape[1], tuple(data.latents.shape[2:]))
            text = TextEncoderConfig(vocabulary, recipe.text_length, recipe.text_width)
            self.net = Conditioned(ZigMa(config), WordTextEncoder(text)).to(self.device)
        self.average = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay))
        self.average.requires_grad_(False)
        self.optimizer = self._make_optimizer()
        self.captions = Captions(data.items, self.net.text_encoder, recipe)
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.path = choose(PATHS, recipe.flow_path, "flow path")()
        self.step, self.seconds, self.order = 0, 0.0, torch.empty(0, dtype=torch.long)
        self._resume()

    @torch.no_grad()
    def start_from(self, path: Path) -> None:
        """Take the initial weights from a model file; does nothing in a run that has begun.

        The text encoder's words are matched by name: those that the file does not know start untrained.

        Raises:
            ValueError: the file's model has another architecture.
        """
        if self.step:
            return
        file = read_checkpoint(path)
        if file.text_config is None:
            raise ValueError(f"{path} has no text encoder: expected a model file of this trainer")
        for name in ("in_channels", "embed_dim", "depth", "patch_size", "img_dim", "d_context", "use_pe"):
            own, stated = getattr(self.net.model.config, name), getattr(file.config, name)
            if own != stated:
                raise ValueError(f"{path} has {name} {stated}, but this run {own}: give the run the file's own sizes")
        self.net.model.load_state_dict(file.state_dict)
        state, encoder = dict(file.text_state), self.net.text_encoder
        rows = encoder.words.weight.clone()
        rows[0] = state["words.weight"][0]
        known = [(encoder.ids[w], i) for i, w in enumerate(file.text_config.vocabulary, 1) if w in encoder.ids]
        for own_id, file_id in known:
            rows[own_id] = state["words.weight"][file_id]
        encoder.load_state_dict({**state, "words.weight": rows})
        log.info("started from %s; it knows %d of %d words", path, len(known), len(encoder.ids))

    def _make_optimizer(self) -> OptimizerGroup:
        r = self.recipe
        groups: dict[str, list[nn.Parameter]] = {"muon": [], "decay": [], "plain": []}
        for name, parameter in self.net.named_parameters():
            if r.muon_lr and name.endswith(MUON_WEIGHTS):
                groups["muon"].append(parameter)
            elif parameter.dim() >= 2 and not name.endswith(("A_log", "pos_embed", "words.weight", "positions.weight")):
                groups["decay"].append(parameter)
            else:
                groups["plain"].append(parameter)
        adam = torch.optim.AdamW(
            [{"params": groups["decay"], "weight_decay": r.weight_decay}, {"params": groups["plain"]}],
            lr=r.lr, betas=(0.9, r.beta2), weight_decay=0.0, fused=True,
        )  # fmt: skip
        if not groups["muon"]:
            return OptimizerGroup(adam)
        return OptimizerGroup(MatrixMuon(groups["muon"], lr=r.muon_lr, weight_decay=r.weight_decay), adam)

    @property
    def progress(self) -> float:
        """Finished part of the run, 0 to 1."""
        timed = self.seconds / (60 * self.recipe.minutes) if self.recipe.minutes else 0.0
        return min(1.0, max(self.step / self.recipe.steps, timed))

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Latents (b, c, h, w) and word ids (b, length); every picture comes once before any comes again."""
        while len(self.order) < self.recipe.batch_size:
            self.order = torch.cat([self.order, torch.randperm(len(self.data.latents), generator=self.generator)])
        chosen, self.order = self.order.split([self.recipe.batch_size, len(self.order) - self.recipe.batch_size])
        return self.data.latents[chosen], self.captions.draw(chosen.tolist(), self.generator)

    def train_step(self) -> float:
        """One update; returns the loss.

        Raises:
            RuntimeError: the loss is no number any more.
        """
        r = self.recipe
        self.net.train()
        latents, words = (part.to(self.device) for part in self.next_batch())
        self.optimizer.set_lr_scale(cosine_with_warmup(self.progress, r.warmup, r.hold))

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=r.bf16):
                return self.net(x, t, words)

        loss = flow_loss(
            velocity, latents, path=self.path, time_sampling=r.time_sampling, generator=self.generator
        )  # fmt: skip
        value = loss.item()
        if not math.isfinite(value):
            raise RuntimeError(
                f"the loss became {value} at step {self.step}: resume from the checkpoint with a lower --lr, and with "
                "--grad-clip 1 if that is 0"
            )
        self.optimizer.zero_grad()
        loss.backward()
        if r.grad_clip:
            nn.utils.clip_grad_norm_(self.net.parameters(), r.grad_clip)
        self.optimizer.step()
        self.average.update_parameters(self.net)
        self.step += 1
        return value

    def run(self) -> Path:
        """Train to the end; logs, sample sheets and checkpoints on the way. Returns the finished model file."""
        self._say_what_will_happen()
        now = last_log = last_sample = last_save = time.perf_counter()
        losses: list[float] = []
        while self.progress < 1:
            losses.append(self.train_step())
            before, now = now, time.perf_counter()
            self.seconds += now - before
            if now - last_log > 30 or self.progress >= 1:
                self._log(losses, now - last_log)
                last_log, losses = now, []
            if now - last_save > 60 * self.recipe.save_every:
                self.save()
                last_save = now
            if now - last_sample > 60 * self.recipe.sample_every:
                self.save_sheet()
                last_sample = now
                now = time.perf_counter()  # sheets are no training time
        self.save()
        self.save_sheet()
        return self.export(self.folder / "model.safetensors")

    def _say_what_will_happen(self) -> None:
        r, count = self.recipe, len(self.data.latents)
        parameters = sum(p.numel() for p in self.net.model.parameters())
        log.info(
            "%d pictures as %s, %d words; model of %.2f M parameters, text encoder of %.2f M; %s; batch %d on %s%s",
            count, " x ".join(map(str, self.data.latents.shape[1:])), len(self.net.text_encoder.ids),
            parameters / 1e6, sum(p.numel() for p in self.net.text_encoder.parameters()) / 1e6,
            f"{r.minutes:g} minutes or {r.steps} steps" if r.minutes else f"{r.steps} steps", r.batch_size, self.device,
            ", bfloat16" if r.bf16 else "",
        )  # fmt: skip

    def _log(self, losses: list[float], seconds: float) -> None:
        entry = {
            "step": self.step, "minutes": round(self.seconds / 60, 2), "loss": round(sum(losses) / len(losses), 5),
            "epochs": round(self.step * self.recipe.batch_size / len(self.data.latents), 1),
            "seconds_per_step": round(seconds / len(losses), 4),
        }  # fmt: skip
        log.info("%s", "  ".join(f"{key} {value}" for key, value in entry.items()))
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def bundle(self) -> Bundle:
        """The averaged weights, ready for `sample`."""
        net = self.average.module.eval()
        metadata = {
            "zigma.sampling": json.dumps(
                {"steps": self.recipe.sample_steps, "solver": "euler", "guidance": self.recipe.guidance}
            ),
            "zigma.data": json.dumps({"pictures": len(self.data.items), **self.facts}),
            "zigma.training": json.dumps(
                {"steps": self.step, "minutes": round(self.seconds / 60, 1), "recipe": dataclasses.asdict(self.recipe)}
            ),
        }
        condition = ConditionFacts(null=self.recipe.caption_dropout > 0)
        return Bundle(net.model, net.text_encoder, self.autoencoder, self.data.format, metadata, condition)

    def save_sheet(self) -> Path | None:
        """Draw the recipe's prompts with the averaged weights into samples/."""
        if self.autoencoder is None and not self.data.format.pixel_space:
            return None
        prompts = [prompt.strip() for prompt in self.recipe.sample_prompts.split(",") if prompt.strip()]
        if not prompts:
            captions = sorted({item["captions"][0] for item in self.data.items})
            prompts = captions[:: max(1, len(captions) // 24)][:24]
        steps = min(25, self.recipe.sample_steps)
        settings = SamplingSettings(steps=steps, solver="euler", guidance=self.recipe.guidance)
        pictures = to_pictures(sample(self.bundle(), prompts, settings=settings, seed=0, batch_size=12))
        factor = max(1, 128 // pictures[0].width)
        sheet = labelled_sheet(
            [enlarge(picture, factor) for picture in pictures], prompts, title=f"step {self.step}",
            footnote=f"euler, {settings.steps} steps, guidance {settings.guidance:g}, seed 0",
        )  # fmt: skip
        (self.folder / "samples").mkdir(exist_ok=True)
        return save_picture(sheet, self.folder / "samples" / f"{self.step:07d}.png")

    def export(self, path: Path, dtype: torch.dtype = torch.float16) -> Path:
        """Write the averaged weights with everything that belongs to them as one model file."""
        bundle = self.bundle()
        save_checkpoint(
            bundle.model, path, bundle.metadata, text_encoder=bundle.text_encoder, autoencoder=bundle.autoencoder,
            latent=bundle.latent, condition=bundle.condition, dtype=dtype,
        )  # fmt: skip
        log.info("wrote %s", path)
        return path

    def save(self) -> None:
        """Write the checkpoint, replacing the last one when complete."""
        state = {
            "net": self.net.state_dict(), "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step, "seconds": self.seconds, "order": self.order, "generator": self.generator.get_state(),
            "torch_rng": torch.get_rng_state(), "identity": self._identity(),
        }  # fmt: skip
        temporary = self.folder / "checkpoint.tmp"
        torch.save(state, temporary)
        os.replace(temporary, self.folder / "checkpoint.pt")

    def _identity(self) -> dict:
        """What may not change between a run and its resumption."""
        return {
            "config": self.net.model.config.to_json(), "text": self.net.text_encoder.config.to_json(),
            "pictures": len(self.data.latents), "muon": bool(self.recipe.muon_lr),
        }  # fmt: skip

    def _resume(self) -> None:
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True, map_location=self.device)
        changed = [key for key, value in self._identity().items() if state["identity"].get(key) != value]
        if changed:
            raise ValueError(
                f"{path} belongs to a run with another {', '.join(changed)}: choose another folder, or give that run's "
                "options and data"
            )
        self.net.load_state_dict(state["net"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())
        torch.set_rng_state(state["torch_rng"].cpu())
        self.step, self.seconds, self.order = state["step"], state["seconds"], state["order"].cpu()
        log.info("resumed %s at step %d, %.1f minutes", path, self.step, self.seconds / 60)
