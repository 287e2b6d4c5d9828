"""The command line: python -m zigma demo | sample | train | inspect | scan-order | doctor.

A mistake of the user ends with one sentence on stderr and exit status 2; `--debug` shows the traceback as well.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from .training.recipe import Recipe

if TYPE_CHECKING:
    from PIL.Image import Image

    from .checkpoint import Bundle
    from .sampling import SamplingSettings

# The imports that bring torch stand in the commands, so that --help and a misspelt option answer at once.

DEMO_PROMPTS = (
    "fox face", "panda face", "penguin", "owl", "turtle", "octopus",
    "tiger face", "frog face", "tropical fish", "sunflower", "tulip", "cactus",
    "red apple", "strawberry", "watermelon", "avocado", "carrot", "slice of pizza",
    "hamburger", "cupcake", "smiling face with sunglasses", "ghost", "sparkling heart", "unicorn face",
)  # fmt: skip


class UserError(Exception):
    """A mistake of the user, with the sentence that says what to do."""


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> NoReturn:
        """Leave with status 2."""
        self.exit(2, f"{self.prog}: {message}; `{self.prog} --help` lists what there is\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for a user's mistake, 130 when interrupted."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        options.command(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `... | head` has read enough; nothing may be written at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (UserError, ValueError, OSError, ImportError, RuntimeError) as error:
        if options.debug:
            raise
        # What torch itself raises is seldom the user's doing, and its message alone seldom enough.
        print(f"zigma: {error}" + " (--debug shows where)" * isinstance(error, RuntimeError), file=sys.stderr)
        return 2
    return 0


def _parser() -> Parser:
    shared = Parser(add_help=False)
    shared.add_argument("--debug", action="store_true", help="show tracebacks")
    shared.add_argument("--verbose", action="store_true", help="log what is chosen and why")
    parser = Parser(prog="python -m zigma", description="ZigMa: pictures from zigzag Mamba diffusion models.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)

    def command(name: str, function: Callable[[argparse.Namespace], None], text: str) -> Parser:
        sub = commands.add_parser(name, help=text, description=text, parents=[shared])
        sub.set_defaults(command=function)
        return sub

    demo = command("demo", demo_command, "Draw a labelled sheet with the model that comes with the pack.")
    demo.add_argument("--prompt", action="append", help="your own, instead of the sheet's; may be given again")
    demo.add_argument("--output", type=Path, default=Path("output/demo.png"), help="default: %(default)s")
    _add_sampling(demo, count=None)

    draw = command("sample", sample_command, "Draw pictures and write them as files.")
    draw.add_argument("--model", default="demo", help="a file, or the name of a shipped model (default: %(default)s)")
    condition = draw.add_mutually_exclusive_group()
    condition.add_argument("--prompt", action="append", help="of a text model; may be given again; may be empty")
    condition.add_argument("--label", action="append", type=int, help="of a class model; may be given again")
    draw.add_argument("--negative", default="", help="text that guidance leads away from (default: the empty text)")
    draw.add_argument("--output", type=Path, required=True, help="out.png; several become out-1.png, out-2.png")
    draw.add_argument("--sheet", action="store_true", help="write one labelled sheet instead of single pictures")
    _add_sampling(draw, count=1)

    train = command("train", train_command, "Train a text-conditioned model on pictures with captions.")
    train.add_argument("--data", type=Path, required=True, help="a folder of pictures, or a packed file")
    train.add_argument("--out", type=Path, required=True, help="folder of the run; a run found there is resumed")
    train.add_argument("--autoencoder", type=Path, help="a VAE in TAESD layout, or a model file with one; none: pixels")
    train.add_argument("--start-from", type=Path, help="a model file whose weights the run starts from")
    train.add_argument("--categories", help="of a packed file, comma-separated (default: all)")
    train.add_argument("--size", type=_positive, default=64, help="sides of a folder's pictures (default: %(default)s)")
    train.add_argument("--device", default="cpu", help="cpu, cuda, mps (default: %(default)s)")
    group = train.add_argument_group("recipe", "see zigma/training/recipe.py for what each of them means")
    for field in dataclasses.fields(Recipe):
        parse = _yes_or_no if isinstance(field.default, bool) else type(field.default)
        option = "--" + field.name.replace("_", "-")
        group.add_argument(option, type=parse, default=field.default, help="default: %(default)s")

    inspect = command("inspect", inspect_command, "Say what a model file holds.")
    inspect.add_argument("file", help="a file, or the name of a shipped model")

    order = command("scan-order", scan_order_command, "Print a token order, or draw it.")
    order.add_argument("kind", help="zigzag, hilbert, ...; an unknown one lists them all")
    order.add_argument("--index", type=int, help="which variant (default: the first eight)")
    order.add_argument("--height", type=int, default=8, help="of the grid, in tokens (default: %(default)s)")
    order.add_argument("--width", type=int, default=8, help="of the grid, in tokens (default: %(default)s)")
    order.add_argument("--seed", type=int, default=0, help="of the kind random (default: %(default)s)")
    order.add_argument("--png", type=Path, help="draw it into this file")

    command("doctor", doctor_command, "Say what is installed here, and which scan backends and devices can run.")
    return parser


def _add_sampling(parser: argparse.ArgumentParser, count: int | None) -> None:
    group = parser.add_argument_group("sampling", "steps, solver and guidance are the file's own unless given")
    group.add_argument("--count", type=_positive, default=count, help="pictures for each prompt")
    group.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    group.add_argument("--steps", type=_positive, help="intervals of the time grid")
    group.add_argument("--solver", help="euler, heun, midpoint, rk4, dopri5, ...")
    group.add_argument("--cfg", type=float, help="scale of classifier-free guidance; 1 is none")
    group.add_argument("--device", default="cpu", help="cpu, cuda, mps (default: %(default)s)")
    group.add_argument("--batch-size", type=_positive, default=8, help="pictures at once (default: %(default)s)")
    group.add_argument("--upscale", type=_positive, help="enlarge pictures this many times")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, but expected a whole number from 1")
    return int(text)


def _yes_or_no(text: str) -> bool:
    if text.lower() not in ("yes", "true", "1", "no", "false", "0"):
        raise argparse.ArgumentTypeError(f"got {text!r}, but expected yes or no")
    return text.lower() in ("yes", "true", "1")


def demo_command(options: argparse.Namespace) -> None:
    """The labelled sheet of `make demo`."""
    bundle = _load("demo", options.device)
    prompts = options.prompt or list(DEMO_PROMPTS)
    count = options.count or (6 if options.prompt else 1)
    options.upscale = options.upscale or 2
    started = time.monotonic()
    settings, pictures = _draw(bundle, options, prompts, "", count)
    captions = [prompt or "(empty prompt)" for prompt in prompts for _ in range(count)]
    _write_sheet(options, settings, pictures, captions, "ZigMa")
    print(f"{len(pictures)} pictures in {time.monotonic() - started:.0f} s: {options.output.resolve()}")


def sample_command(options: argparse.Namespace) -> None:
    """Pictures as files, or one sheet."""
    bundle = _load(options.model, options.device)
    prompts = options.label if options.prompt is None else options.prompt
    options.upscale = options.upscale or 1
    settings, pictures = _draw(bundle, options, prompts, options.negative, options.count)
    names = [str(prompt) or "(empty prompt)" for prompt in prompts or [""] for _ in range(options.count)]
    if options.sheet:
        _write_sheet(options, settings, pictures, names, "")
        print(options.output)
        return
    from .sheet import save_picture

    width = len(str(len(pictures)))
    for number, picture in enumerate(pictures, 1):
        path = options.output
        if len(pictures) > 1:
            path = path.with_name(f"{path.stem}-{number:0{width}d}{path.suffix}")
        print(save_picture(picture, path))


def train_command(options: argparse.Namespace) -> None:
    """A training run, resumed if its folder holds one."""
    from .training.data import encode_pictures, read_autoencoder, read_pictures, vocabulary_of
    from .training.trainer import Trainer

    logging.getLogger().setLevel(logging.INFO)
    _check_device(options.device)
    recipe = Recipe(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Recipe)})
    categories = [name.strip() for name in options.categories.split(",")] if options.categories else None
    pictures = read_pictures(options.data, options.size, categories)
    autoencoder = None if options.autoencoder is None else read_autoencoder(options.autoencoder)
    options.out.mkdir(parents=True, exist_ok=True)
    data = encode_pictures(pictures, autoencoder, options.out / "latents.safetensors")
    facts = {"categories": categories} if categories else {}
    trainer = Trainer(data, vocabulary_of(pictures), options.out, recipe, autoencoder, options.device, facts)
    if options.start_from is not None:
        trainer.start_from(options.start_from)
    print(trainer.run())


def inspect_command(options: argparse.Namespace) -> None:
    """What a file holds, read without building a module."""
    from .checkpoint import read_checkpoint

    file = read_checkpoint(_model_file(options.file))
    config = file.config
    parts = {"denoiser": file.state_dict, "text encoder": file.text_state, "autoencoder": file.vae_state}
    print(f"{file.path}: {Path(file.path).stat().st_size / 1e6:.1f} MB")
    for name, state in parts.items():
        if state:
            dtypes = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()}))
            print(f"  {name}: {sum(t.numel() for t in state.values()):,} parameters in {len(state)} tensors, {dtypes}")
        else:
            print(f"  {name}: none in this file")
    print(f"  width {config.embed_dim}, depth {config.depth}, patch size {config.patch_size}, state {config.d_state}")
    height, width = config.img_dim
    print(f"  input: {config.in_channels} x {height} x {width}, {config.grid[0]} x {config.grid[1]} tokens")
    print(f"  condition: {config.conditioning}" + f", features of width {config.d_context}" * config.has_text)
    own = "in the file, one for each layer" if file.token_orders is not None else config.scan_type
    print(f"  token orders: {own}")
    space = "pixels" if file.latent.pixel_space else f"latents, 1/{file.latent.downscale} of the picture's sides"
    print(f"  works on: {space}")
    for key, value in sorted(file.metadata.items()):
        print(f"  {key} = {value if len(str(value)) <= 200 else str(value)[:197] + '...'}")


def scan_order_command(options: argparse.Namespace) -> None:
    """The step at which each token is read, as the grid; or the path as a picture."""
    import torch

    from .scan_orders import available_orders, count_jumps, inverse_order, scan_order
    from .sheet import draw_order, labelled_sheet, save_picture

    generator = torch.Generator().manual_seed(options.seed)
    kind, height, width = options.kind, options.height, options.width
    indices = [options.index] if options.index is not None else range(min(8, available_orders().get(kind, 1)))
    orders = [scan_order(kind, index, height=height, width=width, generator=generator) for index in indices]
    if options.png:
        drawings = [draw_order(order, height, width) for order in orders]
        names = [f"{kind} {index}" for index in indices]
        print(save_picture(drawings[0] if len(drawings) == 1 else labelled_sheet(drawings, names), options.png))
        return
    digits = len(str(height * width - 1))
    for index, order in zip(indices, orders, strict=True):
        print(f"{kind} {index} on {height} x {width} tokens: the step at which each is read")
        for row in inverse_order(order).view(height, width).tolist():
            print("  " + " ".join(f"{step:{digits}d}" for step in row))
        print(f"order: {' '.join(map(str, order.tolist()))}")
        print(f"jumps: {count_jumps(order, width)}")


def doctor_command(options: argparse.Namespace) -> None:
    """Versions, devices, backends, shipped models."""
    import torch

    from .assets import available_models
    from .selective_scan import available_backends

    print(f"python {platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores")
    for package in ("torch", "einops", "numpy", "pillow", "safetensors", "torchdiffeq", "tqdm"):
        try:
            print(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{package} is missing: pip install {package}")
    devices = ["cpu"]
    devices += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    devices += ["mps"] * torch.backends.mps.is_available()
    print(f"devices: {', '.join(devices)}; {torch.get_num_threads()} threads")
    print(f"scan backends, fastest first: {', '.join(available_backends())}")
    for name, path in available_models().items():
        print(f"model {name}: {path}")


def _model_file(name: str) -> Path:
    """A file's path, or that of the shipped model of this name."""
    from .assets import available_models

    models = available_models()
    if name in models and not Path(name).is_file():
        return models[name]
    if not Path(name).is_file():
        raise UserError(f"no model file {name}: give a path, or the name of a shipped model ({', '.join(models)})")
    return Path(name)


