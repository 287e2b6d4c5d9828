"""The command line: python -m zigma demo | sample | train | evaluate | convert | inspect | scan-order | doctor.

A mistake of the user ends with one sentence on stderr and exit status 2; `--debug` shows the traceback as well.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .commands import (
    UserError,
    check_device,
    check_writable,
    convert_command,
    doctor_command,
    file_arguments,
    inspect_command,
    model_file,
    scan_order_command,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from .checkpoint import Bundle
    from .sampling import SamplingSettings

# The imports that bring torch stand in the commands, so that --help and a misspelt option answer at once.

FPS = 8
DEMO_PROMPTS = (
    "fox face", "panda face", "penguin", "owl", "turtle", "octopus",
    "tiger face", "frog face", "tropical fish", "sunflower", "tulip", "cactus",
    "red apple", "strawberry", "watermelon", "avocado", "carrot", "slice of pizza",
    "hamburger", "cupcake", "smiling face with sunglasses", "ghost", "sparkling heart", "unicorn face",
)  # fmt: skip


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> NoReturn:
        """Leave with status 2."""
        self.exit(2, f"{self.prog}: {message}; `{self.prog} --help` lists what there is\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for a user's mistake, 130 when interrupted."""
    options = _parser().parse_args(arguments)
    if hasattr(sys.stdout, "reconfigure"):  # names of files may hold what a console or a redirection cannot encode
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        for line in options.command(options) or ():
            print(line)
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

    def command(name: str, function: Callable[[argparse.Namespace], Iterator[str] | None], text: str) -> Parser:
        sub = commands.add_parser(name, help=text, description=text, parents=[shared])
        sub.set_defaults(command=function)
        return sub

    upscale: Any = {"type": _positive, "help": "enlarge pictures this many times"}
    demo = command("demo", demo_command, "Draw a labelled sheet with the model that comes with the pack.")
    demo.add_argument("--prompt", action="append", help="your own, instead of the sheet's; may be given again")
    demo.add_argument("--output", type=Path, default=Path("output/demo.png"), help="default: %(default)s")
    _add_sampling(demo, count=None).add_argument("--upscale", **upscale)

    draw = command("sample", sample_command, "Draw pictures and write them as files.")
    draw.add_argument("--model", default="demo", help="a file, or the name of a shipped model (default: %(default)s)")
    condition = draw.add_mutually_exclusive_group()
    condition.add_argument("--prompt", action="append", help="of a text model; may be given again; may be empty")
    condition.add_argument("--label", action="append", help="of a class model, number or name; may be given again")
    condition.add_argument("--features", type=Path, help="text features (n, tokens, width): .safetensors or .npy")
    draw.add_argument("--negative", default="", help="what guidance leads away from (default: the null condition)")
    draw.add_argument("--vae", type=Path, help="for a file without one: TAESD or Stable Diffusion layout")
    draw.add_argument("--clip", help="for a text model without an encoder: a folder or name that transformers knows")
    draw.add_argument(
        "--output", type=Path, required=True,
        help="out.png; several become out-1.png, out-2.png; a video's end in .webp or .mp4",
    )  # fmt: skip
    draw.add_argument("--fps", type=_positive, help=f"frames a second of a video (default: {FPS})")
    draw.add_argument("--sheet", action="store_true", help="write one labelled sheet instead of single pictures")
    _add_sampling(draw, count=1).add_argument("--upscale", **upscale)
    _add_file(draw)

    train = command("train", train_command, "Train or fine-tune a model, or go on with a run that was interrupted.")
    train.add_argument("config", nargs="?", help="a TOML file, or the name of a shipped one (--list)")
    train.add_argument(
        "--set", action="append", default=[], metavar="TABLE.KEY=VALUE", dest="changes",
        help="stands above the file: --set run.steps=500 --set data.path=pictures; may be given again",
    )  # fmt: skip
    train.add_argument("--dry-run", action="store_true", help="look at data, model, time and memory, and stop there")
    train.add_argument("--list", action="store_true", help="name the shipped configurations and where they are")
    train.add_argument("--quiet", action="store_true", help="no progress bars")

    evaluate = command("evaluate", evaluate_command, "Measure what a model draws, or pictures that are there.")
    _add_evaluate(evaluate)
    _add_sampling(evaluate, count=None, counts="pictures to draw (default: 1000), or of --samples to measure")
    _add_file(evaluate)

    inspect = command("inspect", inspect_command, "Say what a model file holds.")
    inspect.add_argument("file", help="a file, or the name of a shipped model")
    _add_file(inspect)

    convert = command("convert", convert_command, "Write any model file as a .safetensors that describes itself.")
    _add_convert(convert)
    _add_file(convert)

    order = command("scan-order", scan_order_command, "Print a token order, or draw it.")
    order.add_argument("kind", help="zigzag, hilbert, ...; an unknown one lists them all")
    order.add_argument("--index", type=int, help="which variant (default: the first eight)")
    order.add_argument("--height", type=int, default=8, help="of the grid, in tokens (default: %(default)s)")
    order.add_argument("--width", type=int, default=8, help="of the grid, in tokens (default: %(default)s)")
    order.add_argument("--seed", type=int, default=0, help="of the kind random (default: %(default)s)")
    order.add_argument("--png", type=Path, help="draw it into this file, and print its measures")
    order.add_argument("--over", type=Path, metavar="PICTURE", help="draw it over this picture (with --png)")

    command("doctor", doctor_command, "Say what is installed here, and which scan backends and devices can run.")
    return parser


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="a published .pt, a state dict, or a .safetensors; nothing in it is executed")
    parser.add_argument("output", type=Path, help="out.safetensors")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as in the file")
    parser.add_argument("--vae", type=Path, help="an autoencoder to put beside it")
    parser.add_argument("--null-label", type=int, help="of a class model: the label that training put for 'no class'")
    parser.add_argument("--label-names", type=Path, help="of a class model: a text file, one name a line, from 0 on")


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help="what to measure against: as for training")
    parser.add_argument("--model", help="a file, or the name of a shipped model; without one --samples are measured")
    parser.add_argument("--samples", type=Path, metavar="FOLDER", help="keep what is drawn here, and go on with it")
    parser.add_argument("--metrics", help="some of kid,precision,retrieval,bpd,fid (default: all)")
    parser.add_argument("--shard", metavar="K/N", help="draw only the K-th of N shares, from 0, and measure nothing")
    parser.add_argument("--bpd-count", type=_positive, default=32, help="pictures for bpd (default: %(default)s)")
    parser.add_argument("--bpd-steps", type=_positive, default=25, help="of Heun's method (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures into this file too")
    parser.add_argument("--vae", type=Path, help="for a file without one: TAESD or Stable Diffusion layout")
    parser.add_argument("--clip", help="for a text model without an encoder: a folder or name that transformers knows")


