"""The report before the first step: what the data are, what will be made of them, and what speaks against it.

    report = inspect_data(dataset, size=256, buckets=True, step=16, batch_size=8)
    print(report.text())
    if report.problems: ...
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence

from .buckets import target_sizes
from .caption_files import listed
from .dataset import Dataset

__all__ = ["Preflight", "estimate", "inspect_data"]

_NAMES, _BUCKETS = 10, 12


@dataclasses.dataclass
class Preflight:
    """What `inspect_data` found.

    Attributes:
        kind: of the data. count: samples that can be used. captioned: of these, with a caption.
        frames: least and most of a clip; (0, 0) for pictures.
        sizes: (least, median, most) of the samples' (height, width), by area.
        targets: (height, width) at which each sample is trained. buckets: how many samples have each; empty where
            nobody knows yet.
        upscaled: names of samples that are smaller than that. missing_captions: names.
        unreadable: (name, reason). duplicates: groups of names. labels: samples of each class, by its name.
        notes: what reading the data has said.
        held_out: samples kept for validation.
        variants: crops and flips of a sample.
        batch_size, steps_per_epoch: of the order of the batches; 0 where nobody knows yet.
        problems: sentences that forbid to begin, each with what to do. warnings: sentences to know.
    """

    kind: str
    count: int
    captioned: int
    frames: tuple[int, int]
    sizes: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    targets: list[tuple[int, int]]
    buckets: dict[tuple[int, int], int]
    upscaled: list[str]
    missing_captions: list[str]
    unreadable: list[tuple[str, str]]
    duplicates: list[tuple[str, ...]]
    labels: dict[str, int]
    notes: list[str]
    held_out: int
    variants: int
    batch_size: int
    steps_per_epoch: float
    problems: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)

    def text(self, extra: Iterable[str] = ()) -> str:
        """The report in lines; `extra` are the trainer's own, such as those of `estimate`."""
        what = "clips" if self.frames[1] else "pictures"
        lines = [f"Data: {self.count} {what} (kind {self.kind!r})"]
        if self.frames[1]:
            lines.append(f"  frames: {_span(*self.frames)}")
        if self.held_out:
            lines.append(f"  kept for validation: {self.held_out}")
        lines.append(f"  captions: {self.captioned} of {self.count}")
        if self.labels:
            shown = [f"{name} {count}" for name, count in self.labels.items()]
            lines.append(f"  classes: {len(self.labels)} ({listed(shown)})")
        least, median, most = (_size(size) for size in self.sizes)
        lines.append(f"  sizes: {least} to {most}, median {median}")
        buckets = [f"{_size(size)}: {count}" for size, count in self.buckets.items()]
        if buckets:
            lines.append(f"  trained at: {listed(buckets, _BUCKETS)}")
        if self.variants > 1:
            lines.append(f"  variants of each: up to {self.variants} (crops, flips)")
        if self.batch_size:
            lines.append(f"  steps in an epoch: {self.steps_per_epoch:.4g} of {self.batch_size}")
        if self.duplicates:
            lines.append(f"Duplicates ({len(self.duplicates)} groups):")
            lines += _entries([" = ".join(names) for names in self.duplicates])
        if self.unreadable:
            lines.append(f"Left out ({len(self.unreadable)}):")
            lines += _entries([f"{name}: {reason}" for name, reason in self.unreadable], all_of_them=True)
        for title, sentences in (("Notes", self.notes), ("Warnings", self.warnings), ("Problems", self.problems)):
            if sentences:
                lines += [f"{title}:", *(f"  {sentence}" for sentence in sentences)]
        return "\n".join([*lines, *extra])


def _entries(entries: Sequence[str], all_of_them: bool = False) -> list[str]:
    shown = entries if all_of_them else entries[:_NAMES]
    rest = len(entries) - len(shown)
    return [f"  {entry}" for entry in shown] + ([f"  and {rest} more"] if rest else [])


def _size(size: tuple[int, int]) -> str:
    """As people say it: width first."""
    return f"{size[1]} x {size[0]}"


def _span(least: int, most: int) -> str:
    return str(least) if least == most else f"{least} to {most}"


