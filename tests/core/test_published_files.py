"""Files that others wrote: published checkpoints, bare state dicts, and pickles that mean harm."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from zigma import CheckpointError, ZigMa, ZigMaConfig, load_checkpoint, save_checkpoint
from zigma.atomic_file import write_safetensors
from zigma.checkpoint import load_bundle, read_checkpoint
from zigma.pickle_reader import PickleError, TorchFile, read_pickle
from zigma.scan_orders import scan_order

SMALL = {"in_channels": 4, "embed_dim": 16, "depth": 3, "img_dim": 8, "patch_size": 2}


def build(**fields) -> ZigMa:
    torch.manual_seed(0)
    return ZigMa(ZigMaConfig(**{**SMALL, **fields}), generator=torch.Generator().manual_seed(0)).eval()


def same(a: ZigMa, b: ZigMa) -> bool:
    return a.config == b.config and all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# --- the published layout


def test_a_published_checkpoint_gives_its_recorded_output(root):
    recorded = load_file(root / "tests/data/published_checkpoint_output.safetensors")
    path = root / "tests/data/published_checkpoint.pt"
    before = set(sys.modules)
    model = load_checkpoint(path)
    assert not {name for name in set(sys.modules) - before if "omegaconf" in name}
    v = model(recorded["input.x"], recorded["input.t"])
    torch.testing.assert_close(v, recorded["output"], atol=1e-4, rtol=0)
    # The weights of training are others, and can be had.
    assert not torch.allclose(load_checkpoint(path, weights="model")(recorded["input.x"], recorded["input.t"]), v)


def test_a_published_checkpoint_states_its_facts(root):
    file = read_checkpoint(root / "tests/data/published_checkpoint.pt")
    assert file.config == ZigMaConfig.from_published(
        img_dim=8, in_channels=4, patch_size=2, embed_dim=64, depth=4, scan_type="zigzagN8"
    )
    assert file.latent.scale == 0.18215 and file.latent.downscale == 8
    assert set(file.metadata) == {"zigma.train_steps", "zigma.best_fid", "zigma.weights"}
    assert file.metadata["zigma.weights"] == "ema"


def test_the_legacy_switch_reaches_a_file(root):
    path = root / "tests/data/published_checkpoint.pt"
    plain, legacy = load_checkpoint(path), load_checkpoint(path, legacy_permutation=True)
    x, t = torch.randn(1, 4, 8, 8), torch.rand(1)
    assert legacy.config.legacy_permutation and not torch.allclose(plain(x, t), legacy(x, t), atol=1e-3)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.diffusion_model."])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_a_bare_state_dict_is_read_with_whatever_was_put_before_its_keys(tmp_path, prefix, suffix):
    model = build(use_pe=2)
    path = tmp_path / f"weights{suffix}"
    state = OrderedDict((prefix + key, value.clone()) for key, value in model.state_dict().items())
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    assert same(load_checkpoint(path, scan_type="zigzagN8"), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_other_number_formats_are_read(tmp_path, dtype, suffix):
    model = build(use_pe=2)
    state = {key: value.to(dtype) for key, value in model.state_dict().items()}
    path = tmp_path / f"weights{suffix}"
    torch.save(state, path) if suffix == ".pt" else save_file(state, path)
    loaded = load_checkpoint(path, scan_type="zigzagN8")
    for key, value in loaded.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, state[key].float())
    assert next(load_checkpoint(path, scan_type="zigzagN8", dtype=dtype).parameters()).dtype == dtype


def test_views_and_shared_storages_are_read_as_the_tensors_they_are(tmp_path):
    model = build()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    flat = torch.cat([torch.zeros(3), state["norm_f.weight"], torch.ones(5)])
    state["norm_f.weight"] = flat[3:19]
    turned = state["t_embedder.mlp.2.weight"].t().contiguous()
    state["t_embedder.mlp.2.weight"] = turned.t()
    torch.save(state, tmp_path / "views.pt")
    loaded = load_checkpoint(tmp_path / "views.pt", scan_type="zigzagN8", img_dim=8)
    assert same(loaded, model) and loaded.norm_f.weight.untyped_storage().nbytes() == 64


VARIANTS = {
    "class": {"num_classes": 5}, "text": {"has_text": True, "d_context": 6}, "layer norm": {"rms_norm": False},
    "v2": {"scan_type": "v2", "use_pe": 2}, "fixed positions": {"use_pe": 1}, "shared": {"share_ssm": True},
    "attention": {"mixer": "attention"}, "sizes": {"d_state": 5, "d_conv": 3, "expand": 1, "dt_rank": 2, "bias": True},
    "no bias": {"conv_bias": False}, "video": {"video_frames": 3, "scan_type": "video_sst", "tpe": True, "use_pe": 2},
    "long": {"video_frames": 4, "scan_type": "video_st", "use_pe": 2}, "bidirectional video":
    {"video_frames": 4, "scan_type": "v2", "use_pe": 2}, "wide": {"img_dim": (4, 12), "use_pe": 2},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_architecture_is_derived_from_shapes_and_what_they_do_not_tell(tmp_path, variant):
    model = build(**VARIANTS[variant])
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    known = {"scan_type": model.config.scan_type, "img_dim": model.config.img_dim}
    if variant == "bidirectional video":
        known["video_frames"] = 4
    loaded = load_checkpoint(tmp_path / "weights.pt", **known)
    assert same(loaded, model)


@pytest.mark.parametrize(
    ("fields", "given", "asked"),
    [
        ({}, {}, "scan_type and img_dim"),
        ({"use_pe": 2}, {}, "scan_type: give it, such as scan_type='zigzagN8'"),
        ({}, {"scan_type": "zigzagN8"}, "img_dim: give it"),
        ({"img_dim": (4, 12), "use_pe": 2}, {"scan_type": "zigzagN8"}, "img_dim"),
        ({"scan_type": "v2", "use_pe": 2}, {}, "video_frames and img_dim"),
        ({"scan_type": "video_sst", "video_frames": 4, "use_pe": 2}, {"scan_type": "video_sst"}, "video_frames"),
    ],
)
def test_what_cannot_be_derived_is_asked_for_by_name(tmp_path, fields, given, asked):
    torch.save(build(**fields).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "weights.pt", **given)
    assert f"do not tell {asked}" in str(caught.value) and "\n" not in str(caught.value)


def test_random_orders_that_no_file_holds_have_to_be_given(tmp_path):
    model = build(scan_type="randomN3")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    given = {"scan_type": "randomN3", "img_dim": 8}
    with pytest.raises(CheckpointError, match=r"drawn at random \(randomN3\) and not in the file: give them"):
        load_checkpoint(tmp_path / "weights.pt", **given)
    loaded = load_checkpoint(tmp_path / "weights.pt", token_orders=model.token_orders, **given)
    x, t = torch.randn(1, 4, 8, 8), torch.rand(1)
    assert torch.equal(loaded(x, t), model(x, t))
    save_checkpoint(model, tmp_path / "own.safetensors")  # ours keeps them
    assert torch.equal(load_checkpoint(tmp_path / "own.safetensors")(x, t), model(x, t))
    with pytest.raises(CheckpointError, match="describes its model itself, but token_orders was given"):
        load_checkpoint(tmp_path / "own.safetensors", token_orders=model.token_orders)
    with pytest.raises(CheckpointError, match="3 layers"):
        load_checkpoint(tmp_path / "weights.pt", token_orders=[scan_order("zigzag", height=4, width=4)], **given)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: s.pop("norm_f.weight"), r"its model lacks 1 tensors \(norm_f\.weight\)"),
        (lambda s: s.update(extra=torch.zeros(2)), r"its model has unknown 1 tensors \(extra\)"),
        (
            lambda s: s.update({"norm_f.weight": torch.zeros(3)}),
            r"norm_f\.weight of its model has shape \(3,\), where \(16,",
        ),
        (lambda s: s.update({"module.norm_f.weight": torch.zeros(16)}), r"key norm_f\.weight is there twice"),
        (lambda s: s.update(step=3), r"entries that are no tensors \(step\)"),
        (lambda s: s.pop("blocks.1.norm.weight"), r"lacks 1 tensors \(blocks\.1\.norm\.weight\)"),
        (lambda s: s.clear(), r"has the entries  and neither 'ema' nor 'model'"),
    ],
)
def test_wrong_keys_are_named(tmp_path, change, sentence):
    state = dict(build(use_pe=2).state_dict())
    change(state)
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=sentence):
        load_checkpoint(tmp_path / "weights.pt", scan_type="zigzagN8")


def test_a_file_without_the_wanted_weights_says_which_it_takes(tmp_path, caplog):
    model = build(use_pe=2)
    torch.save({"model": model.state_dict(), "train_steps": 7}, tmp_path / "m.pt")
    assert same(load_checkpoint(tmp_path / "m.pt", scan_type="zigzagN8"), model)
    assert "no 'ema' weights: its 'model' weights are used" in caplog.text


# --- pickles that mean harm


class Bomb:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Built:
    """Calls nothing on reading but BUILD, with a state that would set attributes."""

    def __reduce__(self):
        return OrderedDict, (), {"__class__": 1}, None, iter([("x", Bomb(os.system, "touch {target}"))])


def bombs(target):
    yield "os.system", "posix.system" if os.name == "posix" else "nt.system", Bomb(os.system, f"touch {target}")
    yield "eval", "builtins.eval", Bomb(eval, f"open({str(target)!r}, 'w')")
    yield "exec", "builtins.exec", Bomb(exec, f"open({str(target)!r}, 'w')")
    yield "getattr", "builtins.getattr", Bomb(getattr, "", "join")
    yield "open", "io.open", Bomb(open, str(target), "w")
    yield "popen", "subprocess.Popen", Bomb(subprocess.Popen, ["touch", str(target)])
    yield "nested", "builtins.eval", {"ema": [Bomb(dict, [Bomb(tuple, [Bomb(eval, "1")])])]}
    yield "build", "posix.system" if os.name == "posix" else "nt.system", Built()
    yield "torch.load", "torch.serialization.load", Bomb(torch.load, str(target))


@pytest.mark.parametrize("name", [name for name, *_ in bombs("x")])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_harmful_pickles_are_inert_and_refused_by_name(tmp_path, name, wrapped, protocol):
    target, path = tmp_path / "harm", tmp_path / "model.pt"
    culprit, bomb = next((c, b) for n, c, b in bombs(target) if n == name)
    if wrapped:
        torch.save({"ema": {"w": torch.zeros(2)}, "args": bomb}, path, pickle_protocol=max(protocol, 2))
    else:
        path.write_bytes(pickle.dumps(bomb, protocol=protocol))
    started = time.monotonic()
    with pytest.raises(CheckpointError, match="refused, because it asks for") as caught:
        load_checkpoint(path)
    assert time.monotonic() - started < 1
    culprit = {"io.open": r"open", "torch.serialization.load": "torch", "subprocess.Popen": "Popen"}.get(
        culprit, culprit
    )
    assert culprit in str(caught.value) and "nothing in it was executed" in str(caught.value)
    assert not target.exists()


@pytest.mark.parametrize(
    ("program", "sentence"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", "asks for os.system"),
        (b"(S'true'\nios\nsystem\n.", "asks for os.system"),
        (b"(cos\nsystem\nS'true'\no.", "asks for os.system"),
        (b"\x80\x02K\x01K\x02R.", "calls 1, which is no name"),
        (b"\x80\x02K\x01}b.", "changes 1, which has no state"),
        (b"\x80\x02K\x01}s.", "damaged"),
        (b"\x80\x02Pxyz\n.", "opcode PERSID"),
        (b"\x80\x02\x82\x01.", "opcode EXT1"),
        (b"\x80\x02(", "damaged"),
        (b"\x80\x02.", "damaged"),
        (b"\x80\x02h\x05.", "damaged"),
        (b"not a pickle", "damaged"),
        (b"", "damaged"),
    ],
)
def test_programs_that_are_no_data_are_refused(program, sentence):
    with pytest.raises(PickleError, match=sentence):
        read_pickle(program)


def test_plain_data_is_read_as_python_reads_it():
    data = {"a": [1, -5, 2**80, 1.5, "text", b"bytes", None, True, (1, 2, 3, 4), {1, 2}, OrderedDict(x=1)], 3: ()}
    for protocol in range(3, pickle.HIGHEST_PROTOCOL + 1):
        assert read_pickle(pickle.dumps(data, protocol=protocol)) == data


def rewritten(path, changes):
    """The zip with some entries changed (None drops one)."""
    with zipfile.ZipFile(path) as file:
        parts = {i.filename: file.read(i) for i in file.infolist()}
    for suffix, value in changes.items():
        name = next(n for n in parts if n.endswith(suffix))
        parts.pop(name) if value is None else parts.__setitem__(name, value(parts[name]))
    with zipfile.ZipFile(path, "w") as file:
        for name, value in parts.items():
            file.writestr(name, value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"/data/0": None}, "data/0 has no bytes instead of 256"),
        ({"/data/0": lambda b: b[:-4]}, "data/0 has 252 bytes instead of 256"),
        ({"/byteorder": lambda b: b"big"}, "big-endian"),
        ({"/data.pkl": None}, "0 entries data.pkl"),
        ({"/data.pkl": lambda b: b[: len(b) // 2]}, "damaged"),
    ],
)
def test_damaged_zips_are_refused(tmp_path, changes, sentence):
    path = tmp_path / "weights.pt"
    torch.save({"x_embedder.proj.weight": torch.zeros(16, 4, 1, 1), "blocks.0.x": torch.zeros(1)}, path)
    rewritten(path, changes)
    with pytest.raises(CheckpointError, match=sentence):
        load_checkpoint(path)


def test_a_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"blocks.0.w": torch.arange(1000.0)}, path)
    data = bytearray(path.read_bytes())
    place = data.index(torch.arange(100.0, 110.0).numpy().tobytes())
    data[place] ^= 1
    path.write_bytes(data)
    with TorchFile(path) as file, pytest.raises(PickleError, match="cannot be read"):
        file.tensor(file.contents["blocks.0.w"])


def test_a_truncated_file_is_refused(tmp_path, root):
    data = (root / "tests/data/published_checkpoint.pt").read_bytes()
    path = tmp_path / "half.pt"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="refused"):
        load_checkpoint(path)


def test_files_of_old_torch_are_named(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"format of torch before 1\.6: load and save it once"):
        load_checkpoint(tmp_path / "old.pt")


@pytest.mark.parametrize(
    ("size", "stride", "offset"), [((1 << 40,), (0,), 0), ((4,), (1,), 3), ((2, 2), (5, 1), 0), ((-1,), (1,), 0)]
)
def test_tensors_beyond_their_storage_are_refused(tmp_path, size, stride, offset):
    path = tmp_path / "m.pt"
    torch.save({"w": torch.zeros(5)}, path)
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, protocol=2)
    storage = ("storage", torch.FloatStorage, "0", "cpu", 5)

    class Storage:
        pass

    marker = Storage()
    pickler.persistent_id = lambda obj: storage if obj is marker else None

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (marker, offset, size, stride, False, OrderedDict())

    pickler.dump({"w": Tensor()})
    rewritten(path, {"/data.pkl": lambda _: buffer.getvalue()})
    with pytest.raises(CheckpointError, match=r"does not fit its storage|has sizes"):
        load_checkpoint(path)


# --- writing


def test_what_is_written_is_read_by_the_library_bit_for_bit(tmp_path):
    tensors = {
        "f": torch.randn(3, 5), "half": torch.randn(7).half(), "b": torch.randn(2, 2).bfloat16(), "i": torch.arange(5),
        "flag": torch.tensor([True, False]), "scalar": torch.tensor(2.5), "none": torch.zeros(0, 4), "turned":
        torch.randn(4, 6).t(), "d": torch.randn(3).double(), "u8": torch.arange(3, dtype=torch.uint8),
    }  # fmt: skip
    path = tmp_path / "all.safetensors"
    write_safetensors(tensors, path, {"note": "ä"})
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for key, value in tensors.items():
        assert read[key].dtype == value.dtype and torch.equal(read[key], value)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"note": "ä"}
    with pytest.raises(ValueError, match=r"got c \(torch.complex64\), expected tensors of the types"):
        write_safetensors({"c": torch.zeros(2, dtype=torch.complex64)}, path, {})


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), replace(a, b)))
    write_safetensors({"a": torch.zeros(1)}, tmp_path / "a.safetensors", {})
    assert events[:2] == ["fsync", "replace"]


def test_a_published_file_is_converted_without_loss(tmp_path, root):
    path, out = root / "tests/data/published_checkpoint.pt", tmp_path / "out.safetensors"
    bundle = load_bundle(path)
    save_checkpoint(bundle.model, out, latent=bundle.latent)
    again = load_bundle(out)
    assert same(again.model, bundle.model) and again.latent == bundle.latent
    with safe_open(out, framework="pt") as file:
        assert json.loads(file.metadata()["zigma.config"])["scan_type"] == "zigzagN8"


@pytest.mark.parametrize("part", ["pickle", "file"])
def test_damage_anywhere_ends_in_a_sentence_or_in_a_model(root, tmp_path, part):
    """Bytes changed, lost and put in, in the pickle or in the zip around it: never another exception."""
    source, path = root / "tests/data/published_checkpoint.pt", tmp_path / "damaged.pt"
    with zipfile.ZipFile(source) as file:
        parts = {entry.filename: file.read(entry) for entry in file.infolist()}
    name = next(n for n in parts if n.endswith("data.pkl"))
    whole = source.read_bytes() if part == "file" else parts[name]
    generator = random.Random(0)
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(generator.choice((1, 2, 8))):
            # Half of it near the end: there the pickle has its configuration, and the zip its directory.
            low = len(data) - 2500 if generator.random() < 0.5 else 0
            place, kind = generator.randrange(low, len(data)), generator.random()
            if kind < 0.5:
                data[place] = generator.randrange(256)
            elif kind < 0.75:
                del data[place : place + generator.randrange(1, 20)]
            else:
                data[place:place] = generator.randbytes(generator.randrange(1, 8))
        if part == "file":
            path.write_bytes(data)
        else:
            with zipfile.ZipFile(path, "w") as file:
                for key, value in parts.items():
                    file.writestr(key, bytes(data) if key == name else value)
        try:
            load_checkpoint(path)
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 50


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the system does not list open files")
def test_a_refused_file_is_closed(tmp_path):
    """Whoever keeps the error would keep the file open, which Windows then lets nobody remove."""
    path = tmp_path / "twice.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("a/data.pkl", "b/data.pkl"):
            archive.writestr(name, b"")
    with pytest.raises(PickleError, match=r"2 entries data\.pkl") as kept:
        TorchFile(path)
    opened = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
    assert kept and str(path.resolve()) not in opened
