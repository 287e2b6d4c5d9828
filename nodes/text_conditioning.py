"""What a text model draws: a prompt, and the text that guidance leads away from."""

from __future__ import annotations

import logging

from comfy_api.latest import io

from .comfy_conditions import check_text
from .comfy_model import as_zigma, facts_of
from .schema import schema

log = logging.getLogger(__name__)


class ZigMaTextConditioning(io.ComfyNode):
    """Prompt and negative prompt at once, checked against the model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What the host shows."""
        text = {"multiline": True, "dynamic_prompts": True}
        return schema(
            node_id="ZigMaTextConditioning",
            display_name="ZigMa Text Conditioning",
            description="Encodes a prompt and what guidance leads away from. It equals two stock CLIP Text Encode, and "
            "checks that they fit the model.",
            inputs=[
                io.Clip.Input(
                    "clip",
                    tooltip="The text encoder: the CLIP of the ZigMa Model Loader, or for released models CLIPLoader "
                    "with CLIP ViT-L/14 and type stable_diffusion.",
                ),
                io.String.Input("text", default="", **text, tooltip="What the picture should show."),
                io.String.Input(
                    "negative_text", default="", **text,
                    tooltip="What guidance leads away from. Empty is the null that models are trained with, and "
                    "usually best.",
                ),
                io.Model.Input(
                    "model", optional=True,
                    tooltip="The model that this is for. Connected, it is checked that the text encoder belongs to it.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="The encoded text, for positive."),
                io.Conditioning.Output(display_name="negative", tooltip="The encoded negative text, for negative."),
            ],
            search_aliases=["prompt", "text to image", "negative prompt", "clip text encode", "empty prompt"],
        )  # fmt: skip

    @classmethod
    def execute(cls, clip, text: str, negative_text: str, model=None) -> io.NodeOutput:
        """Encode as the host does, hooks and schedules of the CLIP included."""
        if clip is None:
            raise ValueError(
                "connect a text encoder: this model file carries none, so load the one that the model was trained "
                "with by CLIPLoader (for released ZigMa models CLIP ViT-L/14, type stable_diffusion)"
            )
        if model is not None and not as_zigma(model).config.has_text:
            kind = as_zigma(model).config.conditioning
            node = "connect ZigMa Label Conditioning" if kind == "class" else "leave the model out"
            raise ValueError(f"{node}: this model does not draw from texts, its condition is {kind!r}")
        encoded = [clip.encode_from_tokens_scheduled(clip.tokenize(prompt)) for prompt in (text, negative_text)]
        if model is not None:
            for features, _ in (entry for conditioning in encoded for entry in conditioning):
                check_text(as_zigma(model).config, features)
            if not negative_text.strip() and not facts_of(model).has_null:
                log.warning(
                    "set cfg to 1 if pictures look worse with guidance: as far as its file says, this model was never "
                    "trained on the empty text that guidance leads away from"
                )
        return io.NodeOutput(*encoded)
