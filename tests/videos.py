"""Videos that tests write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np

WIDTH, HEIGHT, FPS = 64, 96, 10


def write_video(path: Path, grays: Sequence[int]) -> Path:
    """A video with one gray frame per value, at `FPS`."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = 12, 2
        stream.bit_rate = 4_000_000
        for gray in grays:
            pixels = np.full((HEIGHT, WIDTH, 3), gray, dtype=np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path
