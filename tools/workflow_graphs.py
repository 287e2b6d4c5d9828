"""The shipped workflows, each a function that builds its graph; `tools/workflows.py` writes the files.

All of them run as they are: on the demo model, or on a file that the note names and says where to get.
"""

from __future__ import annotations

from collections.abc import Callable

from graph_files import Graph, Node

__all__ = ["WORKFLOWS"]

WORKFLOWS: dict[str, Callable[[Graph], None]] = {}


def workflow(function: Callable[[Graph], None]) -> Callable[[Graph], None]:
    """Ship it under the function's name."""
    WORKFLOWS[function.__name__] = function
    return function


def _loaded(g: Graph, name: str = "demo") -> Node:
    return g.add("ZigMaModelLoader", 0, model_name=name)


def _prompt(g: Graph, model: Node, text: str, column: int = 1) -> Node:
    """positive and negative (the null condition)."""
    return g.add("ZigMaTextConditioning", column, clip=model[1], text=text, negative_text="")


def _drawn(g: Graph, column: int, model: list, text: Node, latent: Node, title: str = "", **settings) -> Node:
    return g.add(
        "ZigMaSampler", column, title, model=model, positive=text[0], negative=text[1], latent_image=latent[0],
        **settings,
    )  # fmt: skip


def _saved(g: Graph, images: list, column: int, name: str) -> Node:
    return g.add("SaveImage", column, images=images, filename_prefix=f"zigma/{name}")


@workflow
def text_to_image(g: Graph) -> None:
    """Four pictures of a prompt."""
    g.note(
        "**Text to image with the model that comes with the pack.** Prompts are words of its vocabulary: *panda face*, "
        "*slice of pizza*, *smiling face with sunglasses*; add *noto* or *twemoji* for a style. Words that it does not "
        "know are named in the host's log.\n\nKSampler (euler, simple) and VAE Decode in place of the two ZigMa nodes "
        "give the same pictures.",
        0,
    )
    model = _loaded(g)
    positive = g.add("CLIPTextEncode", 1, "Prompt", clip=model[1], text="panda face")
    negative = g.add("CLIPTextEncode", 1, "Negative (empty)", clip=model[1], text="")
    latent = g.add("ZigMaEmptyLatent", 1, model=model[0], batch_size=4)
    drawn = g.add(
        "ZigMaSampler", 2, model=model[0], positive=positive[0], negative=negative[0], latent_image=latent[0], seed=0,
        steps=50, cfg=3.0,
    )  # fmt: skip
    _saved(g, g.add("ZigMaVAEDecode", 3, samples=drawn[0], vae=model[2], enlarge=4)[0], 4, "text")


@workflow
def image_to_image(g: Graph) -> None:
    """A picture as the start of another."""
    g.note(
        "**Image to image.** A picture is encoded, covered with noise up to `denoise`, and drawn again under another "
        "prompt: 0.9 keeps little of it, 0.5 much.\n\nThe picture is drawn here so that the graph runs as it is: put "
        "**Load Image** in place of the first ZigMa VAE Decode for one of your own (the demo model knows 64 x 64).",
        0,
    )
    model = _loaded(g)
    first = _prompt(g, model, "red apple")
    second = _prompt(g, model, "green apple")
    latent = g.add("ZigMaEmptyLatent", 1, model=model[0])
    source = _drawn(g, 2, model[0], first, latent, "The picture to start from", seed=1, steps=50)
    before = g.add("ZigMaVAEDecode", 3, samples=source[0], vae=model[2])
    encoded = g.add("ZigMaVAEEncode", 3, pixels=before[0], vae=model[2])
    drawn = _drawn(g, 4, model[0], second, encoded, "Drawn again", seed=2, steps=50, denoise=0.85)
    after = g.add("ZigMaVAEDecode", 5, samples=drawn[0], vae=model[2])
    sheet = g.add(
        "ZigMaPictureSheet", 5, images=before[0], images_2=after[0], captions="before: red apple\nafter: green apple",
        enlarge=4,
    )  # fmt: skip
    _saved(g, sheet[0], 6, "image")


