"""Check the files of a dataset: images that are missing, broken, empty of content, or not read at all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import pyarrow as pa

from tvilfm.data.depth import FULL_RANGE
from tvilfm.data.image_files import is_image, list_files, patterns
from tvilfm.data.pixels import Inspection, inspect
from tvilfm.data.splits import missing_images
from tvilfm.datasets.findings import Fault
from tvilfm.terms import DepthRange

USED = 0.1  # share of 16 bits that deep images have to fill; below it, 8 bits keep fewer than 26 values
_BESIDE = ("Text", "exp", "idx")  # folders of captions and split lists
_COMPANIONS = (".csv", ".parquet", ".json", ".txt", ".npy", ".mat", ".md", ".pdf", ".yaml", ".yml")


def missing_faults(root: Path, manifest: pa.Table) -> list[Fault]:
    """Return the fault of listed images that are missing; no image is opened."""
    missing = tuple(missing_images(root, manifest))
    fix = "Unpack the images again, or correct their paths."
    return [Fault(what="listed images that are missing", where=missing, fix=fix)] if missing else []


def file_faults(root: Path, manifest: pa.Table) -> Iterator[Fault]:
    """Yield the files beside the images that the reader does not read, counted by pattern of path and suffix."""
    listed = manifest["image"].to_pylist()
    known = {os.path.realpath(root / image) for image in listed}
    tops = {image.split("/")[0] for image in listed}
    # LLCM's test images are stored twice, and only one copy is read.
    copies = tuple(f"{top.removeprefix('test_')}/" for top in tops if top.startswith("test_"))
    names = [
        name
        for name in list_files(root)
        if name.split("/")[0] not in _BESIDE and os.path.realpath(root / name) not in known
    ]
    images = [name for name in names if is_image(name) and not name.startswith(copies)]
    if images:
        yield Fault(
            what=f"{len(images)} images that are not read: in other folders than the layout has, or in no list",
            where=_described(images),
            fix="Move them to the folders that are read (docs/cameras.md), add them to the lists, or ignore this.",
            serious=False,
        )
    others = [name for name in names if not is_image(name) and not name.lower().endswith(_COMPANIONS)]
    if others:
        yield Fault(
            what=f"{len(others)} files that are skipped because of their suffix",
            where=_described(others),
            fix="Convert images to PNG or JPEG, for example with `magick mogrify -format png`.",
            serious=False,
        )


def _described(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{len(group)} x {pattern}, such as {group[0]}" for pattern, group in patterns(names).items())


def image_faults(root: Path, manifest: pa.Table, depth_range: DepthRange) -> Iterator[Fault]:
    """Open every image and yield what is wrong with them."""
    missing = missing_faults(root, manifest)
    yield from missing
    absent = {image for fault in missing for image in fault.where}
    present = [image for image in manifest["image"].to_pylist() if image not in absent]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(partial(_inspect, root, depth_range), present))
    errors = tuple(one for one in found if isinstance(one, str))
    if errors:
        yield Fault(
            what="images that cannot be read",
            where=errors,
            fix="Copy these files again, or remove them and their lines in the split files.",
        )
    modality_of = dict(zip(manifest["image"].to_pylist(), manifest["modality"].to_pylist(), strict=True))
    seen = [
        _Seen(image, modality_of[image], one)
        for image, one in zip(present, found, strict=True)
        if isinstance(one, Inspection)
    ]
    yield from _content_faults(seen, depth_range)


@dataclass(frozen=True)
class _Seen:
    image: str
    modality: str
    inspection: Inspection


def _inspect(root: Path, depth_range: DepthRange, image: str) -> Inspection | str:
    try:
        return inspect((root / image).read_bytes(), name=image, depth_range=depth_range)
    except (ValueError, OSError) as error:
        return str(error)


def _content_faults(seen: Sequence[_Seen], depth_range: DepthRange) -> Iterator[Fault]:
    for modality in sorted({one.modality for one in seen}):
        of = [one for one in seen if one.modality == modality]
        flat = tuple(one.image for one in of if one.inspection.flat)
        if flat:
            yield Fault(
                what=f"{len(flat)} of {len(of)} {modality} images have one single value in all pixels",
                where=flat,
                fix="Look at these images. If they are thermal, check data.depth_range.",
                serious=2 * len(flat) >= len(of),
            )
    deep = [one for one in seen if one.inspection.values is not None]
    spans = [one.inspection.values for one in deep if one.inspection.values is not None]
    if deep and depth_range is None:
        low, high = min(span[0] for span in spans), max(span[1] for span in spans)
        if 0 < high - low < USED * (FULL_RANGE[1] - FULL_RANGE[0]):
            kept = round(255 * (high - low) / (FULL_RANGE[1] - FULL_RANGE[0])) + 1
            yield Fault(
                what=f"{len(deep)} deep images whose pixels are all between {low:g} and {high:g}: of the 256 values of "
                f"8 bits, {kept} are used",
                where=tuple(one.image for one in deep),
                fix=f"Set data.depth_range=[{low:g},{high:g}], or data.depth_range=percentiles.",
            )
    pages = tuple(one.image for one in seen if one.inspection.frames > 1)
    if pages:
        kinds = sorted({PurePosixPath(image).suffix.lower() for image in pages})
        yield Fault(
            what=f"{len(pages)} files with several pages or frames ({', '.join(kinds)})",
            where=pages,
            fix="Only the first is read. Split the files if the others show people too.",
            serious=False,
        )
