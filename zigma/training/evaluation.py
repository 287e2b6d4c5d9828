"""What `python -m zigma evaluate` does: draw pictures, or take some, and measure them against data.

Every figure says by what it was measured, and what it compares with; one that cannot be had says why, and the others
are measured none the less.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from ..atomic_file import replacing
from ..checkpoint import Bundle
from ..sampling import SamplingSettings
from .dataset import Dataset, read_dataset
from .features import file_digest
from .figures import METRICS, Drawn, Evaluation, Task, words_of
from .generation import Plan, SampleFolder, Share, draw, wait_for
from .picture_files import read_picture
from .progress import Progress, named

__all__ = ["METRICS", "Task", "evaluate", "model_facts"]


def model_facts(path: Path, vae: Path | None = None, clip: str | None = None, arguments: dict | None = None) -> dict:
    """What tells a model from others: digests of its files, and how they are read."""
    facts = {"model": file_digest(path), **(arguments or {})}
    if vae is not None:
        facts["vae"] = file_digest(vae)
    return facts if clip is None else {**facts, "clip": clip}


def evaluate(
    task: Task, bundle: Bundle | None = None, share: Share | None = None, json_file: Path | None = None,
    bar: Progress | None = None,
) -> Iterator[str]:  # fmt: skip
    """Lines of results, as they become known.

    Args:
        task: what to do.
        bundle: the model; None measures the pictures of `task.samples`.
        share: draw only that share into `task.samples` and measure nothing; None asks the environment, where the first
            of many processes measures when all have drawn.
        json_file: the results once more.

    Raises:
        ValueError: nothing that was asked for can be measured, or the task is impossible; nothing is lost of what was
            drawn into `task.samples`.
    """
    _check(task, bundle, share)
    own, only_draw = share or Share.of_environment(), share is not None
    if (own.count > 1 or only_draw) and task.samples is None:
        raise ValueError("the shares of several processes are drawn into one folder: say with --samples which")
    dataset, said = _read_data(task, bundle, bar)
    plan = Plan(dataset, bundle, task.seed) if bundle is not None else None
    if own.rank == 0 or only_draw:
        yield from said
    with ExitStack() as stack:
        drawn = None
        if only_draw or set(task.metrics) - {"bpd"}:
            if bundle is None or plan is None:
                drawn, line = _pictures_there(task, bar)
            else:
                place = task.samples or Path(stack.enter_context(tempfile.TemporaryDirectory()))
                drawn, line = _drawn(task, bundle, plan, place, own, only_draw, bar)
            if drawn is None or own.rank == 0:
                yield line
            if drawn is None:
                return
        if own.rank:
            return
        evaluation = Evaluation(task, dataset, drawn, bundle, plan, bar)
        figures, reasons = [], {}
        for name in task.metrics:
            try:
                found = getattr(evaluation, name)()
            except (ValueError, OSError, ImportError, RuntimeError) as error:
                reasons[name] = str(error)
                continue
            figures += found
            yield from (figure.line() for figure in found)
        if not figures:
            raise ValueError("; ".join(f"{name} cannot be measured: {reason}" for name, reason in reasons.items()))
        yield from (f"not measured: {name}: {reason}" for name, reason in reasons.items())
    if json_file is not None:
        report = {
            **task.facts, "data": str(task.data), "pictures_of_data": len(dataset), "seed": task.seed,
            "pictures": len(drawn.names) if drawn is not None else 0, "sampling": _sampling(task, bundle),
            "figures": [figure.facts() for figure in figures], "not_measured": reasons,
        }  # fmt: skip
        with replacing(json_file) as stream:
            stream.write(json.dumps(report, indent=1).encode())
        yield str(json_file)


def _sampling(task: Task, bundle: Bundle | None) -> dict | None:
    """How pictures are drawn; None of those that were drawn elsewhere."""
    if bundle is None:
        return None
    return dataclasses.asdict(task.sampling or SamplingSettings.from_metadata(bundle.metadata))


def _check(task: Task, bundle: Bundle | None, share: Share | None) -> None:
    if bundle is None and task.samples is None:
        raise ValueError("there is nothing to measure: give a --model to draw with, or --samples with pictures")
    if bundle is None and share is not None:
        raise ValueError("a share is of pictures to draw: give the --model that draws them, or leave --shard out")
    if bundle is not None and bundle.model.config.video_frames:
        raise ValueError("the model draws videos, but the figures are of pictures: give a model of pictures")


def _read_data(task: Task, bundle: Bundle | None, bar: Progress | None) -> tuple[Dataset, list[str]]:
    """The data, of a packed file only the categories that the model was trained on, and what to say about them."""
    dataset = read_dataset(task.data, progress=named(bar, "reading the data"))
    if dataset.clips:
        raise ValueError(f"{task.data} holds clips, but the figures are of pictures: give pictures")
    wanted = json.loads(bundle.metadata.get("zigma.data", "{}")).get("categories") if bundle is not None else None
    chosen = [i for i, sample in enumerate(dataset.samples) if wanted and sample.category in wanted]
    of = ""
    if dataset.kind == "packed" and chosen:
        dataset, of = dataset.subset(chosen), f" ({', '.join(wanted)}, as the model was trained on)"
    lines = [f"{len(dataset)} pictures of {task.data}{of}"]
    if dataset.unreadable:
        name, reason = dataset.unreadable[0]
        lines.append(f"{len(dataset.unreadable)} files cannot be used and are left out: {name} ({reason}), ...")
    return dataset, lines


def _pictures_there(task: Task, bar: Progress | None) -> tuple[Drawn, str]:
    """Pictures that somebody made before."""
    there = read_dataset(task.samples, progress=named(bar, "reading the samples"))
    count = min(len(there), task.count or len(there))
    drawn = Drawn(there.picture, [next(iter(words_of(there, i)), "") for i in range(count)])
    return drawn, f"{count} pictures of {task.samples}"


def _drawn(
    task: Task, bundle: Bundle, plan: Plan, place: Path, share: Share, only_draw: bool, bar: Progress | None
) -> tuple[Drawn | None, str]:  # fmt: skip
    """Draw what is missing; None for a share of which nothing is measured."""
    sampling, count = _sampling(task, bundle), task.count or 1000
    settings = SamplingSettings(**sampling)
    facts = {**task.facts, "seed": task.seed, "sampling": sampling, "prompts": plan.digest()}
    if settings.solver == "dopri5":  # whose error control looks at a batch as a whole
        facts["batch_size"] = task.batch_size
    folder = SampleFolder(place, facts)
    new = draw(
        bundle, folder, plan, count, seed=task.seed, settings=settings, batch_size=task.batch_size, share=share,
        progress=named(bar, "drawing"),
    )  # fmt: skip
    if only_draw:
        left = len(folder.missing(count))
        rest = f"{left} of {count} are still missing" if left else f"all {count} are there"
        return None, f"share {share.rank} of {share.count}: {new} new pictures in {place}; {rest}"
    if share.rank == 0:
        wait_for(folder, count, named(bar, "waiting for the other processes"))
    steps = "" if settings.solver == "dopri5" else f", {settings.steps} steps"
    how = f"{settings.solver}{steps}, guidance {settings.guidance:g}, seed {task.seed}"
    drawn = Drawn(
        lambda number: read_picture(folder.picture(number), folder.picture(number).name),
        [plan.name(number) for number in range(count)], [plan.source(number) for number in range(count)],
    )  # fmt: skip
    return drawn, f"{count} pictures drawn: {how}" + (f"; {new} of them now, in {place}" if task.samples else "")
