"""What the program knows of a dataset, in one record; each dataset's file ends with its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pyarrow as pa

PUBLISHED_LABEL = "published, single run, test-selected"
AS_REPORTED = "other methods, as reported"


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """A published result, for comparison.

    Args:
        setting: description of the published protocol.
        method: the published method or ablation.
        query: our query modality to compare with.
        rank1, mAP, mINP: fractions; None = not reported.
        rank1_std: standard deviation of rank-1 over training seeds; None = single run.
        note: origin of the numbers.
    """

    setting: str
    method: str
    query: str
    rank1: float
    mAP: float | None = None
    mINP: float | None = None
    rank1_std: float | None = None
    note: str = PUBLISHED_LABEL


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A dataset.

    Its protocols are in `tvilfm/config/data.py`, because a run description names them, and the rule by which a query
    ignores gallery images is in `tvilfm/evaluation/protocols.py`.

    Attributes:
        label: name for people.
        read: function from the dataset's folder to its manifest; the parameters after the folder are its options.
        caption_folders: top folders of images as they occur in the keys of caption files.
        counts: published numbers of identities, images and cameras.
        unsure: names of those counts that sources disagree on.
        published: published results.
    """

    label: str
    read: Callable[..., pa.Table]
    caption_folders: frozenset[str]
    counts: Mapping[str, int] = field(default_factory=dict)
    unsure: frozenset[str] = frozenset()
    published: tuple[PublishedRow, ...] = ()


def published(
    setting: str,
    method: str,
    query: str,
    rank1: float,
    mAP: float | None,
    mINP: float | None,
    note: str = PUBLISHED_LABEL,
    rank1_std: float | None = None,
) -> PublishedRow:
    """Build a `PublishedRow` from the percentages printed in the paper."""
    return PublishedRow(
        setting=setting,
        method=method,
        query=query,
        rank1=rank1 / 100,
        mAP=None if mAP is None else mAP / 100,
        mINP=None if mINP is None else mINP / 100,
        rank1_std=None if rank1_std is None else rank1_std / 100,
        note=note,
    )
