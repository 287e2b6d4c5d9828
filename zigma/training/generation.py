"""Many pictures into one folder, by one process or by many, and again after an interruption.

    000042.png    picture 42, whole or not there; 000042.txt beside it says of what (nothing for a model without)
    samples.json  what the pictures depend on; a folder of another model, seed or setting is not added to

Picture i is a function of the seed and i (and of model, data and settings), whoever draws it and however many are drawn
beside it: its noise and its place in the data come from (seed, i), and it is computed in the batch that its number
belongs to, which is always full. So the folders of one process and of many are the same, bit for bit where they compute
alike (the same device, number of threads and batch size).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..atomic_file import replacing
from ..checkpoint import Bundle
from ..sampling import SamplingSettings, initial_noise, sample
from ..sheet import to_pictures
from ..text import WordTextEncoder
from .dataset import Dataset

__all__ = ["Plan", "SampleFolder", "Share", "condition_of", "draw", "noise_of", "own_device", "wait_for"]

log = logging.getLogger(__name__)

FACTS = "samples.json"
STALLED = 30 * 60  # seconds without a new picture of another process
Progress = Callable[[int, int], None]


class Share(NamedTuple):
    """Which of how many processes this is."""

    rank: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Share:
        """The share of "0/4", the first of four.

        Raises:
            ValueError: it is none.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        share = cls(int(match[1]), int(match[2])) if match else cls(0, 0)
        if not share.rank < share.count:
            raise ValueError(f"got the share {text!r}, but expected one such as 0/4, the first of four, up to 3/4")
        return share

    @classmethod
    def of_environment(cls) -> Share:
        """What `accelerate launch` and torchrun say in RANK and WORLD_SIZE; alone without them."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        return cls(int(os.environ.get("RANK", "0")), count) if count > 1 else cls()


ALONE = Share()


def own_device(device: str) -> str:
    """The device of this process: of several GPUs the one that a launcher's LOCAL_RANK says."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


class SampleFolder:
    """The pictures of one drawing, by number.

    Args:
        path: made if it is not there.
        facts: what the pictures depend on, as JSON has it.

    Raises:
        ValueError: the folder has pictures of something else.
    """

    def __init__(self, path: Path, facts: dict) -> None:
        self.path, facts = path, json.loads(json.dumps(facts))  # a tuple comes back from a file as a list
        path.mkdir(parents=True, exist_ok=True)
        file = path / FACTS
        if not file.is_file():
            others = [entry.name for entry in path.iterdir() if not entry.name.startswith((".", FACTS))]
            if others and not file.is_file():  # another process may have begun meanwhile
                raise ValueError(
                    f"{path} holds files that were not drawn here ({sorted(others)[0]}, ...): leave --model out to "
                    "measure these pictures, or give another folder to draw into"
                )
            with replacing(file) as stream:
                stream.write(json.dumps(facts, indent=1).encode())
        before = json.loads(file.read_text(encoding="utf-8"))
        changed = [key for key in {**before, **facts} if before.get(key) != facts.get(key)]
        if changed:
            key = changed[0]
            raise ValueError(
                f"{path} holds pictures with another {', '.join(changed)} ({key} {before.get(key)!r}, now "
                f"{facts.get(key)!r}): put that back, or give another folder"
            )

    def picture(self, number: int) -> Path:
        """Where picture `number` is, or belongs."""
        return self.path / f"{number:06d}.png"

    def missing(self, count: int) -> list[int]:
        """The numbers below count whose pictures are not there."""
        there = {entry.name for entry in self.path.iterdir()}
        return [number for number in range(count) if self.picture(number).name not in there]

    def write(self, number: int, picture, caption: str) -> None:
        """Write a picture, its caption before it: what is there is whole."""
        if caption:
            with replacing(self.picture(number).with_suffix(".txt")) as stream:
                stream.write(f"{caption}\n".encode())
        with replacing(self.picture(number)) as stream:
            picture.save(stream, "PNG")


class Plan:
    """What picture i is drawn of: the caption or label of a picture of the data, each once before any comes again.

    Args:
        dataset: whose captions (the first of each picture) or labels are the prompts.
        bundle: the model, which says what it takes.
        seed: of the order.

    Raises:
        ValueError: the data have no captions, or no labels, for a model that takes them.
    """

    def __init__(self, dataset: Dataset, bundle: Bundle, seed: int) -> None:
        self.kind, samples = bundle.model.config.conditioning, dataset.samples
        if self.kind == "none":
            usable = list(range(len(samples)))
        else:
            usable = [i for i, s in enumerate(samples) if (s.captions if self.kind == "text" else s.label is not None)]
        if not usable:
            wanted = "captions" if self.kind == "text" else "labels"
            raise ValueError(f"the model draws from {wanted}, but the data have none: give data with {wanted}")
        if len(usable) < len(samples):
            log.warning("%d pictures of the data have nothing to draw from", len(samples) - len(usable))
        order = torch.randperm(len(usable), generator=torch.Generator().manual_seed(seed)).tolist()
        self.order = [usable[place] for place in order]
        self.prompts = [self._prompt(dataset, bundle, index) for index in range(len(samples))]
        self.names = [_name(dataset, index) if self.kind != "none" else "" for index in range(len(samples))]

    def _prompt(self, dataset: Dataset, bundle: Bundle, index: int) -> str | int | None:
        one = dataset.samples[index]
        if self.kind == "text":
            return one.captions[0] if one.captions else ""
        if self.kind == "none" or one.label is None:
            return None
        named = bundle.condition.label_names is not None
        return bundle.condition.label(
            dataset.label_names[one.label] if named else one.label, bundle.model.config.num_classes
        )

    def source(self, number: int) -> int:
        """The index in the data that picture `number` takes its caption or label from."""
        return self.order[number % len(self.order)]

    def prompt(self, number: int) -> str | int | None:
        """What the model is given for picture `number`."""
        return self.prompts[self.source(number)]

    def name(self, number: int) -> str:
        """The same in words."""
        return self.names[self.source(number)]

    def digest(self) -> str:
        """Of everything that `prompt` depends on."""
        return hashlib.sha256(json.dumps([self.order, self.prompts]).encode()).hexdigest()[:16]


