"""Rows of a gallery from boxes of people in full frames: a folder of frames or a video file."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

import pyarrow as pa

from cluster.tables.images import EDGES, FRAME_TIME, list_images, reference
from tvilfm.data.boxes import Box, read_boxes
from tvilfm.data.video import frame_times
from tvilfm.place import Place
from tvilfm.retrieval.rows import TIME
from tvilfm.terms import is_name

_LAST_NUMBER = re.compile(r"([0-9]+)[^0-9]*$")


@dataclass(frozen=True, kw_only=True)
class Shots:
    """How the frames were taken.

    Attributes:
        camid: the camera; None = every box names one.
        fps: frames per second; None = as the video says.
        start: time of the first frame, UTC; None = unknown.
    """

    camid: str | None
    fps: float | None
    start: datetime | None


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """A frame: its file name (empty for a video), its part of an id, its time, and `FRAME_TIME`."""

    name: str
    id: str
    time: datetime | None
    frame_time: int


def boxed_rows(images: str, boxes: str, shots: Shots) -> tuple[pa.Table, list[str]]:
    """Return rows for boxes in frames, sorted by frame, and why other boxes are not usable.

    The id of a row is that of its frame or video with a media fragment: `#xywh=10,20,30,60`, after
    `#frame=12&` for a video. So a box has the same id in every call.

    Args:
        images: folder or URI of frames, or a video file.
        boxes: file as `data.boxes.read_boxes` reads it.
        shots: how the frames were taken.

    Raises:
        ValueError: there are no usable boxes, or a camera or the frame rate is missing.
    """
    read = read_boxes(Place(boxes).read(), boxes)
    faults, place = list(read.faults), Place(images)
    find = _video_frames(place, shots, read.first) if place.is_file() else _folder_frames(place, shots)
    source = _whole(place)
    rows: dict[str, tuple[str, Box, _Frame]] = {}
    for box in read.boxes:
        frame = find(box.frame)
        camera = box.camera or shots.camid
        if frame is None:
            faults.append(f"{box.source}: expected a frame of {place}, got {box.frame}")
            continue
        if camera is None or not is_name(camera):
            raise ValueError(f"--camid: expected the camera of {box.source}, got {camera or 'none'}. Set --camid.")
        left, top, right, bottom = box.edges
        id = f"{frame.id}xywh={left},{top},{right - left},{bottom - top}"
        if id in rows:
            faults.append(f"{box.source}: expected each box once, got the box of {rows[id][1].source} again")
        else:
            rows[id] = camera, box, frame
    if not rows:
        raise ValueError(f"--boxes: expected boxes in frames of {place}, got {len(faults)} faults. First: {faults[0]}.")
    ordered = sorted(rows.items(), key=lambda row: (row[1][2].name, row[1][2].frame_time))
    return _table(ordered, source, in_video=place.is_file()), faults


def _table(rows: list[tuple[str, tuple[str, Box, _Frame]]], source: str, *, in_video: bool) -> pa.Table:
    people = [box.person if box.track is None else f"{source}:{box.track}" for _, (_, box, _) in rows]
    columns = {
        "name": [frame.name for _, (_, _, frame) in rows],
        "id": [id for id, _ in rows],
        "camid": [camera for _, (camera, _, _) in rows],
        "pid": pa.array(people, pa.string()),
        "time": pa.array([box.time or frame.time for _, (_, box, frame) in rows], TIME),
    }
    for place, name in enumerate(EDGES):
        columns[name] = [box.edges[place] for _, (_, box, _) in rows]
    if in_video:
        columns[FRAME_TIME] = [frame.frame_time for _, (_, _, frame) in rows]
    return pa.table(columns)


def _folder_frames(place: Place, shots: Shots) -> Callable[[str], _Frame | None]:
    """Return a function from a name or number to a frame; the last number in a file's name is that of its frame."""
    if shots.start is not None and shots.fps is None:
        raise ValueError("--fps: expected the frames per second beside --start, got none. Set --fps.")
    names = list_images(place.uri, "visible")["image"].to_pylist()
    numbered: dict[int, list[str]] = {}
    for name in names:
        if found := _LAST_NUMBER.search(name.rpartition("/")[2].rpartition(".")[0]):
            numbered.setdefault(int(found[1]), []).append(name)
    number_of = {name: number for number, some in numbered.items() for name in some}
    first, known = min(numbered, default=0), set(names)

    def find(frame: str) -> _Frame | None:
        name = frame.replace("\\", "/").removeprefix("./")
        if name not in known:
            some = numbered.get(int(frame), []) if frame.isdecimal() else []
            if len(some) > 1:
                raise ValueError(
                    f"--images: expected one image of frame {frame}, got {some[0]} and {some[1]}. Give the folder of "
                    "one of them, or boxes that name files."
                )
            if not some:
                return None
            name = some[0]
        time = None
        if shots.start is not None and shots.fps is not None and name in number_of:
            time = shots.start + timedelta(seconds=(number_of[name] - first) / shots.fps)
        return _Frame(name=name, id=f"{reference(place, name)}#", time=time, frame_time=0)

    return find


def _video_frames(video: Place, shots: Shots, first: int) -> Callable[[str], _Frame | None]:
    """Return a function from a number, or a name that ends with one, to a frame of a video."""
    times, unit = frame_times(video)
    whole = _whole(video)

    def find(frame: str) -> _Frame | None:
        found = _LAST_NUMBER.search(frame.rpartition("/")[2].partition(".")[0])
        number = int(found[1]) - first if found else -1
        if not 0 <= number < len(times):
            return None
        seconds = float(times[number] - times[0]) * unit if shots.fps is None else number / shots.fps
        time = None if shots.start is None else shots.start + timedelta(seconds=seconds)
        return _Frame(name="", id=f"{whole}#frame={number}&", time=time, frame_time=int(times[number]))

    return find


def _whole(place: Place) -> str:
    """Return what ids of a folder or a video begin with."""
    return reference(place, "").rstrip("/")
