"""Write rendered people in the layout of a real dataset: SYSU-MM01, RegDB, LLCM or a plain folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from PIL import Image

from tvilfm.data.manifest import CAPTION_SCHEMA, build_manifest
from tvilfm.datasets.caption_writing import write_published
from tvilfm.datasets.synthetic.people import Person, draw_people
from tvilfm.datasets.synthetic.rendering import INFRARED_CAMERAS, VISIBLE_CAMERAS, render
from tvilfm.datasets.synthetic.sentences import observe, write_rephrase, write_sentence

Layout = Literal["sysu_mm01", "regdb", "llcm", "folder"]
TRUTH_FILE = "attributes.json"
FEW_SHOTS = 300  # up to this number, rendering takes less time than starting processes


@dataclass(frozen=True, kw_only=True)
class Size:
    """Number of identities per split, and number of images per identity and camera."""

    train: int
    val: int
    test: int
    images_per_camera: int


SIZES = {
    "tiny": Size(train=24, val=8, test=16, images_per_camera=1),
    "small": Size(train=800, val=80, test=120, images_per_camera=2),
    "large": Size(train=7000, val=700, test=700, images_per_camera=2),
}


@dataclass(frozen=True, kw_only=True)
class _Shot:
    person: Person
    camid: int
    index: int
    seed: int
    path: str


def _shoot(shot: _Shot, root: Path) -> tuple[str, str, str]:
    rendering = render(shot.person, shot.camid, shot.index, seed=shot.seed)
    rng = np.random.default_rng([shot.seed, 4, shot.person.pid, shot.camid, shot.index])
    infrared = shot.camid in INFRARED_CAMERAS
    believed = observe(shot.person, rendering, rng, infrared=infrared)
    target = root / shot.path
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rendering.pixels).save(target, quality=92)
    return shot.path, write_sentence(believed, rng), write_rephrase(believed, rng, infrared=infrared)


def write_layout(root: Path, size: Size, *, seed: int, layout: Layout = "sysu_mm01", archetypes: bool = True) -> None:
    """Write a benchmark in the exact layout of a dataset, so that the reader of this dataset reads it.

    Args:
        root: folder to create; it must not exist.
        size: identities per split and images per camera. RegDB and LLCM have no validation list; their readers hold
            out every tenth of the `train + val` identities.
        seed: seed; the same seed creates the same bytes.
        layout: sysu_mm01, regdb (ten splits), llcm (nine cameras, eight of them also infrared) or folder.
        archetypes: see `draw_people`.

    Raises:
        FileExistsError: `root` exists.
    """
    writers = {
        "sysu_mm01": write_sysu_layout,
        "regdb": _write_regdb_layout,
        "llcm": _write_llcm_layout,
        "folder": _write_folder_layout,
    }
    writers[layout](root, size, seed=seed, archetypes=archetypes)


def write_sysu_layout(root: Path, size: Size, *, seed: int, archetypes: bool = True) -> None:
    """Write a benchmark in the exact layout of SYSU-MM01, with captions in the published format.

    The files are `cam{1..6}/{pid:04d}/{index:04d}.jpg`, `exp/{train,val,test}_id.txt`,
    `Text/Blip_{RGB,IR}/caption_llm_dict_Blip_{RGB,IR}.json`, and `attributes.json` (see `read_truth`). The folder is
    created completely or, after an error, not at all.

    Args:
        root: folder to create; it must not exist.
        size: identities per split and images per camera.
        seed: seed; the same seed creates the same bytes.
        archetypes: see `draw_people`.

    Raises:
        FileExistsError: `root` exists.
    """
    with _whole_or_nothing(root) as partial:
        people, split_of = _people(size, seed, archetypes)
        (partial / "exp").mkdir(parents=True)
        for split in ("train", "val", "test"):
            chosen = [person.pid for person in people if split_of[person.pid] == split]
            (partial / "exp" / f"{split}_id.txt").write_text(",".join(map(str, chosen)) + "\n")
        captions: dict[str, dict[str, dict[str, str]]] = {"RGB": {}, "IR": {}}
        for path, caption, rephrased in _shoot_all(partial, list(_shots(people, size.images_per_camera, seed))):
            sensor = "IR" if int(path[3]) in INFRARED_CAMERAS else "RGB"
            captions[sensor][path] = {"description": caption, "aug_description": rephrased}
        for sensor, entries in captions.items():
            folder = partial / "Text" / f"Blip_{sensor}"
            folder.mkdir(parents=True)
            (folder / f"caption_llm_dict_Blip_{sensor}.json").write_text(json.dumps(entries, indent=1))
        _write_truth(partial, people)


def _write_regdb_layout(root: Path, size: Size, *, seed: int, archetypes: bool = True) -> None:
    """Write `{Visible,Thermal}/{pid}/*.bmp`, `idx/{train,test}_{visible,thermal}_{1..10}.txt`, and Text."""
    with _whole_or_nothing(root) as partial:
        people, _ = _people(size, seed, archetypes)
        shots = []
        for person in people:
            for folder, letter, camid in (("Visible", "v", 1), ("Thermal", "t", 3)):
                for index in range(size.images_per_camera):
                    sex = "male" if person.attributes["sex"] == "man" else "female"
                    side = ("front", "back")[index % 2]
                    number = person.pid * size.images_per_camera + index
                    path = f"{folder}/{person.pid}/{sex}_{side}_{letter}_{number:05d}_{person.pid}.bmp"
                    shots.append(_Shot(person=person, camid=camid, index=index, seed=seed, path=path))
        _write_captions(partial, shots, _shoot_all(partial, shots), key_root="datasets/regdb/")
        (partial / "idx").mkdir()
        pids = np.array([person.pid for person in people])
        for split in range(1, 11):
            order = np.random.default_rng([seed, 6, split]).permutation(pids)
            halves = {"train": order[: size.train + size.val], "test": order[size.train + size.val :]}
            for part, chosen in halves.items():
                label_of = {int(pid): label for label, pid in enumerate(sorted(chosen))}
                for sensor, folder in (("visible", "Visible"), ("thermal", "Thermal")):
                    paths = [s.path for s in shots if s.person.pid in label_of and s.path.startswith(folder)]
                    lines = [f"{path} {label_of[int(path.split('/')[1])]}\n" for path in paths]
                    (partial / "idx" / f"{part}_{sensor}_{split}.txt").write_text("".join(lines))
        _write_truth(partial, people)


def _write_llcm_layout(root: Path, size: Size, *, seed: int, archetypes: bool = True) -> None:
    """Write `{vis,nir}/{pid:04d}/*.jpg`, `test_{vis,nir}/cam{c}/{pid:04d}/*`, `idx/*.txt`, and Text."""
    with _whole_or_nothing(root) as partial:
        people, split_of = _people(size, seed, archetypes)
        pids: dict[str, list[int]] = {"train": [], "test": []}
        for person in people:
            pids["test" if split_of[person.pid] == "test" else "train"].append(person.pid)
        shots = []
        copies: dict[str, str] = {}
        lists: dict[tuple[str, str], list[str]] = {(part, kind): [] for part in pids for kind in ("vis", "nir")}
        for part, chosen in pids.items():
            for label, pid in enumerate(chosen):
                person = people[pid - people[0].pid]
                for kind, cameras in (("vis", range(1, 10)), ("nir", (1, 2, 4, 5, 6, 7, 8, 9))):
                    for camera, number in product(cameras, range(size.images_per_camera)):
                        name = f"{pid:04d}_c{camera:02d}_s{100000 + camera}_f{1000 + number}_{kind}.jpg"
                        path = f"{kind}/{pid:04d}/{name}"
                        # Infrared images use one of the two infrared cameras; every visible camera has its own look.
                        camid = camera + 10 if kind == "vis" else INFRARED_CAMERAS[camera % 2]
                        index = camera * 1000 + number
                        shots.append(_Shot(person=person, camid=camid, index=index, seed=seed, path=path))
                        lists[part, kind].append(f"{path} {label}\n")
                        if part == "test":
                            copies[path] = f"test_{kind}/cam{camera}/{pid:04d}/{name}"
        _write_captions(partial, shots, _shoot_all(partial, shots), key_root="/data0/datasets/LLCM/")
        for source, target in copies.items():
            (partial / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(partial / source, partial / target)
        (partial / "idx").mkdir()
        for (part, kind), lines in lists.items():
            (partial / "idx" / f"{part}_{kind}.txt").write_text("".join(lines))
        (partial / "idx" / "test_id.txt").write_text(",".join(map(str, pids["test"])) + "\n")
        _write_truth(partial, people)


def _write_folder_layout(root: Path, size: Size, *, seed: int, archetypes: bool = True) -> None:
    """Write `{visible,infrared}/{pid}/{camid}/{index:04d}.jpg`, `splits.csv`, and Text."""
    with _whole_or_nothing(root) as partial:
        people, split_of = _people(size, seed, archetypes)
        shots = []
        for shot in _shots(people, size.images_per_camera, seed):
            modality = "infrared" if shot.camid in INFRARED_CAMERAS else "visible"
            path = f"{modality}/{shot.person.pid}/{shot.camid}/{shot.index + 1:04d}.jpg"
            shots.append(replace(shot, path=path))
        _write_captions(partial, shots, _shoot_all(partial, shots), key_root="")
        rows = [f"{person.pid},{split_of[person.pid]}\n" for person in people]
        (partial / "splits.csv").write_text("".join(["pid,split\n", *rows]))
        _write_truth(partial, people)


@contextmanager
def _whole_or_nothing(root: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `root` if the block ends without an error."""
    if root.exists():
        raise FileExistsError(
            f"out: expected a folder that does not exist, got {root}. Choose another folder or remove it."
        )
    partial = root.with_name(root.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    partial.rename(root)


def _people(size: Size, seed: int, archetypes: bool) -> tuple[list[Person], dict[int, str]]:
    """Return the people of the benchmark in the order of pid, and the split of every pid."""
    counts = {"train": size.train, "val": size.val, "test": size.test}
    people = draw_people(sum(counts.values()), seed=seed, archetypes=archetypes)
    order = np.random.default_rng([seed, 5]).permutation(len(people))
    splits = [split for split, count in counts.items() for _ in range(count)]
    return people, {people[i].pid: split for i, split in zip(order, splits, strict=True)}


def _shoot_all(partial: Path, shots: Sequence[_Shot]) -> list[tuple[str, str, str]]:
    """Render all shots into the folder and return (path, caption, rephrase) in the same order."""
    if len(shots) <= FEW_SHOTS:
        return [_shoot(shot, partial) for shot in shots]
    # spawn, because a fork of a process with threads (torch, ray) can hang.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_shoot, shots, [partial] * len(shots), chunksize=64))


def _write_captions(
    partial: Path, shots: Sequence[_Shot], written: Sequence[tuple[str, str, str]], *, key_root: str
) -> None:
    manifest = build_manifest(
        {
            "image": shot.path,
            "pid": shot.person.pid,
            "camid": shot.camid,
            "modality": "infrared" if shot.camid in INFRARED_CAMERAS else "visible",
            "split": "train",
        }
        for shot in shots
    )
    rows = [
        {"image": path, "caption": caption, "rephrased": rephrased, "captioner": "synthetic", "revision": None}
        for path, caption, rephrased in written
    ]
    captions = pa.Table.from_pylist(rows, schema=CAPTION_SCHEMA)
    write_published(partial / "Text", captions, manifest, key_root=key_root)


def _write_truth(partial: Path, people: Sequence[Person]) -> None:
    (partial / TRUTH_FILE).write_text(json.dumps({str(p.pid): p.attributes for p in people}, indent=1))


def read_truth(root: Path) -> dict[int, dict[str, str]]:
    """Return pid -> attribute -> true value of the people of a benchmark.

    Only pre-training, the scores of captioners and `evaluate.text_noise` read it.

    Raises:
        ValueError: the folder has no file of attributes.
    """
    path = root / TRUTH_FILE
    if not path.is_file():
        raise ValueError(f"{path}: expected the true attributes of rendered people, got no file. Render them again.")
    return {int(pid): attributes for pid, attributes in json.loads(path.read_text()).items()}


def _shots(people: Sequence[Person], images_per_camera: int, seed: int) -> Iterator[_Shot]:
    for person in people:
        for camid in sorted((*VISIBLE_CAMERAS, *INFRARED_CAMERAS)):
            # There are two infrared and four visible cameras; twice the shots gives both modalities the same size.
            factor = 2 if camid in INFRARED_CAMERAS else 1
            for index in range(images_per_camera * factor):
                path = f"cam{camid}/{person.pid:04d}/{index + 1:04d}.jpg"
                yield _Shot(person=person, camid=camid, index=index, seed=seed, path=path)
