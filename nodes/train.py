"""Training of a model of the graph."""

from __future__ import annotations

import functools

import torch
from comfy_api.latest import io, ui
from PIL import Image

from ..zigma.checkpoint import read_checkpoint
from .comfy_model import as_zigma, build_model
from .comfy_text import build_clip
from .lora import with_lora
from .pictures import as_image
from .schema import schema
from .shown_text import tell
from .training_run import METHODS, Finished, base_of, folder_of, settings_of, times_lost, train


class ZigMaTrain(io.ComfyNode):
    """LoRA, LoKr or whole weights, as `python -m zigma train` does it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What the host shows."""
        return schema(
            node_id="ZigMaTrain",
            display_name="ZigMa Train",
            description="Fine-tunes a ZigMa model on pictures, by a LoRA or as a whole. Stop keeps what was learnt: "
            "queued again, the run goes on where it was, to the same result.",
            search_aliases=["train lora", "finetune", "fine-tune", "dreambooth", "lokr", "training"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The ZigMa model to start from, LoRAs and merges included."),
                io.Custom("ZIGMA_DATASET").Input("dataset", tooltip="The pictures, of a ZigMa Dataset."),
                io.Combo.Input(
                    "method", options=list(METHODS), default="lora",
                    tooltip="lora and lokr are small files beside the model, quick to learn and to share; lokr is the "
                    "smaller. full changes all weights, and the text encoder learns new words.",
                ),
                io.Int.Input(
                    "steps", default=300, min=1, max=1000000,
                    tooltip="Updates of the whole run. More of them later go on with a run that is finished.",
                ),
                io.Int.Input(
                    "batch_size", default=4, min=1, max=4096,
                    tooltip="Pictures of one update; at most as many as there are.",
                ),
                io.Float.Input(
                    "learning_rate", default=0.0, min=0.0, max=1.0, step=0.00001, round=0.000001,
                    tooltip="How far an update goes. 0 takes what suits the method: 0.002 for lora and lokr, 0.0001 "
                    "for full. Less if the loss jumps.",
                ),
                io.Int.Input(
                    "rank", default=16, min=1, max=1024,
                    tooltip="Size of a lora or lokr: 8 is enough for a style, 32 for several subjects. Not for full.",
                ),
                io.Int.Input(
                    # Not "seed": a canvas draws a new one of that name after each run, and a run goes on with its own.
                    "training_seed", default=0, min=0, max=0xFFFFFFFF,
                    tooltip="Of everything random in the training. Another seed is another run.",
                ),
                io.Combo.Input(
                    "precision", options=["fp32", "bf16"], default="fp32",
                    tooltip="What is computed in. bf16 takes less memory and time on newer GPUs.",
                ),
                io.String.Input(
                    "run_name", default="first",
                    tooltip="Name of the run, a folder in output/zigma_training. A run that is there is gone on with: "
                    "choose another name to begin anew.",
                ),
                io.Float.Input(
                    "caption_dropout", default=0.1, min=0.0, max=1.0, step=0.01,
                    tooltip="Part of the pictures seen without caption, which keeps guidance (cfg) working.",
                ),
                io.Int.Input(
                    "sample_every", default=0, min=0, max=1000000,
                    tooltip="Steps between pictures drawn on the way, shown in the node; 0 draws only at the end.",
                ),
                io.String.Input(
                    "prompts", default="", multiline=True,
                    tooltip="What these pictures show, one prompt or label a line; empty takes captions of the data.",
                ),
                io.Clip.Input(
                    "clip", optional=True,
                    tooltip="The text encoder, for models that draw from texts: the CLIP of the ZigMa Model Loader.",
                ),
                io.Vae.Input(
                    "vae", optional=True,
                    tooltip="The VAE of the model, by which pictures become latents. Not for models in pixel space.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The fine-tuned model: with the LoRA on it, or the new one."),
                io.Clip.Output(tooltip="Its text encoder: after full with the words it has learnt, else as given."),
                io.String.Output(
                    display_name="file",
                    tooltip="Where the LoRA or the model is, in the run's folder: for ZigMa Save LoRA.",
                ),
                io.Custom("ZIGMA_LOSSES").Output(display_name="losses", tooltip="For ZigMa Loss Plot."),
                io.Image.Output(display_name="samples", tooltip="What the fine-tuned model draws of the prompts."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, run_name: str = "", **_) -> str:
        """Run again when the run's folder was deleted: a host would bring back a file that is no more."""
        try:
            return f"{times_lost(folder_of(run_name))}"
        except ValueError:  # execute says what is wrong with it
            return ""

    @classmethod
    def execute(
        cls, model, dataset, method: str, steps: int, batch_size: int, learning_rate: float, rank: int,
        training_seed: int, precision: str, run_name: str, caption_dropout: float, sample_every: int, prompts: str,
        clip=None, vae=None,
    ) -> io.NodeOutput:  # fmt: skip
        """Write what the graph gives into the run's folder, train, and bring back what came of it."""
        as_zigma(model)
        if steps < 1:
            raise ValueError(f"set steps to 1 or more: got {steps}")
        folder = folder_of(run_name)
        base = base_of(model, clip, vae, folder)
        settings = settings_of(
            folder, base, model.model.zigma_file, dataset, method=method, steps=steps, batch_size=batch_size,
            learning_rate=learning_rate, rank=rank, seed=training_seed, precision=precision,
            caption_dropout=caption_dropout, prompts=prompts,
        )  # fmt: skip
        texts = clip if model.model.zigma_file.config.has_text else None
        done = train(settings, texts, sample_every=sample_every, say=functools.partial(tell, node=cls))
        text = _summary(done, steps)
        tell(text, cls)
        if method == "full":
            file = read_checkpoint(done.file)
            trained, encoder = build_model(file), build_clip(file) or clip
        else:
            trained, encoder = with_lora(model, done.file), clip
        return io.NodeOutput(
            trained, encoder, str(done.file), done.entries, _samples(done), ui=ui.PreviewText(text)
        )  # fmt: skip


def _summary(done: Finished, steps: int) -> str:
    losses = [entry["loss"] for entry in done.entries if entry.get("loss") is not None]
    last = losses[-max(1, len(losses) // 10) :]
    loss = f", loss {sum(last) / len(last):.4f} at the end" if last else ""
    more = f", more than the {steps} asked for: choose another run_name for a shorter run" if done.steps > steps else ""
    return f"{done.steps} steps{more}{loss}\n{done.file}\n{done.file.with_name('report.html')}\n\n{done.data}"


def _samples(done: Finished) -> torch.Tensor:
    with Image.open(done.sheet) as picture:
        return as_image(picture)