def _add_sampling(
    parser: argparse.ArgumentParser, count: int | None, counts: str = "pictures for each prompt"
) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("sampling", "steps, solver and guidance are the file's own unless given")
    group.add_argument("--count", type=_positive, default=count, help=counts)
    group.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    group.add_argument("--steps", type=_positive, help="intervals of the time grid")
    group.add_argument("--solver", help="euler, heun, midpoint, rk4, dopri5, ...")
    group.add_argument("--cfg", type=float, help="scale of classifier-free guidance; 1 is none")
    group.add_argument("--device", default="cpu", help="cpu, cuda, mps (default: %(default)s)")
    group.add_argument("--batch-size", type=_positive, default=8, help="pictures at once (default: %(default)s)")
    return group


def _add_file(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("files of others", "what a published file or a state dict does not say")
    group.add_argument("--weights", choices=("ema", "model"), default="ema", help="default: %(default)s")
    group.add_argument("--config", type=Path, help="the published YAML of the model")
    group.add_argument("--scan-type", help="zigzagN8, hilbertN8, v2, video_sst, ...")
    group.add_argument("--img-dim", type=_sides, help="of the latent: 128, or 64x96")
    group.add_argument("--video-frames", type=int, help="0 for pictures")
    group.add_argument("--legacy-permutation", action="store_true", help="trained with the code of April and May 2024")
    group.add_argument("--corrected-time-order", action="store_true", help="trained with frames in their place")


def _sides(text: str) -> int | tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"got {text!r}, but expected a number such as 128, or height x width as 64x96")
    return int(text) if len(parts) == 1 else (int(parts[0]), int(parts[1]))


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, but expected a whole number from 1")
    return int(text)


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
    """Pictures or videos as files, or one sheet."""
    bundle = _load(options.model, options.device, **file_arguments(options))
    _complete(bundle, options)
    if options.label is not None and bundle.model.config.conditioning != "class":
        raise UserError(f"got --label {options.label[0]}, but this is no class model: leave it out, or use --prompt")
    if options.fps is not None and (options.sheet or not bundle.model.config.video_frames):
        raise UserError(f"got --fps {options.fps}, but no video is written: leave it out")
    prompts: Any = options.label if options.prompt is None else options.prompt
    names: list[Any] = prompts or [""]
    if options.features is not None:
        from .text import read_features

        prompts = read_features(options.features)
        names = [f"features {row}" for row in range(len(prompts))]
    options.upscale = options.upscale or 1
    settings, pictures = _draw(bundle, options, prompts, options.negative, options.count)
    names = [str(name) or "(empty prompt)" for name in names for _ in range(options.count)]
    if options.sheet:
        if bundle.model.config.video_frames:
            pictures, names = (
                [frame for video in pictures for frame in video],
                [f"{name}, frame {i}" for name, video in zip(names, pictures, strict=True) for i in range(len(video))],
            )
        _write_sheet(options, settings, pictures, names, "")
        print(options.output)
        return
    from .sheet import save_animation, save_picture

    width = len(str(len(pictures)))
    for number, picture in enumerate(pictures, 1):
        path = options.output
        if len(pictures) > 1:
            path = path.with_name(f"{path.stem}-{number:0{width}d}{path.suffix}")
        video = isinstance(picture, list)
        print(save_animation(picture, path, options.fps or FPS) if video else save_picture(picture, path))


