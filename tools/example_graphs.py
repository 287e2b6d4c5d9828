"""The example of each node's help page: the node among the few that it needs, as a graph.

A graph grows by types. What a node needs comes from the node that usually gives it, and what it gives goes on until
there is a picture or a text to look at: a new node has an example without a line here. EXAMPLES says what there is to
say beside that, such as a prompt, or nodes that types do not tell of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from graph_files import SNUG, Graph, Node, declared_inputs, is_widget

__all__ = ["EXAMPLES", "example_graph"]

GIVERS = {
    "MODEL": ("ZigMaModelLoader", 0), "CLIP": ("ZigMaModelLoader", 1), "VAE": ("ZigMaModelLoader", 2),
    "CONDITIONING": ("ZigMaTextConditioning", 0), "LATENT": ("ZigMaSampler", 0), "IMAGE": ("ZigMaVAEDecode", 0),
    "SAMPLER": ("ZigMaODESampler", 0), "SIGMAS": ("ZigMaScheduler", 0), "STRING": ("ZigMaModelDoctor", 0),
    "ZIGMA_DATASET": ("ZigMaDataset", 0), "ZIGMA_LOSSES": ("ZigMaTrain", 3),
}  # fmt: skip
# Inputs whose name says more than their type.
NAMED = {"negative": ("ZigMaTextConditioning", 1), "latent_image": ("ZigMaEmptyLatent", 0), "file": ("ZigMaTrain", 2)}
VALUES = {
    "ZigMaTextConditioning": {"text": "panda face"},
    "ZigMaSampler": {"steps": 30},
    "ZigMaVAEDecode": {"enlarge": 4},
    "ZigMaDataset": {"folder": "badges"},
    "ZigMaTrain": {"steps": 150, "batch_size": 6},
}
CHAIN = ("ZigMaSampler", "ZigMaVAEDecode")  # from a latent to a picture
EXAMPLES: dict[str, Callable[[Example], None]] = {}


def example_graph(subject: str, facts: Mapping[str, dict]) -> Graph:
    """The example of the node `subject`, by what a host says of all nodes (`/object_info`).

    Raises:
        ValueError: the host has no such node, or nothing gives what it needs or takes what it gives.
    """
    if subject not in facts:
        raise ValueError(f"got {subject}, expected the id of a node that the host knows; its log says what it refused")
    grown = Example(subject, facts)
    EXAMPLES.get(subject, Example.finish)(grown)
    return grown.graph


def example(function: Callable[[Example], None]) -> Callable[[Example], None]:
    """Of the node whose id is the function's name."""
    EXAMPLES[function.__name__] = function
    return function


