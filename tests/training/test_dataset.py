"""Training data: each kind is told apart and read whole, and every bad input is named and costs nothing else."""

from __future__ import annotations

import hashlib
import io
import json
import random
import tarfile
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from zigma.training import dataset
from zigma.training.caption_files import Notes, caption_lines, decode_text, flipped_caption, natural_key
from zigma.training.dataset import read_dataset
from zigma.training.emoji import PackedPictures, write_packed
from zigma.training.tar_shards import expand_braces


def picture_bytes(seed: int = 0, size: tuple[int, int] = (6, 8), kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write(folder, files: dict[str, bytes | str]):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def names(dataset) -> list[str]:
    return [sample.name for sample in dataset.samples]


def said(dataset, *parts: str) -> bool:
    """Whether one note has all of these."""
    return any(all(part in note for part in parts) for note in dataset.notes)


def test_pictures_with_captions(tmp_path):
    write(tmp_path, {
        "a10.png": picture_bytes(1), "a2.png": picture_bytes(2, (5, 9)), "deep/b.jpg": picture_bytes(3, kind="JPEG"),
        "a2.txt": "a cat\n\n  a   black cat \na cat\n", "deep/b.txt": "a dog", "c.webp": picture_bytes(4, kind="WEBP"),
    })  # fmt: skip
    dataset = read_dataset(tmp_path)
    assert dataset.kind == "captions" and said(dataset, "taken as 'captions'")
    assert names(dataset) == ["a2.png", "a10.png", "c.webp", "deep/b.jpg"]
    assert [s.captions for s in dataset.samples] == [("a cat", "a black cat"), (), (), ("a dog",)]
    assert dataset.samples[0].size == (5, 9) and dataset.samples[0].label is None and not dataset.clips
    assert dataset.picture(0).size == (9, 5)
    assert dataset.file_digest(1) == hashlib.sha256(picture_bytes(1)).hexdigest()
    assert dataset.unreadable == [] and dataset.duplicates == []
    assert names(dataset.subset([2, 0])) == ["c.webp", "a2.png"]


def test_another_extension_of_captions(tmp_path):
    write(tmp_path, {"a.png": picture_bytes(), "a.caption": "from caption", "a.txt": "from txt"})
    for extension in (".caption", "caption"):
        dataset = read_dataset(tmp_path, caption_extension=extension)
        assert dataset.samples[0].captions == ("from caption",)
        assert said(dataset, "neither pictures", "a.txt")


def test_the_order_of_the_file_system_does_not_matter(tmp_path, monkeypatch):
    import os

    write(tmp_path, {f"{n}.png": picture_bytes(n) for n in (1, 2, 10, 20, 3)})
    expected = names(read_dataset(tmp_path))
    assert expected == ["1.png", "2.png", "3.png", "10.png", "20.png"]
    real = os.walk

    def shuffled(*args, **kwargs):
        for root, folders, files in real(*args, **kwargs):
            random.Random(5).shuffle(files)
            yield root, folders, files

    monkeypatch.setattr(os, "walk", shuffled)
    assert names(read_dataset(tmp_path)) == expected


@pytest.mark.parametrize(
    ("data", "expected", "note"),
    [
        ("\ufeffa cat".encode(), ("a cat",), ""),
        ("a caté".encode("utf-16"), ("a caté",), ""),
        ("a caté".encode("utf-16-be"), ("a caté",), "zeros between"),
        ("a caté".encode("utf-16-le"), ("a caté",), "zeros between"),
        (b"\xfe\xff" + "a caté".encode("utf-16-be"), ("a caté",), ""),
        ("a caté\u20ac".encode("cp1252"), ("a caté\u20ac",), "Windows-1252"),
        (b"one\r\ntwo\r\n", ("one", "two"), ""),
        (b"", (), "without a word"),
        (b" \r\n\t\n", (), "without a word"),
        (b"\xff\xfea", None, "damaged UTF-16"),
    ],
    ids=[
        "bom", "utf-16", "be without mark", "le without mark", "utf-16-be", "cp1252", "crlf", "empty", "blank", "cut",
    ],
)  # fmt: skip
def test_captions_in_any_encoding(tmp_path, data, expected, note):
    write(tmp_path, {"a.png": picture_bytes(), "a.txt": data})
    dataset = read_dataset(tmp_path)
    if expected is not None:
        assert dataset.samples[0].captions == expected
    about = [line for line in dataset.notes if "a.txt" in line]
    assert len(about) == bool(note) and all(note in line for line in about)


def test_unreadable_pictures_are_listed_and_left_out(tmp_path):
    whole = picture_bytes(1, (40, 40))
    write(tmp_path, {
        "good.png": whole, "cut.png": whole[:900], "text.jpg": "no picture", "empty.webp": b"",
        "dot.png": picture_bytes(2, (1, 1)), "cut.txt": "a caption",
        "deep/cut.jpg": picture_bytes(1, (64, 64), "JPEG")[:-300],
    })  # fmt: skip
    dataset = read_dataset(tmp_path)
    assert names(dataset) == ["good.png"]
    reasons = dict(dataset.unreadable)
    assert list(reasons) == ["cut.png", "deep/cut.jpg", "dot.png", "empty.webp", "text.jpg"]
    assert "too small (1 x 1" in reasons["dot.png"] and "empty" in reasons["empty.webp"]
    assert "no picture" in reasons["text.jpg"] and "cannot be decoded" in reasons["cut.png"]
    shallow = read_dataset(tmp_path, deep=False)
    assert names(shallow) == ["cut.png", "deep/cut.jpg", "good.png"]  # their headers are whole
    assert shallow.samples[2].size == (40, 40)


@pytest.mark.parametrize(
    "files", [{}, {"a.txt": "alone"}, {"bad.png": "x", "bad2.png": "y"}, {"a.pdf": "x"}, {".a.png": "x"}]
)
@pytest.mark.parametrize("kind", ["auto", "captions", "classes", "frames", "jsonl", "webdataset"])
def test_nothing_usable_is_one_sentence(tmp_path, files, kind):
    write(tmp_path, files)
    with pytest.raises(ValueError, match="nothing to train on: looked for") as caught:
        read_dataset(tmp_path, kind)
    if "bad.png" in files and kind in ("auto", "captions"):
        assert "bad.png: it is no picture" in str(caught.value)


def test_wrong_paths_and_kinds(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is nothing at"):
        read_dataset(tmp_path / "absent")
    with pytest.raises(ValueError, match="got the kind of data 'pictures', expected auto, captions"):
        read_dataset(tmp_path, "pictures")
    write(tmp_path, {"a.csv": "x", "a.png": picture_bytes()})
    with pytest.raises(ValueError, match=r"a.csv is no training data"):
        read_dataset(tmp_path / "a.csv")
    with pytest.raises(ValueError, match="is a folder, but the kind 'packed'"):
        read_dataset(tmp_path, "packed")
    with pytest.raises(ValueError, match="only a packed file has them"):
        read_dataset(tmp_path, categories=["Odd"])


def test_one_picture_is_enough(tmp_path):
    write(tmp_path, {"a.png": picture_bytes()})
    assert names(read_dataset(tmp_path)) == ["a.png"]


def test_duplicate_stems_orphans_and_hidden_files_are_said(tmp_path):
    write(tmp_path, {
        "a.png": picture_bytes(1), "a.jpg": picture_bytes(2, kind="JPEG"), "a.txt": "both", "lonely.txt": "x",
        ".hidden.png": picture_bytes(3), "Thumbs.db": "x", "@eaDir/a.png": picture_bytes(4), "notes.pdf": "x",
        "__MACOSX/._a.png": "x", ".cache/b.png": picture_bytes(5), "photo.heic": "x",
    })  # fmt: skip
    dataset = read_dataset(tmp_path)
    assert names(dataset) == ["a.jpg", "a.png"]
    assert [s.captions for s in dataset.samples] == [("both",), ("both",)]
    assert said(dataset, "share the caption file a.txt", "a.jpg", "a.png")
    assert said(dataset, "without a picture of that name", "lonely.txt")
    assert said(dataset, "hidden or made by a file browser", ".hidden.png", "Thumbs.db", "@eaDir", "__MACOSX", ".cache")
    assert said(dataset, "neither pictures", "notes.pdf", "photo.heic")


def test_animations_are_taken_by_their_first_frame_with_a_note(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    dataset = read_dataset(tmp_path)
    assert said(dataset, "2 frames, of which the first", "a.gif")
    assert dataset.picture(0).getpixel((4, 4)) == (255, 0, 0)


def test_duplicates_are_found_by_their_bytes(tmp_path):
    write(tmp_path, {f"{n}.png": picture_bytes(n % 2) for n in range(4)} | {"z.png": picture_bytes(9)})
    dataset = read_dataset(tmp_path)
    assert dataset.duplicates == [("0.png", "2.png"), ("1.png", "3.png")]
    assert len(dataset) == 5  # said, not dropped


def test_links_are_followed_and_loops_end(tmp_path):
    write(tmp_path / "real", {"a.png": picture_bytes()})
    try:
        (tmp_path / "data").symlink_to(tmp_path / "real", target_is_directory=True)
        (tmp_path / "real" / "up").symlink_to(tmp_path / "real", target_is_directory=True)
    except OSError:
        pytest.skip("links need rights here")
    assert names(read_dataset(tmp_path / "data")) == ["a.png"]


def test_class_folders(tmp_path):
    write(tmp_path, {
        "cat/1.png": picture_bytes(1), "cat/more/2.png": picture_bytes(2), "ant/1.png": picture_bytes(3),
        "dog/bad.png": "x", "dog/1.png": picture_bytes(4),
    })  # fmt: skip
    (tmp_path / "empty").mkdir()
    dataset = read_dataset(tmp_path)
    assert dataset.kind == "classes" and dataset.label_names == ("ant", "cat", "dog")
    labels = {sample.name: sample.label for sample in dataset.samples}
    assert labels == {"ant/1.png": 0, "cat/1.png": 1, "cat/more/2.png": 1, "dog/1.png": 2}
    assert said(dataset, "no classes", "empty") and [name for name, _ in dataset.unreadable] == ["dog/bad.png"]
    write(tmp_path, {"loose.png": picture_bytes(5)})
    dataset = read_dataset(tmp_path, "classes")
    assert ("loose.png", "it is in no class folder") in dataset.unreadable
    assert dataset.label_names == ("ant", "cat", "dog")


def test_metadata_jsonl(tmp_path):
    rows = [
        {"file_name": "b.png", "text": "a bee", "label": "insect"},
        {"file_name": "a.png", "captions": ["an ant", "a small ant"], "label": "insect"},
        {"file_name": "sub/c.png", "caption": "a cat", "label": "animal"},
        {"file_name": "gone.png", "text": "x"},
        {"text": "no file"},
        {"file_name": "a.png", "text": "again"},
        {"file_name": "b.png", "text": 5},
    ]
    lines = "\ufeff" + "\n".join(json.dumps(row) for row in rows) + "\n\nnot json\n"
    pictures = {name: picture_bytes(n) for n, name in enumerate(["a.png", "b.png", "sub/c.png", "extra.png"])}
    write(tmp_path, {"metadata.jsonl": lines, **pictures})
    for path in (tmp_path, tmp_path / "metadata.jsonl"):
        dataset = read_dataset(path)
        assert dataset.kind == "jsonl" and names(dataset) == ["a.png", "b.png", "sub/c.png"]
        assert dataset.samples[0].captions == ("an ant", "a small ant", "again")
        assert dataset.label_names == ("animal", "insect") and [s.label for s in dataset.samples] == [1, 1, 0]
        reasons = dict(dataset.unreadable)
        assert set(reasons) == {"gone.png", "metadata.jsonl line 5", "metadata.jsonl line 9"}
        assert said(dataset, "extra.png", "no metadata.jsonl mentions") and said(dataset, "more than once", "a.png")
        assert said(dataset, "no text", "b.png")


def test_whole_numbers_stay_the_labels_that_they_are(tmp_path):
    rows = [{"file_name": "a.png", "label": 3}, {"file_name": "b.png", "label": 0}, {"file_name": "c.png"}]
    write(tmp_path, {"metadata.jsonl": "\n".join(map(json.dumps, rows))})
    write(tmp_path, {f"{letter}.png": picture_bytes(ord(letter)) for letter in "abc"})
    dataset = read_dataset(tmp_path)
    assert [s.label for s in dataset.samples] == [3, 0, None] and dataset.label_names == ("0", "1", "2", "3")
    assert said(dataset, "without a label", "c.png")
    write(tmp_path, {"metadata.jsonl": json.dumps({"file_name": "a.png", "label": [1]})})
    with pytest.raises(ValueError, match=r"got the label \[1\] for a.png"):
        read_dataset(tmp_path)


def shard(path, members: dict[str, bytes | str]):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def test_webdataset_shards(tmp_path):
    shard(tmp_path / "s-000.tar", {
        "x/0010.jpg": picture_bytes(1, kind="JPEG"), "x/0010.txt": "ten\nzehn", "x/0010.json": '{"caption": "X"}',
        "x/0002.PNG": picture_bytes(2), "x/0002.txt": "two", "__meta__.json": "{}", "x/._0002.png": "x",
    })  # fmt: skip
    shard(tmp_path / "s-001.tar", {  # the keys of ZigMa's published shards
        "a.image.png": picture_bytes(3), "a.caption.json": '["one", "two"]', "a.latent.npy": "x", "a.cls_id.cls": "1",
        "a.cls_name.json": '"Archery"', "b.image.jpg": picture_bytes(4, kind="JPEG"), "b.cls_id.cls": "0",
        "c.latent.npy": "x", "d.jpg": "broken",
    })  # fmt: skip
    dataset = read_dataset(tmp_path)
    assert dataset.kind == "webdataset"
    assert names(dataset) == ["s-000.tar/x/0002", "s-000.tar/x/0010", "s-001.tar/a", "s-001.tar/b"]
    assert [s.captions for s in dataset.samples] == [("two",), ("ten", "zehn", "X"), ("one", "two"), ()]
    assert [s.label for s in dataset.samples] == [None, None, 1, 0] and dataset.label_names == ("0", "Archery")
    assert dict(dataset.unreadable).keys() == {"s-001.tar/c", "s-001.tar/d"}
    assert "no picture, only latent.npy" in dict(dataset.unreadable)["s-001.tar/c"]
    assert said(dataset, "'latent.npy' are not read")
    assert (np.asarray(dataset.picture(0)) == np.asarray(Image.open(io.BytesIO(picture_bytes(2))))).all()
    assert dataset.file_digest(2) == hashlib.sha256(picture_bytes(3)).hexdigest()

    pattern = read_dataset(tmp_path / "s-{000..001}.tar")
    assert names(pattern) == names(dataset)
    assert names(read_dataset(tmp_path / "s-001.tar")) == ["s-001.tar/a", "s-001.tar/b"]
    with pytest.raises(FileNotFoundError, match=r"s-002.tar \(1 of 3 shards are missing\)"):
        read_dataset(tmp_path / "s-{000..002}.tar")


def test_the_webdataset_package_reads_the_same_samples(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "w.tar")) as writer:
        for n in range(3):
            writer.write({"__key__": f"{n:03d}", "png": picture_bytes(n), "txt": f"number {n}", "cls": n})
    dataset = read_dataset(tmp_path)
    theirs = list(webdataset.WebDataset(str(tmp_path / "w.tar"), shardshuffle=False))
    assert [f"w.tar/{sample['__key__']}" for sample in theirs] == names(dataset)
    assert [(s["txt"].decode(),) for s in theirs] == [s.captions for s in dataset.samples]
    assert [s.label for s in dataset.samples] == [0, 1, 2]
    assert [hashlib.sha256(s["png"]).hexdigest() for s in theirs] == [dataset.file_digest(n) for n in range(3)]


def test_damaged_and_compressed_shards(tmp_path):
    whole = shard(tmp_path / "w.tar", {f"{n}.png": picture_bytes(n, (30, 30)) for n in range(3)}).read_bytes()
    write(tmp_path, {"cut.tar": whole[:5000], "junk.tar": b"junk" * 500})
    with tarfile.open(tmp_path / "zip.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a"))
    dataset = read_dataset(tmp_path)
    assert names(dataset) == ["cut.tar/0", "w.tar/0", "w.tar/1", "w.tar/2"]
    reasons = dict(dataset.unreadable)
    assert set(reasons) == {"cut.tar", "junk.tar", "zip.tar"}
    assert "cut off inside 1.png" in reasons["cut.tar"] and "compressed" in reasons["zip.tar"]
    shard(tmp_path / "w.tar", {"a.png": picture_bytes(), "a.cls": "cat"})
    with pytest.raises(ValueError, match=r"got 'cat' in w.tar/a.cls, expected the whole number of a class"):
        read_dataset(tmp_path)


def test_clips_as_folders_of_frames(tmp_path):
    frames = {f"run/frame_{n}.png": picture_bytes(n) for n in (1, 2, 10)}
    write(tmp_path, {
        **frames, "jump/frame_1.png": picture_bytes(7), "jump/frame_2.png": "broken", "run.txt": "a man runs",
        "mixed/frame_1.png": picture_bytes(1), "mixed/frame_2.png": picture_bytes(2, (9, 9)),
        "sit/frame_1.png": picture_bytes(3), "sit/captions.txt": "sits",
    })  # fmt: skip
    dataset = read_dataset(tmp_path)
    assert dataset.kind == "frames" and names(dataset) == ["run", "sit"] and dataset.clips
    assert dataset.samples[0].captions == ("a man runs",) and dataset.samples[0].frames == 3
    assert dataset.samples[1].captions == ("sits",)
    clip = dataset.clip(0)
    assert [np.asarray(f).tolist() for f in clip] == [
        np.asarray(Image.open(io.BytesIO(picture_bytes(n)))).tolist() for n in (1, 2, 10)
    ]
    reasons = dict(dataset.unreadable)
    assert "frame_2.png: it is no picture" in reasons["jump"] and "differ in size" in reasons["mixed"]


def test_clips_in_class_folders_have_labels(tmp_path):
    clips = [f"{label}/{clip}" for label in ("run", "jump") for clip in ("v1", "v2")]
    write(tmp_path, {f"{clip}/{n}.png": picture_bytes(n) for clip in clips for n in (0, 1)})
    dataset = read_dataset(tmp_path, "frames")
    assert dataset.label_names == ("jump", "run") and [s.label for s in dataset.samples] == [0, 0, 1, 1]
    assert [s.frames for s in dataset.samples] == [2] * 4
    assert dataset.duplicates == [("jump/v1", "jump/v2", "run/v1", "run/v2")]


def test_packed_file(tmp_path):
    images = torch.randint(0, 256, (3, 3, 4, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    items = [{"captions": [f"n{n}"], "style": "flat", "category": "Odd" if n % 2 else "Even"} for n in range(3)]
    write_packed(PackedPictures(images, items), tmp_path / "e.safetensors")
    dataset = read_dataset(tmp_path / "e.safetensors")
    assert dataset.kind == "packed" and [s.captions for s in dataset.samples] == [("n0",), ("n1",), ("n2",)]
    assert dataset.samples[0].style == "flat" and dataset.samples[0].size == (4, 5)
    even = read_dataset(tmp_path / "e.safetensors", categories=["Even"])
    assert names(even) == ["e.safetensors/0", "e.safetensors/2"]
    assert (np.asarray(even.picture(1)) == images[2].permute(1, 2, 0).numpy()).all()
    assert even.file_digest(1) == dataset.file_digest(2) != dataset.file_digest(1)
    with pytest.raises(ValueError, match="has Even, Odd"):
        read_dataset(tmp_path / "e.safetensors", categories=["Old"])
    with pytest.raises(ValueError, match="can only be 'packed'"):
        read_dataset(tmp_path / "e.safetensors", "classes")


def test_progress_is_told(tmp_path):
    write(tmp_path, {f"{n}.png": picture_bytes(n) for n in range(3)})
    calls = []
    read_dataset(tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_an_interrupted_look_opens_nothing_more(tmp_path, monkeypatch):
    write(tmp_path, {f"{n}.png": picture_bytes(n) for n in range(200)})
    opened, look = [], dataset._look

    def slowly(sample, deep):
        opened.append(sample.name)
        time.sleep(0.02)
        return look(sample, deep)

    def stop(done, total):
        raise KeyboardInterrupt

    monkeypatch.setattr(dataset, "_look", slowly)
    with pytest.raises(KeyboardInterrupt):
        read_dataset(tmp_path, progress=stop)
    assert len(opened) < 100


@given(st.lists(st.text(max_size=8), max_size=8))
def test_natural_order_is_total_and_independent_of_the_start(texts):
    ordered = sorted(texts, key=natural_key)
    assert ordered == sorted(reversed(texts), key=natural_key) and sorted(ordered) == sorted(texts)


@given(st.binary(max_size=40))
def test_any_bytes_are_some_captions(data):
    assert all(line.strip() == line and line for line in caption_lines(decode_text(data, "a.txt", Notes())))


def test_braces():
    assert expand_braces("a-{8..11}.tar") == ["a-8.tar", "a-9.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{x,y}/{00..01}.tar") == ["x/00.tar", "x/01.tar", "y/00.tar", "y/01.tar"]
    assert expand_braces("plain.tar") == ["plain.tar"]


@pytest.mark.parametrize(
    ("text", "mirrored"),
    [
        ("a cat on the left", "a cat on the right"), ("Left hand, RIGHT side", "Right hand, LEFT side"),
        ("left-handed, rightmost, leftwards", "right-handed, leftmost, rightwards"),
        ("copyright of bright leftovers, uprights", "copyright of bright leftovers, uprights"),
        ("left_arrow right2", "right_arrow left2"), ("", ""),
    ],
)  # fmt: skip
def test_mirrored_captions(text, mirrored):
    assert flipped_caption(text) == mirrored
    assert flipped_caption(mirrored) == text
