"""Caption images on a pool of Ray Data actors. The job scales to a million images and resumes after a kill.

Images are cut into fixed chunks before they are distributed, so neither the number of actors nor their speed changes
which images are captioned together: the captions equal those of a plain loop over the same chunks, row for row. CPU
tasks read and decode a chunk; an actor captions it and writes its part atomically. The output folder is the only state,
so a kill leaves no other state behind.

The modalities are processed one after the other, each on the whole pool. Two pools at once would need a guess how to
split the GPUs, and the pool that finishes first would be idle.
"""

from __future__ import annotations

import datetime
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import ExecutionResources
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.places.depot import Depot, fetched
from cluster.progress import ProgressFile, watch
from cluster.session import plain_errors, session
from cluster.tables.job import check_rows, chunk_dataset, claim_folder, fixed_chunks, with_absolute_model
from cluster.tables.parts import Parts, alone, part_name
from tvilfm.captioning.colors import remove_colors
from tvilfm.config import CaptionerSection, CaptionSection, ClusterSection, Config
from tvilfm.data import image_files
from tvilfm.data.manifest import CAPTION_SCHEMA
from tvilfm.data.pixels import decode
from tvilfm.datasets import read_dataset
from tvilfm.place import Place, to_parquet
from tvilfm.terms import MODALITIES, DepthRange

if TYPE_CHECKING:
    from tvilfm.captioning.captioner import Captioner