def _name(dataset: Dataset, index: int) -> str:
    one = dataset.samples[index]
    if one.captions:
        return one.captions[0]
    return dataset.label_names[one.label] if one.label is not None else ""


def noise_of(bundle: Bundle, seed: int, number: int) -> Tensor:
    """(1, channels, h, w), the noise of picture `number`, of a seed of its own."""
    own = hashlib.sha256(f"{seed} {number}".encode()).digest()
    return initial_noise(bundle, 1, int.from_bytes(own[:7], "big"))


@torch.no_grad()
def condition_of(bundle: Bundle, prompts: Sequence[str | int | None]) -> Tensor | None:
    """What the model takes for prompts: features (b, n, d), labels (b,), or None of a model without conditions."""
    if bundle.model.config.conditioning == "none":
        return None
    if bundle.model.config.conditioning == "class":
        return torch.tensor(prompts)
    encoder = bundle.text_encoder
    if encoder is None:
        raise ValueError("the model takes text, but its file carries no text encoder: give its CLIP with --clip")
    if isinstance(encoder, WordTextEncoder):  # its `encode` would warn of unknown words in every batch
        tokens = torch.stack([encoder.tokenize(prompt) for prompt in prompts])
        return encoder(tokens.to(encoder.words.weight.device))
    return encoder.encode(prompts)


def draw(
    bundle: Bundle, folder: SampleFolder, plan: Plan, count: int, *, seed: int, settings: SamplingSettings,
    batch_size: int = 8, share: Share = ALONE, progress: Progress | None = None,
) -> int:  # fmt: skip
    """Draw this process's share of pictures 0 to count - 1, those that are not there yet; returns how many it drew.

    A share is every `share.count`-th batch. A batch of which a picture is missing is computed as a whole, also beyond
    count, so that numbers do not depend on what is there.

    Args:
        bundle: the model. folder, plan: where the pictures go, and of what they are.
        progress: called with (pictures of this share done or there, pictures of this share).
    """
    missing = set(folder.missing(count))
    if missing and isinstance(bundle.text_encoder, WordTextEncoder) and plan.kind == "text":
        bundle.text_encoder.warn([plan.prompt(number) for number in range(min(count, len(plan.order)))])
    starts = range(share.rank * batch_size, count, share.count * batch_size)
    total = sum(min(start + batch_size, count) - start for start in starts)
    done = drawn = 0
    for start in starts:
        batch = range(start, start + batch_size)
        wanted = missing.intersection(batch)
        if wanted:
            images = _batch(bundle, plan, batch, seed, settings)
            for number, picture in zip(batch, to_pictures(images), strict=True):
                if number in wanted:
                    folder.write(number, picture, plan.name(number))
            drawn += len(wanted)
        done += min(batch.stop, count) - start
        if progress is not None:
            progress(done, total)
    return drawn


def _batch(bundle: Bundle, plan: Plan, batch: range, seed: int, settings: SamplingSettings) -> Tensor:
    noise = torch.cat([noise_of(bundle, seed, number) for number in batch])
    condition = condition_of(bundle, [plan.prompt(number) for number in batch])
    prompts = condition.tolist() if plan.kind == "class" else condition
    return sample(bundle, prompts, settings=settings, batch_size=len(batch), noise=noise)


def wait_for(folder: SampleFolder, count: int, progress: Progress | None = None, stalled: float = STALLED) -> None:
    """Until the other processes' pictures are there.

    Raises:
        ValueError: for `stalled` seconds none was added.
    """
    left, since = len(folder.missing(count)), time.monotonic()
    while left:
        if time.monotonic() - since > stalled:
            raise ValueError(
                f"{left} of {count} pictures in {folder.path} did not come from the other processes within "
                f"{stalled / 60:.0f} minutes: start the command again, which draws only those"
            )
        time.sleep(min(1.0, stalled / 10))
        before, left = left, len(folder.missing(count))
        since = time.monotonic() if left < before else since
        if progress is not None:
            progress(count - left, count)
