"""Boxes of people in full frames, as detectors and trackers write them: COCO JSON, MOTChallenge text, CSV.

Pixels count from 0 at the left and the top. A box may reach beyond its frame; the part inside is used.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

from tvilfm.data.images import Pixels
from tvilfm.data.text_files import decode_text

COLUMNS = ("frame", "x", "y", "width", "height", "person", "camera", "time")  # of a CSV file; five are required
MOT_PEOPLE = (1, 2, 7)  # classes of MOTChallenge: pedestrian, person on a vehicle, static person
COCO_PEOPLE = ("person", "pedestrian", "people")


@dataclass(frozen=True, kw_only=True)
class Box:
    """A person in a frame.

    Attributes:
        frame: name of the frame's file below the folder, or its number.
        edges: left, top, right and bottom edge in pixels; right and bottom are outside.
        person: identity as people write it; None = unknown.
        track: number of the tracker, valid in one video; None = none.
        camera: None = the camera of all frames.
        time: aware; None = the time of the frame.
        source: file and line, for messages.
    """

    frame: str
    edges: tuple[int, int, int, int]
    person: str | None = None
    track: int | None = None
    camera: str | None = None
    time: datetime | None = None
    source: str


@dataclass(frozen=True, kw_only=True)
class Boxes:
    """What a file of boxes says.

    Attributes:
        boxes: the usable boxes, in the order of the file.
        faults: why others are not usable, one line per box.
        first: number of the first frame of a video: 1 in MOTChallenge text, else 0.
    """

    boxes: list[Box]
    faults: list[str]
    first: int


def read_boxes(content: bytes, name: str) -> Boxes:
    """Read boxes of people; other classes, crowds and boxes that a ground truth says to ignore are left out.

    Args:
        content: a JSON object with `images` and `annotations` (COCO), comma-separated text without a header
            (MOTChallenge: frame, track, x, y, width, height, and optionally confidence and class), or CSV with the
            header `COLUMNS`.
        name: path of the file, for messages.

    Raises:
        ValueError: the file has none of these formats, or no usable box.
    """
    text = decode_text(content, name)
    if text.lstrip()[:1] in ("{", "["):
        reader, first = _coco, 0
    elif re.match(r"\s*-?[0-9]", text):
        reader, first = _mot, 1
    else:
        reader, first = _csv, 0
    boxes: list[Box] = []
    faults: list[str] = []
    for source, make in reader(text, name):
        try:
            box = make(source)
        except (ValueError, TypeError, KeyError, OverflowError, AttributeError) as error:
            faults.append(f"{source}: expected a frame and numbers for a box, got an error: {error}")
            continue
        if box is None:
            continue
        left, top, right, bottom = box.edges
        if left >= right or top >= bottom:
            faults.append(f"{source}: expected a box with an area, got {right - left} x {bottom - top} pixels")
        else:
            boxes.append(box)
    if not boxes:
        first_fault = f" First fault: {faults[0]}." if faults else ""
        raise ValueError(f"--boxes: expected boxes of people in {name}, got none.{first_fault}")
    return Boxes(boxes=boxes, faults=faults, first=first)


def cropped(pixels: Pixels, edges: tuple[int, int, int, int], name: str) -> Pixels:
    """Return the part of a frame (H, W, 3) that a box covers.

    Raises:
        ValueError: the box is outside.
    """
    (tall, wide), (left, top, right, bottom) = pixels.shape[:2], edges
    part = pixels[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
    if not part.size:
        raise ValueError(
            f"{name}: expected a box in a frame of {wide} x {tall} pixels, got x {left} to {right}, y {top} to {bottom}"
        )
    return part


_Makers = Iterable[tuple[str, Callable[[str], Box | None]]]


def _coco(text: str, name: str) -> _Makers:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--boxes: expected JSON in {name}, got an error: {error}.") from None
    if not isinstance(content, dict) or not all(
        isinstance(content.get(key), list) for key in ("images", "annotations")
    ):
        raise ValueError(
            f"--boxes: expected a COCO file with images and annotations in {name}, got something else. Detections "
            "without images name no frames; write them as CSV with a column frame."
        )
    names = {image["id"]: str(image["file_name"]) for image in content["images"]}
    people = {one["id"] for one in content.get("categories") or () if str(one.get("name", "")).lower() in COCO_PEOPLE}

    def make(one: Mapping[str, Any], source: str) -> Box | None:
        if one.get("iscrowd") or (people and one.get("category_id") not in people):
            return None
        if one["image_id"] not in names:
            raise ValueError(f"image_id {one['image_id']}, which images does not have")
        x, y, width, height = one["bbox"]
        track = one.get("track_id")
        return Box(
            frame=names[one["image_id"]],
            edges=_edges(x, y, width, height),
            track=None if track is None else int(track),
            source=source,
        )

    for number, one in enumerate(content["annotations"], start=1):
        yield f"{name} annotation {number}", partial(make, one)


def _mot(text: str, name: str) -> _Makers:
    def make(fields: list[str], source: str) -> Box | None:
        if len(fields) < 6:
            raise ValueError(f"{len(fields)} fields instead of 6 or more")
        frame, track, x, y, width, height, *more = (float(field) for field in fields)
        kind = int(more[1]) if len(more) == 3 else -1  # a ground truth: whether to use it, class, visible share
        if len(more) == 3 and (more[0] == 0 or kind not in MOT_PEOPLE):
            return None
        return Box(
            frame=str(int(frame)),
            edges=_edges(x - 1, y - 1, width, height),  # pixels count from 1
            track=int(track) if track >= 0 else None,
            source=source,
        )

    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            fields = line.split(",")
            yield f"{name} line {number}", partial(make, fields)


def _csv(text: str, name: str) -> _Makers:
    rows = csv.DictReader(text.splitlines())
    header = [column.strip() for column in rows.fieldnames or ()]
    rows.fieldnames = header
    if set(header) - set(COLUMNS) or set(COLUMNS[:5]) - set(header):
        raise ValueError(
            f"--boxes: expected COCO JSON, MOTChallenge text, or CSV with the columns frame, x, y, width, height and "
            f"optionally person, camera, time in {name}, got {', '.join(header)[:200] or 'an empty file'}."
        )

    def make(row: Mapping[str, str | None], source: str) -> Box:
        fields = {column: (value or "").strip() for column, value in row.items() if column is not None}
        if not fields["frame"]:
            raise ValueError("no frame")
        time = datetime.fromisoformat(fields["time"]) if fields.get("time") else None
        return Box(
            frame=fields["frame"],
            edges=_edges(*(float(fields[column]) for column in COLUMNS[1:5])),
            person=fields.get("person") or None,
            camera=fields.get("camera") or None,
            time=time if time is None or time.tzinfo else time.replace(tzinfo=UTC),
            source=source,
        )

    for row in rows:
        yield f"{name} line {rows.line_num}", partial(make, row)


def _edges(x: float, y: float, width: float, height: float) -> tuple[int, int, int, int]:
    if not all(math.isfinite(value) and abs(value) < 1e6 for value in (x, y, width, height)):
        raise ValueError(f"the box {x}, {y}, {width}, {height}")
    return round(x), round(y), round(x + width), round(y + height)