class Example:
    """A graph that grows around the node `subject`; of most classes it has one node."""

    def __init__(self, subject: str, facts: Mapping[str, dict]) -> None:
        self.subject, self.facts = subject, facts
        self.graph = Graph(subject, SNUG, accent=subject)
        self.nodes: dict[str, Node] = {}
        self.after: set[int] = set()  # numbers of the subject and of what depends on it
        self.given: dict[str, list] = {}

    def the(self, kind: str, *connected: str, **values) -> Node:
        """The node of a class, made when it is first asked for; with what it needs, and these optional inputs."""
        if kind not in self.nodes:
            self.nodes[kind] = self.another(kind, *connected, **values)
            if kind == self.subject:  # what follows it is new: pictures drawn before stay as they are
                self.nodes = {name: node for name, node in self.nodes.items() if name == kind or name not in CHAIN}
        return self.nodes[kind]

    def another(self, kind: str, *connected: str, title: str = "", column: int | None = None, **values) -> Node:
        """One more node of a class, in the column after what it needs or in a given one."""
        inputs = {**VALUES.get(kind, {}), **values}
        wanted = declared_inputs(self.facts[kind])
        for name, (type_, options) in wanted.items():
            needed = name in self.facts[kind]["input_order"].get("required", []) and not is_widget(type_, options)
            if name not in inputs and (needed or name in connected):
                inputs[name] = self.give(name, type_, kind)
        sources = [self.graph.source(value) for value in inputs.values() if isinstance(value, list)]
        if column is None:
            column = 1 + max((source.column for source in sources), default=-1)
        node = self.graph.add(kind, column, title, **inputs)
        if kind == self.subject or any(source.number in self.after for source in sources):
            self._follow(node, any(wanted[name][0] == "LATENT" for name in inputs))
        return node

    def _follow(self, node: Node, takes_latent: bool) -> None:
        """Let what comes next take what this node gives, in place of what usually gives it."""
        self.after.add(node.number)
        given: dict[str, list] = {}
        for slot, type_ in enumerate(self.facts[node.kind]["output"]):
            # A latent of nothing that was drawn is one to start from.
            given.setdefault("latent_image" if type_ == "LATENT" and not takes_latent else type_, []).append(node[slot])
        self.given |= given

    def give(self, name: str, type_: str, kind: str = "") -> list:
        """What an input of a node of class `kind` is connected to."""
        role = name if name == "latent_image" else type_
        if role in self.given and (kind, type_) != ("ZigMaEmptyLatent", "MODEL"):  # sizes, which nobody changes
            return self.given[role][-1 if name == "negative" else 0]
        if name not in NAMED and type_ not in GIVERS:
            raise ValueError(f"say in tools/example_graphs.py what gives {type_}: {self.subject} needs it")
        giver, slot = NAMED.get(name) or GIVERS[type_]
        return self.the(giver)[slot]

    def finish(self) -> None:
        """Show what comes of the subject: its pictures, its texts where it does not itself, else what is drawn."""
        node, facts = self.the(self.subject), self.facts[self.subject]
        seen = [slot for slot, type_ in enumerate(facts["output"]) if type_ in ("IMAGE", "STRING")]
        for slot in [] if facts["output_node"] else seen:
            self.show(node[slot])
        if not seen and not facts["output_node"]:
            self.show(self.give("images", "IMAGE"))
            if self.after == {node.number}:
                kinds = ", ".join(facts["output"])
                raise ValueError(f"say in tools/example_graphs.py what takes {kinds}: {self.subject} gives it")

    def trained(self) -> Node:
        """A run of training, with what the demo model needs for it."""
        return self.the("ZigMaTrain", "clip", "vae")

    def show(self, source: list, column: int | None = None) -> Node:
        """A preview, below what it shows or in a given column."""
        node = self.graph.source(source)
        picture = self.facts[node.kind]["output"][source[1]] == "IMAGE"
        kind, name = ("PreviewImage", "images") if picture else ("PreviewAny", "source")
        return self.graph.add(kind, node.column if column is None else column, **{name: source})


@example
def ZigMaTextConditioning(e: Example) -> None:
    e.the("ZigMaTextConditioning", "model", text="slice of pizza")
    e.finish()


@example
def ZigMaLabelConditioning(e: Example) -> None:
    e.the("ZigMaModelLoader", model_name="zigma-classes.safetensors")
    e.the("ZigMaLabelConditioning", label_name="apple, fish, heart, moon")
    e.the("ZigMaEmptyLatent", batch_size=4)
    e.finish()


@example
def ZigMaNoCondition(e: Example) -> None:
    e.the("ZigMaModelLoader", model_name="zigma-unconditional.safetensors")
    e.the("ZigMaNoCondition")
    e.the("ZigMaEmptyLatent", batch_size=4)
    e.the("ZigMaSampler", seed=3, cfg=1.0)
    e.finish()


@example
def ZigMaEmptyLatent(e: Example) -> None:
    e.the("ZigMaTextConditioning")
    e.the("ZigMaEmptyLatent", batch_size=4)
    e.finish()


@example
def ZigMaSampler(e: Example) -> None:
    e.the("ZigMaTextConditioning", text="owl")
    e.the("ZigMaSampler", seed=5)
    e.finish()


