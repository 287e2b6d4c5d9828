"""The figures of drawn pictures beside the data's, each with what has to be known beside it.

What each means, and its formula, is in metrics.py; which features it is measured by is in its name.
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..checkpoint import Bundle
from ..flow import linear_velocity
from ..guidance import classifier_free
from ..sampling import SamplingSettings, flow_of
from ..solvers import likelihood
from .assemble import held_out_pictures
from .dataset import Dataset
from .features import EfficientNetFeatures, FeatureExtractor, InceptionFeatures, features_of
from .generation import Plan, condition_of
from .metrics import bits_per_dimension, frechet_distance, kernel_distance, precision_recall, retrieval_ranks
from .picture_files import fit
from .progress import Progress, named

__all__ = ["METRICS", "Drawn", "Evaluation", "Figure", "Task", "words_of"]

METRICS = ("kid", "precision", "retrieval", "bpd", "fid")


@dataclasses.dataclass(frozen=True)
class Task:
    """What is to be measured.

    Attributes:
        data: what `read_dataset` reads.
        metrics: of METRICS, in the order in which they are wanted.
        count: pictures to draw; of pictures that are there already at most so many, None for all.
        seed: of noises, captions, subsets and estimators.
        sampling: how to draw; None is the file's own.
        samples: a folder of pictures: drawn there, or, without a model, measured as they are.
        likelihoods, likelihood_steps: for bits per dimension, pictures of the data and steps of Heun's method.
        facts: about model and settings, for the folder and the report.
    """

    data: Path
    metrics: Sequence[str] = METRICS
    count: int | None = None
    seed: int = 0
    batch_size: int = 8
    device: str = "cpu"
    sampling: SamplingSettings | None = None
    samples: Path | None = None
    likelihoods: int = 32
    likelihood_steps: int = 25
    facts: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        strange = [name for name in self.metrics if name not in METRICS]
        if strange or not self.metrics:
            raise ValueError(f"got the metrics {', '.join(strange) or 'none'}, expected some of {', '.join(METRICS)}")


@dataclasses.dataclass(frozen=True)
class Figure:
    """One result: its full name, its value, the value as it is shown, and what has to be known beside it."""

    name: str
    value: float
    shown: str
    note: str
    more: dict = dataclasses.field(default_factory=dict)

    def line(self) -> str:
        """For people."""
        return f"{self.name:<34} {self.shown:<20} {self.note}".rstrip()

    def facts(self) -> dict:
        """For programs."""
        return {"name": self.name, "value": self.value, "note": self.note, **self.more}


@dataclasses.dataclass
class Drawn:
    """The pictures that are measured: what each is drawn of ("" where that is unknown), and the source in the data."""

    picture: Callable[[int], Image.Image]
    names: list[str]
    sources: list[int] | None = None


def words_of(dataset: Dataset, index: int) -> list[str]:
    """Everything that a picture of the data may be called: its captions, or its class."""
    one = dataset.samples[index]
    if one.captions or one.label is None:
        return list(one.captions)
    return [dataset.label_names[one.label]]


def _tensor(picture: Image.Image, size: tuple[int, int] | None = None) -> Tensor:
    """(3, h, w) in [-1, 1], scaled and cut to a size if one is given."""
    return fit(picture, size or (picture.height, picture.width)).float() / 127.5 - 1


class Evaluation:
    """Drawn pictures beside the data; one method for each of METRICS, which raises where it cannot be measured."""

    def __init__(
        self, task: Task, dataset: Dataset, drawn: Drawn | None, bundle: Bundle | None, plan: Plan | None,
        bar: Progress | None = None,
    ) -> None:  # fmt: skip
        self.task, self.dataset, self.drawn, self.bundle, self.plan, self.bar = task, dataset, drawn, bundle, plan, bar
        self._features: dict[type, tuple[FeatureExtractor, Tensor, Tensor]] = {}

    def _features_by(self, kind: type) -> tuple[FeatureExtractor, Tensor, Tensor]:
        """(extractor, features of the data, features of what is drawn); data at the size of what is drawn."""
        if kind not in self._features:
            extractor = kind(self.task.device)
            first = self.drawn.picture(0)
            size = (first.height, first.width)
            data = features_of(
                extractor, lambda i: _tensor(self.dataset.picture(i), size), len(self.dataset),
                named(self.bar, f"{extractor.name} features of the data"),
            )  # fmt: skip
            drawn = features_of(
                extractor, lambda i: _tensor(self.drawn.picture(i)), len(self.drawn.names),
                named(self.bar, f"{extractor.name} features of the drawn"),
            )  # fmt: skip
            self._features[kind] = extractor, data, drawn
        return self._features[kind]

    def kid(self, kind: type | None = None) -> list[Figure]:
        """The kernel distance, on EfficientNet's features unless others are given."""
        extractor, data, drawn = self._features_by(kind or EfficientNetFeatures)
        found = kernel_distance(data, drawn, generator=torch.Generator().manual_seed(self.task.seed))
        note = f"mean and std of {found.subsets} subsets of {found.size}"
        if kind is None:
            note += "; compares only with KIDs of the same features, and is no FID and no Inception KID"
        more = {"std": found.std, "subsets": found.subsets, "subset_size": found.size}
        return [Figure(f"KID ({extractor.name})", found.mean, f"{found.mean:.5f} ± {found.std:.5f}", note, more)]

    def precision(self, kind: type | None = None) -> list[Figure]:
        """Precision and recall, on the same."""
        extractor, data, drawn = self._features_by(kind or EfficientNetFeatures)
        precision, recall = precision_recall(data, drawn)
        return [
            Figure(f"precision ({extractor.name})", precision, f"{precision:.3f}",
                   f"share of {len(drawn)} drawn pictures among the data's, 3 neighbours"),
            Figure(f"recall ({extractor.name})", recall, f"{recall:.3f}",
                   f"share of {len(data)} pictures of the data among the drawn, 3 neighbours"),
        ]  # fmt: skip

    def fid(self) -> list[Figure]:
        """What is defined by the Inception network: FID, KID, precision and recall."""
        _, data, drawn = self._features_by(InceptionFeatures)
        value = frechet_distance(data, drawn)
        note = f"of {len(data)} and {len(drawn)} pictures; compares only with FIDs of as many"
        own = Figure("FID", value, f"{value:.3f}", note)
        return [own, *self.kid(InceptionFeatures), *self.precision(InceptionFeatures)]

    def retrieval(self) -> list[Figure]:
        """The share of prompts whose picture's nearest picture of the data carries the prompt."""
        words = [set(words_of(self.dataset, i)) for i in range(len(self.dataset))]
        numbers = [i for i, name in enumerate(self.drawn.names) if name]
        if not numbers:
            raise ValueError("the drawn pictures have no captions and no labels that a nearest picture could carry")
        if len(set().union(*words)) < 2:
            raise ValueError("the data have no two different captions or labels, so that every picture is retrieved")
        extractor, data, drawn = self._features_by(EfficientNetFeatures)
        names = [self.drawn.names[i] for i in numbers]
        carrying = defaultdict(list)  # rows of the data by what they carry
        for row, of in enumerate(words):
            for word in of:
                carrying[word].append(row)
        carries = torch.zeros(len(names), len(words), dtype=torch.bool)
        for i, name in enumerate(names):
            carries[i, carrying.get(name, [])] = True
        hits = sum(rank == 0 for rank in retrieval_ranks(drawn[numbers], data, carries))
        ceiling, note = self._ceiling(extractor, data, numbers, carries)
        return [
            Figure(f"retrieval ({extractor.name})", hits / len(numbers), f"{hits} of {len(numbers)}",
                   f"nearest picture of the data carries the prompt; {note}",
                   {"hits": hits, "of": len(numbers), "ceiling": ceiling})
        ]  # fmt: skip

    def _ceiling(
        self, extractor: FeatureExtractor, data: Tensor, numbers: list[int], carries: Tensor
    ) -> tuple[int | None, str]:
        """How many of the data's own pictures are retrieved, passed through the autoencoder: no sampler can do better.
        """
        if self.drawn.sources is None:
            return None, "the ceiling is not known without the model"
        if self.bundle.latent.pixel_space:
            return len(numbers), f"ceiling {len(numbers)} (the model draws pixels)"
        sources = [self.drawn.sources[i] for i in numbers]
        size = self._picture_size()
        vae, device = self.bundle.autoencoder, self.task.device

        @torch.no_grad()
        def passed(place: int) -> Tensor:
            picture = _tensor(self.dataset.picture(unique[place]), size)[None].to(device)
            return vae.decode(vae.encode(picture))[0].float().cpu()

        unique = sorted(set(sources))
        features = features_of(extractor, passed, len(unique), named(self.bar, "ceiling"))
        rows = features[[unique.index(source) for source in sources]]
        ceiling = sum(rank == 0 for rank in retrieval_ranks(rows, data, carries))
        return ceiling, f"ceiling {ceiling}: the data's own pictures through the autoencoder"

    def _picture_size(self) -> tuple[int, int]:
        height, width = self.bundle.model.config.img_dim
        return height * self.bundle.latent.downscale, width * self.bundle.latent.downscale

    def bpd(self) -> list[Figure]:
        """Bits per dimension along the probability flow; of the density of latents where the model has any."""
        if self.bundle is None:
            raise ValueError("bits per dimension are a figure of a model: give one with --model")
        indices, seen = self._unseen()
        described = set(self.plan.order)
        indices = [i for i in indices if i in described]
        order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(self.task.seed)).tolist()
        chosen = [indices[place] for place in order[: self.task.likelihoods]]
        generator = torch.Generator().manual_seed(self.task.seed)
        bits = []
        for start in range(0, len(chosen), self.task.batch_size):
            bits.append(self._bits(chosen[start : start + self.task.batch_size], generator))
            if self.bar is not None:
                self.bar("bits per dimension", min(start + self.task.batch_size, len(chosen)), len(chosen))
        values = torch.cat(bits)
        mean = values.mean().item()
        error = values.std().item() / len(values) ** 0.5 if len(values) > 1 else float("nan")
        pixels = self.bundle.latent.pixel_space
        note = f"± standard error over {len(values)} {seen}; heun, {self.task.likelihood_steps} steps"
        if not pixels:
            note += "; density of the latents, compares only with the same autoencoder and scale"
        name = "bits per dimension" if pixels else "bits per latent dimension"
        more = {"standard_error": error, "pictures": len(values), "of": "pixels" if pixels else "latents"}
        return [Figure(name, mean, f"{mean:.4f} ± {error:.4f}", note, more)]

    def _unseen(self) -> tuple[list[int], str]:
        """Pictures of the data that training held out, if the model's file tells, else all of them."""
        metadata = self.bundle.metadata
        part = json.loads(metadata.get("zigma.training", "{}")).get("settings", {}).get("data", {}).get("validation", 0)
        same = json.loads(metadata.get("zigma.data", "{}")).get("pictures") == len(self.dataset)
        if part and same:
            return held_out_pictures(self.dataset, part), "pictures that training held out"
        return list(range(len(self.dataset))), "pictures of the data, which the model may have been trained on"

    def _bits(self, indices: Sequence[int], generator: torch.Generator) -> Tensor:
        """(b,) bits per dimension of pictures of the data."""
        bundle, device = self.bundle, self.task.device
        size = self._picture_size()
        x = torch.stack([_tensor(self.dataset.picture(i), size) for i in indices])
        if bundle.latent.pixel_space:  # spread over the bin of each level
            x = x + (torch.rand(x.shape, generator=generator) - 0.5) * (2 / 255)
        x = x.to(device)
        if not bundle.latent.pixel_space:
            with torch.no_grad():
                x = bundle.latent.to_model(bundle.autoencoder.encode(x)).float()
        condition = condition_of(bundle, [self.plan.prompts[i] for i in indices])
        condition = None if condition is None else condition.to(device)
        # Without guidance: a guided field is of no density that was learnt.
        velocity = linear_velocity(classifier_free(bundle.model, condition, None, 1.0), *flow_of(bundle.metadata))
        found = likelihood(velocity, x, self.task.likelihood_steps, "heun", probes=1, generator=generator)
        return bits_per_dimension(found.log_prob, x[0].numel(), 2 / 255 if bundle.latent.pixel_space else None).cpu()
