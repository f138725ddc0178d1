"""Check the captions of a dataset: every image has one, every caption has an image, and the text tower can read it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa

from tvilfm.config import DataSection
from tvilfm.data.manifest import select
from tvilfm.data.tokens import CONTEXT, count_tokens, tokenize
from tvilfm.datasets.caption_files import PUBLISHED, SENSORS, Collected, collect, identity_captions
from tvilfm.datasets.caption_tables import is_table, match_table
from tvilfm.datasets.findings import Count, Fault
from tvilfm.terms import is_blank

PLACEHOLDERS = ("nan", "none", "null", "n/a")  # what programs write for a missing text
FOREIGN = 0.1  # share of letters beyond Latin above which a caption is not English


def check_captions(section: DataSection, root: Path, manifest: pa.Table) -> tuple[list[Count], list[Fault]]:
    """Return the counts and faults of the captions at `data.captions`: a caption table or published files."""
    text_dir = section.captions or root / "Text"
    try:
        if is_table(text_dir):
            return _check_table(text_dir, root, manifest)
        collected = collect(text_dir, manifest)
    except ValueError as error:
        return [], [Fault(what=str(error), where=(str(text_dir),), fix="Fix the caption files and check again.")]
    counts = []
    for modality in SENSORS:
        images = select(manifest, modality=modality)["image"].to_pylist()
        entries = [collected.found[image] for image in images if image in collected.found]
        counts.append(Count(what=f"{modality} captions", found=len(entries), expected=len(images)))
        rephrased = sum(entry.rephrased is not None for entry in entries)
        counts.append(Count(what=f"{modality} rephrases", found=rephrased))
    texts = {image: entry.caption for image, entry in collected.found.items()}
    return counts, [*_caption_faults(collected, manifest), *text_faults(texts)]


def _check_table(path: Path, root: Path, manifest: pa.Table) -> tuple[list[Count], list[Fault]]:
    _, matched = match_table(path, manifest)
    unknown = [key for key in matched.unknown if not (root / key).is_file()]  # images of nobody are left out
    faults = []
    missing = tuple(image for image in manifest["image"].to_pylist() if image not in matched.found)
    if missing:
        faults.append(_missing(missing))
    if unknown:
        faults.append(_unknown(path, unknown))
    texts = {image: row["caption"] for image, row in matched.found.items()}
    counts = [Count(what="captions", found=len(matched.found), expected=manifest.num_rows)]
    return counts, [*faults, *text_faults(texts)]


def text_faults(texts: Mapping[str, str]) -> Iterator[Fault]:
    """Yield what is wrong with sentences, given by image: missing words, length, language."""
    blank = tuple(image for image, text in texts.items() if is_blank(text) or text.strip().lower() in PLACEHOLDERS)
    if blank:
        yield Fault(
            what=f"{len(blank)} captions without words (empty, blank, nan or null)",
            where=blank,
            fix="Caption these images again.",
        )
    foreign = tuple(image for image, text in texts.items() if _is_foreign(text))
    if foreign:
        yield Fault(
            what=f"{len(foreign)} captions in a script other than Latin",
            where=foreign,
            fix="Translate them: CLIP's text tower reads English.",
            serious=False,
        )
    yield from _length_faults(texts)


def _length_faults(texts: Mapping[str, str]) -> Iterator[Fault]:
    unique = sorted(set(texts.values()))
    lengths = dict(zip(unique, count_tokens(unique), strict=True))
    long = [text for text in unique if lengths[text] > CONTEXT]
    if not long:
        return
    # Sentences that differ only beyond the end are one and the same sentence to the text tower.
    kept = len({tuple(row.tolist()) for row in tokenize(long, pad_to_context=True)})
    where = tuple(image for image, text in texts.items() if lengths[text] > CONTEXT)
    merged = f"; {len(long)} different sentences become {kept}" if kept < len(long) else ""
    yield Fault(
        what=f"{len(where)} captions longer than the text tower's {CONTEXT} tokens, whose end is not read{merged}",
        where=where,
        fix="Put what distinguishes the person first, or shorten the sentences.",
        serious=kept < len(long),
    )


def _is_foreign(text: str) -> bool:
    letters = [char for char in text if char.isalpha()]
    return sum(ord(char) > 0x24F for char in letters) > FOREIGN * len(letters)


def _missing(images: tuple[str, ...]) -> Fault:
    return Fault(what="images without a caption", where=images, fix="Caption them or restore the caption files.")


def _unknown(path: Path, keys: list[str]) -> Fault:
    return Fault(
        what=f"captions without an image, in {path.name}",
        where=tuple(keys),
        fix="Restore the images or remove these entries. If all are listed, check data.name and data.root.",
    )


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
        yield _missing(missing)
    for path, keys in collected.unknown.items():
        yield _unknown(path, keys)
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
