"""Caption images on a pool of Ray Data actors. The job scales to a million images and resumes after a kill.

Images are cut into batches at fixed places before they are distributed, so neither the number of actors nor their speed
changes which images are captioned together: the captions equal those of a plain loop over the same batches, row for
row. The driver hands out chunks of about 1,000 names. An actor has its batches read and decoded by CPU tasks, captions
them and writes one part per chunk atomically. The output folder is the only state, so a kill leaves no other state
behind, and the next run compares names only.

The modalities are processed one after the other, each on the whole pool. Two pools at once would need a guess how to
split the GPUs, and the pool that finishes first would be idle.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray

from cluster.places.depot import Depot
from cluster.progress import ProgressFile, counted
from cluster.session import plain_errors, session
from cluster.tables.caption_worker import (
    ACTOR_CPUS,
    ANYWHERE,
    PART_SCHEMA,
    QUARANTINE_SCHEMA,
    CaptionActor,
    CaptionJob,
    load_captioners,
)
from cluster.tables.images import list_images
from cluster.tables.job import check_rows, chunk_dataset, claim_folder, fixed_chunks, with_absolute_model
from cluster.tables.parts import Parts, alone
from tvilfm.config import CaptionSection, ClusterSection, Config
from tvilfm.datasets import read_dataset
from tvilfm.place import Place, to_parquet
from tvilfm.terms import MODALITIES, DepthRange

CHUNK_IMAGES = 1000  # images per part: 10 million are 10,000 parts, and a lost actor costs seconds of work
CHUNKS_PER_WORKER = 16  # a smaller job is cut into more chunks, so that all actors end together


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
    with session(config.cluster), counted("caption", "images") as progress:
        return caption_images(
            rows,
            images,
            out,
            config.caption,
            config.cluster,
            seed=config.run.seed,
            depth_range=config.data.depth_range,
            retry_bad=retry_bad,
            progress=progress,
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
        started = time.monotonic()
        captions, quarantine = Parts(out, "parts", "captions"), Parts(out, "parts", "quarantine")
        captioned = _among(rows, captions.keys())
        missing = ~captioned if retry_bad else ~(captioned | _among(rows, quarantine.keys()))
        job = partial(
            CaptionJob,
            images=Place(root),
            captions=captions,
            quarantine=quarantine,
            device="cuda" if cluster.gpus_per_worker else "cpu",
            dtype=section.dtype,
            filter_colors=section.filter_colors,
            seed=seed,
            depth_range=depth_range,
            depot=depot,
        )
        work = _work(rows, missing, section, job)
        done, unread = int(len(rows) - missing.sum()), Counter[str]()
        for report in _reports(work, out, section, cluster):
            done += report["done"]
            unread.update(report["unread"])
            if progress:
                progress.update(done, len(rows))
        return _publish(rows, out, captions, quarantine, captioned, unread, time.monotonic() - started)


def _work(
    rows: pa.Table, missing: npt.NDArray[np.bool_], section: CaptionSection, job: Callable[..., CaptionJob]
) -> list[tuple[CaptionJob, pa.Table]]:
    """Return the job of each modality that has missing images, and their chunks."""
    work = []
    for modality in MODALITIES:
        of_modality = pc.equal(rows["modality"], modality).to_numpy()
        images, wanted = rows.select(["image"]).filter(of_modality), missing[of_modality]
        placed = images.append_column("place", pa.array(np.arange(len(images))))
        chunks = fixed_chunks(placed, wanted, _chunk_images(int(wanted.sum()), section))
        if chunks.num_rows:
            captioner = with_absolute_model(getattr(section, modality))
            work.append((job(modality=modality, captioner=captioner), chunks))
    return work


def _chunk_images(missing: int, section: CaptionSection) -> int:
    """Return the images per chunk, a multiple of the batch."""
    wanted = min(CHUNK_IMAGES, missing // (section.workers * CHUNKS_PER_WORKER))
    return max(1, wanted // section.batch) * section.batch


def _reports(
    work: Sequence[tuple[CaptionJob, pa.Table]], out: str, section: CaptionSection, cluster: ClusterSection
) -> Iterator[dict[str, Any]]:
    """Caption the chunks of each job, and yield the actors' report of each chunk."""
    if work:
        resources = {"num_cpus": ACTOR_CPUS, "num_gpus": cluster.gpus_per_worker or None}
        sizes = _introduce([job for job, _ in work], out, resources)
        for (job, chunks), size in zip(work, sizes, strict=True):
            yield from _captioned(job, chunks, size, section, resources)


def _introduce(jobs: Sequence[CaptionJob], out: str, resources: Mapping[str, Any]) -> list[tuple[int, int] | None]:
    """Claim the output folder for the captioners, and return the input size of each.

    A worker loads the models for this, because the driver's machine may have neither a GPU nor the models.
    """
    with plain_errors():
        introduced = ray.get(load_captioners.options(scheduling_strategy=ANYWHERE, **resources).remote(jobs))
    for job, (_, provenance) in zip(jobs, introduced, strict=True):
        claim_folder(
            Place(out) / f"captioner-{job.modality}.json",
            {**provenance, "filter_colors": job.filter_colors, "seed": job.seed},
            expected=f"{job.modality} captions of one captioner",
            advice="Caption into another folder.",
        )
    return [size for size, _ in introduced]


def _captioned(
    job: CaptionJob,
    chunks: pa.Table,
    size: tuple[int, int] | None,
    section: CaptionSection,
    resources: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:
    """Caption chunks and yield the actors' report of each."""
    workers = min(section.workers, chunks.num_rows)
    reports = chunk_dataset(chunks, max_per_task=1).map_batches(
        CaptionActor,
        fn_constructor_kwargs={"job": job, "batch": section.batch, "decoders": section.decoders, "size": size},
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
        **resources,
    )
    yield from reports.iter_rows()


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
