"""Protocols on a small hand-made manifest; draws against the released loop with the global generator."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.io import loadmat, savemat

from tests.oracles import gallery_draw_loop
from tvilfm.config import WitnessDraw
from tvilfm.data.captions import IDENTITY_MAP
from tvilfm.data.manifest import fingerprint
from tvilfm.datasets.sysu_mm01 import read as read_sysu
from tvilfm.evaluation.metrics import ranking_metrics
from tvilfm.evaluation.protocols import chance_level, get_protocol, select_gallery, select_query, witness_captions

NAMES = (
    "sysu_mm01/all/single",
    "sysu_mm01/all/multi",
    "sysu_mm01/indoor/single",
    "sysu_mm01/indoor/multi",
    "regdb/infrared-visible",
    "regdb/visible-infrared",
    "llcm/infrared-visible",
    "llcm/visible-infrared",
)


def table(rows: list[tuple[str, int, int, str, str]], seed: int = 0) -> pa.Table:
    random.Random(seed).shuffle(rows)
    names = ("image", "pid", "camid", "modality", "split")
    return pa.table({name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)})


def sysu() -> pa.Table:
    """Identities 6, 10 and 104, uneven; identity 10 was not seen by camera 2; 7 is for validation."""
    count = random.Random(1)
    rows = []
    for pid in (6, 7, 10, 104):
        for camid in range(1, 7):
            if (pid, camid) == (10, 2):
                continue
            modality = "infrared" if camid in (3, 6) else "visible"
            split = "val" if pid == 7 else "query" if modality == "infrared" else "gallery"
            for n in range(count.randint(1, 14)):
                rows.append((f"cam{camid}/{pid:04d}/{n + 1:04d}.jpg", pid, camid, modality, split))
    return table([*rows, ("cam1/0001/0001.jpg", 1, 1, "visible", "train")])


def llcm() -> pa.Table:
    count = random.Random(2)
    rows = []
    for pid in (3, 20, 111):
        for camid in range(1, 10):
            for modality, folder in (("visible", "test_vis"), ("infrared", "test_nir")):
                if (modality == "infrared" and camid == 3) or (pid + camid) % 4 == 0:
                    continue
                for n in range(count.randint(1, 6)):
                    image = f"{folder}/cam{camid}/{pid:04d}/{pid:04d}_c0{camid}_{n}.jpg"
                    rows.append((image, pid, camid, modality, "test"))
    return table(rows)


def regdb() -> pa.Table:
    rows = [
        (f"{folder}/{pid}/{n}.bmp", pid, camid, modality, "test")
        for pid in (9, 4, 77)
        for n in (3, 1, 2)
        for folder, camid, modality in (("Visible", 1, "visible"), ("Thermal", 2, "infrared"))
    ]
    return table(rows)


def folders(manifest: pa.Table, modality: str, split: str) -> dict[tuple[int, int], list[str]]:
    found: dict[tuple[int, int], list[str]] = defaultdict(list)
    for row in manifest.to_pylist():
        if row["modality"] == modality and row["split"] == split:
            found[row["pid"], row["camid"]].append(row["image"])
    return found


@pytest.mark.parametrize("name", NAMES)
def test_protocols_are_known_by_name(name: str) -> None:
    protocol = get_protocol(name)
    assert protocol.name == name
    assert protocol.dataset == name.split("/")[0]
    assert protocol.num_trials == (1 if protocol.dataset == "regdb" else 10)
    assert protocol.query_modality != protocol.gallery_modality


def test_an_unknown_protocol_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="protocol: expected one of sysu_mm01") as error:
        get_protocol("sysu")
    assert all(name in str(error.value) for name in NAMES)


@pytest.mark.parametrize("trial", range(10))
@pytest.mark.parametrize(("mode", "cameras"), [("all", (1, 2, 4, 5)), ("indoor", (1, 2))])
def test_sysu_single_shot_repeats_the_released_draw(trial: int, mode: str, cameras: tuple[int, ...]) -> None:
    drawn = select_gallery(sysu(), get_protocol(f"sysu_mm01/{mode}/single"), trial=trial)
    assert drawn["image"].to_pylist() == gallery_draw_loop(folders(sysu(), "visible", "gallery"), cameras, trial)


@pytest.mark.parametrize("trial", range(10))
@pytest.mark.parametrize(("name", "modality"), [("infrared-visible", "visible"), ("visible-infrared", "infrared")])
def test_llcm_repeats_the_released_draw(trial: int, name: str, modality: str) -> None:
    drawn = select_gallery(llcm(), get_protocol(f"llcm/{name}"), trial=trial)
    cameras = tuple(range(1, 10)) if modality == "visible" else (1, 2, 4, 5, 6, 7, 8, 9)
    assert drawn["image"].to_pylist() == gallery_draw_loop(folders(llcm(), modality, "test"), cameras, trial)


def test_multi_shot_draws_ten_or_all_without_repetition() -> None:
    protocol = get_protocol("sysu_mm01/all/multi")
    drawn = select_gallery(sysu(), protocol, trial=4)
    assert drawn.equals(select_gallery(sysu(), protocol, trial=4))
    assert not drawn.equals(select_gallery(sysu(), protocol, trial=5))
    groups = folders(drawn, "visible", "gallery")
    available = folders(sysu(), "visible", "gallery")
    assert list(groups) == sorted(available)
    for key, images in groups.items():
        assert len(set(images)) == len(images) == min(10, len(available[key]))


def test_draws_leave_the_global_generator_alone() -> None:
    random.seed(5)
    expected = random.random()
    random.seed(5)
    select_gallery(sysu(), get_protocol("sysu_mm01/all/single"), trial=0)
    assert random.random() == expected


def test_sysu_queries_are_all_infrared_test_images_by_identity_and_camera() -> None:
    query = select_query(sysu(), get_protocol("sysu_mm01/indoor/single"))
    keys = list(zip(query["pid"].to_pylist(), query["camid"].to_pylist(), query["image"].to_pylist(), strict=True))
    assert keys == sorted(keys)
    assert set(query["camid"].to_pylist()) == {3, 6} and set(query["pid"].to_pylist()) == {6, 10, 104}
    assert query.num_rows == sum(map(len, folders(sysu(), "infrared", "query").values()))


def test_validation_identities_follow_the_same_protocol() -> None:
    protocol = get_protocol("sysu_mm01/all/single")
    query = select_query(sysu(), protocol, split="val")
    gallery = select_gallery(sysu(), protocol, trial=3, split="val")
    assert set(query["pid"].to_pylist()) == {7} and set(query["modality"].to_pylist()) == {"infrared"}
    expected = gallery_draw_loop(folders(sysu(), "visible", "val"), (1, 2, 4, 5), 3)
    assert gallery["image"].to_pylist() == expected


@pytest.mark.parametrize("direction", ["infrared-visible", "visible-infrared"])
def test_regdb_keeps_every_image_in_manifest_order(direction: str) -> None:
    manifest, protocol = regdb(), get_protocol(f"regdb/{direction}")
    for side, modality in (
        (select_query(manifest, protocol), protocol.query_modality),
        (select_gallery(manifest, protocol, trial=0), protocol.gallery_modality),
    ):
        listed = [row["image"] for row in manifest.to_pylist() if row["modality"] == modality]
        assert side["image"].to_pylist() == listed


def test_wrong_trials_and_empty_selections_are_named() -> None:
    protocol = get_protocol("regdb/infrared-visible")
    with pytest.raises(ValueError, match="trial: expected 0 to 0"):
        select_gallery(regdb(), protocol, trial=1)
    with pytest.raises(ValueError, match="manifest: expected val images for the query"):
        select_query(regdb(), protocol, split="val")
    with pytest.raises(ValueError, match="manifest: expected val images for the gallery"):
        select_gallery(regdb(), protocol, trial=0, split="val")


def captions_of(manifest: pa.Table) -> pa.Table:
    """Two images of one camera share a caption; training captions must never be drawn."""
    rows = manifest.to_pylist()
    return pa.table(
        {
            "image": [row["image"] for row in rows],
            "caption": [f"{row['split']} {row['modality']} {row['pid']} {row['camid']}" for row in rows],
            "rephrased": ["other words" for _ in rows],
            "captioner": ["test" for _ in rows],
            "revision": ["0" for _ in rows],
        }
    )


def test_official_galleries_are_those_of_the_authors_kit(tmp_path: Path) -> None:
    count = random.Random(0)
    rng = np.random.default_rng(0)
    (tmp_path / "exp").mkdir()
    for split, pids in (("train", "3"), ("val", "2,9"), ("test", "4,12")):
        (tmp_path / "exp" / f"{split}_id.txt").write_text(pids)
    cells = np.empty((6, 1), dtype=object)  # as MATLAB saves cells of cells
    for camid in range(1, 7):
        people = np.empty((1, 12), dtype=object)
        for pid in range(1, 13):
            shown = count.randint(1, 14) if pid in (2, 3, 4, 9, 12) and (camid, pid) != (2, 4) else 0
            people[0, pid - 1] = np.array([rng.permutation(shown) + 1 for _ in range(10)])
            for number in range(1, shown + 1):
                path = tmp_path / f"cam{camid}" / f"{pid:04d}" / f"{number:04d}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
        cells[camid - 1, 0] = people
    savemat(tmp_path / "exp" / "rand_perm_cam.mat", {"rand_perm_cam": cells})

    manifest = read_sysu(tmp_path)
    perm = loadmat(tmp_path / "exp" / "rand_perm_cam.mat")["rand_perm_cam"]
    for mode, cameras in (("all", (1, 2, 4, 5)), ("indoor", (1, 2))):
        for shot, shots in (("single", 1), ("multi", 10)):
            protocol = get_protocol(f"sysu_mm01/official/{mode}/{shot}")
            for trial in (0, 9):
                expected = [
                    f"cam{camid}/{pid:04d}/{number:04d}"
                    for camid in cameras
                    for pid in (4, 12)
                    if (camid, pid) != (2, 4)
                    for number in perm[camid - 1][0].squeeze()[pid - 1][trial][:shots]
                ]
                gallery = select_gallery(pq_round_trip(manifest, tmp_path), protocol, trial=trial)
                assert [image.rpartition(".")[0] for image in gallery["image"].to_pylist()] == expected
    assert fingerprint(manifest) != fingerprint(manifest.replace_schema_metadata(None))
    with pytest.raises(ValueError, match=r"expected rand_perm_cam\.mat .* use sysu_mm01/all/single"):
        select_gallery(manifest.replace_schema_metadata(None), get_protocol("sysu_mm01/official/all/single"), trial=0)
    savemat(tmp_path / "exp" / "rand_perm_cam.mat", {"other": 1})
    with pytest.raises(ValueError, match="expected the authors' cell array rand_perm_cam"):
        read_sysu(tmp_path)


def pq_round_trip(table: pa.Table, folder: Path) -> pa.Table:
    pq.write_table(table, folder / "table.parquet")
    return pq.read_table(folder / "table.parquet")


def test_the_released_draw_is_numpys_first_seed_over_the_published_lists_in_query_order() -> None:
    manifest, protocol = sysu(), get_protocol("sysu_mm01/indoor/single")
    query, captions = select_query(manifest, protocol), captions_of(manifest)
    lists = {pid: [f"{pid} {word}" for word in ("z", "a", "m", "b", "y")] for pid in set(query["pid"].to_pylist())}
    published = captions.replace_schema_metadata({IDENTITY_MAP: json.dumps(lists)})
    state = np.random.RandomState(1)  # as the released loader, sentence by sentence
    expected = [state.choice(lists[pid]) for pid in query["pid"].to_pylist()]
    for seed in (0, 7):  # the run's seed has no part in it
        drawn = witness_captions(manifest, published, query, protocol, seed=seed, held_out=False, draw="released")
        assert drawn == expected
    alone = witness_captions(manifest, captions, query, protocol, seed=0, held_out=False, draw="released")
    assert [text.split()[2] for text in alone if text] == [str(pid) for pid in query["pid"].to_pylist()]
    released, seeded = (
        witness_captions(manifest, published, query, protocol, seed=0, held_out=True, draw=draw)
        for draw in get_args(WitnessDraw)
    )
    assert released == seeded


def test_witness_draws_a_visible_test_caption_of_the_true_identity() -> None:
    manifest, protocol = sysu(), get_protocol("sysu_mm01/indoor/single")
    query, captions = select_query(manifest, protocol), captions_of(manifest)
    drawn = witness_captions(manifest, captions, query, protocol, seed=3, held_out=False)
    rng = random.Random(3)
    for row, text in zip(query.to_pylist(), drawn, strict=True):
        cameras = [camid for camid in (1, 2, 4, 5) if (row["pid"], camid) != (10, 2)]
        assert text == rng.choice([f"gallery visible {row['pid']} {camid}" for camid in cameras])
    assert drawn == witness_captions(manifest, captions, query, protocol, seed=3, held_out=False)
    assert drawn != witness_captions(manifest, captions, query, protocol, seed=4, held_out=False)


def test_held_out_witness_never_describes_a_gallery_camera() -> None:
    manifest, protocol = sysu(), get_protocol("sysu_mm01/indoor/single")
    query = select_query(manifest, protocol)
    drawn = witness_captions(manifest, captions_of(manifest), query, protocol, seed=0, held_out=True)
    assert {text.split()[-1] for text in drawn if text is not None} == {"4", "5"}
    everywhere = get_protocol("sysu_mm01/all/single")
    assert set(witness_captions(manifest, captions_of(manifest), query, everywhere, seed=0, held_out=True)) == {None}


def test_witness_without_a_caption_is_named() -> None:
    manifest, protocol = regdb(), get_protocol("regdb/infrared-visible")
    captions = captions_of(manifest.slice(0, 0))
    with pytest.raises(ValueError, match="captions: expected a visible test caption of every"):
        witness_captions(manifest, captions, select_query(manifest, protocol), protocol, seed=0, held_out=False)


@pytest.mark.parametrize("name", ["sysu_mm01/all/single", "sysu_mm01/indoor/multi", "llcm/infrared-visible"])
def test_chance_level_is_what_random_rankings_reach(name: str) -> None:
    manifest, protocol = llcm() if name.startswith("llcm") else sysu(), get_protocol(name)
    query, gallery = select_query(manifest, protocol), select_gallery(manifest, protocol, trial=0)
    labels = [np.array(side[column]) for column in ("pid", "camid") for side in (query, gallery)]
    rng = np.random.default_rng(0)
    reached = [
        ranking_metrics(rng.random((query.num_rows, gallery.num_rows)), *labels, protocol=protocol.dataset).rank1
        for _ in range(150)
    ]
    error = 5 * np.std(reached) / np.sqrt(len(reached))
    assert chance_level(query, gallery, protocol) == pytest.approx(np.mean(reached), abs=error)


def test_chance_level_by_hand() -> None:
    protocol = get_protocol("sysu_mm01/all/single")
    query = table([("q1", 1, 3, "infrared", "query"), ("q2", 1, 6, "infrared", "query")])
    gallery = table([(f"g{n}", pid, camid, "visible", "gallery") for n, (pid, camid) in enumerate(
        [(1, 1), (1, 2), (2, 1), (2, 4), (3, 2)]
    )])  # fmt: skip
    assert chance_level(query, gallery, protocol) == pytest.approx((1 / 3 + 2 / 5) / 2)
    stranger = table([("q", 8, 3, "infrared", "query")])
    with pytest.raises(ValueError, match="query: expected at least one identity"):
        chance_level(stranger, gallery, protocol)