MIN_SIDE = 8  # pixels; smaller images show no person
MAX_BYTES = 256 << 20  # maximum file size: a video among the images would fill a worker's memory before it is detected
READERS = 8  # files that a decoding task reads in parallel: an object store has a latency of 30 ms
# Do not use the placement group of a surrounding Tune trial: it reserves resources only for the trial's driver.
ANYWHERE = PlacementGroupSchedulingStrategy(placement_group=None)  # type: ignore[arg-type]  # as its documentation says
STORE_BYTES = 1 << 30  # maximum of decoded images queued per actor: seconds of work for the fastest GPU
# One CPU has room for an actor and a decoder. Otherwise, after a loss of nodes, actors could take all CPUs of the other
# nodes, no decoder could run, and the job would hang.
ACTOR_CPUS, DECODER_CPUS = 0.9, 0.1

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
class Summary:
    """Result of a captioning job.

    Attributes:
        table: URI or path of the caption table.
        total: number of requested images.
        before: number of these that earlier runs captioned.
        captioned: number captioned by this run.
        bad: number in quarantine, from this or an earlier run.
        unread: number that could not be read; the next run retries them.
        reasons: reason -> count of bad and unread images, most frequent first.
        seconds: duration of the job.
    """

    table: str
    total: int
    before: int
    captioned: int
    bad: int
    unread: int
    reasons: Mapping[str, int]
    seconds: float

    @property
    def images_per_s(self) -> float:
        """Return the speed of this run, including the start of the workers."""
        return self.captioned / self.seconds

    def lines(self) -> list[str]:
        """Return the summary as lines of text."""
        first = f"captioned {self.captioned} of {self.total} images in {self.seconds:.1f} s"
        first += f", {self.images_per_s:.1f} images/s; {self.before} were captioned before"
        faults = [f"{self.bad} in quarantine, {self.unread} not readable"] if self.bad or self.unread else []
        return [first, *faults, *(f"  {count} x {reason}" for reason, count in self.reasons.items()), self.table]

    def check(self, max_bad_share: float) -> None:
        """Check that not too many images lack a caption.

        Raises:
            ValueError: the share of images in quarantine or not readable is above `max_bad_share`.
        """
        missing = self.bad + self.unread
        if missing > max_bad_share * self.total:
            raise ValueError(
                f"caption.max_bad_share: expected at most {max_bad_share:g} of the images without caption, got "
                f"{missing} of {self.total}. Check the quarantine table, fix the images, run with --retry-bad."
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


def caption(
    config: Config, *, out: str, images: str | None = None, modality: str | None = None, retry_bad: bool = False
) -> Summary:
    """Caption a folder of images or the dataset of the run description, and show the progress.

    Args:
        config: the run.
        out: see `caption_images`.
        images: folder or URI of the image files; None = `data.root`, with the modalities of the dataset.
        modality: modality of `images`, visible or infrared.
        retry_bad: see `caption_images`.

    Raises:
        ValueError: only one of `images` and `modality` is given, or see `caption_images`.
    """
    if (images is None) != (modality is None):
        raise ValueError(
            f"--modality: expected visible or infrared with --images, none without it, got {modality} with {images}."
        )
    if images is None or modality is None:
        rows = read_dataset(config.data.name, config.data_root, **config.data.reader_options)
        images = str(config.data_root)
    else:
        rows = list_images(images, modality)
    with session(config.cluster), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "progress.json"
        with watch(path, "caption", "images"):
            return caption_images(
                rows,
                images,
                out,
                config.caption,
                config.cluster,
                seed=config.run.seed,
                depth_range=config.data.depth_range,
                retry_bad=retry_bad,
                progress=ProgressFile(path),
            )


def caption_images(
    rows: pa.Table,
    root: str,
    out: str,
    section: CaptionSection,
    cluster: ClusterSection,
    *,
    seed: int,
    depth_range: DepthRange = None,
    retry_bad: bool = False,
    progress: ProgressFile | None = None,
    depot: Depot | None = None,
) -> Summary:
    """Caption the images of a list that a caption table lacks.

    `out/captions.parquet` is the table (columns of `CAPTION_SCHEMA`, then modality, prompt_hash, settings, time),
    `out/quarantine.parquet` lists invalid images, and `out/parts` holds the parts that the next run resumes from.

    Args:
        rows: `image` (path below the root) and `modality`, each image once.
        root: folder of the images: a local path or a URI that pyarrow opens, accessible to all workers.
        out: folder to fill, a path or URI as above. It takes one captioner per modality; another captioner needs
            another folder.
        section: captioners, batch size and numbers of workers.
        cluster: GPUs per actor.
        seed: seed of sampling.
        depth_range: `data.depth_range`, the scaling of images above 8 bits.
        retry_bad: also retry images that an earlier run put in quarantine.
        progress: receives the number of finished images.
        depot: copies from which workers fetch a captioner that is missing on their machine.

    Returns:
        Counts; `Summary.check` checks the share of bad images.

    Raises:
        ValueError: the rows, a URI or a captioner are invalid; another job fills `out`; `out` holds captions of another
            captioner; or the workers do not share `out`.
        ray.exceptions.RayError: the workers failed. Finished parts are kept, and the next run resumes from them.
    """
    check_rows(rows["image"], pc.unique(rows["modality"]).to_pylist())
    with alone(out):
        return _caption(rows, root, out, section, cluster, seed, depth_range, retry_bad, progress, depot)


def _caption(
    rows: pa.Table,
    root: str,
    out: str,
    section: CaptionSection,
    cluster: ClusterSection,
    seed: int,
    depth_range: DepthRange,
    retry_bad: bool,
    progress: ProgressFile | None,
    depot: Depot | None,
) -> Summary:
    started = time.monotonic()
    captions, quarantine = Parts(out, "parts", "captions"), Parts(out, "parts", "quarantine")
    for parts in (captions, quarantine):
        parts.compact()
    captioned = _among(rows, captions.keys())
    missing = ~captioned if retry_bad else ~(captioned | _among(rows, quarantine.keys()))
    jobs, work = [], []
    for modality in MODALITIES:
        of_modality = pc.equal(rows["modality"], modality).to_numpy()
        chunks = fixed_chunks(rows.select(["image"]).filter(of_modality), missing[of_modality], section.batch)
        if chunks.num_rows:
            work.append(chunks)
            jobs.append(
                CaptionJob(
                    images=Place(root),
                    captions=captions,
                    quarantine=quarantine,
                    modality=modality,
                    captioner=with_absolute_model(getattr(section, modality)),
                    device="cuda" if cluster.gpus_per_worker else "cpu",
                    dtype=section.dtype,
                    filter_colors=section.filter_colors,
                    seed=seed,
                    depth_range=depth_range,
                    depot=depot,
                )
            )
    done, unread = int(len(rows) - missing.sum()), Counter[str]()
    if jobs:
        resources = {"num_cpus": ACTOR_CPUS, "num_gpus": cluster.gpus_per_worker or None}
        for job, chunks, size in zip(jobs, work, _introduce(jobs, out, resources), strict=True):
            for report in _reports(job, chunks, size, section, resources):
                done += report["done"]
                unread.update(report["unread"])
                if progress:
                    progress.update(done, len(rows))
    for parts in (captions, quarantine):
        parts.compact()
    return _publish(rows, out, captions, quarantine, captioned, unread, time.monotonic() - started)


def _introduce(jobs: Sequence[CaptionJob], out: str, resources: Mapping[str, Any]) -> list[tuple[int, int] | None]:
    """Claim the output folder for the captioners, and return the input size of each.

    A worker loads the models for this, because the driver's machine may have neither a GPU nor the models.
    """
    with plain_errors():
        introduced = ray.get(_load_captioners.options(scheduling_strategy=ANYWHERE, **resources).remote(jobs))
    for job, (_, provenance) in zip(jobs, introduced, strict=True):
        claim_folder(
            Place(out) / f"captioner-{job.modality}.json",
            {**provenance, "filter_colors": job.filter_colors, "seed": job.seed},
            expected=f"{job.modality} captions of one captioner",
            advice="Caption into another folder.",
        )
    return [size for size, _ in introduced]


@ray.remote(max_calls=1)  # the worker process ends and frees its memory; otherwise it would be reused for decoding
def _load_captioners(jobs: Sequence[CaptionJob]) -> list[tuple[tuple[int, int] | None, dict[str, str]]]:
    loaded = []
    for job in jobs:
        try:
            captioner = job.load()
        except ValueError as error:
            raise ValueError(f"caption.{job.modality}.{error}") from None
        loaded.append((captioner.input_size, captioner.provenance))
        del captioner  # free its memory before loading the next one
    return loaded


def _reports(
    job: CaptionJob,
    chunks: pa.Table,
    size: tuple[int, int] | None,
    section: CaptionSection,
    resources: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:
    """Caption chunks and yield the actors' report of each."""
    workers = min(section.workers, chunks.num_rows)
    dataset = chunk_dataset(chunks)
    dataset.context.execution_options.resource_limits = ExecutionResources.for_limits(
        object_store_memory=STORE_BYTES * workers
    )
    decoded = dataset.map_batches(
        partial(decode_chunk, job=job, size=size),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.TaskPoolStrategy(size=section.decoders * workers),
        num_cpus=DECODER_CPUS,
    )
    reports = decoded.map_batches(
        CaptionActor,
        fn_constructor_kwargs={"job": job},
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=workers),
        **resources,
    )
    yield from reports.iter_rows()


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


def list_images(uri: str, modality: str) -> pa.Table:
    """Return all image files below a folder as rows for `caption_images`, sorted by name, each real file once.

    Raises:
        ValueError: the folder has no image files, or the name of one is not UTF-8.
    """
    place = Place(uri)
    names = image_files.list_images(place)
    if not names:
        suffixes = ", ".join(image_files.SUFFIXES)
        raise ValueError(f"--images: expected {suffixes} files below {place}, got none. Check the path.")
    image_files.require_text_names(place, names)
    return pa.table({"image": names, "modality": pa.repeat(pa.scalar(modality), len(names))})


def _among(rows: pa.Table, images: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    """Return for each row whether its image is in `images`."""
    contained: npt.NDArray[np.bool_] = pc.is_in(rows["image"], images.combine_chunks()).to_numpy()
    return contained


def _publish(
    rows: pa.Table,
    out: str,
    captions: Parts,
    quarantine: Parts,
    before: npt.NDArray[np.bool_],
    unread: Counter[str],
    seconds: float,
) -> Summary:
    """Write the caption table and the quarantine table, and return the summary."""
    folder = Place(out)
    captions.publish(folder / "captions.parquet", PART_SCHEMA)
    captioned, bad_rows = captions.keys(), quarantine.read()
    bad_rows = bad_rows if bad_rows.num_columns else QUARANTINE_SCHEMA.empty_table()
    bad_rows = bad_rows.filter(~_among(bad_rows, captioned))  # remove images that were fixed since an earlier run
    (folder / "quarantine.parquet").write(to_parquet(bad_rows))
    finished, bad = _among(rows, captioned), _among(rows, bad_rows["image"])
    lost = int((~finished & ~bad).sum()) - unread.total()
    if lost > 0:
        raise ValueError(
            f"{folder}: expected a folder that all workers share, got {lost} images fewer than were captioned. "
            "Use a folder that all machines mount, or a URI."
        )
    counts = pc.value_counts(bad_rows["reason"].filter(_among(bad_rows, rows["image"]))).to_pylist()
    reasons = Counter({count["values"]: count["counts"] for count in counts}) + unread
    return Summary(
        table=str(folder / "captions.parquet"),
        total=rows.num_rows,
        before=int(before.sum()),
        captioned=int((finished & ~before).sum()),
        bad=int(bad.sum()),
        unread=int((~finished & ~bad).sum()),
        reasons=dict(reasons.most_common()),
        seconds=seconds,
    )


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