@workflow
def inpainting(g: Graph) -> None:
    """A masked part drawn anew."""
    g.note(
        "**In-painting.** Only what the mask covers is drawn anew, here the right half of a picture; the rest "
        "stays.\n\nFor a picture of your own: **Load Image**, paint a mask in the mask editor, and connect its MASK to "
        "Set Latent Noise Mask.",
        0,
    )
    model = _loaded(g)
    first = _prompt(g, model, "cat face")
    second = _prompt(g, model, "panda face")
    latent = g.add("ZigMaEmptyLatent", 1, model=model[0])
    source = _drawn(g, 2, model[0], first, latent, "The picture to mend", seed=3, steps=50)
    before = g.add("ZigMaVAEDecode", 3, samples=source[0], vae=model[2])
    encoded = g.add("ZigMaVAEEncode", 3, pixels=before[0], vae=model[2])
    kept = g.add("SolidMask", 2, "0 keeps", value=0.0, width=64, height=64)
    redrawn = g.add("SolidMask", 2, "1 is drawn anew", value=1.0, width=32, height=64)
    mask = g.add("MaskComposite", 3, destination=kept[0], source=redrawn[0], x=32, y=0, operation="add")
    masked = g.add("SetLatentNoiseMask", 4, samples=encoded[0], mask=mask[0])
    drawn = _drawn(g, 4, model[0], second, masked, "Drawn anew", seed=4, steps=50)
    after = g.add("ZigMaVAEDecode", 5, samples=drawn[0], vae=model[2])
    sheet = g.add(
        "ZigMaPictureSheet", 5, images=before[0], images_2=after[0], captions="before\nright half drawn anew",
        enlarge=4,
    )  # fmt: skip
    _saved(g, sheet[0], 6, "inpainting")


@workflow
def order_comparison(g: Graph) -> None:
    """One seed, several token orders."""
    g.note(
        "**What the token order does.** The same model, prompt, seed and steps; only the order in which the layers "
        "read the patches differs. The demo model was trained on eight zigzags: in other orders it shows what it has "
        "learned to expect.\n\nThe paths themselves: **ZigMa Scan Order Preview**.",
        0,
    )
    model = _loaded(g)
    text = _prompt(g, model, "panda face")
    latent = g.add("ZigMaEmptyLatent", 1, model=model[0])
    orders = [
        ("zigzag", "0-7"), ("zigzag", "0"), ("sweep", "0-7"), ("hilbert", "0-7"), ("diagonal", "0"), ("random", "0-7"),
    ]  # fmt: skip
    decoded = []
    for kind, variants in orders:
        ordered = g.add("ZigMaScanOrder", 2, f"{kind} {variants}", model=model[0], order=kind, variants=variants)
        drawn = g.add(
            "KSampler", 3, f"{kind} {variants}", model=ordered[0], positive=text[0], negative=text[1],
            latent_image=latent[0], seed=0, steps=50, cfg=3.0, sampler_name="euler", scheduler="simple",
        )  # fmt: skip
        decoded.append(g.add("ZigMaVAEDecode", 4, samples=drawn[0], vae=model[2])[0])
    more = {f"images_{number}": images for number, images in enumerate(decoded[1:], 2)}
    captions = ["zigzag 0-7 (as trained)", *(f"{kind} {variants}" for kind, variants in orders[1:])]
    sheet = g.add(
        "ZigMaPictureSheet", 5, images=decoded[0], **more, captions="\n".join(captions), columns=3, enlarge=3,
        title="One seed, six token orders",
    )  # fmt: skip
    _saved(g, sheet[0], 6, "orders")
    paths = g.add("ZigMaScanOrderPreview", 5, model=model[0])
    g.add("PreviewImage", 6, "The paths of the trained order", images=paths[0])


@workflow
def ode_and_sde(g: Graph) -> None:
    """The same noise along the ODE and the SDE."""
    g.note(
        "**ODE and SDE.** Both lead from the same noise to the data: the ODE along one path, the SDE with new noise in "
        "every step, whose strength `norm` sets. The stock SamplerCustomAdvanced runs them, with any guider and noise "
        "node.",
        0,
    )
    model = _loaded(g)
    text = _prompt(g, model, "owl")
    latent = g.add("ZigMaEmptyLatent", 1, model=model[0])
    guider = g.add("CFGGuider", 2, model=model[0], positive=text[0], negative=text[1], cfg=3.0)
    noise = g.add("RandomNoise", 2, noise_seed=5)
    sigmas = g.add("ZigMaScheduler", 2, steps=100)
    samplers = [
        ("ODE, heun", g.add("ZigMaODESampler", 2, solver="heun")),
        ("ODE, dopri5 (adaptive)", g.add("ZigMaODESampler", 2, solver="dopri5")),
        ("SDE, norm 0.5", g.add("ZigMaSDESampler", 2, norm=0.5)),
        ("SDE, norm 1", g.add("ZigMaSDESampler", 2, norm=1.0)),
    ]
    decoded = []
    for title, sampler in samplers:
        drawn = g.add(
            "SamplerCustomAdvanced", 3, title, noise=noise[0], guider=guider[0], sampler=sampler[0], sigmas=sigmas[0],
            latent_image=latent[0],
        )  # fmt: skip
        decoded.append(g.add("ZigMaVAEDecode", 4, samples=drawn[0], vae=model[2])[0])
    more = {f"images_{number}": images for number, images in enumerate(decoded[1:], 2)}
    sheet = g.add(
        "ZigMaPictureSheet", 5, images=decoded[0], **more, captions="\n".join(title for title, _ in samplers),
        columns=2, enlarge=4, title="One noise, four ways to the data",
    )  # fmt: skip
    _saved(g, sheet[0], 6, "solvers")


