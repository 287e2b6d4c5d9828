"""For models that draw without being told what."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from .comfy_model import as_zigma
from .schema import schema


class ZigMaNoCondition(io.ComfyNode):
    """What a sampler's two conditionings are connected to when the model takes none."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What the host shows."""
        return schema(
            node_id="ZigMaNoCondition",
            display_name="ZigMa No Condition",
            description="For ZigMa models that take neither text nor label, such as the released models of faces, "
            "landscapes and churches: samplers want a conditioning all the same.",
            inputs=[io.Model.Input("model", tooltip="A ZigMa model without a condition.")],
            outputs=[
                io.Conditioning.Output(
                    tooltip="Nothing, for positive and negative of KSampler or ZigMa Sampler, with cfg 1."
                ),
            ],
            search_aliases=["unconditional", "empty conditioning", "no prompt", "null condition"],
        )

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        """Refuse models that want to be told."""
        kind = as_zigma(model).config.conditioning
        if kind != "none":
            instead = {"text": "ZigMa Text Conditioning", "class": "ZigMa Label Conditioning"}[kind]
            raise ValueError(f"connect {instead} in place of this node: got a model that takes a condition ({kind})")
        return io.NodeOutput([[torch.ones(1, 1, 1), {}]])