@example
def ZigMaODESampler(e: Example) -> None:
    e.the("ZigMaTextConditioning", text="red apple")
    e.the("ZigMaODESampler", solver="heun")
    e.the("ZigMaSampler", "sampler", steps=20)
    e.finish()


@example
def ZigMaSDESampler(e: Example) -> None:
    e.the("ZigMaTextConditioning", text="red apple")
    e.the("ZigMaSDESampler")
    e.the("ZigMaSampler", "sampler", steps=100)
    e.finish()


@example
def ZigMaScheduler(e: Example) -> None:
    e.the("ZigMaTextConditioning", text="penguin")
    e.the("ZigMaScheduler", steps=20, spacing="cosine")
    e.the("SamplerCustom", cfg=3.0)
    e.finish()


@example
def ZigMaVAEDecode(e: Example) -> None:
    e.the("ZigMaTextConditioning", text="sunflower")
    e.finish()


@example
def ZigMaVAEEncode(e: Example) -> None:
    e.the("ZigMaModelLoader")
    picture = e.another("LoadImage", image="example.png")
    e.the("ZigMaTextConditioning", text="green apple")
    small = e.another(
        "ImageScale", image=picture[0], upscale_method="lanczos", width=64, height=64, crop="center"
    )  # fmt: skip
    e.the("ZigMaVAEEncode", pixels=small[0])
    e.the("ZigMaSampler", column=2, denoise=0.8)
    e.finish()


@example
def ZigMaLoraLoader(e: Example) -> None:
    e.the("ZigMaLoraLoader", lora_name="zigma/first_00001_.safetensors")
    e.the("ZigMaTextConditioning", text="apple")
    e.finish()


@example
def ZigMaScanOrder(e: Example) -> None:
    ordered = e.the("ZigMaScanOrder", order="hilbert", variants="0, 1", layers="6, 7")
    e.show(e.the("ZigMaVAEDecode")[0])
    e.show(ordered[1], column=3)


@example
def ZigMaScanOrderPreview(e: Example) -> None:
    ordered = e.the("ZigMaScanOrder", order="hilbert", variants="0, 1")
    drawn = e.the("ZigMaScanOrderPreview", model=ordered[0])
    drawn.size = (252, 230)  # its whole name
    e.show(drawn[0], column=3).size = (430, 320)
    e.show(drawn[1], column=1).size = (690, 270)  # a line of the table


@example
def ZigMaPictureSheet(e: Example) -> None:
    drawn = [e.another("ZigMaSampler", title=f"{steps} steps", steps=steps) for steps in (4, 40)]
    first, second = (e.another("ZigMaVAEDecode", samples=latent[0])[0] for latent in drawn)
    sheet = e.the(
        "ZigMaPictureSheet", images=first, images_2=second, captions="4 steps\n40 steps", text_size=22
    )  # fmt: skip
    e.show(sheet[0]).size = (340, 270)


@example
def ZigMaModelDoctor(e: Example) -> None:
    report = e.the("ZigMaModelDoctor", "clip", "vae")
    report.size = (230, 420)
    e.show(report[0], column=2).size = (480, 700)


@example
def ZigMaSaveModel(e: Example) -> None:
    e.the("ZigMaSaveModel", "clip", "vae", dtype="bfloat16").size = (340, 220)


@example
def ZigMaDataset(e: Example) -> None:
    e.the("ZigMaDataset").size = (340, 480)


@example
def ZigMaTrain(e: Example) -> None:
    e.show(e.trained()[4], column=2).size = (380, 420)


@example
def ZigMaLossPlot(e: Example) -> None:
    e.trained()
    e.show(e.the("ZigMaLossPlot")[0]).size = (480, 290)


@example
def ZigMaSaveLora(e: Example) -> None:
    e.trained()
    e.the("ZigMaSaveLora").size = (340, 150)
