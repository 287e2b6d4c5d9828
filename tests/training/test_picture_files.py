"""Picture files: every usual kind looks as it should, and every unusable one says why."""

from __future__ import annotations

import io
import pickle
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from zigma.training.picture_files import PictureError, fit, picture_size, read_picture


def as_bytes(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def levels(picture: Image.Image) -> np.ndarray:
    assert picture.mode == "RGB"
    return np.asarray(picture).astype(int)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation):
    upright = noise(4, 6)
    undo = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = as_bytes(upright if undo is None else upright.transpose(undo), exif=exif)
    assert (levels(read_picture(data, "a.png")) == levels(upright)).all()
    assert picture_size(data, "a.png") == (4, 6)


def test_transparency_lies_on_white():
    rgba = Image.new("RGBA", (2, 2), (200, 0, 0, 0))
    rgba.putpixel((0, 0), (200, 0, 0, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 128))
    seen = levels(read_picture(as_bytes(rgba), "a.png"))
    assert seen[0, 0].tolist() == [200, 0, 0]
    assert seen[1, 0].tolist() == [255, 255, 255]
    assert abs(seen[0, 1] - 127).max() <= 1


def test_transparency_of_palettes_and_grey_lies_on_white():
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((0, 0), 0)
    for transparency in (0, b"\x00\xff"):
        seen = levels(read_picture(as_bytes(palette, transparency=transparency), "p.png"))
        assert seen[0, 0].tolist() == [255, 255, 255], transparency
        assert seen[1, 1].tolist() == [40, 50, 60]
    grey = Image.new("LA", (2, 2), (0, 0))
    grey.putpixel((0, 0), (90, 255))
    seen = levels(read_picture(as_bytes(grey), "la.png"))
    assert seen[0, 0].tolist() == [90, 90, 90] and seen[1, 1].tolist() == [255, 255, 255]
    keyed = levels(read_picture(as_bytes(Image.new("RGB", (2, 2), (1, 2, 3)), transparency=(1, 2, 3)), "key.png"))
    assert (keyed == 255).all()


