"""The report names whatever a person has to know before a run, and stops what cannot work."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from zigma.training.buckets import BatchOrder
from zigma.training.dataset import Dataset, Sample, read_dataset
from zigma.training.preflight import estimate, inspect_data


def picture_bytes(seed: int, size: tuple[int, int]) -> bytes:
    levels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    for n, size in enumerate([(40, 40), (40, 80), (80, 40), (10, 12), (40, 40)]):
        (tmp_path / f"{n}.png").write_bytes(picture_bytes(n, size))
        (tmp_path / f"{n}.txt").write_text(f"number {n}" if n else "", encoding="utf-8")
    (tmp_path / "copy.png").write_bytes(picture_bytes(1, (40, 80)))
    (tmp_path / "broken.png").write_bytes(b"x")
    return tmp_path


def test_the_report_has_everything(folder):
    report = inspect_data(read_dataset(folder), size=32, buckets=True, step=8, batch_size=2, flips=True, crops=3)
    assert (report.kind, report.count, report.captioned, report.variants) == ("captions", 6, 4, 6)
    assert report.sizes == ((10, 12), (40, 40), (80, 40))
    assert report.missing_captions == ["0.png", "copy.png"] and report.upscaled == ["3.png"]
    assert report.duplicates == [("1.png", "copy.png")]
    assert [name for name, _ in report.unreadable] == ["broken.png"]
    assert sum(report.buckets.values()) == 6 and set(report.buckets) == set(report.targets) and len(report.buckets) == 3
    assert report.problems == []
    text = report.text(["Run: 10 steps"])
    for part in (
        "6 pictures", "captions: 4 of 6", "sizes: 12 x 10 to 40 x 80, median 40 x 40", "32 x 32: 3",
        "steps in an epoch: 3 of 2", "broken.png: it is no picture", "1.png = copy.png", "without a word: 0.txt",
        "1 samples are smaller", "up to 6", "Run: 10 steps",
    ):  # fmt: skip
        assert part in text, part
    for name in ("0.png", "copy.png"):
        assert any("no caption" in warning and name in warning for warning in report.warnings)


def test_steps_per_epoch_are_those_of_the_order():
    samples = [Sample(f"{n}.png", ("x",), size=(8, 8)) for n in range(11)]
    report = inspect_data(Dataset(samples), size=8, batch_size=4)
    assert report.steps_per_epoch == BatchOrder([0] * 11, 4, 0).steps_per_epoch


def test_a_batch_larger_than_the_data_is_a_problem(folder):
    report = inspect_data(read_dataset(folder), size=32, batch_size=7)
    assert len(report.problems) == 1
    assert "batch of 7 is larger than the 6 samples to learn from: set batch_size to at most 6" in report.problems[0]
    assert report.problems[0] in report.text()
    assert inspect_data(read_dataset(folder), size=32, batch_size=6).problems == []


def test_samples_kept_for_validation_are_not_counted_as_learnt(folder):
    report = inspect_data(read_dataset(folder), size=32, batch_size=5, validation=0.3)
    assert (report.count, report.held_out, report.steps_per_epoch) == (6, 2, 4 / 5)
    assert "larger than the 4 samples to learn from" in report.problems[0]
    assert "kept for validation: 2" in report.text() and any("validation may be" in line for line in report.warnings)
    one = inspect_data(Dataset([Sample("a.png", ("x",), size=(8, 8))]), size=8, validation=0.9)
    assert one.held_out == 0 and one.problems == []


def test_no_buckets_is_one_size(folder):
    report = inspect_data(read_dataset(folder), size=(16, 32))
    assert report.targets == [(16, 32)] * 6 and report.buckets == {(16, 32): 6}


def test_rare_buckets_are_warned_of(folder):
    report = inspect_data(read_dataset(folder), size=32, buckets=True, batch_size=3)
    assert any("fewer samples than a batch of 3" in warning for warning in report.warnings)
    report = inspect_data(read_dataset(folder), size=32, buckets=False, batch_size=3)
    assert not any("fewer samples" in warning for warning in report.warnings)


def test_captions_are_missed_only_where_they_are_needed(tmp_path):
    for n, name in enumerate(["ant/1", "ant/2", "bee/1", "cat/1"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.png").write_bytes(b"x" if name == "cat/1" else picture_bytes(n, (16, 16)))
    dataset = read_dataset(tmp_path)
    report = inspect_data(dataset, size=16)
    assert report.labels == {"ant": 2, "bee": 1, "cat": 0}
    assert not any("caption" in warning for warning in report.warnings)
    assert any("no sample: cat" in warning for warning in report.warnings)
    assert "classes: 3 (ant 2, bee 1, cat 0)" in report.text()
    assert any("caption" in warning for warning in inspect_data(dataset, size=16, captions_needed=True).warnings)
    assert inspect_data(dataset, size=16, labels_needed=True).problems == []


def test_labels_that_a_model_needs():
    samples = [Sample("a.png", label=0, size=(8, 8)), Sample("b.png", size=(8, 8))]
    report = inspect_data(Dataset(samples, ("x",)), size=8, labels_needed=True)
    assert len(report.problems) == 1
    assert "1 samples have no label" in report.problems[0] and "b.png" in report.problems[0]


@pytest.mark.parametrize(
    ("lengths", "frames", "problem"),
    [
        ([4, 4], 0, ""), ([4, 4], 4, ""), ([9, 4], 4, ""), ([9, 4], 0, "the clips have 4 to 9 frames"),
        ([9, 4], 5, "1 clips have fewer than 5 frames: remove them (1)"), ([0, 0], 4, "the data are pictures"),
    ],
)  # fmt: skip
def test_clips_have_to_be_long_enough(lengths, frames, problem):
    samples = [Sample(str(n), ("x",), size=(8, 8), frames=length) for n, length in enumerate(lengths)]
    report = inspect_data(Dataset(samples, kind="frames"), size=8, frames=frames)
    assert len(report.problems) == bool(problem) and all(problem in sentence for sentence in report.problems)
    assert ("clips" in report.text().splitlines()[0]) == (max(lengths) > 0)


def test_nothing_to_train_on_is_a_problem():
    report = inspect_data(Dataset([], unreadable=[("a.png", "it is empty")]), size=8)
    assert len(report.problems) == 1 and "a.png: it is empty" in report.text()


def test_long_lists_are_cut_but_unreadable_files_are_all_named():
    samples = [Sample(f"p{n}.png", size=(8, 8)) for n in range(50)]
    dataset = Dataset(
        samples, unreadable=[(f"u{n}.png", "broken") for n in range(50)],
        duplicates=[(f"p{n}.png", f"p{n + 1}.png") for n in range(0, 50, 2)],
    )  # fmt: skip
    text = inspect_data(dataset, size=16).text()
    assert all(f"u{n}.png: broken" in text for n in range(50))
    assert "and 15 more" in text and "and 40 more" in text and max(map(len, text.splitlines())) < 400


def test_estimates():
    room = {"memory": 9 * 10**9, "available": 8 * 10**9, "disk": 10**6, "free": 10**9}
    lines = estimate(0.5, 10_000, done=1000, steps_per_epoch=20, **room)
    text = "\n".join(lines)
    assert "10000 steps, 9000 of them left" in text and "epochs: 500" in text and "1 h 15 min (0.5 s a step)" in text
    assert "9.00 GB of 8.00 GB, which is too little: take a smaller batch" in text
    assert "disk: about 1.00 MB of 1.00 GB" in text
    assert estimate(None, 5) == ["Run: 5 steps"]
    assert "about 2 days 1 h" in "\n".join(estimate(1.0, 2 * 86400 + 3700))
