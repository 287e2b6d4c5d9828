"""Training the small autoencoder: pictures of one size -> latents that a diffusion model finds easy.

    python -m zigma.training.autoencoder --data emoji.safetensors --out runs/ae --minutes 30

Loss: L1 + MSE + differences of neighbouring pixels (edges) on the picture, and on the latent a pull of the batch's
covariance toward the identity, because channels of unit variance without correlation are what the flow assumes of
its data. A little noise on the latent makes the decoder forgive what a sampler leaves. The learning rate follows the
wall clock, so that a run ends annealed whatever the machine; the run resumes from its last checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import os
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..autoencoder import TinyAutoencoder
from .emoji import CATEGORIES, PackedPictures, read_packed
from .optim import MatrixMuon, OptimizerGroup, schedule, split_parameters

__all__ = ["AutoencoderRecipe", "AutoencoderTrainer", "picture_loss", "psnr"]

log = logging.getLogger(__name__)


@dataclasses.dataclass
class AutoencoderRecipe:
    """Everything that decides a run; `minutes` is the wall-clock budget over all resumptions."""

    latent_channels: int = 16
    minutes: float = 30.0
    batch_size: int = 16
    crop: int = 32
    crop_until: float = 0.3
    muon_lr: float = 7e-3
    weight_decay: float = 0.3
    adam_lr: float = 1e-3
    latent_noise: float = 0.05
    covariance_weight: float = 0.02
    edge_weight: float = 1.0
    favourite_weight: float = 3.0
    held_out_every: int = 20
    bf16: bool = True
    seed: int = 0


def picture_loss(output: torch.Tensor, target: torch.Tensor, edge_weight: float = 1.0) -> torch.Tensor:
    """L1 + MSE + edge_weight * L1 of horizontal and vertical differences; (b, 3, h, w) in [-1, 1], a scalar."""
    error = output - target
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.square().mean() + edge_weight * edges


def latent_penalty(latents: torch.Tensor) -> torch.Tensor:
    """Squared distance of the channels' covariance (and mean) over batch and place from identity (and zero)."""
    z = latents.float().transpose(0, 1).flatten(1)
    mean = z.mean(1, keepdim=True)
    covariance = (z - mean) @ (z - mean).t() / z.shape[1]
    eye = torch.eye(len(z), device=z.device)
    return (covariance - eye).square().sum() / len(z) + mean.square().mean()