def test_sixteen_bit_grey_is_scaled_and_not_clipped():
    values = np.array([[0, 257, 32896], [65535, 256, 1000]], dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        seen = levels(read_picture(as_bytes(Image.fromarray(values), kind), "deep"))
        assert (seen[..., 0] == np.rint(values / 257)).all(), kind
    wide = as_bytes(Image.fromarray(values.astype(np.int32)), "TIFF")
    assert (levels(read_picture(wide, "wide.tif"))[..., 1] == np.rint(values / 257)).all()
    with pytest.raises(PictureError, match=r"far.tif: its pixels go from 0 to 100000, expected grey from 0 to 65535"):
        read_picture(as_bytes(Image.fromarray(np.array([[0, 5], [7, 100_000]], dtype=np.int32)), "TIFF"), "far.tif")


def test_floating_point_grey():
    data = as_bytes(Image.fromarray(np.array([[0.0, 0.5], [1.0, 0.25]], dtype=np.float32)), "TIFF")
    assert levels(read_picture(data, "f.tif"))[..., 0].tolist() == [[0, 128], [255, 64]]
    broken = as_bytes(Image.fromarray(np.array([[0.0, np.nan], [1.0, 0.25]], dtype=np.float32)), "TIFF")
    with pytest.raises(PictureError, match="expected grey from 0 to 1"):
        read_picture(broken, "nan.tif")


@pytest.mark.parametrize("colour", [(255, 255, 255), (200, 40, 40), (20, 60, 180)])
def test_cmyk_and_ycck_keep_their_colour(colour):
    cmyk = Image.new("RGB", (16, 16), colour).convert("CMYK")
    plain = as_bytes(cmyk, "JPEG", quality=100)
    # The Adobe marker's last byte says how the four channels are stored; its numbers are then inverted.
    for name, data in (("tiff", as_bytes(cmyk, "TIFF")), ("jpeg", plain), ("ycck", _as_ycck(colour))):
        seen = levels(read_picture(data, name)).mean((0, 1))
        assert np.abs(seen - colour).max() < 4, (name, seen)


def _as_ycck(colour: tuple[int, int, int]) -> bytes:
    """A JPEG as Photoshop writes it: YCbCr of the colour's complement, and no black, which is stored as 255."""
    complement = tuple(255 - level for level in colour)
    y, cb, cr = (int(v) for v in np.asarray(Image.new("RGB", (1, 1), complement).convert("YCbCr"))[0, 0])
    # Pillow inverts what it writes as CMYK.
    stored = Image.new("CMYK", (16, 16), (255 - y, 255 - cb, 255 - cr, 0))
    data = bytearray(as_bytes(stored, "JPEG", quality=100))
    place = data.find(b"Adobe")
    assert place > 0
    data[place + 11] = 2
    return bytes(data)


def test_one_bit_and_other_modes():
    bits = Image.new("1", (3, 3), 1)
    bits.putpixel((0, 0), 0)
    seen = levels(read_picture(as_bytes(bits), "bits.png"))
    assert seen[0, 0].tolist() == [0, 0, 0] and seen[2, 2].tolist() == [255, 255, 255]
    assert levels(read_picture(as_bytes(Image.new("L", (3, 3), 77)), "grey.png"))[0, 0].tolist() == [77, 77, 77]
    ycc = Image.new("RGB", (16, 16), (10, 200, 90)).convert("YCbCr")
    seen = levels(read_picture(as_bytes(ycc, "TIFF"), "ycc.tif")).mean((0, 1))
    assert np.abs(seen - (10, 200, 90)).max() < 4


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_the_first_frame_of_an_animation_with_a_note(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = as_bytes(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    notes: list[str] = []
    assert levels(read_picture(data, "moving", notes))[4, 4].tolist() == [255, 0, 0]
    assert notes == ["moving: has 3 frames, of which the first is taken"]
    notes.clear()
    read_picture(as_bytes(frames[0]), "still", notes)
    assert notes == []


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_a_truncated_file_is_named_with_the_reason(kind):
    data = as_bytes(noise(64, 64), kind)
    read_picture(data, "whole")
    with pytest.raises(PictureError, match=r"^cut\.x: .+") as caught:
        read_picture(data[: len(data) // 2], "cut.x")
    assert caught.value.name == "cut.x" and caught.value.reason in str(caught.value)


def test_a_damaged_png_is_found_out():
    data = bytearray(as_bytes(noise(32, 32)))
    data[len(data) // 2] ^= 0x55
    with pytest.raises(PictureError, match="cannot be decoded"):
        read_picture(bytes(data), "flipped.png")


@pytest.mark.parametrize("data", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a"])
def test_what_is_no_picture(data, tmp_path):
    with pytest.raises(PictureError, match=r"^x\.png: "):
        read_picture(data, "x.png")
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(PictureError, match=r"^x\.png: "):
        read_picture(tmp_path / "x.png", "x.png")
    with pytest.raises(PictureError, match="no such file"):
        read_picture(tmp_path / "absent.png", "absent.png")


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1)])
def test_a_single_pixel_is_too_small(size):
    with pytest.raises(PictureError, match=r"dot\.png: it is too small"):
        read_picture(as_bytes(Image.new("RGB", size)), "dot.png")


def _png_of_size(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    body = zlib.compress(bytes((width + 7) // 8 + 1) * height, 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_decompression_bombs_are_refused_without_a_warning():
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(PictureError, match=r"it has 20000 x 10001 pixels, more than the 200 million"):
            read_picture(_png_of_size(20_000, 10_001), "bomb.png")
        assert picture_size(_png_of_size(12_000, 10_000), "large.png") == (10_000, 12_000)  # Pillow would warn here
    assert before == Image.MAX_IMAGE_PIXELS


def test_damaged_exif_does_not_cost_the_picture():
    data = as_bytes(noise(8, 8), exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff garbage")
    notes: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (levels(read_picture(data, "a.png", notes)) == levels(noise(8, 8))).all()


def test_the_error_crosses_a_process():
    again = pickle.loads(pickle.dumps(PictureError("a.png", "it is empty")))
    assert (again.name, again.reason, str(again)) == ("a.png", "it is empty", "a.png: it is empty")


sides = st.integers(2, 40)


@settings(deadline=None, max_examples=60)
@given(sides, sides, st.integers(1, 24), st.integers(1, 24), st.floats(0, 1), st.booleans())
def test_fit_has_the_size_and_mirrors(height, width, h, w, crop, flip):
    picture = noise(height, width)
    out = fit(picture, (h, w), crop)
    assert out.shape == (3, h, w) and out.dtype == torch.uint8
    assert (fit(picture, (h, w), crop, flip=True) == out.flip(-1)).all()
    flat = Image.new("RGB", (width, height), (9, 8, 7))
    assert (fit(flat, (h, w), crop, flip) == torch.tensor([9, 8, 7])[:, None, None]).all()


def test_fit_keeps_a_picture_of_the_right_size_and_crops_where_told():
    picture = noise(6, 6)
    assert (fit(picture, (6, 6)).permute(1, 2, 0).numpy() == levels(picture)).all()
    wide = noise(6, 18)
    pixels = torch.from_numpy(levels(wide)).permute(2, 0, 1)
    for crop, left in ((0.0, 0), (0.5, 6), (1.0, 12)):
        assert (fit(wide, (6, 6), crop).int() == pixels[..., left : left + 6]).all()
    tall = wide.transpose(Image.Transpose.TRANSPOSE)
    assert (fit(tall, (6, 6), 1.0).int() == pixels[..., 12:].transpose(1, 2)).all()
    with pytest.raises(ValueError, match="expected a place between 0 and 1"):
        fit(wide, (6, 6), 1.5)