def _complete(bundle: Bundle, options: argparse.Namespace) -> None:
    """Give a bundle the parts that its file lacks."""
    if options.vae is not None:
        from .autoencoder import load_autoencoder

        bundle.autoencoder = load_autoencoder(options.vae, options.device)
    elif bundle.autoencoder is None and not bundle.latent.pixel_space:
        raise UserError(
            f"{options.model} carries no autoencoder to decode its latents: give one with --vae (for the "
            "released models that of Stable Diffusion, such as sd-vae-ft-ema)"
        )
    if options.clip is not None:
        from .text import ClipTextEncoder

        bundle.text_encoder = ClipTextEncoder(options.clip, options.device)


def train_command(options: argparse.Namespace) -> Iterator[str]:
    """A training run, resumed if its folder holds one."""
    from .training.command import shipped_configurations, train
    from .training.settings import read_settings

    logging.getLogger().setLevel(logging.INFO)
    shipped = shipped_configurations()
    if options.list:
        for name, path in shipped.items():
            yield f"{name}  {path}"
        return
    if options.config is None:
        raise UserError(f"give a configuration: a TOML file, or one of {', '.join(shipped)} (see --list)")
    changes = {}
    for change in options.changes:
        key, equals, value = change.partition("=")
        if not equals or "." not in key:
            raise UserError(f"got --set {change}, but expected TABLE.KEY=VALUE such as run.steps=500")
        changes[key.strip()] = value.strip()
    path = Path(options.config)
    if not path.is_file() and options.config in shipped:
        path = shipped[options.config]
    yield from train(read_settings(path, changes), dry_run=options.dry_run, show=not options.quiet)


