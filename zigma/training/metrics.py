"""How far drawn pictures are from the data: figures on features of both, as pure functions.

    kernel_distance     KID: MMD^2 with a cubic kernel, unbiased      arXiv 1801.01401
    frechet_distance    FID: between two Gaussians, biased            arXiv 1706.08500
    precision_recall    shares of pictures within the other's k-NN    arXiv 1904.06991
    retrieval_ranks     does the nearest data picture carry the prompt
    bits_per_dimension  of a log-likelihood

Features are (n, d), one row for each picture, of whatever network; two figures compare only if their features are of
the same one. All sums are in float64: KID is a small difference of large means.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Estimate",
    "bits_per_dimension",
    "frechet_distance",
    "kernel_distance",
    "precision_recall",
    "retrieval_ranks",
    "squared_mmd",
]

ROWS = 1024  # of a matrix of distances that are in memory at once


class Estimate(NamedTuple):
    """A mean over subsets, and the standard deviation between them."""

    mean: float
    std: float
    subsets: int
    size: int  # rows of each set in a subset


def squared_mmd(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy between the sources of x (n, d) and y (m, d).

        MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{ij} k(x_i, y_j),
        k(a, b) = (a . b / d + 1)^3

    Binkowski et al. 2018 (arXiv 1801.01401), section 4, equation (4). It is negative at times where both sources are
    alike.

    Raises:
        ValueError: fewer than two rows, or features of two kinds.
    """
    _check_pair(x, y)
    n, m, d = len(x), len(y), x.shape[1]
    x, y = x.double(), y.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / d + 1) ** 3

    xx, yy = kernel(x, x), kernel(y, y)
    own = (xx.sum() - xx.diagonal().sum()) / (n * (n - 1)) + (yy.sum() - yy.diagonal().sum()) / (m * (m - 1))
    return (own - 2 * kernel(x, y).mean()).item()


