"""What workers of the captioning job do: read and decode a chunk of images, caption it, and write its part."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray

from cluster.places.depot import Depot, fetched
from cluster.tables.parts import Parts, part_name
from tvilfm.captioning.colors import remove_colors
from tvilfm.config import CaptionerSection
from tvilfm.data.manifest import CAPTION_SCHEMA
from tvilfm.data.pixels import decode
from tvilfm.place import Place
from tvilfm.terms import DepthRange

if TYPE_CHECKING:
    from tvilfm.captioning.captioner import Captioner

MIN_SIDE = 8  # pixels; smaller images show no person
MAX_BYTES = 256 << 20  # maximum file size: a video among the images would fill a worker's memory before it is detected
READERS = 8  # files that a decoding task reads in parallel: an object store has a latency of 30 ms

PART_SCHEMA = pa.schema(
    [
        *CAPTION_SCHEMA,
        pa.field("modality", pa.string()),
        pa.field("prompt_hash", pa.string()),
        pa.field("settings", pa.string()),
        pa.field("time", pa.timestamp("ms", "UTC")),
    ]
)
QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("image", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("time", pa.timestamp("ms", "UTC")),
    ]
)
_PICTURE = pa.struct(
    [
        pa.field("image", pa.string()),
        pa.field("pixels", pa.binary()),
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field("fault", pa.string()),
        pa.field("again", pa.bool_()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class CaptionJob:
    """Everything that a worker needs to caption images of one modality."""

    images: Place
    captions: Parts
    quarantine: Parts
    modality: str
    captioner: CaptionerSection
    device: str
    dtype: Any
    filter_colors: bool
    seed: int
    depth_range: DepthRange = None
    depot: Depot | None = None

    def load(self) -> Captioner:
        # Imported here: decoding workers import this module too and do not need torch and transformers.
        from tvilfm.captioning.captioner import Captioner

        fetched(Path(self.captioner.model), self.depot)
        return Captioner.load(self.captioner, device=self.device, dtype=self.dtype)


@ray.remote(max_calls=1)  # the worker process ends and frees its memory; otherwise it would be reused for decoding
def load_captioners(jobs: Sequence[CaptionJob]) -> list[tuple[tuple[int, int] | None, dict[str, str]]]:
    loaded = []
    for job in jobs:
        try:
            captioner = job.load()
        except ValueError as error:
            raise ValueError(f"caption.{job.modality}.{error}") from None
        loaded.append((captioner.input_size, captioner.provenance))
        del captioner  # free its memory before loading the next one
    return loaded


def decode_chunk(chunk: pa.Table, *, job: CaptionJob, size: tuple[int, int] | None) -> pa.Table:
    """Return the images of a chunk, each decoded or with the reason why it could not be."""
    (names,) = chunk["image"].to_pylist()
    with ThreadPoolExecutor(READERS) as pool:
        contents = list(pool.map(partial(_read, job.images), names))
    pictures = [_picture(name, *content, size, job.depth_range) for name, content in zip(names, contents, strict=True)]
    return pa.table({"start": chunk["start"], "pictures": pa.array([pictures], type=pa.list_(_PICTURE))})


def _read(folder: Place, name: str) -> tuple[bytes, str | None, bool]:
    """Return the bytes of a file, the reason if it cannot be read, and whether a retry may succeed."""
    try:
        with folder.filesystem.open_input_file(f"{folder.path}/{name}") as file:
            if file.size() > MAX_BYTES:
                return b"", f"expected at most {MAX_BYTES >> 20} MiB, got {file.size() >> 20}", False
            return file.read(), None, False
    except FileNotFoundError:
        return b"", "expected a file, got none", False
    except OSError as error:
        return b"", f"expected a readable file, got {type(error).__name__}", True


def _picture(
    name: str, content: bytes, fault: str | None, again: bool, size: tuple[int, int] | None, depth_range: DepthRange
) -> dict[str, object]:
    """Return a `_PICTURE`."""
    if fault is not None:
        return {"image": name, "fault": fault, "again": again}
    height, width = size or (None, None)
    try:
        pixels = decode(content, height=height, width=width, name=name, min_side=MIN_SIDE, depth_range=depth_range)
    except Exception as error:  # a decoder may raise anything on malicious bytes
        return {"image": name, "fault": str(error).removeprefix(f"{name}: "), "again": False}
    return {"image": name, "pixels": pixels.tobytes(), "height": pixels.shape[0], "width": pixels.shape[1]}


class CaptionActor:
    """Actor that loads a captioner once, then captions chunks and writes their parts."""

    def __init__(self, job: CaptionJob) -> None:
        self._job, self._captioner = job, job.load()

    def __call__(self, chunk: pa.Table) -> pa.Table:
        (start,), (pictures,) = chunk["start"].to_pylist(), chunk["pictures"].to_pylist()
        bad = [picture for picture in pictures if picture["fault"] and not picture["again"]]
        good = [picture for picture in pictures if not picture["fault"]]
        # Ray may process a chunk again after a failure, and then other images of it may be readable.
        if good and not self._job.captions.has(part_name(picture["image"] for picture in good)):
            try:
                captioned, refused = self._caption_accepted(good, start)
            except Exception as error:
                error.add_note(f"While captioning {len(good)} {self._job.modality} images from {good[0]['image']}.")
                raise
            bad += refused
            if captioned.num_rows:
                self._job.captions.write(part_name(captioned["image"].to_pylist()), captioned)
        if bad:
            now = _now()
            faults = [{"image": picture["image"], "reason": picture["fault"], "time": now} for picture in bad]
            name = part_name(picture["image"] for picture in bad)
            self._job.quarantine.write(name, pa.Table.from_pylist(faults, schema=QUARANTINE_SCHEMA))
        unread = [picture["fault"] for picture in pictures if picture["again"]]
        return pa.table(
            {"done": [len(pictures) - len(unread)], "unread": pa.array([unread], type=pa.list_(pa.string()))}
        )

    def _caption_accepted(
        self, pictures: Sequence[Mapping[str, Any]], start: int
    ) -> tuple[pa.Table, list[dict[str, Any]]]:
        """Return the captions of the images that the model's processor accepts, and the others with its reasons.

        Every image is tried alone only after the batch failed.
        """
        try:
            return self._caption(pictures, start), []
        except Exception:
            reasons = [self._refusal(picture) for picture in pictures]
            refused = [
                {**picture, "fault": reason}
                for picture, reason in zip(pictures, reasons, strict=True)
                if reason is not None
            ]
            if not refused:
                raise
        accepted = [picture for picture, reason in zip(pictures, reasons, strict=True) if reason is None]
        return self._caption(accepted, start) if accepted else PART_SCHEMA.empty_table(), refused

    def _refusal(self, picture: Mapping[str, Any]) -> str | None:
        """Return why the processor refuses an image, or None. A lack of memory or a lost device says nothing of it."""
        try:
            self._captioner.prompt_inputs([_array(picture)])
        except (RuntimeError, MemoryError):
            return None
        except Exception as error:  # processors raise what they like
            size = f"{picture['width']} x {picture['height']}"
            return f"expected an image that the captioner accepts, got {size} pixels ({error})"
        return None

    def _caption(self, pictures: Sequence[Mapping[str, Any]], start: int) -> pa.Table:
        seed = int(np.random.SeedSequence([self._job.seed, start]).generate_state(1)[0])
        sentences = self._captioner.caption([_array(picture) for picture in pictures], seed=seed)
        if self._job.modality == "infrared" and self._job.filter_colors:
            sentences = [remove_colors(sentence) for sentence in sentences]
        provenance, now = self._captioner.provenance, _now()
        common = {
            "rephrased": None,
            "captioner": provenance["model"],
            "revision": provenance["revision"],
            "modality": self._job.modality,
            "prompt_hash": provenance["prompt_hash"],
            "settings": provenance["settings"],
            "time": now,
        }
        captioned = zip(pictures, sentences, strict=True)
        return pa.Table.from_pylist(
            [{"image": picture["image"], "caption": sentence, **common} for picture, sentence in captioned],
            schema=PART_SCHEMA,
        )


def _array(picture: Mapping[str, Any]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(picture["pixels"], dtype=np.uint8).reshape(picture["height"], picture["width"], 3)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
