"""Frames of a video file, by number, in any order of reading: PyAV finds them by their presentation times."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from tvilfm.data.images import Pixels
from tvilfm.place import Place

REORDERED = 16  # most frames that a codec holds back


def frame_times(video: Place) -> tuple[npt.NDArray[np.int64], float]:
    """Return the presentation time of each frame, in order, without decoding, and the seconds per unit of time.

    Raises:
        ValueError: the file is not a video, or PyAV is missing.
    """
    with _stream(video) as (container, stream):
        times = [packet.pts for packet in container.demux(stream) if packet.pts is not None and not packet.is_discard]
        if not times:
            raise ValueError(f"--images: expected a video, got {video}, which has no frames.")
        return np.array(sorted(times), dtype=np.int64), float(stream.time_base)


def read_frames(video: Place, times: Collection[int]) -> Iterator[tuple[int, Pixels]]:
    """Yield (presentation time, RGB pixels (H, W, 3)) of the frames at some of `frame_times`, in order.

    Frames that cannot be decoded are left out.
    """
    wanted = set(times)
    for seek in (True, False):  # a file whose index is wrong leads to a later frame; then all frames are read
        if not wanted:
            return
        with _stream(video) as (container, stream):
            if seek:
                # Files are entered by the order of decoding, in which a frame is up to `REORDERED` frames elsewhere.
                margin = int(REORDERED / float(stream.average_rate or REORDERED) / stream.time_base)
                container.seek(max(min(wanted) - margin, stream.start_time or 0), stream=stream, backward=True)
            for frame in _decoded(container, stream):
                if frame.pts in wanted:
                    wanted.remove(frame.pts)
                    yield frame.pts, frame.to_ndarray(format="rgb24")
                if not wanted or (frame.pts is not None and frame.pts > max(wanted)):
                    break


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    """Yield frames; a damaged packet loses its own frames only."""
    import av

    for packet in container.demux(stream):
        try:
            yield from packet.decode()
        except av.error.InvalidDataError:
            continue


@contextmanager
def _stream(video: Place) -> Iterator[tuple[Any, Any]]:
    try:
        import av
    except ImportError:
        raise ValueError(
            f"--images: expected PyAV to read {video}, got no such package. Run pip install 'tvilfm[video]' on all "
            "machines."
        ) from None
    with video.filesystem.open_input_file(video.path) as file:
        try:
            container = av.open(file)
        except av.error.FFmpegError as error:
            raise ValueError(f"--images: expected a folder or a video, got {video} ({error.strerror}).") from None
        with container:
            if not container.streams.video:
                raise ValueError(f"--images: expected a video, got {video}, which has no pictures.")
            yield container, container.streams.video[0]
