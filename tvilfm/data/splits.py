"""Splits: reading lists of identities and images, holding out identities, and checking that splits do not overlap."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa

from tvilfm.data.people import person_name
from tvilfm.data.text_files import read_text

HELD_OUT_EVERY = 10  # METHOD 4: datasets without a validation split hold out 10 % of the training identities
TEST_SPLITS = ("query", "gallery", "test")


def held_out(pids: Iterable[int]) -> frozenset[int]:
    """Return the training identities held out for validation: every tenth in ascending order, at least one.

    This is a fixed rule and not a random draw, so every reader, machine and version holds out the same people.

    Source: METHOD 4, ours. Differs: the released code holds out no identity and selects on the test set.
    """
    ordered = sorted(set(pids))
    chosen = ordered[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    return frozenset(chosen or ordered[1:][-1:])


def read_image_list(path: Path, *, top: str) -> list[str]:
    """Return the image paths of a split list with one `path label` per line.

    Paths may have backslashes or begin on another machine; they are returned from their last folder `top`. The label
    is the position of the identity in this list. It must be a number but is not used: the folder in the path names the
    identity, in the same way in every list.

    Raises:
        ValueError: the file is missing or empty, or a line has another format (the message contains its number).
    """
    images = []
    for number, line in enumerate(_lines(path), start=1):
        image, _, label = line.strip().rpartition(" ")
        if not image or not label.isdigit():
            raise ValueError(f"{path}:{number}: expected 'image label', got {line!r}. Restore the file.")
        parts = image.strip().replace("\\", "/").removeprefix("./").split("/")
        start = len(parts) - 1 - parts[::-1].index(top) if top in parts else 0
        images.append("/".join(parts[start:]))
    return images


def read_ids(path: Path) -> list[int]:
    """Return the identities of a comma-separated list, ascending.

    Raises:
        ValueError: the file is missing, empty, or contains other text.
    """
    lines = _lines(path)
    try:
        return sorted({int(pid) for line in lines for pid in line.split(",") if pid.strip()})
    except ValueError:
        raise ValueError(
            f"{path}: expected comma-separated identity numbers, got other text. Restore the file."
        ) from None


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(
            f"data.root: expected the split file {path}, got no such file. "
            f"Copy the dataset's {path.parent.name} folder."
        )
    lines = [line for line in read_text(path).splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"data.root: expected lines in the split file {path}, got none. Restore the file.")
    return lines


def in_two_splits(manifest: pa.Table) -> list[tuple[int, str, str]]:
    """Return (pid, one, other) of identities in two of train, val and test; query and gallery count as test.

    Negative numbers are nobody (`data/people.py`).
    """
    parts: dict[int, set[str]] = {}
    for pid, split in zip(manifest["pid"].to_pylist(), manifest["split"].to_pylist(), strict=True):
        if pid >= 0:
            parts.setdefault(pid, set()).add("test" if split in TEST_SPLITS else split)
    twice: list[tuple[int, str, str]] = []
    for pid, splits in sorted(parts.items()):
        one, *others = [split for split in ("train", "val", "test") if split in splits]
        if others:
            twice.append((pid, one, others[-1]))
    return twice


def _image_of(manifest: pa.Table, pid: int, part: str) -> str:
    splits = TEST_SPLITS if part == "test" else (part,)
    rows = zip(*(manifest[name].to_pylist() for name in ("image", "pid", "split")), strict=True)
    return next(str(image) for image, person, split in rows if person == pid and split in splits)


def missing_images(root: Path, manifest: pa.Table) -> list[str]:
    """Return the images of the manifest that are missing on disk, in manifest order."""
    return [image for image in manifest["image"].to_pylist() if not (root / image).is_file()]


def require_sound(root: Path, manifest: pa.Table) -> pa.Table:
    """Check that every image exists and that no identity is in two splits, and return the manifest.

    Raises:
        ValueError: the check failed; the message contains the first such identity or image and their number.
    """
    twice = in_two_splits(manifest)
    if twice:
        pid, one, other = twice[0]
        raise ValueError(
            f"data.root: expected each identity in one split, got pid {person_name(manifest, pid)} in {one} and "
            f"{other} ({_image_of(manifest, pid, one)} and {_image_of(manifest, pid, other)}; {len(twice)} identities "
            "in all). Fix the split files; `tvilfm data check` lists all errors."
        )
    missing = missing_images(root, manifest)
    if missing:
        raise ValueError(
            f"data.root: expected every listed image in {root}, got {len(missing)} of {manifest.num_rows} missing, "
            f"the first {missing[0]}. Unpack the images again or set data.root to their folder."
        )
    return manifest
