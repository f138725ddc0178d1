"""Check a dataset on disk: counts, splits, images and captions, with a fix for every fault."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from tvilfm.config import DataSection
from tvilfm.data.manifest import select
from tvilfm.data.people import person_name
from tvilfm.data.splits import TEST_SPLITS, in_two_splits
from tvilfm.datasets.check_captions import check_captions
from tvilfm.datasets.check_images import file_faults, image_faults, missing_faults
from tvilfm.datasets.findings import Count, Fault, Findings
from tvilfm.datasets.folder import SPLIT_FILE, TABLES
from tvilfm.datasets.naming import recognize
from tvilfm.datasets.readers import DATASETS, read_dataset
from tvilfm.terms import MODALITIES

PARTS = {"train": ("train", "val"), "test": TEST_SPLITS}
# Only synthetic benchmarks contain this file; their counts are not the counts of the real dataset.
SYNTHETIC_MARK = "attributes.json"


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
    try:
        manifest = read_loosely(section, root)
    except ValueError as error:
        fix = "Nothing else can be checked before this is fixed."
        fault = Fault(what=str(error), where=(str(root),), fix=fix)
        return Findings(counts=(), faults=(fault, *recognize(root, section.name)))
    counts = list(_counts(section.name, root, manifest))
    faults = [*_count_faults(section.name, counts), *_split_faults(section.name, root, manifest)]
    faults += file_faults(root, manifest)
    faults += image_faults(root, manifest, section.depth_range) if images else missing_faults(root, manifest)
    caption_counts, caption_faults = check_captions(section, root, manifest)
    if trained is not None:
        faults += _trained_faults(section, trained, root, manifest)
    return Findings(counts=(*counts, *caption_counts), faults=(*faults, *caption_faults))


def read_loosely(section: DataSection, root: Path) -> pa.Table:
    """Return the manifest of a dataset that may have missing images and identities in two splits."""
    options = dict(section.reader_options)
    if section.name not in ("synthetic", "sysu_mm01"):
        options["strict"] = False
    return read_dataset(section.name, root, **options)


def _counts(name: str, root: Path, manifest: pa.Table) -> Iterator[Count]:
    published = {} if (root / SYNTHETIC_MARK).is_file() else DATASETS[name].counts
    numbers: dict[str, int] = {}
    for part, splits in PARTS.items():
        numbers[f"{part} identities"] = len(_people(select(manifest, split=splits)))
    numbers["of which val"] = len(_people(select(manifest, split="val")))
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
            where=tuple(f"pid {person_name(manifest, pid)}: {one} and {other}" for pid, one, other in twice),
            fix="Restore the split files: test identities must not be trained on.",
        )
    if name == "folder" and not any((root / file).is_file() for file in (SPLIT_FILE, *TABLES)):
        yield Fault(
            what="identities were split by rule: half train, a tenth val, the rest test",
            where=tuple(f"{person_name(manifest, pid)},{split}" for pid, split in sorted(set(_pid_splits(manifest)))),
            fix=f"To choose the splits, write {SPLIT_FILE} with the columns pid,split.",
            serious=False,
        )
    for part, splits in PARTS.items():
        rows = select(manifest, split=splits)
        seen = {modality: _people(select(rows, modality=modality)) for modality in MODALITIES}
        alone = sorted(seen["visible"] ^ seen["infrared"])
        if alone:
            yield Fault(
                what=f"{part} identities with images of one modality only",
                where=tuple(f"pid {person_name(manifest, pid)}" for pid in alone),
                fix={
                    "train": "They are never drawn for a batch. Add the images or remove these identities.",
                    "test": "Queries without a match are not in the means. Add the images or remove these identities.",
                }[part],
                serious=False,
            )


def _people(rows: pa.Table) -> set[int]:
    return {pid for pid in rows["pid"].to_pylist() if pid >= 0}


def _pid_splits(manifest: pa.Table) -> Iterator[tuple[int, str]]:
    yield from zip(manifest["pid"].to_pylist(), manifest["split"].to_pylist(), strict=True)


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
