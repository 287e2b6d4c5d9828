"""Everything that decides a training run, in one dataclass; the command line has one option per field."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..config import ZigMaConfig

__all__ = ["Recipe"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A training run of a text-conditioned ZigMa.

    Attributes:
        embed_dim, depth, patch_size, scan_type: of the model; the rest follows from the data.
        drop_path_rate: stochastic depth.
        text_width, text_length: of the text encoder's features.
        steps: length of the run; the learning rate's schedule follows it.
        minutes: 0, or a budget of wall-clock time over all resumptions: the schedule follows whichever of the two is
            nearer its end, so that a run on a slow machine ends annealed too.
        batch_size: pictures in a step.
        lr: peak learning rate of AdamW. muon_lr: of Muon for the blocks' projections; 0 leaves them to AdamW.
        weight_decay: of matrices (biases, norms, embeddings and the scan's A and D have none).
        beta2, grad_clip: of AdamW; of the gradient's norm, 0 for none.
        warmup, hold: parts of the run for linear warm-up, and after which the cosine decay to zero begins.
        ema_decay: of the average of the weights that samples are drawn with.
        caption_dropout: part of the pictures seen with the empty caption, the null condition of guidance.
        style_rate: part of the captions that name the picture's style as last word, where the data have styles.
        flow_path, time_sampling: interpolant and distribution of the training times (see zigma.flow).
        bf16: autocast to bfloat16.
        use_checkpoint: recompute activations in the backward pass (less memory, more time).
        sample_every, save_every: minutes between sample sheets, and between checkpoints.
        sample_prompts: comma-separated; empty takes captions of the data.
        sample_steps, guidance: Euler steps and guidance of the sheets, and the defaults written into the model file.
        seed: of weights, data order, noise and times.
    """

    embed_dim: int = 176
    depth: int = 8
    patch_size: int = 1
    scan_type: str = "zigzagN8"
    drop_path_rate: float = 0.0
    text_width: int = 176
    text_length: int = 16
    steps: int = 20_000
    minutes: float = 0.0
    batch_size: int = 32
    lr: float = 1.3e-3
    muon_lr: float = 0.0
    weight_decay: float = 0.02
    beta2: float = 0.99
    grad_clip: float = 1.0
    warmup: float = 0.02
    hold: float = 0.3
    ema_decay: float = 0.999
    caption_dropout: float = 0.1
    style_rate: float = 0.2
    flow_path: str = "linear"
    time_sampling: str = "uniform"
    bf16: bool = True
    use_checkpoint: bool = False
    sample_every: float = 10.0
    save_every: float = 3.0
    sample_prompts: str = ""
    sample_steps: int = 50
    guidance: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "sample_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"got {name} {getattr(self, name)}, expected at least 1")
        for name in ("caption_dropout", "style_rate", "warmup", "hold", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"got {name} {getattr(self, name)}, expected a part between 0 and 1")

    def model_config(self, channels: int, sides: tuple[int, int]) -> ZigMaConfig:
        """The architecture for latents of this shape."""
        from ..config import ZigMaConfig  # which brings torch: the command line's help does without

        return ZigMaConfig(
            in_channels=channels, embed_dim=self.embed_dim, depth=self.depth, img_dim=sides,
            patch_size=self.patch_size, scan_type=self.scan_type, use_pe=2, has_text=True, d_context=self.text_width,
            n_context_token=self.text_length, drop_path_rate=self.drop_path_rate, use_checkpoint=self.use_checkpoint,
        )  # fmt: skip