def kernel_distance(
    x: Tensor, y: Tensor, subsets: int = 100, size: int | None = None, generator: torch.Generator | None = None
) -> Estimate:
    """The kernel distance (KID) of Binkowski et al. 2018: `squared_mmd` of random subsets, its mean and spread.

    The mean estimates the same number whatever the size of a subset is; the spread shrinks as it grows. It is that of
    one subset, and no error bar of the mean, which the subsets share pictures for.

    Args:
        x, y: features (n, d) and (m, d).
        subsets: how many; each draws without repetition.
        size: rows of each set in a subset; None is 1000, or half of the smaller set where that is less.
        generator: of the choice.

    Raises:
        ValueError: fewer than four rows without a size, or a size that a set does not have.
    """
    _check_pair(x, y)
    least = min(len(x), len(y))
    size = min(1000, least // 2) if size is None else size
    if not 2 <= size <= least or subsets < 1:
        raise ValueError(
            f"got {len(x)} and {len(y)} pictures for {subsets} subsets of {size}, but expected at least one subset, of "
            "two pictures or more that both sets have: give more pictures"
        )
    values = []
    for _ in range(subsets):
        a, b = (s[torch.randperm(len(s), generator=generator)[:size].to(s.device)] for s in (x, y))
        values.append(squared_mmd(a, b))
    found = torch.tensor(values, dtype=torch.float64)
    return Estimate(found.mean().item(), found.std(correction=0).item(), subsets, size)


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """|mu_x - mu_y|^2 + Tr(S_x + S_y - 2 (S_x S_y)^1/2): Frechet's distance between Gaussians with these moments.

    Heusel et al. 2017 (arXiv 1706.08500), equation (6). The trace of the root is the sum of the roots of the
    eigenvalues of S_x^1/2 S_y S_x^1/2, which is symmetric. Biased: it falls as pictures are added (arXiv 1801.01401),
    so only figures of equal numbers of pictures compare.

    Raises:
        ValueError: fewer than two rows, or features of two kinds.
    """
    _check_pair(x, y)
    x, y = x.double(), y.double()
    covariances = [torch.atleast_2d(torch.cov(s.T)) for s in (x, y)]
    values, vectors = torch.linalg.eigh(covariances[0])
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    moved = (x.mean(0) - y.mean(0)).square().sum()
    # The rounding of some 2048 eigenvalues may leave a little below zero for equal moments.
    return max(0.0, (moved + covariances[0].trace() + covariances[1].trace() - 2 * cross).item())


def precision_recall(real: Tensor, drawn: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """(precision, recall): shares of drawn pictures within the real ones' manifold, and the other way round.

    Kynkäänniemi et al. 2019 (arXiv 1904.06991), equations (1) and (2): the manifold of a set is the union of balls
    round its members, each as large as the distance to its k-th nearest other member.

    Args:
        real, drawn: features (n, d) and (m, d).
        neighbours: k, 3 in the paper.

    Raises:
        ValueError: a set with no k-th neighbour, or features of two kinds.
    """
    _check_pair(real, drawn)
    if not 1 <= neighbours < min(len(real), len(drawn)):
        raise ValueError(
            f"got {len(real)} real and {len(drawn)} drawn pictures, but expected more than {neighbours} of each, "
            "since every ball reaches to the neighbour of that number: give more pictures"
        )
    return _share_within(real, drawn, neighbours), _share_within(drawn, real, neighbours)


def _share_within(members: Tensor, others: Tensor, neighbours: int) -> float:
    """The share of others (m, d) that lie in a ball of the members (n, d)."""
    within = torch.zeros(len(others), dtype=torch.bool, device=others.device)
    for start in range(0, len(members), ROWS):
        part = members[start : start + ROWS]
        own = _squared_distances(part, members)
        rows = torch.arange(len(part), device=own.device)
        own[rows, start + rows] = math.inf
        radii = own.kthvalue(neighbours, dim=1).values
        within |= (_squared_distances(part, others) <= radii[:, None]).any(0)
    return within.double().mean().item()


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(n, m) of a (n, d) and b (m, d), exactly 0 for equal rows."""
    a, b = a.double(), b.double()
    sizes = a.square().sum(1)[:, None] + b.square().sum(1)
    squares = sizes - 2 * a @ b.T
    # Rounded, a picture would lie a hair's breadth from its copy, and outside a ball whose radius is nought.
    return torch.where(squares > 1e-12 * sizes, squares, squares.new_zeros(()))


def retrieval_ranks(pictures: Tensor, library: Tensor, carries: Tensor) -> list[int]:
    """For each picture how many of the library's pictures of other captions are nearer than the nearest of its own.

    0 is a picture that is retrieved: the nearest of all carries its caption.

    Args:
        pictures: features (m, d), of pictures drawn from captions.
        library: features (n, d), of pictures with captions. Nearness is the cosine.
        carries: (m, n) bool, whether picture n of the library carries the caption of picture m.

    Raises:
        ValueError: a caption that no picture of the library carries.
    """
    if not carries.any(1).all():
        lost = int((~carries.any(1)).sum())
        raise ValueError(f"{lost} of {len(carries)} prompts are the caption of no picture of the data: give their data")
    pictures, library = (torch.nn.functional.normalize(features, dim=1) for features in (pictures, library))
    ranks = []
    for part, own in zip(pictures.split(ROWS), carries.split(ROWS), strict=True):
        similarity = part @ library.t()
        best = similarity.masked_fill(~own, -math.inf).amax(1, keepdim=True)
        ranks += ((similarity > best) & ~own).sum(1).tolist()
    return ranks


def bits_per_dimension(log_prob: Tensor, dimensions: int, bin_width: float | None = None) -> Tensor:
    """-log2 p / D of log densities in nats (b,), in float64.

    With the width of the bins that a dequantised value is spread over (Theis et al. 2016, arXiv 1511.01844, section
    3.1), it bounds the bits that a lossless code of the quantised picture needs: of 8 bits in [-1, 1] the width is
    2/255. Without it the bits are of the density itself, which are fewer the smaller the numbers are, also negative.
    """
    if dimensions < 1:
        raise ValueError(f"got {dimensions} dimensions, but expected at least one")
    return -log_prob.double() / (dimensions * math.log(2)) - (math.log2(bin_width) if bin_width is not None else 0.0)


def _check_pair(x: Tensor, y: Tensor) -> None:
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(
            f"got features of shapes {tuple(x.shape)} and {tuple(y.shape)}, expected (n, d) and (m, d) of one network"
        )
    if min(len(x), len(y)) < 2:
        raise ValueError(f"got {len(x)} and {len(y)} pictures, but expected at least two of each: give more")