def psnr(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each picture in dB; (b, 3, h, w) in [-1, 1] -> (b,)."""
    mse = (output.clamp(-1, 1) - target).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / mse)


class AutoencoderTrainer:
    """One run over packed pictures; `run()` trains until the recipe's minutes are used up.

    Args:
        pictures: uint8 pictures; every `held_out_every`-th caption is kept out of training (0: none).
        folder: for the checkpoint; a run found there goes on where it stopped.
    """

    def __init__(self, pictures: PackedPictures, folder: Path, recipe: AutoencoderRecipe) -> None:
        self.recipe, self.folder = recipe, Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.generator = torch.Generator().manual_seed(recipe.seed)
        torch.manual_seed(recipe.seed)  # only for the initial weights
        self.model = TinyAutoencoder(recipe.latent_channels).to(memory_format=torch.channels_last)
        _halve_residual_branches(self.model)

        def is_matrix(name: str, weight: torch.nn.Parameter) -> bool:
            return weight.dim() == 4 and weight.shape[0] == weight.shape[1] == 64

        hidden, others = split_parameters(self.model, is_matrix)
        self.optimizer = OptimizerGroup(
            MatrixMuon(hidden, lr=recipe.muon_lr, weight_decay=recipe.weight_decay, momentum=0.95),
            torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
        )
        captions = sorted(set(pictures.captions))
        held = set(captions[:: recipe.held_out_every]) if recipe.held_out_every else set()
        is_held = torch.tensor([caption in held for caption in pictures.captions])
        self.train_images, self.held_images = pictures.images[~is_held], pictures.images[is_held]
        weights = [
            recipe.favourite_weight if item["category"] in CATEGORIES else 0.3 if item["category"] == "Flags" else 1.0
            for item in pictures.items
        ]
        self.weights = torch.tensor(weights)[~is_held]
        favourite = torch.tensor([item["category"] in CATEGORIES for item in pictures.items])
        self.favourite_held = favourite[is_held]
        self.step, self.seconds, self.history = 0, 0.0, []
        self._resume()

    @property
    def progress(self) -> float:
        """Used part of the budget, 0 to 1."""
        return min(1.0, self.seconds / (60 * self.recipe.minutes))

    def batch(self) -> torch.Tensor:
        """Random pictures in [-1, 1], flipped half of the time; small crops early in the run."""
        r = self.recipe
        cropping = self.progress < r.crop_until and r.crop < self.train_images.shape[-1]
        count = r.batch_size * 4 if cropping else r.batch_size
        chosen = torch.multinomial(self.weights, count, replacement=True, generator=self.generator)
        images = self.train_images[chosen].float() / 127.5 - 1
        flips = torch.rand(count, generator=self.generator) < 0.5
        images = torch.where(flips[:, None, None, None], images.flip(-1), images)
        if cropping:
            room = (images.shape[-1] - r.crop) // 8 + 1
            y, x = (8 * torch.randint(room, (2,), generator=self.generator)).tolist()
            images = images[..., y : y + r.crop, x : x + r.crop]
        return images.contiguous(memory_format=torch.channels_last)

    def train_step(self) -> float:
        """One update; returns the picture loss."""
        r = self.recipe
        images = self.batch()
        self.optimizer.set_lr_scale(schedule(self.progress))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=r.bf16):
            latents = self.model.encode(images)
            noise = torch.randn(latents.shape, generator=self.generator) * r.latent_noise
            output = self.model.decode_raw(latents + noise)
        loss = picture_loss(output.float(), images, r.edge_weight)
        total = loss + r.covariance_weight * latent_penalty(latents)
        if not math.isfinite(total.item()):
            raise RuntimeError(f"the loss became {total.item()} at step {self.step}: lower muon_lr (2e-2 diverges)")
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        self.step += 1
        return loss.item()

    @torch.no_grad()
    def evaluate(self, images: torch.Tensor | None = None) -> torch.Tensor:
        """PSNR in dB of each held-out picture (or of the given uint8 pictures)."""
        images = self.held_images if images is None else images
        scores = []
        for part in images.split(64):
            target = part.float() / 127.5 - 1
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.recipe.bf16):
                output = self.model.decode(self.model.encode(target))
            scores.append(psnr(output.float(), target))
        return torch.cat(scores)

    def run(self) -> None:
        """Train until the budget is used up; checkpoints every two minutes and at the end."""
        last_log = last_save = time.perf_counter()
        mark, losses = last_log, []
        while self.progress < 1:
            losses.append(self.train_step())
            now = time.perf_counter()
            self.seconds, mark = self.seconds + now - mark, now
            if now - last_log > 30:
                mean = sum(losses) / len(losses)
                self.history.append((self.step, round(self.seconds), mean))
                log.info("step %d, %.0f s, loss %.4f", self.step, self.seconds, mean)
                last_log, losses = now, []
            if now - last_save > 120:
                self.save()
                last_save = now
        self.save()

    def save(self) -> None:
        """Write the checkpoint atomically."""
        state = {
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step,
            "seconds": self.seconds, "history": self.history, "generator": self.generator.get_state(),
        }  # fmt: skip
        temporary = self.folder / "checkpoint.tmp"
        torch.save(state, temporary)
        os.replace(temporary, self.folder / "checkpoint.pt")

    def export(self, path: Path, dtype: torch.dtype = torch.float16) -> Path:
        """Write the autoencoder alone, in TAESD layout, as this project and stock VAE loaders read it."""
        state = {key: value.to(dtype).contiguous() for key, value in self.model.state_dict().items()}
        save_file(state, path)
        return path

    def _resume(self) -> None:
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
        log.info("resumed %s at step %d, %.0f s", path, self.step, self.seconds)


@torch.no_grad()
def _halve_residual_branches(model: TinyAutoencoder) -> None:
    """Start the 19 residual blocks near the identity: without norms their variances would multiply."""
    for name, weight in model.named_parameters():
        if name.endswith("conv.4.weight") or name.endswith("conv.4.bias"):
            weight.mul_(0.25)


def main() -> None:
    """Command line: one field of the recipe per option."""
    parser = argparse.ArgumentParser(description="Train the small autoencoder.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    for field in dataclasses.fields(AutoencoderRecipe):
        kind = type(field.default)
        parse = (lambda text: text.lower() in ("1", "true", "yes")) if kind is bool else kind
        parser.add_argument("--" + field.name.replace("_", "-"), type=parse, default=field.default)
    arguments = vars(parser.parse_args())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    data, out = arguments.pop("data"), arguments.pop("out")
    trainer = AutoencoderTrainer(read_packed(data), out, AutoencoderRecipe(**arguments))
    trainer.run()
    trainer.export(out / "vae.safetensors")
    report = {"recipe": dataclasses.asdict(trainer.recipe), "steps": trainer.step, "seconds": round(trainer.seconds)}
    if len(trainer.held_images):
        held = trainer.evaluate()
        report["held_out_psnr"] = round(held.mean().item(), 2)
        report["held_out_psnr_favourites"] = round(held[trainer.favourite_held].mean().item(), 2)
    report["train_psnr"] = round(trainer.evaluate(trainer.train_images[::8]).mean().item(), 2)
    report["history"] = trainer.history
    (out / "report.json").write_text(json.dumps(report, indent=1))
    log.info("%s", {key: value for key, value in report.items() if key != "history"})


if __name__ == "__main__":
    main()
