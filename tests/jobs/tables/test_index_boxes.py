"""`tvilfm index --boxes`: people are cut out of the frames of a folder or a video."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from cluster.tables.indexing import Indexed, index
from tests.untrained_run import UntrainedRun
from tests.videos import write_video
from tvilfm.config import resolve

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)


def filled(run: UntrainedRun, url: str, **options: object) -> Indexed:
    config = resolve(
        run.config.model_dump(mode="json"), [f"gallery.url={url}", "gallery.thumbnail_height=40", "evaluate.batch=2"]
    )
    return index(config, **options)  # type: ignore[arg-type]


def shown(result: Indexed) -> dict[str, tuple[object, ...]]:
    """Return id without folder -> person, camera, time, size and mean gray of the thumbnail."""
    found = {}
    for row in pa.concat_tables(result.gallery.tables()).to_pylist():
        reference, thumbnail = result.gallery.picture(row["id"]) or (None, None)
        assert reference == row["id"]
        picture = Image.open(io.BytesIO(thumbnail or b""))
        gray = int(np.asarray(picture).mean().round())
        found[row["id"].rpartition("/")[2]] = (row["pid"], row["camid"], row["time"], picture.size, gray)
    return found


@pytest.mark.slow
def test_people_are_cut_out_of_a_folder_of_frames_and_a_killed_job_goes_on(
    untrained_run: UntrainedRun, ray_session: None, tmp_path: Path, database: str
) -> None:
    frames = tmp_path / "frames"
    frames.mkdir()
    for number in (1, 2, 6):
        pixels = np.zeros((100, 80, 3), dtype=np.uint8)
        pixels[20:60, 10:30] = 40 * number  # the person
        Image.fromarray(pixels).save(frames / f"img_{number:06}.png")
    (frames / "img_000007.png").write_bytes(b"no picture")
    boxes = tmp_path / "gt.txt"
    boxes.write_text(
        "1,4,11,21,20,40,1,1,1\n2,4,11,21,20,40,1,1,1\n6,5,11,21,20,40,1,1,1\n6,5,11,21,20,40,1,1,1\n"
        "2,6,201,1,20,40,1,1,1\n3,4,11,21,20,40,1,1,1\n7,4,11,21,20,40,1,1,1\n2,4,1,1,0,40,1,1,1\n"
    )
    options = {"images": str(frames), "boxes": str(boxes), "camid": "gate-2", "fps": 2.0, "start": NOON}
    result = filled(untrained_run, database, **options)
    place = "#xywh=10,20,20,40"
    expected = {
        f"img_{number:06}.png{place}": (
            f"{frames}:{track}",
            "gate-2",
            NOON + timedelta(seconds=(number - 1) / 2),
            (20, 40),
            40 * number,
        )
        for number, track in ((1, 4), (2, 4), (6, 5))
    }
    assert shown(result) == expected and result.written == 3
    faults = "\n".join(result.faults)
    assert len(result.faults) == 5
    for part in (
        "line 8: expected a box with an area",
        "line 4: expected each box once",
        "line 6: expected a frame of",
    ):
        assert part in faults
    assert "expected a box in a frame of 80 x 100 pixels, got x 200 to 220" in faults
    assert "img_000007.png: expected an image" in faults

    result.gallery.delete([f"{frames}/img_000002.png{place}"])  # as if the job had been killed before this row
    again = filled(untrained_run, database, **options)
    assert (again.written, again.skipped) == (1, 2) and shown(again) == expected


@pytest.mark.slow
def test_people_are_cut_out_of_a_video_with_the_time_of_each_frame(
    untrained_run: UntrainedRun, ray_session: None, tmp_path: Path, database: str
) -> None:
    video = write_video(tmp_path / "gate.mp4", [6 * n for n in range(40)])
    images = [{"id": n, "file_name": f"frame_{n:06}.PNG"} for n in (0, 25, 39, 40)]
    annotations = [{"image_id": one["id"], "bbox": [8, 16, 16, 32]} for one in images]
    annotations.append({"image_id": 25, "bbox": [0, 0, 30, 60]})
    boxes = tmp_path / "boxes.json"
    boxes.write_text(json.dumps({"images": images, "annotations": annotations}))
    result = filled(untrained_run, database, images=str(video), boxes=str(boxes), camid="gate", start=NOON)
    found = shown(result)
    assert {id: facts[:4] for id, facts in found.items()} == {
        "gate.mp4#frame=0&xywh=8,16,16,32": (None, "gate", NOON, (16, 32)),
        "gate.mp4#frame=25&xywh=8,16,16,32": (None, "gate", NOON + timedelta(seconds=2.5), (16, 32)),
        "gate.mp4#frame=25&xywh=0,0,30,60": (None, "gate", NOON + timedelta(seconds=2.5), (20, 40)),
        "gate.mp4#frame=39&xywh=8,16,16,32": (None, "gate", NOON + timedelta(seconds=3.9), (16, 32)),
    }
    np.testing.assert_allclose([int(str(facts[4])) for facts in found.values()], [0, 150, 150, 234], atol=3)
    (fault,) = result.faults
    assert "annotation 4: expected a frame of" in fault and fault.endswith("got frame_000040.PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"boxes": "boxes.csv"}, "--images: expected what --manifest or --boxes describes"),
        ({"images": ".", "camid": "1", "fps": 2.0}, "--boxes: expected boxes beside --fps and --start"),
        ({"images": ".", "boxes": "boxes.csv"}, "--camid: expected the camera of boxes.csv line 2"),
        ({"images": ".", "boxes": "boxes.csv", "camid": "1", "start": NOON}, "--fps: expected the frames per second"),
        ({"images": ".", "boxes": "boxes.csv", "manifest": "boxes.csv"}, "expected either --boxes or --manifest"),
        ({"images": "boxes.csv", "boxes": "boxes.csv", "camid": "1"}, "--images: expected a folder or a video"),
        ({"images": ".", "boxes": "unknown.csv", "camid": "1"}, "--boxes: expected boxes in frames of ., got 1 faults"),
    ],
)
def test_what_boxes_lack_is_said_before_anything_is_read(
    untrained_run: UntrainedRun,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    options: dict[str, object],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("a.png")
    Path("boxes.csv").write_text("frame,x,y,width,height\na.png,0,0,4,4\n")
    Path("unknown.csv").write_text("frame,x,y,width,height\nb.png,0,0,4,4\n")
    with pytest.raises(ValueError, match="--") as caught:
        filled(untrained_run, "unused", **options)
    assert message in str(caught.value)
