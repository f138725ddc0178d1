"""Decoding pictures: the right pixels, or a message that names the file."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tvilfm.data.pixels import create, decode, decode_files, open_pixels

NOISE = np.random.default_rng(0).integers(0, 256, (20, 10, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def test_a_picture_of_the_wanted_size_is_unchanged() -> None:
    found = decode(encoded(Image.fromarray(NOISE)), height=20, width=10, name="a")
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, NOISE)


def test_resizing_takes_height_and_width_in_that_order_with_lanczos() -> None:
    found = decode(encoded(Image.fromarray(NOISE)), height=12, width=30, name="a")
    assert found.shape == (12, 30, 3)
    np.testing.assert_array_equal(found, np.asarray(Image.fromarray(NOISE).resize((30, 12), Image.Resampling.LANCZOS)))


def test_a_gray_picture_is_repeated() -> None:
    found = decode(encoded(Image.fromarray(NOISE[:, :, 0])), height=20, width=10, name="a")
    np.testing.assert_array_equal(found, NOISE[:, :, :1].repeat(3, axis=2))


@pytest.mark.parametrize("mode", ["P", "RGBA", "CMYK", "1", "LA"])
def test_other_colour_modes_become_three_channels(mode: str) -> None:
    kind = "TIFF" if mode == "CMYK" else "PNG"
    assert decode(encoded(Image.fromarray(NOISE).convert(mode), kind), height=20, width=10, name="a").shape == (
        20,
        10,
        3,
    )


def test_zero_bytes_are_named() -> None:
    with pytest.raises(ValueError, match=r"^cam1/a\.jpg: expected an image, got zero bytes"):
        decode(b"", height=8, width=8, name="cam1/a.jpg")


def test_bytes_that_are_no_picture_are_named() -> None:
    with pytest.raises(ValueError, match=r"^b\.jpg: expected an image, got"):
        decode(b"<html>404</html>", height=8, width=8, name="b.jpg")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP"])
def test_a_picture_cut_anywhere_is_named(kind: str) -> None:
    content = encoded(Image.fromarray(NOISE), kind)
    # Behind the last pixel a format may hold an end mark that decoders can do without.
    for length in range(1, len(content) - 20):
        with pytest.raises(ValueError, match=r"^c: expected an image"):
            decode(content[:length], height=8, width=8, name="c")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP"])
def test_flipped_bytes_give_a_picture_or_a_named_error(kind: str) -> None:
    content = encoded(Image.fromarray(NOISE), kind)
    rng = np.random.default_rng(1)
    for _ in range(300):
        broken = bytearray(content)
        for place in rng.integers(0, len(content), 3):
            broken[place] = rng.integers(0, 256)
        try:
            assert decode(bytes(broken), height=8, width=8, name="d").shape == (8, 8, 3)
        except ValueError as error:
            assert str(error).startswith("d: expected")


def test_a_png_whose_second_chunk_is_broken_is_named() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    content = bytearray(encoded(Image.fromarray(noise)))
    second = content.index(b"IDAT", content.index(b"IDAT") + 4)
    content[second] ^= 0x55  # PIL answers this one with a SyntaxError
    with pytest.raises(ValueError, match=r"^c: expected an image"):
        decode(bytes(content), height=8, width=8, name="c")


def test_a_decompression_bomb_and_a_format_that_is_not_wanted_are_refused_unread() -> None:
    content, size = encoded(Image.fromarray(NOISE)), {"height": 8, "width": 8, "name": "e"}
    with pytest.raises(ValueError, match=r"^e: expected at most 199 pixels, got 10 x 20"):
        decode(content, **size, max_pixels=199)
    assert decode(content, **size, max_pixels=200, formats=("PNG",)).shape == (8, 8, 3)
    with pytest.raises(ValueError, match=r"^e: expected an image"):
        decode(content, **size, formats=("JPEG",))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 20_000])
def test_a_real_bomb_is_refused_by_name(side: int) -> None:
    # Between PIL's warning and its error, and beyond its error.
    content = encoded(Image.new("1", (side, side)))
    assert len(content) < 100_000
    with pytest.raises(ValueError, match=r"^f: expected"):
        decode(content, height=8, width=8, name="f")


def test_files_are_decoded_in_order_and_shared_through_a_map(tmp_path: Path) -> None:
    for name, value in (("a.png", 10), ("b.png", 200)):
        Image.new("RGB", (4, 6), (value, value, value)).save(tmp_path / name)
    decoded = decode_files(tmp_path, ["b.png", "a.png", "b.png"], height=6, width=4)
    assert decoded.shape == (3, 6, 4, 3)
    assert decoded[:, 0, 0, 0].tolist() == [200, 10, 200]
    target = create(tmp_path / "p.npy", 3, height=6, width=4)
    target[:] = decoded
    target.flush()
    shared = open_pixels(tmp_path / "p.npy")
    np.testing.assert_array_equal(shared, decoded)
    with pytest.raises(ValueError, match="read-only"):
        shared[0] = 0
