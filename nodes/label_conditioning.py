"""What a class model draws: a label, and the null that guidance leads away from."""

from __future__ import annotations

from comfy_api.latest import io

from .comfy_conditions import label_conditioning
from .comfy_model import as_zigma, facts_of
from .schema import schema


class ZigMaLabelConditioning(io.ComfyNode):
    """Labels by number or name, for models that were trained on classes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What the host shows."""
        return schema(
            node_id="ZigMaLabelConditioning",
            display_name="ZigMa Label Conditioning",
            description="Chooses the class that a class model draws, by its number or its name. For models that draw "
            "from texts use CLIP Text Encode or ZigMa Text Conditioning.",
            inputs=[
                io.Model.Input("model", tooltip="A ZigMa class model: it knows its labels, their names and its null."),
                io.Int.Input("label", default=0, min=0, max=1000000, tooltip="The number of the class, from 0."),
                io.String.Input(
                    "label_name", default="", optional=True,
                    tooltip="The name of the class, if the file has names, as 'fox'; not empty, it stands above the "
                    "number. Several names or numbers, as 'fox, owl' or '3, 5, 7', are one for each picture of the "
                    "batch.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="The class to draw."),
                io.Conditioning.Output(
                    display_name="negative",
                    tooltip="The null class that guidance leads away from. A model that was trained without one can "
                    "only be sampled with cfg 1.",
                ),
            ],
            search_aliases=["class label", "class conditioning", "label to image", "imagenet class", "null label"],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, label: int, label_name: str = "") -> io.NodeOutput:
        """Look the labels up in the model's file."""
        config, facts = as_zigma(model).config, facts_of(model)
        if config.conditioning != "class":
            instead = (
                "connect CLIP Text Encode or ZigMa Text Conditioning" if config.has_text else
                "connect any conditioning, which it does not look at"
            )  # fmt: skip
            raise ValueError(f"{instead}: this model has no labels, its condition is {config.conditioning!r}")
        count = config.num_classes
        labels = facts.labels(label_name, count) if label_name.strip() else [facts.label(label, count)]
        null = [facts.null] if facts.has_null else []
        return io.NodeOutput(label_conditioning(labels), label_conditioning(null))
