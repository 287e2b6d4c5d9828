"""The tables of a configuration, one dataclass each, with the reason why a value cannot be; read by settings.py."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from ..solvers import ODE_SOLVERS
from .adapters import DEFAULT_TARGETS, AdapterSettings

__all__ = [
    "AdapterTable", "DataTable", "FlowTable", "ModelTable", "OptimizerTable", "RunTable", "SampleTable", "TextTable",
]  # fmt: skip


def _among(table: str, name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        near = difflib.get_close_matches(value, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
        raise ValueError(f"[{table}] {name} is {value!r}: {hint}")


def _at_least(table: str, owner: Any, least: float, *names: str) -> None:
    for name in names:
        if not getattr(owner, name) >= least:
            raise ValueError(f"[{table}] {name} is {getattr(owner, name)}, expected at least {least}")


def _part(table: str, owner: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(owner, name) <= 1:
            raise ValueError(f"[{table}] {name} is {getattr(owner, name)}, expected a part between 0 and 1")


def _seed(table: str, seed: int, bits: int) -> None:
    if not 0 <= seed < 2**bits:
        raise ValueError(f"[{table}] seed is {seed}, expected a whole number from 0 to {2**bits - 1}")


@dataclasses.dataclass(frozen=True)
class ModelTable:
    """What is trained.

    Attributes:
        start_from: a model file, or the name of a shipped model ("demo"); empty: random weights.
        weights: of a file that holds both, "ema" or "model".
        config: fields of ZigMaConfig. From scratch: the architecture, without what follows from the data (in_channels,
            img_dim, video_frames, d_context, num_classes). With start_from: only what a published file leaves open
            (scan_type, img_dim, legacy_permutation, ...).
        preset: from scratch, a published size such as "B/2" instead of embed_dim, depth and patch_size.
        train: patterns of parameter names that learn ("*": all); the others are frozen.
        freeze: patterns of those that do not, after `train`.
    """

    start_from: str = ""
    weights: str = "ema"
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    preset: str = ""
    train: tuple[str, ...] = ("*",)
    freeze: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _among("model", "weights", self.weights, ("ema", "model"))
        if self.start_from and self.preset:
            raise ValueError("[model] has start_from and preset: a file knows its own size, leave preset out")


@dataclasses.dataclass(frozen=True)
class TextTable:
    """How captions become conditions.

    Attributes:
        encoder: "auto" (the model's own; from scratch "words" if there are captions, "labels" for class folders),
            "words" (the small encoder, trained along), "clip" (frozen, through transformers), "labels" or "none".
        clip: folder or name that transformers knows.
        width, length: of the word encoder's features, from scratch.
        train: whether the word encoder learns too; with an adapter it never does.
        dropout: part of the pictures seen with the null condition: what guidance leads away from.
        style_rate: part of the captions that name the picture's style as last word, where the data have styles.
        trigger: a word put before every caption, which the fine-tune then hangs on.
    """

    encoder: str = "auto"
    clip: str = "openai/clip-vit-large-patch14"
    width: int = 176
    length: int = 16
    train: bool = True
    dropout: float = 0.1
    style_rate: float = 0.2
    trigger: str = ""

    def __post_init__(self) -> None:
        _among("text", "encoder", self.encoder, ("auto", "words", "clip", "labels", "none"))
        _at_least("text", self, 1, "width", "length")
        _part("text", self, "dropout", "style_rate")


@dataclasses.dataclass(frozen=True)
class DataTable:
    """What it is trained on.

    Attributes:
        path: a folder of pictures (with captions, class folders, metadata.jsonl, clips), WebDataset shards, or a packed
            file.
        kind: "auto", or one of the kinds that dataset.py reads.
        names_as_captions: caption a picture that has none by the words of its file's name.
        categories: of a packed file, only these; empty: all.
        size: of the pictures in pixels: a side, or (height, width); 0: what the model was made for.
        buckets: keep aspect ratios, in groups of about size x size pixels; else crop to the size.
        bucket_step: sides of bucketed pictures are multiples of this many pixels; 0: the least that the model allows.
        flips: learn mirrored pictures too ("left" and "right" in captions change places).
        crops: how many crops along the longer side of each picture (1: the middle).
        autoencoder: a VAE file, or the name of a shipped model that carries one; empty: the model file's own, or
            pixels if it has none.
        cache: folder of latents and text features; empty: `cache` in the run's folder.
        validation: part of the pictures kept for the validation loss, chosen by name; 0 for none.
    """

    path: str = ""
    kind: str = "auto"
    names_as_captions: bool = False
    categories: tuple[str, ...] = ()
    size: int | tuple[int, int] = 0
    buckets: bool = False
    bucket_step: int = 0
    flips: bool = False
    crops: int = 1
    autoencoder: str = ""
    cache: str = ""
    validation: float = 0.0

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("[data] path is missing: give the folder of pictures")
        sides = self.size if isinstance(self.size, tuple) else (self.size,)
        if (isinstance(self.size, tuple) and len(sides) != 2) or min(sides, default=-1) < 0:
            raise ValueError(f"[data] size is {self.size}, expected a side in pixels, or [height, width]")
        _at_least("data", self, 1, "crops")
        _at_least("data", self, 0, "bucket_step")
        if not 0 <= self.validation < 1:
            raise ValueError(f"[data] validation is {self.validation}, expected a part below 1")


@dataclasses.dataclass(frozen=True)
class AdapterTable:
    """A small addition to frozen weights instead of new weights: see adapters.py.

    Attributes:
        kind: "none" trains the weights themselves; "lora", "lokr".
        rank, alpha: the addition is scaled by alpha / rank; alpha 0 takes the rank itself.
        factor: of LoKr.
        dropout: of the adapter's inputs, in training.
        targets: patterns of layer names; empty: in_proj, out_proj, x_proj and cross-attention.
    """

    kind: str = "none"
    rank: int = 16
    alpha: float = 0.0
    factor: int = -1
    dropout: float = 0.0
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _among("adapter", "kind", self.kind, ("none", "lora", "lokr"))
        if self.kind != "none":
            self.settings()

    def settings(self) -> AdapterSettings:
        """What adapters.py makes of it. Raises ValueError for values out of their range."""
        alpha, targets = self.alpha or float(self.rank), self.targets or DEFAULT_TARGETS
        return AdapterSettings(self.kind, self.rank, alpha, self.factor, self.dropout, targets)


@dataclasses.dataclass(frozen=True)
class FlowTable:
    """The loss: see flow.py.

    Attributes:
        path: "linear", "gvp", "vp". prediction: "velocity", "noise", "score".
        time_sampling: "uniform", "logit-normal" with `mean` and `std` (a negative mean dwells on noise).
        weighting: of noise and score losses, "none", "velocity" or "likelihood"; of any, "min-snr" (Hang et al. 2023,
            arXiv 2303.09556) with `snr_gamma`.
    """

    path: str = "linear"
    prediction: str = "velocity"
    time_sampling: str = "uniform"
    mean: float = 0.0
    std: float = 1.0
    weighting: str = "none"
    snr_gamma: float = 5.0

    def __post_init__(self) -> None:
        _among("flow", "path", self.path, ("linear", "gvp", "vp"))
        _among("flow", "prediction", self.prediction, ("velocity", "noise", "score"))
        _among("flow", "time_sampling", self.time_sampling, ("uniform", "logit-normal"))
        _among("flow", "weighting", self.weighting, ("none", "velocity", "likelihood", "min-snr"))
        if self.prediction == "velocity" and self.weighting in ("velocity", "likelihood"):
            raise ValueError(f"[flow] weighting {self.weighting!r} is for noise and score: take 'none' or 'min-snr'")
        if self.std <= 0 or self.snr_gamma <= 0:
            raise ValueError("[flow] std and snr_gamma have to be above 0")


@dataclasses.dataclass(frozen=True)
class OptimizerTable:
    """How weights move.

    Attributes:
        name: "adamw", "adamw8bit" (package bitsandbytes), "prodigy" (package prodigyopt; give lr = 1), or "muon" (the
            blocks' projections by torch's Muon with `muon_lr`, the rest by AdamW).
        lr, beta1, beta2, eps, weight_decay: as usual; biases, norms, embeddings, A and D are not decayed.
        muon_lr: of Muon.
        schedule: "constant", "cosine" or "linear" to zero at the end. warmup: part of the run, linear from zero.
        hold: part of the run after which a cosine or linear schedule begins to fall.
        clip: of the gradient's norm, before the step; 0 for none.
    """

    name: str = "adamw"
    lr: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.02
    muon_lr: float = 5e-3
    schedule: str = "cosine"
    warmup: float = 0.02
    hold: float = 0.3
    clip: float = 1.0

    def __post_init__(self) -> None:
        _among("optimizer", "name", self.name, ("adamw", "adamw8bit", "prodigy", "muon"))
        _among("optimizer", "schedule", self.schedule, ("constant", "cosine", "linear"))
        _part("optimizer", self, "warmup", "hold")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"[optimizer] lr is {self.lr:g}, which trains nothing: expected a number above 0 (1e-4)")
        _at_least("optimizer", self, 0, "clip", "weight_decay", "muon_lr")


@dataclasses.dataclass(frozen=True)
class SampleTable:
    """Sheets drawn on the way, and what the finished file recommends.

    Attributes:
        prompts: texts, or labels of a class model; empty: some of the data's own.
        steps, solver, guidance, seed: as in sampling.
        every: minutes between sheets; 0: only at the end.
        count: pictures for each prompt.
    """

    prompts: tuple[str, ...] = ()
    steps: int = 25
    solver: str = "euler"
    guidance: float = 2.0
    seed: int = 0
    every: float = 10.0
    count: int = 1

    def __post_init__(self) -> None:
        _among("samples", "solver", self.solver, ODE_SOLVERS)
        _at_least("samples", self, 1, "steps", "count")
        _at_least("samples", self, 0, "every")
        if not abs(self.guidance) < float("inf"):
            raise ValueError(f"[samples] guidance is {self.guidance}, expected a number, such as 1 for none")
        _seed("samples", self.seed, 64)


@dataclasses.dataclass(frozen=True)
class RunTable:
    """Length, size and safety of the run.

    Attributes:
        folder: of the run; one that is there is resumed.
        steps: updates. minutes: 0, or a budget of time over all resumptions; the schedule follows whichever of both is
            nearer its end, so that a run on a slow machine ends annealed too.
        batch_size: pictures of an update, over all processes. accumulate: parts that it is computed in.
        precision: "fp32", "bf16", "fp16" (autocast; fp16 with loss scaling).
        device: "auto", "cpu", "cuda", "mps".
        seed: of weights, data order, noise and times.
        ema: decay of the average of the weights that samples and the finished model come from; 0: the weights.
        checkpointing: recompute activations in the backward pass (less memory, more time).
        compile: torch.compile the model.
        save_every: minutes between checkpoints. save_steps: steps between them; 0 leaves it to the minutes.
        keep_last: how many checkpoints stay. keep_best: whether the one of the least validation loss stays too.
        validate_every: steps between validation losses, where [data] validation is above 0.
        nan_limit: losses in a row that are no number before the run stops.
        output_dtype: of the finished file, "fp32", "fp16" or "bf16"; A and D stay float32.
        tensorboard, wandb: whether to write for these too (packages of those names).
    """

    folder: str = ""
    steps: int = 1000
    minutes: float = 0.0
    batch_size: int = 8
    accumulate: int = 1
    precision: str = "bf16"
    device: str = "auto"
    seed: int = 0
    ema: float = 0.999
    checkpointing: bool = False
    compile: bool = False
    save_every: float = 5.0
    save_steps: int = 0
    keep_last: int = 2
    keep_best: bool = True
    validate_every: int = 500
    nan_limit: int = 3
    output_dtype: str = "fp16"
    tensorboard: bool = False
    wandb: bool = False

    def __post_init__(self) -> None:
        if not self.folder:
            raise ValueError('[run] folder is missing: give a folder for the run, such as "runs/first"')
        _among("run", "precision", self.precision, ("fp32", "bf16", "fp16"))
        _among("run", "output_dtype", self.output_dtype, ("fp32", "fp16", "bf16"))
        _at_least("run", self, 1, "steps", "batch_size", "accumulate", "keep_last", "validate_every", "nan_limit")
        _at_least("run", self, 0, "minutes", "save_every", "save_steps")
        _seed("run", self.seed, 32)  # numpy takes no more
        if not 0 <= self.ema < 1:
            raise ValueError(f"[run] ema is {self.ema}, expected a decay from 0 to below 1")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"[run] batch_size is {self.batch_size} and accumulate {self.accumulate}, which does not divide it: "
                "batch_size counts the pictures of a whole update"
            )