def evaluate_command(options: argparse.Namespace) -> Iterator[str]:
    """Figures, line by line; with --shard, or of many processes, pictures alone."""
    from .training.evaluation import METRICS, Task, evaluate, model_facts
    from .training.generation import Share, own_device
    from .training.progress import progress_bars

    metrics = tuple(part.strip() for part in options.metrics.split(",")) if options.metrics else METRICS
    if options.json is not None:
        check_writable(options.json, (".json",))
    options.device = own_device(options.device)
    bundle, facts, settings = None, {}, None
    if options.model is not None:
        bundle = _load(options.model, options.device, **file_arguments(options))
        _complete(bundle, options)
        settings = _settings(bundle, options)
        facts = model_facts(model_file(options.model), options.vae, options.clip, file_arguments(options))
    else:
        _refuse(options, ("steps", "solver", "cfg", "vae", "clip", "config", "scan_type", "img_dim", "video_frames"))
    task = Task(
        options.data, metrics, count=options.count, seed=options.seed, batch_size=options.batch_size,
        device=options.device, sampling=settings, samples=options.samples, likelihoods=options.bpd_count,
        likelihood_steps=options.bpd_steps, facts=facts,
    )  # fmt: skip
    share = Share.parse(options.shard) if options.shard is not None else None
    with progress_bars(share is not None or Share.of_environment().rank == 0) as bar:
        yield from evaluate(task, bundle, share, options.json, bar)


def _refuse(options: argparse.Namespace, names: Sequence[str]) -> None:
    """Options that mean nothing without a model."""
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) is not None]
    if given:
        raise UserError(f"got {', '.join(given)}, but no --model that it is for: give the model, or leave it out")


def _load(name: str, device: str, **arguments: Any) -> Bundle:
    from .checkpoint import load_bundle

    path = model_file(name)
    check_device(device)
    return load_bundle(path, device=device, **arguments)


def _settings(bundle: Bundle, options: argparse.Namespace) -> SamplingSettings:
    from .sampling import SamplingSettings

    given = {"steps": options.steps, "solver": options.solver, "guidance": options.cfg}
    settings = SamplingSettings.from_metadata(bundle.metadata)
    settings = dataclasses.replace(settings, **{key: value for key, value in given.items() if value is not None})
    if settings.solver == "dopri5" and options.steps is not None:
        raise UserError(f"got --steps {options.steps}, but dopri5 chooses its own steps: leave --steps out")
    return settings


def _draw(
    bundle: Bundle, options: argparse.Namespace, prompts: Any, negative: str, count: int
) -> tuple[SamplingSettings, list]:
    """`count` pictures (or videos, as lists) for each prompt, with a progress bar; and the settings that drew them."""
    from tqdm import tqdm

    from .sampling import sample
    from .sheet import ANIMATIONS, FORMATS, enlarge, to_pictures

    settings = _settings(bundle, options)
    video = bundle.model.config.video_frames > 0 and not getattr(options, "sheet", False)
    check_writable(options.output, ANIMATIONS if video else tuple(FORMATS))
    with tqdm(desc="sampling", unit="step", delay=0.2) as bar:  # the delay keeps it from standing before a refusal

        def progress(done: int, total: int) -> None:
            bar.total = total or None
            bar.update(done - bar.n)

        images = sample(
            bundle, prompts, count=count, seed=options.seed, settings=settings, negative=negative,
            batch_size=options.batch_size, progress=progress,
        )  # fmt: skip
    if images.dim() == 5:
        return settings, [[enlarge(frame, options.upscale) for frame in to_pictures(video)] for video in images]
    return settings, [enlarge(picture, options.upscale) for picture in to_pictures(images)]


def _write_sheet(
    options: argparse.Namespace, settings: SamplingSettings, pictures: list[Image], captions: list[str], title: str
) -> None:
    from .sheet import labelled_sheet, save_picture

    steps = "" if settings.solver == "dopri5" else f", {settings.steps} steps"
    footnote = f"{settings.solver}{steps}, guidance {settings.guidance:g}, seed {options.seed}"
    save_picture(labelled_sheet(pictures, captions, title=title, footnote=footnote), options.output)
