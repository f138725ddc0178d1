"""Frames of a video, by number."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.videos import write_video
from tvilfm.data.video import frame_times, read_frames
from tvilfm.place import Place


@pytest.mark.parametrize("numbers", [[0], [37], [2, 11, 39], list(range(40))])
def test_a_frame_is_found_by_its_time_whatever_lies_before_it(tmp_path: Path, numbers: Sequence[int]) -> None:
    video = write_video(tmp_path / "a.mp4", [6 * n for n in range(40)])  # key frames and, between, B-frames
    times, unit = frame_times(Place(str(video)))
    assert len(times) == 40
    np.testing.assert_allclose((times - times[0]) * unit, np.arange(40) / 10, atol=1e-3)
    found = {
        time: int(pixels.mean().round()) for time, pixels in read_frames(Place(str(video)), times[numbers].tolist())
    }
    assert list(found) == times[numbers].tolist()
    np.testing.assert_allclose(list(found.values()), [6 * n for n in numbers], atol=3)


def test_what_is_no_video_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"--images: expected a folder or a video, got .*a\.mp4"):
        frame_times(Place(str(tmp_path / "a.mp4")))
