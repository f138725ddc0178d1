"""Check a dataset on disk: counts, splits, images and captions, with a fix for every fault."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa

from tvilfm.config import DataSection
from tvilfm.data.manifest import select
from tvilfm.data.pixels import decode
from tvilfm.data.splits import TEST_SPLITS, in_two_splits, missing_images
from tvilfm.datasets.caption_files import PUBLISHED, SENSORS, Collected, collect, identity_captions, read_captions
from tvilfm.datasets.folder import SPLIT_FILE, TABLES
from tvilfm.datasets.readers import DATASETS, read_dataset
from tvilfm.terms import MODALITIES

PARTS = {"train": ("train", "val"), "test": TEST_SPLITS}
# Only synthetic benchmarks contain this file; their counts are not the counts of the real dataset.
SYNTHETIC_MARK = "attributes.json"


@dataclass(frozen=True, kw_only=True)
class Count:
    """A counted number, and the expected number (None if there is none).

    Expected are the published numbers of identities, images and cameras (None for a rendered dataset, which has an
    attributes.json), and one caption per image.
    """

    what: str
    found: int
    expected: int | None = None


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault of a dataset.

    Attributes:
        what: description of the fault.
        where: every affected file, identity or key.
        fix: what to do.
        serious: False if a run works in spite of the fault.
    """

    what: str
    where: tuple[str, ...]
    fix: str
    serious: bool = True


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The result of a check; `sound` if there is no serious fault."""

    counts: tuple[Count, ...]
    faults: tuple[Fault, ...]

    @property
    def sound(self) -> bool:
        return not any(fault.serious for fault in self.faults)


def check_dataset(
    section: DataSection, root: Path, *, images: bool = True, trained: DataSection | None = None
) -> Findings:
    """Check a complete dataset; the check continues after a fault.

    Args:
        section: the dataset, its split and its captions.
        root: folder of the dataset.
        images: also decode every image, which is slow.
        trained: data section of the run whose model will be tested on this dataset; None = do not compare splits.

    Returns:
        Counts with the published numbers, and the faults.
    """
    options = dict(section.reader_options)
    if section.name not in ("synthetic", "sysu_mm01"):
        options["strict"] = False
    try:
        manifest = read_dataset(section.name, root, **options)
    except ValueError as error:
        fix = "Nothing else can be checked before this is fixed."
        return Findings(counts=(), faults=(Fault(what=str(error), where=(str(root),), fix=fix),))
    counts = list(_counts(section.name, root, manifest))
    faults = [*_count_faults(section.name, counts), *_split_faults(section.name, root, manifest)]
    faults += _image_faults(root, manifest, images=images)
    caption_counts, caption_faults = _captions(section, root, manifest)
    if trained is not None:
        faults += _trained_faults(section, trained, root, manifest)
    return Findings(counts=(*counts, *caption_counts), faults=(*faults, *caption_faults))


def _counts(name: str, root: Path, manifest: pa.Table) -> Iterator[Count]:
    published = {} if (root / SYNTHETIC_MARK).is_file() else DATASETS[name].counts
    numbers: dict[str, int] = {}
    for part, splits in PARTS.items():
        numbers[f"{part} identities"] = len(set(select(manifest, split=splits)["pid"].to_pylist()))
    numbers["of which val"] = len(set(select(manifest, split="val")["pid"].to_pylist()))
    for part, splits in PARTS.items():
        for modality in MODALITIES:
            numbers[f"{modality} {part} images"] = select(manifest, split=splits, modality=modality).num_rows
    for modality in MODALITIES:
        numbers[f"{modality} cameras"] = len(set(select(manifest, modality=modality)["camid"].to_pylist()))
    for what, number in numbers.items():
        yield Count(what=what, found=number, expected=published.get(what))


def _count_faults(name: str, counts: Sequence[Count]) -> Iterator[Fault]:
    other = [count for count in counts if count.expected not in (None, count.found)]
    for serious in (True, False):
        where = tuple(
            f"{count.found} {count.what}, published {count.expected}"
            for count in other
            if (count.what not in DATASETS[name].unsure) == serious
        )
        if where:
            yield Fault(
                what="counts that differ from the published counts",
                where=where,
                fix="Compare the split files with the published files and unpack the images again.",
                serious=serious,
            )


def _split_faults(name: str, root: Path, manifest: pa.Table) -> Iterator[Fault]:
    twice = in_two_splits(manifest)
    if twice:
        yield Fault(
            what="identities in two splits",
            where=tuple(f"pid {pid}: {one} and {other}" for pid, one, other in twice),
            fix="Restore the split files: test identities must not be trained on.",
        )
    if not select(manifest, split="val").num_rows:
        yield Fault(
            what="no validation identities",
            where=("val",),
            fix="Assign some identities to the split val, or set train.*.select=last.",
            serious=False,
        )
    if name == "folder" and not any((root / file).is_file() for file in (SPLIT_FILE, *TABLES)):
        yield Fault(
            what="identities were split by rule: half train, a tenth val, the rest test",
            where=tuple(f"{pid},{split}" for pid, split in sorted(set(_pid_splits(manifest)))),
            fix=f"To choose the splits, write {SPLIT_FILE} with the columns pid,split.",
            serious=False,
        )
    for part, splits in PARTS.items():
        rows = select(manifest, split=splits)
        seen = {modality: set(select(rows, modality=modality)["pid"].to_pylist()) for modality in MODALITIES}
        alone = sorted(seen["visible"] ^ seen["infrared"])
        if alone:
            yield Fault(
                what=f"{part} identities with images of one modality only",
                where=tuple(f"pid {pid}" for pid in alone),
                fix={
                    "train": "They are never drawn for a batch. Add the images or remove these identities.",
                    "test": "Queries without a match are not in the means. Add the images or remove these identities.",
                }[part],
                serious=False,
            )


def _pid_splits(manifest: pa.Table) -> Iterator[tuple[int, str]]:
    yield from zip(manifest["pid"].to_pylist(), manifest["split"].to_pylist(), strict=True)


def _image_faults(root: Path, manifest: pa.Table, *, images: bool) -> Iterator[Fault]:
    missing = missing_images(root, manifest)
    if missing:
        yield Fault(what="listed images that are missing", where=tuple(missing), fix="Unpack the images again.")
    if images:
        absent = set(missing)
        present = [image for image in manifest["image"].to_pylist() if image not in absent]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            errors = [error for error in pool.map(partial(_unreadable, root), present) if error is not None]
        if errors:
            yield Fault(
                what="images that cannot be read",
                where=tuple(errors),
                fix="Copy these files again, or remove them and their lines in the split files.",
            )


def _unreadable(root: Path, image: str) -> str | None:
    try:
        decode((root / image).read_bytes(), height=8, width=4, name=image)
    except (ValueError, OSError) as error:
        return str(error)
    return None


def _captions(section: DataSection, root: Path, manifest: pa.Table) -> tuple[list[Count], list[Fault]]:
    text_dir = section.captions or root / "Text"
    try:
        if text_dir.suffix == ".parquet":
            table = read_captions(manifest, root, text_dir)
            captioned = set(table["image"].to_pylist())
            return [Count(what="captions", found=len(captioned), expected=manifest.num_rows)], []
        collected = collect(text_dir, manifest)
    except ValueError as error:
        return [], [Fault(what=str(error), where=(str(text_dir),), fix="Restore the caption files.")]
    counts = []
    for modality in SENSORS:
        images = select(manifest, modality=modality)["image"].to_pylist()
        entries = [collected.found[image] for image in images if image in collected.found]
        counts.append(Count(what=f"{modality} captions", found=len(entries), expected=len(images)))
        rephrased = sum(entry.rephrased is not None for entry in entries)
        counts.append(Count(what=f"{modality} rephrases", found=rephrased))
    return counts, list(_caption_faults(collected, manifest))


def _caption_faults(collected: Collected, manifest: pa.Table) -> Iterator[Fault]:
    captions = collected.found
    by_identity = identity_captions(manifest, captions, collected.identity_texts)
    if by_identity:
        yield Fault(
            what="visible test images without a caption whose identity has captions",
            where=tuple(by_identity),
            fix="They get the captions of their identity in turn, like in the published protocol. "
            "Caption them for held-out witnesses.",
            serious=False,
        )
    missing = tuple(
        image for image in manifest["image"].to_pylist() if image not in captions and image not in by_identity
    )
    if missing:
        yield Fault(what="images without a caption", where=missing, fix="Caption them or restore the caption files.")
    for path, keys in collected.unknown.items():
        yield Fault(
            what=f"captions without an image, in {path.name}",
            where=tuple(keys),
            fix="Restore the images or remove these entries. If all are listed, check data.name and data.root.",
        )
    empty = tuple(image for image, entry in captions.items() if not entry.caption.strip())
    if empty:
        yield Fault(what="empty captions", where=empty, fix="Caption these images again.")
    if collected.differing:
        yield Fault(
            what="images whose caption differs between caption_dict and caption_llm_dict",
            where=tuple(collected.differing),
            fix="The caption of caption_llm_dict is used. To use the other one, rephrase again.",
            serious=False,
        )
    if collected.identity_texts:
        pools: dict[int, set[str]] = {}
        visible = select(manifest, modality="visible")
        for image, pid in zip(visible["image"].to_pylist(), visible["pid"].to_pylist(), strict=True):
            if image in captions:
                pools.setdefault(pid, set()).add(captions[image].caption)
        other = [pid for pid, pool in pools.items() if pool != set(collected.identity_texts.get(pid, ()))]
        if other:
            yield Fault(
                what="identities whose visible captions differ from id_caption_map",
                where=tuple(f"pid {pid}" for pid in sorted(other)),
                fix=f"Queries draw from the {PUBLISHED} captions of the images. Write the map again from these.",
                serious=False,
            )


def _trained_faults(section: DataSection, trained: DataSection, root: Path, manifest: pa.Table) -> Iterator[Fault]:
    if not section.name == trained.name == "regdb" or section.split == trained.split:
        return
    learnt = read_dataset("regdb", root, **{**trained.reader_options, "strict": False})
    known = set(select(learnt, split=PARTS["train"])["pid"].to_pylist())
    tested = set(select(manifest, split=PARTS["test"])["pid"].to_pylist())
    yield Fault(
        what=f"a RegDB model of split {trained.split} tested on split {section.split}: it was trained on "
        f"{len(known & tested)} of the {len(tested)} test identities",
        where=tuple(f"pid {pid}" for pid in sorted(known & tested)),
        fix=f"Set data.split={trained.split}, or train a model on split {section.split}.",
    )