@workflow
def label_to_image(g: Graph) -> None:
    """A class model."""
    g.note(
        "**Label to image.** For a class-conditional model: put its file into `models/zigma` and choose it in the "
        "loader. Labels are numbers, or names if the file has some. Several labels draw one picture each.\n\nThe null "
        "label for guidance comes from the file; without one, set cfg to 1.",
        0,
    )
    model = _loaded(g, "zigma-classes.safetensors")
    label = g.add("ZigMaLabelConditioning", 1, model=model[0], label=1)
    latent = g.add("ZigMaEmptyLatent", 1, model=model[0])
    drawn = _drawn(g, 2, model[0], label, latent, seed=0, steps=30, cfg=2.0)
    _saved(g, g.add("ZigMaVAEDecode", 3, samples=drawn[0], vae=model[2])[0], 4, "label")


@workflow
def large_picture(g: Graph) -> None:
    """Wider than the training, decoded in tiles."""
    g.note(
        "**A large picture.** A ZigMa has no fixed size: orders are made for any grid, and the cost grows with the "
        "number of patches, not with its square. Here a model of 1024 x 1024 draws 1536 x 1024, which suits "
        "landscapes; the decoder works in tiles of 512 pixels, so that its memory does not grow with the picture.\n\n"
        "`landscape1024_0210000.pt` (huggingface.co/taohu/zigma) into `models/zigma`, `sd-vae-ft-ema.safetensors` "
        "(stabilityai/sd-vae-ft-ema) into `models/vae`.",
        0,
    )
    model = _loaded(g, "landscape1024_0210000.pt")
    vae = g.add("ZigMaVAELoader", 0, vae_name="sd-vae-ft-ema.safetensors")
    nothing = g.add("ZigMaNoCondition", 1, model=model[0])
    latent = g.add("ZigMaEmptyLatent", 1, model=model[0], width=1536, height=1024)
    drawn = g.add(
        "ZigMaSampler", 2, model=model[0], positive=nothing[0], negative=nothing[0], latent_image=latent[0], seed=0,
        steps=25, cfg=1.0, solver="heun",
    )  # fmt: skip
    _saved(g, g.add("ZigMaVAEDecode", 3, samples=drawn[0], vae=vae[0], tile_size=512)[0], 4, "large")


@workflow
def video(g: Graph) -> None:
    """Frames of a video model."""
    g.note(
        "**Video.** For a model with frames: put its file into `models/zigma` and choose it in the loader. Its layers "
        "read space and time in turn. The VAE decodes frame by frame.",
        0,
    )
    model = _loaded(g, "zigma-video.safetensors")
    text = _prompt(g, model, "red fox")
    latent = g.add("ZigMaEmptyLatent", 1, model=model[0])
    drawn = _drawn(g, 2, model[0], text, latent, seed=0, steps=30)
    frames = g.add("ZigMaVAEDecode", 3, samples=drawn[0], vae=model[2], enlarge=4)
    g.add(
        "SaveAnimatedWEBP", 4, images=frames[0], filename_prefix="zigma/video", fps=8.0, lossless=True, quality=100,
        method="default",
    )  # fmt: skip


