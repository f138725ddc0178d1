"""What workers of the captioning job do: read and decode a chunk of images, caption it, and write its part."""

from __future__ import annotations

import datetime
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

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
GRAY_SIZE = (64, 32)  # height and width of the gray image for captioners that take every size
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


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image of a batch.

    Attributes:
        image: its name.
        pixels: uint8 (H, W, 3); None with a fault.
        fault: why it cannot be captioned; None = it can.
        again: whether the next run may succeed.
    """

    image: str
    pixels: npt.NDArray[np.uint8] | None = None
    fault: str | None = None
    again: bool = False


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


# The placement group of a surrounding Tune trial is not used: it reserves resources only for the trial's driver.
ANYWHERE = PlacementGroupSchedulingStrategy(placement_group=None)  # type: ignore[arg-type]  # as its documentation says
# One CPU has room for an actor and a decoder. Otherwise, after a loss of nodes, actors could take all CPUs of the other
# nodes, no decoder could run, and the job would hang.
ACTOR_CPUS, DECODER_CPUS = 0.9, 0.1


def decode_images(names: Sequence[str], job: CaptionJob, size: tuple[int, int] | None) -> list[Picture]:
    """Read images, and decode each or say why that is not possible."""
    with ThreadPoolExecutor(READERS) as pool:
        contents = list(pool.map(partial(_read, job.images), names))
    return [_picture(name, *content, size, job.depth_range) for name, content in zip(names, contents, strict=True)]


@ray.remote(num_cpus=DECODER_CPUS, scheduling_strategy=ANYWHERE)
def decode_batch(names: Sequence[str], job: CaptionJob, size: tuple[int, int] | None) -> list[Picture]:
    return decode_images(names, job, size)


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
) -> Picture:
    if fault is not None:
        return Picture(image=name, fault=fault, again=again)
    height, width = size or (None, None)
    try:
        pixels = decode(content, height=height, width=width, name=name, min_side=MIN_SIDE, depth_range=depth_range)
    except Exception as error:  # a decoder may raise anything on malicious bytes
        return Picture(image=name, fault=str(error).removeprefix(f"{name}: "))
    return Picture(image=name, pixels=pixels)


class CaptionActor:
    """Actor that loads a captioner once, then captions chunks and writes one part per chunk.

    Args:
        job: what it captions.
        batch: images that the captioner gets at once.
        decoders: tasks that read and decode the next batches, on any machine of the cluster.
        size: height and width of the captioner's input; None = images keep their size.
    """

    def __init__(self, job: CaptionJob, *, batch: int, decoders: int, size: tuple[int, int] | None) -> None:
        self._job, self._batch, self._decoders, self._size = job, batch, decoders, size
        self._captioner = job.load()

    def __call__(self, chunk: pa.Table) -> pa.Table:
        (names,), (places,) = chunk["image"].to_pylist(), chunk["place"].to_pylist()
        if self._job.captions.has(part_name(names)):  # Ray may hand out a chunk again after a failure
            return _report(len(names), [])
        tables: list[pa.Table] = []
        faults: list[Picture] = []
        for start, pictures in self._decoded(names, places):
            good = [picture for picture in pictures if picture.fault is None]
            captioned, refused = self._captioned(good, start) if good else ([], [])
            tables += captioned
            faults += [picture for picture in pictures if picture.fault is not None] + refused
        bad, unread = ([picture for picture in faults if picture.again == again] for again in (False, True))
        if bad:
            now = _now()
            rows = [{"image": picture.image, "reason": picture.fault, "time": now} for picture in bad]
            quarantined = pa.Table.from_pylist(rows, schema=QUARANTINE_SCHEMA)
            self._job.quarantine.write(part_name(picture.image for picture in bad), quarantined)
        if tables:
            # Named by all images that need no other attempt: then a whole chunk is known by its name.
            open_images = {picture.image for picture in unread}
            settled = [name for name in names if name not in open_images]
            self._job.captions.write(part_name(settled), pa.concat_tables(tables))
        return _report(len(names) - len(unread), [str(picture.fault) for picture in unread])

    def _decoded(self, names: Sequence[str], places: Sequence[int]) -> Iterator[tuple[int, list[Picture]]]:
        """Yield the batches of a chunk in order, each with its first place; the next ones are decoded meanwhile."""
        batches = _batches(names, places, self._batch)
        waiting = deque((start, group, self._decode(group)) for start, group in islice(batches, self._decoders))
        while waiting:
            start, group, decoded = waiting.popleft()
            pictures = self._survivors(group, decoded)
            waiting.extend((start, group, self._decode(group)) for start, group in islice(batches, 1))
            yield start, pictures

    def _decode(self, names: Sequence[str]) -> ray.ObjectRef[list[Picture]]:
        return decode_batch.remote(names, self._job, self._size)

    def _survivors(self, names: Sequence[str], decoded: ray.ObjectRef[list[Picture]]) -> list[Picture]:
        """Return a decoded batch. If its processes die, it is halved until the image is found that kills them."""
        try:
            return ray.get(decoded)
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
            if len(names) == 1:
                fault = f"expected an image that can be decoded, got {_first(error)}"
                # Another task may have used up the memory.
                again = isinstance(error, ray.exceptions.OutOfMemoryError)
                return [Picture(image=names[0], fault=fault, again=again)]
        halves = (names[: len(names) // 2], names[len(names) // 2 :])
        return [picture for half in halves for picture in self._survivors(half, self._decode(half))]

    def _captioned(self, pictures: Sequence[Picture], start: int) -> tuple[list[pa.Table], list[Picture]]:
        """Return the captions of a batch, and the images that the captioner refuses, with its reasons.

        A batch that fails is halved until the images are found that fail alone. If the captioner then fails with a gray
        image too, the fault is not the image's.
        """
        from torch.cuda import OutOfMemoryError  # imported here as above

        try:
            return [self._caption(pictures, start)], []
        except OutOfMemoryError:  # of a batch that is too large, whatever its images are
            raise
        except Exception as error:  # processors and models raise what they like
            if len(pictures) == 1:
                (picture,) = pictures
                self._check_captioner(error, picture.image)
                return [], [replace(picture, pixels=None, fault=_refusal(picture, error))]
        middle = len(pictures) // 2
        first, first_refused = self._captioned(pictures[:middle], start)
        second, second_refused = self._captioned(pictures[middle:], start + middle)
        return first + second, first_refused + second_refused

    def _check_captioner(self, error: Exception, image: str) -> None:
        """Raise the error of an image if the captioner fails with a gray image too: a device may be lost."""
        gray = np.full((*(self._size or GRAY_SIZE), 3), 128, dtype=np.uint8)
        try:
            self._captioner.caption([gray], seed=0)
        except Exception:
            error.add_note(f"While captioning {self._job.modality} images, from {image} on.")
            raise error from None

    def _caption(self, pictures: Sequence[Picture], start: int) -> pa.Table:
        seed = int(np.random.SeedSequence([self._job.seed, start]).generate_state(1)[0])
        pixels = [picture.pixels for picture in pictures if picture.pixels is not None]
        sentences = self._captioner.caption(pixels, seed=seed)
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
            [{"image": picture.image, "caption": sentence, **common} for picture, sentence in captioned],
            schema=PART_SCHEMA,
        )


def _batches(names: Sequence[str], places: Sequence[int], size: int) -> Iterator[tuple[int, list[str]]]:
    """Cut a chunk into batches by the places of its images among all images; yield the first place of each batch."""
    for number, group in groupby(zip(places, names, strict=True), key=lambda pair: pair[0] // size):
        yield number * size, [name for _, name in group]


def _report(done: int, unread: list[str]) -> pa.Table:
    return pa.table({"done": [done], "unread": pa.array([unread], type=pa.list_(pa.string()))})


def _refusal(picture: Picture, error: Exception) -> str:
    assert picture.pixels is not None
    height, width, _ = picture.pixels.shape
    return f"expected an image that the captioner accepts, got {width} x {height} pixels ({_first(error)})"


def _first(error: Exception) -> str:
    """Return the first line of an error's message, or its class."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