def _load(name: str, device: str) -> Bundle:
    from .checkpoint import load_bundle

    path = _model_file(name)
    _check_device(device)
    return load_bundle(path, device=device)


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a build without CUDA says so in an AssertionError
        reason = str(error).splitlines()[0]
        raise UserError(f"device {device!r} cannot be used here ({reason}): try --device cpu") from error


def _settings(bundle: Bundle, options: argparse.Namespace) -> SamplingSettings:
    from .sampling import SamplingSettings

    given = {"steps": options.steps, "solver": options.solver, "guidance": options.cfg}
    settings = SamplingSettings.from_metadata(bundle.metadata)
    settings = dataclasses.replace(settings, **{key: value for key, value in given.items() if value is not None})
    if settings.solver == "dopri5" and options.steps is not None:
        raise UserError(f"got --steps {options.steps}, but dopri5 chooses its own steps: leave --steps out")
    return settings


def _draw(
    bundle: Bundle, options: argparse.Namespace, prompts: list[str] | list[int] | None, negative: str, count: int
) -> tuple[SamplingSettings, list[Image]]:
    """`count` pictures for each prompt, with a progress bar on stderr; and the settings that drew them."""
    from tqdm import tqdm

    from .sampling import sample
    from .sheet import enlarge, to_pictures

    settings = _settings(bundle, options)
    _check_writable(options.output)
    with tqdm(desc="sampling", unit="step", delay=0.2) as bar:  # the delay keeps it from standing before a refusal

        def progress(done: int, total: int) -> None:
            bar.total = total or None
            bar.update(done - bar.n)

        images = sample(
            bundle, prompts, count=count, seed=options.seed, settings=settings, negative=negative,
            batch_size=options.batch_size, progress=progress,
        )  # fmt: skip
    return settings, [enlarge(picture, options.upscale) for picture in to_pictures(images)]


def _write_sheet(
    options: argparse.Namespace, settings: SamplingSettings, pictures: list[Image], captions: list[str], title: str
) -> None:
    from .sheet import labelled_sheet, save_picture

    steps = "" if settings.solver == "dopri5" else f", {settings.steps} steps"
    footnote = f"{settings.solver}{steps}, guidance {settings.guidance:g}, seed {options.seed}"
    save_picture(labelled_sheet(pictures, captions, title=title, footnote=footnote), options.output)


def _check_writable(path: Path) -> None:
    """Find out before the work, not after it."""
    from .sheet import picture_format

    picture_format(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {path.parent} cannot be made ({error.strerror}): choose another") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"the output {path} cannot be written: choose a file in a folder that is yours")