@workflow
def lora(g: Graph) -> None:
    """A model with a LoRA, beside the model without it."""
    g.note(
        "**LoRA.** Put the file into `models/loras` and choose it in the loader. ZigMa LoRA Loader says when a LoRA "
        "belongs to another model; the stock LoRA loaders work as well.",
        0,
    )
    model = _loaded(g)
    changed = g.add("ZigMaLoraLoader", 1, model=model[0], lora_name="zigma-lora.safetensors", strength_model=1.0)
    text = _prompt(g, model, "red apple")
    latent = g.add("ZigMaEmptyLatent", 1, model=model[0])
    decoded = []
    for title, source in (("without", model[0]), ("with the LoRA", changed[0])):
        drawn = _drawn(g, 2, source, text, latent, title, seed=0, steps=50)
        decoded.append(g.add("ZigMaVAEDecode", 3, samples=drawn[0], vae=model[2])[0])
    sheet = g.add(
        "ZigMaPictureSheet", 4, images=decoded[0], images_2=decoded[1], captions="without\nwith the LoRA", enlarge=4
    )  # fmt: skip
    _saved(g, sheet[0], 5, "lora")


@workflow
def fine_tune(g: Graph) -> None:
    """The demo model learns a style from six pictures."""
    g.note(
        "**Fine-tuning.** ZigMa Train makes a LoRA for the demo model from six pictures, *badges*, which come with the "
        "pack; it takes about a minute on two cores. Then the same prompts and seeds are drawn without it and with "
        "it: *apple* is among the six, *owl* and *strawberry* are not.\n\n**Your own pictures:** a folder in `input`, "
        "with a `.txt` beside each picture that says what it shows; its name as `folder`, and another "
        "`run_name`.\n\n**Stop** keeps what was learnt: queue again, and it goes on. ZigMa Save LoRA puts the file "
        "into `models/loras`.",
        0,
    )
    model = _loaded(g)
    data = g.add("ZigMaDataset", 0, "Six pictures", folder="badges")
    trained = g.add(
        "ZigMaTrain", 1, model=model[0], dataset=data[0], steps=150, batch_size=6, run_name="badges", sample_every=50,
        prompts="apple\nowl\nheart\npanda face", clip=model[1], vae=model[2],
    )  # fmt: skip
    latent = g.add("ZigMaEmptyLatent", 1, model=model[0])
    prompts = ("apple", "owl", "strawberry")
    decoded = []
    for title, source in (("before", model[0]), ("after", trained[0])):
        for prompt in prompts:
            text = _prompt(g, model, prompt, 2)
            drawn = _drawn(g, 3, source, text, latent, f"{prompt}, {title}", seed=0, steps=30)
            decoded.append(g.add("ZigMaVAEDecode", 4, samples=drawn[0], vae=model[2])[0])
    more = {f"images_{number}": images for number, images in enumerate(decoded[1:], 2)}
    captions = [f"{prompt}, {title}" for title in ("before", "after") for prompt in prompts]
    sheet = g.add(
        "ZigMaPictureSheet", 5, images=decoded[0], **more, captions="\n".join(captions), columns=3, enlarge=3,
        title="Before and after 150 steps on six pictures",
    )  # fmt: skip
    _saved(g, sheet[0], 6, "fine_tune")
    plot = g.add("ZigMaLossPlot", 5, losses=trained[3])
    g.add("PreviewImage", 6, "The loss", images=plot[0])
    g.add("ZigMaSaveLora", 2, file=trained[2])


@workflow
def released_models(g: Graph) -> None:
    """The authors' checkpoints."""
    g.note(
        "**The released models**, from huggingface.co/taohu/zigma, into `models/zigma`:\n\n"
        "- `faceshq1024_0090000.pt`, `landscape1024_0210000.pt`: 1024 x 1024\n"
        "- `churches256_0280000.pt`: 256 x 256\n"
        "- `zigzagN8_b1_pe2_coco14_bs48_0400000.pt`: 256 x 256, by text: connect a CLIP loader (CLIP ViT-L/14, type "
        "stable_diffusion) to ZigMa Text Conditioning, in place of ZigMa No Condition\n\n"
        "and `sd-vae-ft-ema.safetensors` (stabilityai/sd-vae-ft-ema) into `models/vae`.\n\nThey were trained without a "
        "null condition: leave cfg at 1.",
        0,
    )
    model = _loaded(g, "landscape1024_0210000.pt")
    vae = g.add("ZigMaVAELoader", 0, vae_name="sd-vae-ft-ema.safetensors")
    nothing = g.add("ZigMaNoCondition", 1, model=model[0])
    latent = g.add("ZigMaEmptyLatent", 1, model=model[0])
    drawn = g.add(
        "ZigMaSampler", 2, model=model[0], positive=nothing[0], negative=nothing[0], latent_image=latent[0], seed=0,
        steps=50, cfg=1.0, solver="heun",
    )  # fmt: skip
    _saved(g, g.add("ZigMaVAEDecode", 3, samples=drawn[0], vae=vae[0])[0], 4, "released")
