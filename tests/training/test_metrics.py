"""The figures of evaluation against closed forms, brute force and each other."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zigma.solvers import likelihood
from zigma.training import metrics
from zigma.training.metrics import (
    bits_per_dimension,
    frechet_distance,
    kernel_distance,
    precision_recall,
    retrieval_ranks,
    squared_mmd,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


sizes = st.integers(2, 7)


# --- KID


@settings(deadline=None, max_examples=20)
@given(n=sizes, m=sizes, d=st.integers(1, 5), seed=st.integers(0, 99))
def test_mmd_is_the_double_loop_of_the_paper(n, m, d, seed):
    x, y = normal(n, d, seed=seed).double(), normal(m, d, seed=seed + 1).double() + 0.5

    def k(a, b):
        return (sum((a * b).tolist()) / d + 1) ** 3

    expected = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    expected += sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    expected -= 2 * sum(k(a, b) for a in x for b in y) / (n * m)
    assert squared_mmd(x.float(), y.float()) == pytest.approx(squared_mmd(y.float(), x.float()), abs=1e-12)
    assert squared_mmd(x, y) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_mmd_is_unbiased():
    """Of small sets of one source the mean is 0 within its error, and some are negative; a biased one never is."""
    values = torch.tensor([squared_mmd(normal(8, 6, seed=2 * i), normal(8, 6, seed=2 * i + 1)) for i in range(400)])
    assert abs(values.mean()) < 4 * values.std() / 20 and values.std() > 0.01
    assert (values < 0).float().mean() > 0.3


def test_kid_of_two_halves_is_nothing_and_grows_with_a_shift():
    features = normal(400, 16)
    found = [
        kernel_distance(features[:200], features[200:] + shift, 20, generator=torch.Generator().manual_seed(0)).mean
        for shift in (0.0, 0.2, 0.4, 0.8)
    ]
    assert abs(found[0]) < 0.01 < found[1] < found[2] < found[3]


def test_kid_of_a_shift_has_its_closed_form():
    """In one dimension k = (ab + 1)^3, so MMD^2 = sum_p binom(3, p) (E x^p - E y^p)^2 over the moments."""
    shift = 0.5
    moments = [shift, shift**2, 3 * shift + shift**3]
    expected = sum(math.comb(3, p) * moment**2 for p, moment in enumerate(moments, 1))
    x, y = normal(4000, 1), normal(4000, 1, seed=1) + shift
    found = kernel_distance(x, y, 30, generator=torch.Generator().manual_seed(2))
    assert found.size == 1000 and found.mean == pytest.approx(expected, rel=0.15)


def test_kid_draws_what_its_generator_says():
    x, y = normal(20, 3), normal(30, 3, seed=1)
    one, same, other = (kernel_distance(x, y, 5, 6, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert one == same != other and one.size == 6 and one.std > 0
    assert kernel_distance(x, y, 3, 20, torch.Generator().manual_seed(0)).size == 20
    whole = kernel_distance(x, x.flip(0), 4, 20, torch.Generator().manual_seed(0))
    assert whole.std == pytest.approx(0, abs=1e-12) and whole.mean == pytest.approx(squared_mmd(x, x))


@pytest.mark.parametrize(
    ("figure", "words"),
    [
        (lambda: squared_mmd(normal(1, 3), normal(5, 3)), "1 and 5 pictures"),
        (lambda: squared_mmd(normal(4, 3), normal(5, 2)), "of one network"),
        (lambda: kernel_distance(normal(3, 3), normal(9, 3)), "give more pictures"),
        (lambda: kernel_distance(normal(8, 3), normal(9, 3), size=9), "subsets of 9"),
        (lambda: precision_recall(normal(3, 3), normal(9, 3)), "more than 3 of each"),
        (lambda: retrieval_ranks(normal(2, 3), normal(4, 3), torch.zeros(2, 4).bool()), "2 of 2 prompts"),
        (lambda: bits_per_dimension(torch.zeros(1), 0), "at least one"),
    ],
)
def test_what_cannot_be_measured_says_why(figure, words):
    with pytest.raises(ValueError, match=words):
        figure()


# --- FID


def test_frechet_distance_of_known_moments():
    """Rows made to have a mean and a diagonal covariance exactly: |dm|^2 + sum (s1 - s2)^2."""
    white = normal(50, 3).double()
    white = white - white.mean(0)
    white = white @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(white.T))).T
    one, two = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([2.0, 2.0, 0.5]).double()
    shift = torch.tensor([1.0, -2.0, 0.0]).double()
    expected = shift.square().sum() + (one - two).square().sum()
    assert frechet_distance(white * one, white * two + shift) == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_agrees_with_a_matrix_root_by_newton():
    """Denman and Beavers' iteration for the root of S_x S_y, which needs no symmetry."""
    x, y = normal(40, 4).double(), normal(50, 4, seed=1).double() @ normal(4, 4, seed=2).double() + 1
    sx, sy = torch.cov(x.T), torch.cov(y.T)
    root, inverse = sx @ sy, torch.eye(4).double()
    for _ in range(40):
        root, inverse = (root + torch.linalg.inv(inverse)) / 2, (inverse + torch.linalg.inv(root)) / 2
    expected = (x.mean(0) - y.mean(0)).square().sum() + (sx + sy - 2 * root).trace()
    assert frechet_distance(x, y) == pytest.approx(expected.item(), rel=1e-6)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(normal(5, 9), normal(5, 9, seed=1)) > 0  # fewer rows than dimensions


