"""A dataset of files as people really have them runs through, and gives the pixels of its tidy original."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.run import run
from tvilfm.config import Config, load_config
from tvilfm.data.manifest import select
from tvilfm.data.people import people_of
from tvilfm.datasets import read_dataset
from tvilfm.datasets.synthetic.layouts import Size, write_layout
from tvilfm.evaluation.feasibility import check_config

ORIENTATION = 0x0112


def _config(folder: Path, root: Path, *overrides: str) -> Config:
    return load_config(
        Path("ray_config.yaml"),
        [
            *(f"run.dir={folder}", "data.name=folder", f"data.root={root}", "caption.source=files"),
            *("cluster.cpus_per_train_worker=1", "model.weights=random", *overrides),
        ],
        size="tiny",
    )


@pytest.fixture(scope="module")
def tidy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset in lossless files."""
    root = tmp_path_factory.mktemp("odd") / "tidy"
    write_layout(root, Size(train=6, val=2, test=4, images_per_camera=1), seed=0, layout="folder")
    for path in root.glob("*/*/*/*.jpg"):
        Image.open(path).save(path, "PNG")
    return root


def make_odd(tidy: Path, root: Path) -> None:
    """Turn visible images, deepen infrared ones, and write a table from Windows with text identities."""
    shutil.copytree(tidy, root)
    manifest = read_dataset("folder", tidy)
    rows = manifest.to_pylist()
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    for row in rows:
        path = root / row["image"]
        image = Image.open(path)
        if row["modality"] == "visible":
            image.convert("RGB").transpose(Image.Transpose.ROTATE_90).save(path, "PNG", exif=exif)
        else:
            gray = np.asarray(image.convert("L")).astype(np.uint16)
            Image.fromarray(7000 + 8 * gray).save(path, "PNG")
        path.with_name(f"._{path.name}").write_bytes(b"x")
    (root / "visible" / "again").symlink_to(".")
    lines = ["image,pid,camid,modality,split"]
    for row in rows:
        written = "D:\\crops\\" + row["image"].replace("/", "\\")
        lines.append(f"{written},p{row['pid']:03d},{row['camid']},{row['modality']},{row['split']}")
    lines.append(lines[1].replace(",p", ",-"))
    lines[-1] = lines[-1].replace("0001.jpg", "junk.jpg")
    shutil.copy(root / rows[0]["image"], (root / rows[0]["image"]).with_name("junk.jpg"))
    (root / "manifest.csv").write_bytes("\r\n".join(lines).encode("utf-16"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_odd_files_give_the_pixels_and_results_of_tidy_ones(ray_session: None, tidy: Path, tmp_path: Path) -> None:
    make_odd(tidy, tmp_path / "odd")
    window = "data.depth_range=[7000,9040]"
    odd_config = _config(tmp_path / "runs", tmp_path / "odd", "run.name=odd", window)
    assert check_config(odd_config).sound
    # In the tidy dataset, gray images are stored as colour, as a camera without temperatures writes them.
    for row in select(read_dataset("folder", tidy), modality="infrared").to_pylist():
        image = Image.open(tidy / row["image"])
        image.convert("L").save(tidy / row["image"], "PNG")
    plain = run(_config(tmp_path / "runs", tidy, "run.name=tidy"))
    odd = run(odd_config)
    pixels = [np.load(outcome.stages["pixels"] / "pixels.npy") for outcome in (plain, odd)]
    tables = [pq.read_table(outcome.stages["pixels"] / "manifest.parquet") for outcome in (plain, odd)]
    assert tables[0]["image"].equals(tables[1]["image"])
    np.testing.assert_array_equal(*pixels)
    names = people_of(tables[1])
    assert [names[pid] for pid in tables[1]["pid"].to_pylist()] == [
        f"p{pid:03d}" for pid in tables[0]["pid"].to_pylist()
    ]
    rows = [json.loads((outcome.path / "results.json").read_text())["rows"] for outcome in (plain, odd)]
    assert rows[0] == rows[1]
    assert load_config(odd.path / "config.yaml").data.depth_range == (7000, 9040)
    assert "person p0" in (odd.path / "report/index.html").read_text()