def inspect_data(
    dataset: Dataset, *, size: int | tuple[int, int], buckets: bool = False, step: int = 8, batch_size: int = 1,
    flips: bool = False, crops: int = 1, frames: int = 0, captions_needed: bool | None = None,
    labels_needed: bool = False, validation: float = 0.0,
) -> Preflight:  # fmt: skip
    """Look at data as a run would use them.

    Args:
        dataset: as `read_dataset` gave it.
        size: a side, or (height, width). buckets, step: see target_sizes.
        batch_size: samples of a step, over all processes.
        flips, crops: of each sample.
        frames: that a video model takes; 0 for pictures, or for clips as long as they are.
        captions_needed: whether missing captions are worth a warning; None: where some samples have one, or where there
            are no labels either.
        labels_needed: whether a sample without a label is a problem.
        validation: part of the samples that is not learnt from: at least one, where it is not 0.

    Raises:
        ValueError: sizes for which there are no buckets.
    """
    samples = dataset.samples
    targets = target_sizes([sample.size for sample in samples], size, buckets=buckets, step=step)
    by_area = sorted((sample.size for sample in samples), key=lambda own: (own[0] * own[1], own))
    numbers = [sample.frames for sample in samples]
    labels = Counter(sample.label for sample in samples)
    missing = [sample.name for sample in samples if not sample.captions]
    if captions_needed is None:
        captions_needed = len(missing) < len(samples) or not dataset.label_names
    upscaled = [
        sample.name for sample, target in zip(samples, targets, strict=True)
        if sample.size[0] < target[0] or sample.size[1] < target[1]
    ]  # fmt: skip
    held_out = max(min(len(samples) - 1, max(1, round(validation * len(samples)))), 0) if validation else 0
    report = Preflight(
        kind=dataset.kind, count=len(samples), captioned=len(samples) - len(missing),
        frames=(min(numbers, default=0), max(numbers, default=0)),
        sizes=(by_area[0], by_area[(len(by_area) - 1) // 2], by_area[-1]) if by_area else ((0, 0),) * 3,
        targets=targets, buckets=dict(sorted(Counter(targets).items(), key=lambda item: (-item[1], item[0]))),
        upscaled=upscaled, missing_captions=missing, unreadable=list(dataset.unreadable),
        duplicates=list(dataset.duplicates),
        labels={name: labels[index] for index, name in enumerate(dataset.label_names)},
        notes=list(dataset.notes), held_out=held_out, variants=crops * (2 if flips else 1), batch_size=batch_size,
        steps_per_epoch=(len(samples) - held_out) / batch_size,
    )  # fmt: skip
    _find_problems(report, dataset, frames, labels_needed)
    _find_warnings(report, captions_needed)
    return report


def _find_problems(report: Preflight, dataset: Dataset, frames: int, labels_needed: bool) -> None:
    say = report.problems.append
    if not report.count:
        say("there is no sample that can be used: see what was left out")
        return
    learnt = report.count - report.held_out
    if report.batch_size > learnt:
        say(
            f"the batch of {report.batch_size} is larger than the {learnt} samples to learn from: set batch_size to at "
            f"most {learnt}, or add data"
        )
    clips = [sample for sample in dataset.samples if sample.frames]
    if frames and len(clips) < report.count:
        say(f"the model takes clips of {frames} frames, but the data are pictures: give a folder of frames for each")
    short = [sample.name for sample in clips if sample.frames < frames]
    if short:
        say(f"{len(short)} clips have fewer than {frames} frames: remove them ({listed(short, _NAMES)})")
    if not frames and len({sample.frames for sample in clips}) > 1:
        say(f"the clips have {_span(*report.frames)} frames: give the number of frames that all of them have at least")
    without = [sample.name for sample in dataset.samples if sample.label is None]
    if labels_needed and without:
        say(
            f"{len(without)} samples have no label, but the model learns classes: put them into class folders, or "
            f"remove them ({listed(without, _NAMES)})"
        )


def _find_warnings(report: Preflight, captions_needed: bool) -> None:
    say = report.warnings.append
    if report.missing_captions and captions_needed:
        say(
            f"{len(report.missing_captions)} of {report.count} samples have no caption and are seen with the empty "
            f"one: {listed(report.missing_captions, _NAMES)}"
        )
    if report.upscaled:
        say(
            f"{len(report.upscaled)} samples are smaller than the size that they are trained at and become blurred: "
            f"{listed(report.upscaled, _NAMES)}"
        )
    rare = [f"{_size(size)} ({count})" for size, count in report.buckets.items() if count < report.batch_size]
    if len(report.buckets) > 1 and rare:
        say(
            f"these sizes have fewer samples than a batch of {report.batch_size}, so that a batch of them repeats "
            f"samples of several epochs: {listed(rare, _BUCKETS)}"
        )
    if report.duplicates:
        extra = sum(len(names) - 1 for names in report.duplicates)
        both = ", and the validation may be of pictures that were learnt" if report.held_out else ""
        say(f"{extra} samples are byte for byte copies of others, which then weigh more{both}")
    if report.unreadable:
        say(f"{len(report.unreadable)} files are left out, because they cannot be used")
    empty = [name for name, count in report.labels.items() if not count]
    if empty:
        say(f"these classes have no sample: {listed(empty)}")


def estimate(
    step_seconds: float | None, steps: int, *, done: int = 0, steps_per_epoch: float | None = None,
    memory: int | None = None, available: int | None = None, disk: int | None = None, free: int | None = None,
) -> list[str]:  # fmt: skip
    """Lines for `Preflight.text` about time, memory and disk; what is None is left out.

    Args:
        step_seconds: as measured on this machine.
        steps: of the run. done: of these, before it is resumed.
        steps_per_epoch: to say how often each sample is seen.
        memory, available: bytes that a step takes and that the device has.
        disk, free: bytes that checkpoints take and that the disk has.
    """
    left = max(steps - done, 0)
    lines = [f"Run: {steps} steps" + (f", {left} of them left" if done else "")]
    if steps_per_epoch:
        lines.append(f"  epochs: {steps / steps_per_epoch:.4g}")
    if step_seconds is not None:
        lines.append(f"  time: about {_duration(step_seconds * left)} ({step_seconds:.3g} s a step)")
    for name, needed, there in (("memory", memory, available), ("disk", disk, free)):
        if needed is None:
            continue
        line = f"  {name}: about {_gigabytes(needed)}"
        if there is not None:
            line += f" of {_gigabytes(there)}"
            if needed > there:
                remedy = "a smaller batch, accumulate, or checkpointing" if name == "memory" else "a smaller keep_last"
                line += f", which is too little: take {remedy}"
        lines.append(line)
    return lines


def _duration(seconds: float) -> str:
    """The two largest units that count.

    >>> _duration(7322)
    '2 h 2 min'
    """
    seconds = math.ceil(seconds)
    for unit, name, smaller, smaller_name in ((86400, "days", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= unit:
            rest = seconds % unit // smaller
            return f"{seconds // unit} {name}" + (f" {rest} {smaller_name}" if rest else "")
    return f"{seconds} s"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"
