"""Images above 8 bits and images that lie on their side: the same pixels as their upright 8-bit image."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.unit.data.test_pixels import encoded
from tvilfm.config import load_config
from tvilfm.data.depth import PERCENTILES
from tvilfm.data.pixels import decode, decode_files
from tvilfm.terms import DepthRange

GRAY = np.random.default_rng(0).integers(0, 256, (6, 4), dtype=np.uint8)
NOISE = np.random.default_rng(1).integers(0, 256, (20, 10, 3), dtype=np.uint8)
ORIENTATION = 0x0112


def gray(content: bytes, depth_range: DepthRange = None) -> npt.NDArray[np.uint8]:
    pixels = decode(content, height=None, width=None, name="a", depth_range=depth_range)
    assert (pixels == pixels[:, :, :1]).all()
    return pixels[:, :, 0]


def files_of_full_range() -> dict[str, bytes]:
    """The 8-bit image with every value multiplied by 257, in each mode that Pillow opens such a file with."""
    deep = GRAY.astype(np.uint16) * 257
    big = io.BytesIO()
    Image.fromarray(deep.astype(">u2")).save(big, "TIFF")
    pages = io.BytesIO()
    Image.fromarray(deep).save(pages, "TIFF", save_all=True, append_images=[Image.new("I;16", (9, 9))])
    return {
        "I;16 PNG": encoded(Image.fromarray(deep)),
        "I;16 TIFF": encoded(Image.fromarray(deep), "TIFF"),
        "I;16B": big.getvalue(),
        "I": encoded(Image.fromarray(deep.astype(np.int32)), "TIFF"),
        "F": encoded(Image.fromarray(deep.astype(np.float32)), "TIFF"),
        "pages": pages.getvalue(),
    }


@pytest.mark.parametrize("kind", list(files_of_full_range()))
def test_a_full_range_image_equals_its_8_bit_image(kind: str) -> None:
    content = files_of_full_range()[kind]
    assert Image.open(io.BytesIO(content)).mode == ("I;16" if kind == "pages" else kind.split()[0])
    np.testing.assert_array_equal(gray(content), GRAY)


@given(low=st.integers(0, 60_000), width=st.integers(1, 5_000), data=st.data())
def test_a_window_scales_every_pixel_as_written(low: int, width: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(0, 65_535), min_size=1, max_size=12))
    found = gray(encoded(Image.fromarray(np.array([values], dtype=np.uint16))), (low, low + width))
    expected = [min(max(round(255 * (value - low) / width), 0), 255) for value in values]
    assert found[0].tolist() == expected


def test_radiometric_counts_become_visible() -> None:
    content = encoded(Image.fromarray(7000 + 8 * GRAY.astype(np.uint16)))
    np.testing.assert_array_equal(gray(content, (7000, 7000 + 8 * 255)), GRAY)
    assert gray(content).max() < 40  # the full range holds temperatures that no camera sees
    low, high = np.percentile(7000 + 8 * GRAY.astype(float), PERCENTILES)
    expected = np.clip(np.rint(255 * (7000 + 8 * GRAY.astype(float) - low) / (high - low)), 0, 255)
    np.testing.assert_array_equal(gray(content, "percentiles"), expected)


def test_temperatures_need_a_window_and_gaps_are_cold() -> None:
    celsius = np.array([[20.0, 30.0, 40.0, np.nan, np.inf]], dtype=np.float32)
    content = encoded(Image.fromarray(celsius), "TIFF")
    assert gray(content, (20, 40)).tolist() == [[0, 128, 255, 0, 255]]
    with pytest.raises(ValueError, match=r"^a: expected finite pixels, got NaN"):
        gray(encoded(Image.fromarray(celsius[:, 3:]), "TIFF"), (20, 40))
    fractions = encoded(Image.fromarray(celsius[:, :3] / 40), "TIFF")
    with pytest.raises(ValueError, match=r"^a: expected integers .* got pixels from 0.5 to 1. Set data.depth_range"):
        gray(fractions)
    with pytest.raises(ValueError, match=r"^a: expected integers from 0 to 65535 .* got pixels from -5"):
        gray(encoded(Image.fromarray(np.array([[-5, 5]], dtype=np.int32)), "TIFF"))


def test_an_image_of_one_value_is_gray_under_percentiles() -> None:
    assert (
        gray(encoded(Image.fromarray(np.full((3, 3), 7000, dtype=np.uint16))), "percentiles").tolist()
        == [[128] * 3] * 3
    )


def test_the_window_leaves_8_bit_images_alone() -> None:
    np.testing.assert_array_equal(gray(encoded(Image.fromarray(GRAY)), (100, 101)), GRAY)


@pytest.mark.parametrize("value", ["[7000,9000]", "percentiles", "null"])
def test_the_description_takes_a_window_percentiles_or_null(value: str) -> None:
    found = load_config(None, [f"data.depth_range={value}"]).data.depth_range
    assert found == {"[7000,9000]": (7000, 9000), "percentiles": "percentiles", "null": None}[value]


@pytest.mark.parametrize("value", ["[9000,7000]", "[1]", "auto"])
def test_the_description_refuses_other_windows(value: str) -> None:
    with pytest.raises(ValueError, match=r"data\.depth_range"):
        load_config(None, [f"data.depth_range={value}"])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_turned_image_is_upright(orientation: int, kind: str, tmp_path: Path) -> None:
    # By hand: what a viewer does to the stored rows (EXIF 2.3, table of orientations).
    upright = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a),
    }[orientation]
    image, exif, file = Image.fromarray(NOISE), Image.Exif(), io.BytesIO()
    exif[ORIENTATION] = orientation
    image.save(file, kind, exif=exif, **{"lossless": True} if kind == "WEBP" else {})
    stored = np.asarray(Image.open(io.BytesIO(file.getvalue())).convert("RGB"))
    if kind != "TIFF":  # Pillow turns a TIFF itself
        np.testing.assert_array_equal(decode(file.getvalue(), height=None, width=None, name="a"), upright(stored))
    shape = (10, 20) if orientation > 4 else (20, 10)
    assert decode(file.getvalue(), height=None, width=None, name="a").shape == (*shape, 3)
    (tmp_path / "a").write_bytes(file.getvalue())
    resized = np.asarray(
        Image.fromarray(np.ascontiguousarray(upright(stored))).resize((5, 8), Image.Resampling.LANCZOS)
    )
    if kind != "TIFF":
        np.testing.assert_array_equal(decode_files(tmp_path, ["a"], height=8, width=5)[0], resized)


def test_a_deep_image_is_turned_too() -> None:
    exif, file = Image.Exif(), io.BytesIO()
    exif[ORIENTATION] = 6
    Image.fromarray(GRAY.astype(np.uint16) * 257).save(file, "PNG", exif=exif)
    np.testing.assert_array_equal(gray(file.getvalue()), np.rot90(GRAY, -1))


def test_damaged_metadata_leaves_the_pixels_as_they_are() -> None:
    exif, file = Image.Exif(), io.BytesIO()
    exif[ORIENTATION] = 6
    Image.fromarray(NOISE).save(file, "JPEG", exif=exif)
    content = file.getvalue()
    start = content.index(b"Exif\0\0") + 6
    stored = np.asarray(Image.open(io.BytesIO(content)))
    rng = np.random.default_rng(2)
    for _ in range(200):
        broken = bytearray(content)
        for place in rng.integers(start, start + 26, 4):
            broken[place] = rng.integers(0, 256)
        pixels = decode(bytes(broken), height=None, width=None, name="a")
        assert sorted(pixels.shape[:2]) == [10, 20] and pixels.mean() == pytest.approx(stored.mean())
