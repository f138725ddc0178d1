"""Boxes of people as detectors and trackers write them."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from tvilfm.data.boxes import cropped, read_boxes


def coco(**changes: Any) -> bytes:
    content = {
        "images": [{"id": 7, "file_name": "cam1/000012.jpg"}],
        "categories": [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}],
        "annotations": [
            {"image_id": 7, "category_id": 1, "bbox": [10.4, 20, 30, 60]},
            {"image_id": 7, "category_id": 3, "bbox": [0, 0, 9, 9]},
            {"image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4], "track_id": 5},
            {"image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4], "iscrowd": 1},
            {"image_id": 8, "category_id": 1, "bbox": [1, 2, 3, 4]},
        ],
    }
    return json.dumps(content | changes).encode()


def test_coco_gives_people_and_names_annotations_without_an_image() -> None:
    read = read_boxes(coco(), "det.json")
    assert [(box.frame, box.edges, box.track) for box in read.boxes] == [
        ("cam1/000012.jpg", (10, 20, 40, 80), None),
        ("cam1/000012.jpg", (1, 2, 4, 6), 5),
    ]
    (fault,) = read.faults
    assert fault.startswith("det.json annotation 5: ") and "image_id 8, which images does not have" in fault


def test_motchallenge_counts_pixels_from_one_and_leaves_out_what_is_nobody() -> None:
    text = (
        b"1,3,11,21,30,60,1,1,0.8\n1,4,1,1,5,5,0,1,1\n2,-1,1,1,5,5,0.3\n2,9,1,1,5,5,1,3,1\n2,8,5,5,0,9,1,1,1\n2,x,1\n"
    )
    read = read_boxes(text, "gt.txt")
    assert [(box.frame, box.edges, box.track) for box in read.boxes] == [
        ("1", (10, 20, 40, 80), 3),
        ("2", (0, 0, 5, 5), None),
    ]
    assert read.first == 1 and [fault.partition(":")[0] for fault in read.faults] == ["gt.txt line 5", "gt.txt line 6"]
    assert "expected a box with an area, got 0 x 9 pixels" in read.faults[0]


def test_detections_of_motchallenge_have_ten_columns_and_no_class() -> None:
    read = read_boxes(b"1,-1,11,21,30,60,0.9,-1,-1,-1\n", "det.txt")
    assert [box.edges for box in read.boxes] == [(10, 20, 40, 80)]


def test_csv_brings_people_cameras_and_times_as_they_are_written() -> None:
    text = (
        "frame,x,y,width,height,person,camera,time\n"
        "a.jpg,0,1,2,3,0001,gate-2,2026-05-01T12:00:00Z\n"
        "a.jpg,0,nan,2,3,,,\n a.jpg ,4,4,2,3,,,2026-05-01 12:00\n,0,0,1,1,,,\n"
    )
    read = read_boxes(b"\xef\xbb\xbf" + text.encode(), "boxes.csv")
    noon = datetime(2026, 5, 1, 12, tzinfo=UTC)
    assert [(box.frame, box.edges, box.person, box.camera, box.time) for box in read.boxes] == [
        ("a.jpg", (0, 1, 2, 4), "0001", "gate-2", noon),
        ("a.jpg", (4, 4, 6, 7), None, None, noon),
    ]
    assert [fault.partition(":")[0] for fault in read.faults] == ["boxes.csv line 3", "boxes.csv line 5"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "expected a COCO file with images and annotations"),
        (b"{", "expected JSON in boxes"),
        (b"frame,left,top\n1,2,3\n", "columns frame, x, y, width, height and optionally person, camera, time"),
        (b"", "got an empty file"),
        (b"1,1,1,1,0,0\n", "expected boxes of people in boxes, got none. First fault: boxes line 1"),
        (coco(annotations=[]), "expected boxes of people in boxes, got none."),
    ],
)
def test_a_file_without_boxes_says_what_is_expected(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match="--boxes: ") as caught:
        read_boxes(content, "boxes")
    assert message in str(caught.value)


def test_a_box_is_cut_at_the_edge_of_its_frame_and_refused_outside() -> None:
    frame = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    np.testing.assert_array_equal(cropped(frame, (-3, 2, 2, 9), "a"), frame[2:, :2])
    for edges in ((5, 0, 9, 2), (0, -4, 2, 0)):
        with pytest.raises(ValueError, match="expected a box in a frame of 5 x 4 pixels"):
            cropped(frame, edges, "a")
