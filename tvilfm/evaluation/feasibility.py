"""Whether a run can train and evaluate on a dataset, checked from its manifest before anything is spent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pyarrow as pa

from tvilfm.config import Config, DataSection
from tvilfm.data.manifest import column, select
from tvilfm.data.splits import TEST_SPLITS
from tvilfm.datasets import read_dataset
from tvilfm.datasets.check import check_dataset, read_loosely
from tvilfm.datasets.check_captions import text_faults
from tvilfm.datasets.findings import Fault, Findings, require_none
from tvilfm.evaluation.protocols import Protocol, chance_level, get_protocol, matches, select_gallery, select_query
from tvilfm.terms import MODALITIES, Split


def check_config(config: Config, *, images: bool = True, trained: DataSection | None = None) -> Findings:
    """Check the dataset of a run completely: its files, its captions, and whether the run can use it.

    Args:
        config: the run.
        images: also decode every image, which is slow.
        trained: as in `check_dataset`.
    """
    findings = check_dataset(config.data, config.data_root, images=images, trained=trained)
    if not findings.counts:  # the dataset cannot be read
        return findings
    manifest = read_loosely(config.data, config.data_root)
    faults = feasibility_faults(config, manifest, training=trained is None)
    return replace(findings, faults=(*findings.faults, *faults))


def require_feasible(config: Config, manifest: pa.Table | None = None, captions: pa.Table | None = None) -> None:
    """Refuse a dataset that the run could not train or evaluate, before anything is spent. No image is opened.

    Args:
        config: the run.
        manifest: rows of the dataset; None = read them. A benchmark that is not rendered yet is not checked.
        captions: captions from files; None = not checked.

    Raises:
        ValueError: it could not; the message has one line per reason.
    """
    if manifest is None:
        if config.data.name == "synthetic" and not config.data_root.exists():
            return
        manifest = read_dataset(config.data.name, config.data_root, **config.data.reader_options)
    faults = list(feasibility_faults(config, manifest))
    if captions is not None:
        faults += text_faults(dict(zip(captions["image"].to_pylist(), captions["caption"].to_pylist(), strict=True)))
    require_none(faults)


def feasibility_faults(config: Config, manifest: pa.Table, *, training: bool = True) -> Iterator[Fault]:
    """Yield the reasons why a run of this config cannot train or evaluate on the dataset.

    Args:
        config: sections `data`, `train`, `evaluate` and `model.trained` (which needs no training).
        manifest: rows of the dataset.
        training: whether the run may train.
    """
    if training and config.model.trained is None:
        yield from _training_faults(config, manifest)
    if not select(manifest, split=TEST_SPLITS).num_rows:
        yield Fault(
            what="no test identities",
            where=(f"{len(_people(manifest))} identities in all",),
            fix="Assign some identities to the split test, or add people: at least two are tested.",
        )
        return
    for name in config.evaluate.protocols:
        yield from _protocol_faults(manifest, get_protocol(name), "test")


def _training_faults(config: Config, manifest: pa.Table) -> Iterator[Fault]:
    for stage, section in (("base", config.train.base), ("text", config.train.text)):
        rows = select(manifest, split=("train", "val") if section.use_val else "train")
        shown = [_people(select(rows, modality=modality)) for modality in MODALITIES]
        trained = len(shown[0] & shown[1])
        if trained < config.train.p:
            yield Fault(
                what=f"{trained} training identities with visible and infrared images, fewer than train.p = "
                f"{config.train.p}",
                where=(f"train.{stage}",),
                fix=f"Lower train.p to {trained} or less, or add people." if trained else "Add people to train.",
            )
            break  # the second stage would say the same
    if "val" in (config.train.base.select, config.train.text.select):
        if not select(manifest, split="val").num_rows:
            yield Fault(
                what="no validation identities, which train.*.select=val needs",
                where=("val",),
                fix="Assign some identities to the split val, or set train.base.select=last train.text.select=last.",
            )
        else:
            yield from _protocol_faults(manifest, get_protocol(config.evaluate.protocols[0]), "val")


def _protocol_faults(manifest: pa.Table, protocol: Protocol, split: Split) -> Iterator[Fault]:
    try:
        query = select_query(manifest, protocol, split=split)
        gallery = select_gallery(manifest, protocol, trial=0, split=split)
    except ValueError as error:
        yield Fault(
            what=str(error),
            where=(protocol.name,),
            fix=f"Add {protocol.query_modality} and {protocol.gallery_modality} images of {split} identities.",
        )
        return
    found = [count for count, _ in matches(query, gallery, protocol)]
    if not any(found):
        yield Fault(what=_why_no_match(query, gallery, protocol, split), where=(protocol.name,), fix=_fix(protocol))
    elif split == "test" and chance_level(query, gallery, protocol) == 1:
        yield Fault(
            what="a gallery in which every image is a match, so every order is right",
            where=(protocol.name,),
            fix="Assign at least two identities with visible and infrared images to the split test.",
        )
    elif split == "test" and not all(found):
        yield Fault(
            what=f"{found.count(0)} of {len(found)} queries of {protocol.name} have no match in the gallery",
            where=tuple(image for image, count in zip(query["image"].to_pylist(), found, strict=True) if not count),
            fix="They are not in the means. Add images of these people from other cameras.",
            serious=False,
        )


def _why_no_match(query: pa.Table, gallery: pa.Table, protocol: Protocol, split: Split) -> str:
    told = f"no {split} query of {protocol.name} has a match in the gallery"
    common = _people(query) & _people(gallery)
    if not common:
        return f"{told}: no identity has {protocol.query_modality} and {protocol.gallery_modality} images"
    cameras = sorted(set(column(query, "camid").tolist()) & set(column(gallery, "camid").tolist()))
    return (
        f"{told}: the protocol ignores gallery images of the query's own camera, and both modalities have the same "
        f"cameras ({', '.join(map(str, cameras[:5]))})"
    )


def _fix(protocol: Protocol) -> str:
    return (
        f"Give {protocol.query_modality} and {protocol.gallery_modality} cameras different numbers (camid), and test "
        "people that both modalities show."
    )


def _people(rows: pa.Table) -> set[int]:
    return {pid for pid in column(rows, "pid").tolist() if pid >= 0}