# --- precision and recall


def brute_force(real, drawn, k):
    def share(members, others):
        radii = [sorted(math.dist(a, b) for j, b in enumerate(members) if j != i)[k - 1] for i, a in enumerate(members)]
        inside = [any(math.dist(a, b) <= r for a, r in zip(members, radii, strict=True)) for b in others]
        return sum(inside) / len(others)

    real, drawn = real.tolist(), drawn.tolist()
    return share(real, drawn), share(drawn, real)


@settings(deadline=None, max_examples=20)
@given(n=st.integers(4, 9), m=st.integers(4, 9), k=st.integers(1, 3), seed=st.integers(0, 99))
def test_precision_and_recall_are_the_papers(n, m, k, seed):
    real, drawn = normal(n, 2, seed=seed).double(), 0.7 * normal(m, 2, seed=seed + 1).double() + 0.5
    assert precision_recall(real, drawn, k) == pytest.approx(brute_force(real, drawn, k))


def test_precision_and_recall_of_identical_sets_are_one():
    """Also where pictures come several times, so that balls have no extent, and in any order."""
    features = 100 * normal(40, 64)
    several = features.repeat(5, 1)
    assert precision_recall(features, features.flip(0)) == (1, 1)
    assert precision_recall(several, several.flip(0)) == (1, 1)
    assert precision_recall(features, features + 1e4) == (0, 0)
    assert not metrics._squared_distances(features, features.clone()).diagonal().any()


def test_one_mode_of_two_has_precision_and_half_the_recall(monkeypatch):
    monkeypatch.setattr("zigma.training.metrics.ROWS", 7)  # several blocks
    left, right = normal(60, 2), normal(60, 2, seed=1) + 50
    precision, recall = precision_recall(torch.cat([left, right]), normal(120, 2, seed=2))
    assert precision > 0.9 and recall == pytest.approx(0.5, abs=0.05)


# --- retrieval


def test_ranks_count_the_nearer_pictures_of_other_captions():
    library = torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1], [-1, 0]])
    carries = torch.tensor([[True, False, False, False], [False, False, True, False], [False, False, False, True]])
    pictures = torch.tensor([[3.0, 0], [0.5, 0.51], [7.0, 0]])
    # The length of a feature does not count. Nearer to (0.5, 0.51) than its own (0, 1) lies (0.9, 0.1) alone.
    assert retrieval_ranks(pictures, library, carries) == [0, 1, 3]


def test_every_picture_retrieves_itself():
    features = normal(30, 8)
    assert retrieval_ranks(features, features, torch.eye(30).bool()) == [0] * 30


# --- bits per dimension


def test_bits_of_a_gaussian_are_its_entropy():
    """data ~ N(0, s^2): v = x (t s^2 - (1 - t)) / ((1 - t)^2 + t^2 s^2), and E[-log2 p] = log2(s sqrt(2 pi e))."""
    s = 0.5

    def velocity(x, t):
        t = t.view(-1, 1)
        return x * (t * s**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * s**2)

    data = s * normal(512, 8).double()
    data = data / data.std(correction=0) * s  # the sum of squares that makes the mean exact
    found = likelihood(velocity, data, 60, "rk4", probes=1, generator=torch.Generator().manual_seed(0))
    bits = bits_per_dimension(found.log_prob, 8)
    assert bits.mean().item() == pytest.approx(math.log2(s * math.sqrt(2 * math.pi * math.e)), rel=2e-3)


def test_bits_of_evenly_spread_levels_are_eight():
    """Uniform on the 256 bins of 2/255 that cover 8-bit levels in [-1, 1]: log2 256."""
    log_density = -math.log(256 * 2 / 255) * 12
    assert bits_per_dimension(torch.tensor([log_density]), 12, 2 / 255).item() == pytest.approx(8, rel=1e-6)
