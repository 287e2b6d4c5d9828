"""Pictures to train on: a folder of them, or a batch of a graph."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io

from ..zigma.training.caption_files import Notes
from ..zigma.training.data_sources import walk
from ..zigma.training.dataset import KINDS, read_dataset
from ..zigma.training.preflight import inspect_data
from ..zigma.training.tar_shards import expand_braces
from .pictures import as_pictures, caption_lines
from .schema import schema
from .shown_text import shown
from .training_run import TrainingData

EXAMPLES = Path(__file__).resolve().parents[1] / "workflows"  # badges: the six pictures of fine_tune.json


class ZigMaDataset(io.ComfyNode):
    """Pictures with captions or classes, looked over."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What the host shows."""
        return schema(
            node_id="ZigMaDataset",
            display_name="ZigMa Dataset",
            description="Pictures to train on, from a folder or from the graph, with a report on them: sizes, "
            "captions, duplicates, files that cannot be read.",
            search_aliases=["training data", "load image folder", "captions", "dataset", "finetune", "lora training"],
            is_output_node=True,
            inputs=[
                io.String.Input(
                    "folder", default="",
                    tooltip="A folder of pictures, in ComfyUI's input folder or by its whole path. Captions are .txt "
                    "files of the same names. 'badges' comes with the pack. Empty if pictures are connected.",
                ),
                io.Combo.Input(
                    "kind", options=["auto", *KINDS], default="auto",
                    tooltip="How the folder is arranged. auto tells by what is there, and the report says how it was "
                    "taken: captions beside pictures, a folder for each class, metadata.jsonl, WebDataset shards, a "
                    "folder of frames for each video.",
                ),
                io.Int.Input(
                    "size", default=0, min=0, max=8192, step=8,
                    tooltip="Side in pixels that pictures are brought to; 0 is what the model was made for.",
                ),
                io.Boolean.Input(
                    "buckets", default=False,
                    tooltip="Keeps the shape of each picture, in groups of about the same area. Off: crops the middle.",
                ),
                io.Boolean.Input(
                    "flips", default=False,
                    tooltip="Learns mirrored pictures too, with left and right in captions changed. Not for letters "
                    "and faces that are known.",
                ),
                io.Boolean.Input(
                    "names_as_captions", default=False,
                    tooltip="Captions a picture that has none by its file's name: red_fox_2.png becomes red fox 2.",
                ),
                io.String.Input(
                    "trigger", default="",
                    tooltip="A word put before every caption, which later calls up what was learnt. A LoRA can only "
                    "use a word that the text encoder knows.",
                ),
                io.Image.Input(
                    "images", optional=True, tooltip="Pictures of the graph in place of a folder, a batch of one size."
                ),
                io.String.Input(
                    "captions", default="", multiline=True, optional=True,
                    tooltip="For images: one line for each of them, or one for all.",
                ),
            ],
            outputs=[
                io.Custom("ZIGMA_DATASET").Output(display_name="dataset", tooltip="For ZigMa Train."),
                io.String.Output(display_name="report", tooltip="What the pictures are, also shown in the node."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, folder: str = "", **_) -> str:
        """Look again when a file was added, changed or removed."""
        try:
            return _fingerprint(_resolved(folder)) if folder.strip() else ""
        except (OSError, RuntimeError):  # the latter of "~somebody"
            return "missing"

    @classmethod
    def execute(
        cls, folder: str, kind: str, size: int, buckets: bool, flips: bool, names_as_captions: bool, trigger: str,
        images=None, captions: str = "",
    ) -> io.NodeOutput:  # fmt: skip
        """Find the pictures, open each once, report."""
        if folder.strip() and images is not None:
            raise ValueError("leave folder empty or images unconnected: got both, expected one source of pictures")
        if not folder.strip() and images is None:
            raise ValueError("give folder the name of a folder of pictures, or connect images: got neither")
        if images is None and captions.strip():
            raise ValueError("leave captions empty: they are for images; those of a folder are .txt files in it")
        path = _resolved(folder) if images is None else _written(images, captions)
        data = TrainingData(str(path), kind, size, buckets, flips, names_as_captions, trigger)
        return shown(_report(data), cls, data)


def _resolved(folder: str) -> Path:
    """The place that a user means.

    Raises:
        FileNotFoundError: nothing is there.
    """
    text = folder.strip().strip("\"'")
    try:
        given = Path(text).expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(f"got the folder {text!r}, but nobody has that home: write the whole path") from error
    places = [given] if given.is_absolute() else [Path(folder_paths.get_input_directory()) / given, EXAMPLES / given]
    for place in places:
        if place.exists() or ("{" in text and place.parent.is_dir()):  # "shards/{000..012}.tar"
            return place
    raise FileNotFoundError(
        f"there is no {places[0]}: give folder the whole path of a folder of pictures, or its name in ComfyUI's input "
        "folder"
    )


def _fingerprint(path: Path) -> str:
    """Of names, sizes and times of everything below."""
    digest = hashlib.sha256(os.fsencode(path))
    folder = path.parent if path.suffix == ".jsonl" else path  # which names pictures beside it
    files = [folder / name for name in walk(folder, Notes())] if folder.is_dir() else expand_braces(str(path))
    for file in files:
        digest.update(os.fsencode(file))
        with contextlib.suppress(OSError):  # a link into nowhere has a name alone
            facts = os.stat(file)
            digest.update(f"{facts.st_size} {facts.st_mtime_ns}".encode())
    return digest.hexdigest()


def _written(images: torch.Tensor, captions: str) -> Path:
    """A folder with pictures (b, h, w, c) of a graph, and their captions; the same for the same contents."""
    lines = caption_lines(captions, len(images), one_for_all=True)
    if len(lines) != len(images):
        raise ValueError(
            f"write one line of captions for each picture, or one for all: got {len(lines)} lines for {len(images)} "
            "pictures"
        )
    pictures = as_pictures(images)
    digest = hashlib.sha256("\n".join(lines).encode())
    for picture in pictures:
        digest.update(repr(picture.size).encode() + picture.tobytes())
    folder = Path(folder_paths.get_temp_directory()) / "zigma_dataset" / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    for number, (picture, line) in enumerate(zip(pictures, lines, strict=True)):
        picture.save(folder / f"{number:04d}.png")
        if line.strip():
            (folder / f"{number:04d}.txt").write_text(line.strip() + "\n", encoding="utf-8")
    return folder


def _report(data: TrainingData) -> str:
    bar = comfy.utils.ProgressBar(1)

    def progress(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    dataset = read_dataset(Path(data.path), data.kind, progress=progress)
    if data.names_as_captions:
        dataset = dataset.captioned_by_name()
    report = inspect_data(dataset, size=data.size or 8, buckets=data.buckets and data.size > 0, flips=data.flips)
    # The batch is known where the graph trains; without a size so is what becomes of the pictures.
    report = dataclasses.replace(report, batch_size=0, **({} if data.size else {"buckets": {}, "variants": 1}))
    return report.text()
