"""What cannot be trained or evaluated is refused before anything is spent; what can be is not."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvilfm.config import Config, load_config
from tvilfm.data.manifest import build_manifest
from tvilfm.data.tri_modal import TrainingRows
from tvilfm.datasets.findings import Fault
from tvilfm.evaluation.feasibility import feasibility_faults, require_feasible
from tvilfm.evaluation.protocols import get_protocol, ignored_gallery, matches, select_gallery, select_query

PROTOCOL = get_protocol("folder/infrared-visible")


def config(*overrides: str) -> Config:
    return load_config(None, ["data.name=folder", "data.root=/data", "train.p=4", *overrides])


def manifest(splits: dict[str, int], *, infrared_camera: int = 4, images: int = 1) -> pa.Table:
    """People with `images` visible and infrared images each."""
    people = [split for split, count in splits.items() for _ in range(count)]
    return build_manifest(
        {"image": f"{modality}/{pid}/{n}.png", "pid": pid, "camid": camera, "modality": modality, "split": split}
        for pid, split in enumerate(people)
        for modality, camera in (("visible", 1), ("infrared", infrared_camera))
        for n in range(images)
    )


def serious(config: Config, table: pa.Table) -> list[Fault]:
    return [fault for fault in feasibility_faults(config, table) if fault.serious]


def test_a_sound_dataset_has_no_fault() -> None:
    assert not list(feasibility_faults(config(), manifest({"train": 4, "val": 2, "test": 3})))
    require_feasible(config(), manifest({"train": 4, "val": 2, "test": 3}))


@pytest.mark.parametrize(
    ("splits", "camera", "what"),
    [
        ({"train": 4, "val": 2}, 4, "no test identities"),
        ({"train": 4, "test": 3}, 4, "no validation identities"),
        ({"train": 3, "val": 2, "test": 3}, 4, "3 training identities with visible and infrared images, fewer than"),
        ({"val": 2, "test": 3}, 4, "0 training identities"),
        ({"train": 4, "val": 2, "test": 3}, 1, "both modalities have the same cameras (1)"),
        ({"train": 4, "val": 2, "test": 1}, 4, "a gallery in which every image is a match"),
    ],
)
def test_what_cannot_be_trained_or_evaluated_is_refused(splits: dict[str, int], camera: int, what: str) -> None:
    table = manifest(splits, infrared_camera=camera)
    assert any(what in fault.what and fault.fix for fault in serious(config(), table))
    with pytest.raises(ValueError, match="data: expected a dataset that can be trained and evaluated, got:"):
        require_feasible(config(), table)


def test_settings_decide_what_is_needed() -> None:
    last = ("train.base.select=last", "train.text.select=last")
    table = manifest({"train": 4, "test": 3})
    assert serious(config(), table) and not serious(config(*last), table)
    few = manifest({"train": 2, "test": 3})
    assert serious(config(*last), few) and not serious(config(*last, "train.p=2"), few)
    assert not serious(config(f"model.trained={Path('/models/x')}"), few)  # nothing is trained


def test_queries_without_a_match_are_noted() -> None:
    rows = manifest({"train": 4, "val": 2, "test": 3}).to_pylist()
    kept = build_manifest(row for row in rows if (row["pid"], row["modality"]) != (8, "visible"))
    (note,) = feasibility_faults(config(), kept)
    assert not note.serious and note.where == ("infrared/8/0.png",) and note.what.startswith("1 of 3 queries")
    alone = build_manifest(
        row for row in rows if row["split"] != "test" or (row["pid"] % 2 == 0) == (row["modality"] == "visible")
    )
    assert any("no identity has infrared and visible images" in fault.what for fault in serious(config(), alone))


people = st.lists(
    st.tuples(
        st.integers(0, 5),
        st.integers(1, 3),
        st.sampled_from(["visible", "infrared"]),
        st.sampled_from(["train", "val", "test"]),
    ),
    min_size=1,
    max_size=25,
)


@given(people)
def test_random_datasets_are_refused_exactly_if_a_step_would_fail(rows: list[tuple[int, int, str, str]]) -> None:
    split_of = {pid: split for pid, _, _, split in rows}
    table = build_manifest(
        {"image": f"{n}.png", "pid": pid, "camid": camid, "modality": modality, "split": split_of[pid]}
        for n, (pid, camid, modality, _) in enumerate(rows)
    )
    told = serious(config("train.p=2", "train.k=2"), table)

    def trains() -> bool:
        try:
            TrainingRows.from_manifest(table, use_val=False).sampler(2, 2, seed=0)
        except ValueError:
            return False
        return True

    def evaluates(split: str, *, meaningful: bool) -> bool:
        try:
            query = select_query(table, PROTOCOL, split=split)  # type: ignore[arg-type]
            gallery = select_gallery(table, PROTOCOL, trial=0, split=split)  # type: ignore[arg-type]
        except ValueError:
            return False
        chances = []
        for pid, camid in zip(query["pid"].to_pylist(), query["camid"].to_pylist(), strict=True):
            ignored = ignored_gallery(PROTOCOL, pid, camid, gallery)
            kept = [one for one, out in zip(gallery["pid"].to_pylist(), ignored, strict=True) if not out]
            if pid in kept:
                chances.append(kept.count(pid) / len(kept))
        return bool(chances) and not (meaningful and min(chances) == 1)

    assert bool(told) != (trains() and evaluates("test", meaningful=True) and evaluates("val", meaningful=False))


@given(people)
def test_matches_are_counted_as_the_rule_ignores(rows: list[tuple[int, int, str, str]]) -> None:
    table = build_manifest(
        {"image": f"{n}.png", "pid": pid, "camid": camid, "modality": modality, "split": "test"}
        for n, (pid, camid, modality, _) in enumerate(rows)
    )
    for protocol in (PROTOCOL, get_protocol("regdb/infrared-visible")):
        expected = []
        for pid, camid in zip(table["pid"].to_pylist(), table["camid"].to_pylist(), strict=True):
            kept = ~ignored_gallery(protocol, pid, camid, table)
            found = [n for n, one in enumerate(table["pid"].to_pylist()) if kept[n] and one == pid]
            expected.append((len(found), int(kept.sum())))
        assert matches(table, table, protocol) == expected
