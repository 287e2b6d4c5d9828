"""Sheets keep every pixel of their pictures, whatever their captions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFont

from zigma import fonts, sheet
from zigma.fonts import font_for

COLOURS = [(255, 0, 0), (0, 200, 0), (0, 0, 255), (250, 220, 0), (0, 180, 180), (200, 0, 200), (90, 60, 30)]


def solid(index, width=20, height=14):
    return Image.new("RGB", (width, height), COLOURS[index])


def count(picture, colour):
    return dict((c, n) for n, c in picture.getcolors(1 << 20)).get(colour, 0)


@settings(max_examples=25, deadline=None)
@given(
    number=st.integers(1, 7),
    columns=st.none() | st.integers(1, 9),
    caption=st.text(max_size=40),
    title=st.sampled_from(["", "A title much longer than any sheet of a single picture is wide"]),
)
def test_every_picture_is_on_the_sheet_whole(number, columns, caption, title):
    """Whatever the captions and the number of columns: nothing overlaps or hangs over an edge."""
    pictures = [solid(i) for i in range(number)]
    page = sheet.labelled_sheet(pictures, [caption] * number, columns=columns, title=title, footnote=caption)
    for i in range(number):
        assert count(page, COLOURS[i]) == 20 * 14


def test_pictures_stand_in_reading_order():
    page = sheet.labelled_sheet([solid(i) for i in range(4)], [""] * 4, columns=2)
    places = {}
    for y in range(page.height):
        for x in range(page.width):
            places.setdefault(page.getpixel((x, y)), (x, y))
    first, second, third, fourth = (places[COLOURS[i]] for i in range(4))
    assert first[1] == second[1] < third[1] == fourth[1]
    assert first[0] == third[0] < second[0] == fourth[0]


@pytest.mark.parametrize("number, captions", [(0, []), (2, ["one"]), (1, ["one", "two"])])
def test_a_caption_for_each_picture(number, captions):
    with pytest.raises(ValueError, match=f"got {number} pictures and {len(captions)} captions"):
        sheet.labelled_sheet([solid(0)] * number, captions)


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=60), width=st.integers(30, 200))
def test_wrapping_loses_no_character_and_keeps_to_the_width(text, width):
    font = font_for(text, 13)
    lines = sheet._wrap(text, font, width)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert all(font.getlength(line) <= width or len(line) == 1 for line in lines)


def test_old_pillow_has_captions_too(monkeypatch):
    """Before 10.1 there is one bitmap font, which takes no size and knows Latin-1 only."""
    bitmap = ImageFont.ImageFont()
    modern = ImageFont.load_default

    def old(*size):
        if size:
            raise TypeError("load_default() takes 0 positional arguments but 1 was given")
        return bitmap

    monkeypatch.setattr(ImageFont, "load_default", old)
    assert font_for("bug", 13) is bitmap
    assert isinstance(modern(13), ImageFont.FreeTypeFont)
    monkeypatch.setattr(ImageFont.ImageFont, "getlength", lambda self, text: 6 * len(text.encode("latin-1")))
    assert sheet._wrap("жук bug", bitmap, 30) == ["???", "bug"]


def test_a_line_break_in_a_caption_is_kept():
    assert sheet._wrap("one two\nthree", font_for("", 13), 500) == ["one two", "three"]


def test_letters_that_the_font_lacks_come_from_one_of_the_system_or_are_named(monkeypatch, caplog):
    """Pillow's own font has none of Hebrew or Chinese; no other is asked while it has all letters."""
    own = font_for("plain words", 16)
    assert own.getname() == ImageFont.load_default(16).getname() and not caplog.records
    path = next((font.path for font in fonts._system_fonts(16) if not fonts._lacking(font, set("שלום"))), None)
    if path is not None:  # here a font of the system has Hebrew
        assert not fonts._lacking(font_for("shalom שלום", 16), set("shalomשלום"))
    monkeypatch.setattr(fonts, "_system_fonts", lambda size: ())
    caplog.clear()
    assert font_for("猫 cat", 16).getname() == own.getname()
    assert "no font for 猫: these letters are drawn as boxes" in caplog.text and "cat" not in caplog.text
    caplog.clear()
    monkeypatch.setattr(fonts.features, "check", lambda name: False)
    font_for("שלום", 16)
    assert "cannot set text from right to left" in caplog.text


def test_tensors_become_pictures_and_back():
    """[-1, 1] -> 0 ... 255, clamped, channels and rows in their places."""
    levels = torch.randint(256, (2, 3, 5, 7), generator=torch.Generator().manual_seed(0))
    pictures = sheet.to_pictures(levels / 127.5 - 1)
    for picture, expected in zip(pictures, levels, strict=True):
        back = torch.tensor(list(picture.tobytes())).view(5, 7, 3).permute(2, 0, 1)
        assert torch.equal(back, expected)
    beyond = sheet.to_pictures(torch.tensor([-9.0, 0.0, 9.0]).view(1, 3, 1, 1))[0]
    assert beyond.getpixel((0, 0)) == (0, 128, 255)
    with pytest.raises(ValueError, match=r"shape \(3, 5, 7\)"):
        sheet.to_pictures(torch.zeros(3, 5, 7))


def test_saving_makes_the_folder_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "new" / "folder" / "picture.png"
    assert sheet.save_picture(solid(2), str(path)) == path
    assert [p.name for p in path.parent.iterdir()] == ["picture.png"]
    assert Image.open(path).tobytes() == solid(2).tobytes()


def test_a_failed_save_leaves_the_old_picture(tmp_path):
    path = sheet.save_picture(solid(0), tmp_path / "picture.png")
    before = path.read_bytes()
    with pytest.raises(OSError):
        sheet.save_picture(Image.new("CMYK", (3, 3)).convert("F"), path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match=r"expected one that ends in \.png"):
        sheet.save_picture(solid(0), tmp_path / "picture.docx")


def test_enlarging():
    picture = Image.new("RGB", (2, 1))
    picture.putpixel((1, 0), (255, 255, 255))
    large = sheet.enlarge(picture, 3, Image.Resampling.NEAREST)
    assert large.size == (6, 3) and count(large, (255, 255, 255)) == 9
    with pytest.raises(ValueError, match="enlargement of 0"):
        sheet.enlarge(picture, 0)
