"""Rephrase a caption table on Ray Data. The job scales to a million captions and resumes after a kill.

Captions are cut into fixed chunks before they are distributed, so neither the number of actors nor their speed changes
which captions are rephrased together: the rephrases equal those of a plain loop over the same chunks, row for row. An
actor rephrases a chunk and writes its part atomically; a kill loses only the chunks in progress. With vLLM, the engine
of `ray.data.llm` replaces the actors, and the driver writes parts as rephrases arrive.
"""

from __future__ import annotations

import importlib.util
import pickle
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from cluster.progress import ProgressFile, counted
from cluster.session import session
from cluster.tables.job import check_rows, chunk_dataset, claim_folder, fixed_chunks
from cluster.tables.parts import alone
from cluster.tables.rephrase_vllm import rephrase_with_vllm
from cluster.tables.rephrase_worker import PART_SCHEMA, WITH_MODEL, RephraseActor, RephraseJob
from tvilfm.captioning.rephrase import prompt_hash
from tvilfm.config import ClusterSection, Config, RephraseSection
from tvilfm.data.manifest import CAPTION_SCHEMA
from tvilfm.datasets import read_dataset
from tvilfm.datasets.caption_files import read_captions
from tvilfm.place import Place, to_parquet


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Result of a rephrasing job.

    Attributes:
        table: URI or path of the caption table.
        total: number of captions.
        before: number of these that had a rephrase before or that an earlier run finished.
        rephrased: number rephrased by this run.
        kept: last reason -> count of captions that have no valid rephrase, in this and earlier runs.
        seconds: duration of the job.
    """

    table: str
    total: int
    before: int
    rephrased: int
    kept: Mapping[str, int]
    seconds: float

    def lines(self) -> list[str]:
        """Return the summary as lines of text."""
        rate = self.rephrased / self.seconds
        first = f"rephrased {self.rephrased} of {self.total} captions in {self.seconds:.1f} s, {rate:.1f} captions/s"
        kept = sum(self.kept.values())
        return [
            f"{first}; {self.before} were finished before",
            *([f"{kept} captions stay unchanged, because no rephrase was valid"] if kept else []),
            *(f"  {count} x {reason}" for reason, count in self.kept.items()),
            self.table,
        ]


def rephrase(config: Config, *, out: str, captions: str | None = None) -> Summary:
    """Rephrase a caption table with the engine of a run description, and show the progress.

    Args:
        config: the run; `caption.rephrase` sets the engine.
        out: folder or URI to fill.
        captions: path or URI of a Parquet caption table; None = the dataset's captions.

    Raises:
        ValueError: as `read_rows` and `rephrase_table`.
        ConnectionError: as `rephrase_table`.
    """
    table, modalities = read_rows(config, captions)
    with session(config.cluster), counted("rephrase", "captions") as progress:
        return rephrase_table(
            table,
            modalities,
            out,
            config.caption.rephrase,
            config.cluster,
            seed=config.run.seed,
            dtype=config.caption.dtype,
            progress=progress,
        )


def read_rows(config: Config, captions: str | None) -> tuple[pa.Table, list[str]]:
    """Return a caption table and the modality of each row, from the table or from the dataset of the run description.

    Raises:
        ValueError: there is no caption table, or it has no column `modality` and images that the dataset lacks.
    """
    if captions is not None:
        place = Place(captions)
        if not place.is_file():
            raise ValueError(
                f"--captions: expected a Parquet caption table, got {captions}, which is not a file. Check the path."
            )
        table = pq.read_table(place.path, filesystem=place.filesystem)
        if missing := [name for name in ("image", "caption") if name not in table.column_names]:
            raise ValueError(f"--captions: expected a column {missing[0]}, got {table.column_names} in {captions}.")
        if "modality" in table.column_names:
            return table, table["modality"].to_pylist()
    manifest = read_dataset(config.data.name, config.data_root, **config.data.reader_options)
    if captions is None:
        table = read_captions(manifest, config.data_root, config.data.captions)
    modality_of = dict(zip(manifest["image"].to_pylist(), manifest["modality"].to_pylist(), strict=True))
    images = table["image"].to_pylist()
    if unknown := [image for image in images if image not in modality_of]:
        raise ValueError(
            f"--captions: expected images of {config.data_root} or a column modality, got {unknown[0]}. "
            "Set data.name and data.root to the dataset of the captions."
        )
    return table, [modality_of[image] for image in images]


def rephrase_table(
    captions: pa.Table,
    modalities: Sequence[str],
    out: str,
    section: RephraseSection,
    cluster: ClusterSection,
    *,
    seed: int,
    dtype: str = "float32",
    progress: ProgressFile | None = None,
) -> Summary:
    """Rephrase the captions of a table that have no rephrase yet.

    `out/captions.parquet` is the table with a filled column `rephrased` (null where a caption stays unchanged) and the
    columns `rephraser` and `refused`. `out/parts` holds the parts that the next run resumes from.

    Args:
        captions: `image`, `caption` and optionally `rephrased`, whose existing values are kept; other columns are
            copied.
        modalities: modality of each row, visible or infrared.
        out: local path or URI, accessible to all workers. It takes one rephraser; another one needs another folder.
        section: engine, batch size and checks.
        cluster: GPUs per actor with a model.
        seed: seed of sampling.
        dtype: data type of a transformers model on CUDA.
        progress: receives the number of finished captions.

    Returns:
        Counts.

    Raises:
        ValueError: no engine is chosen, or it is not installed; the model cannot be loaded; the rows are invalid;
            another job fills `out`; or `out` holds rephrases of another engine or of other captions.
        ConnectionError: the endpoint cannot be reached or used.
        ray.exceptions.RayError: the workers failed. Finished parts are kept, and the next run resumes from them.
    """
    started = time.monotonic()
    _check(section)
    check_rows(captions["image"], modalities)
    rows = pa.table({"image": captions["image"], "caption": captions["caption"], "modality": pa.array(modalities)})
    job = RephraseJob.of(section, cluster, out=out, seed=seed, dtype=dtype)
    with alone(out):
        _introduce(job)
        job.parts.compact()
        finished = _finished(captions, job)
        done, total = int(finished.sum()), captions.num_rows
        counts = (
            rephrase_with_vllm(job, rows.filter(~finished))
            if section.engine == "vllm"
            else _on_actors(job, rows, ~finished, cluster)
        )
        for count in counts:
            done += count
            if progress:
                progress.update(done, total)
        job.parts.compact()
        return _publish(captions, job, finished, time.monotonic() - started)


def _check(section: RephraseSection) -> None:
    if section.engine == "none":
        raise ValueError(
            "caption.rephrase.engine: expected rules, transformers, openai or vllm, got none. Choose one: "
            "caption.rephrase.engine=rules needs no model."
        )
    if section.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "caption.rephrase.engine: expected vLLM to be installed for engine=vllm, got no such package. "
            "Install the extra on every node, pip install 'tvilfm[vllm]', or use a vLLM server: engine=openai."
        )


def _introduce(job: RephraseJob) -> None:
    """Claim the output folder for the rephraser, or refuse another one."""
    producer = {
        "rephraser": job.rephraser,
        "prompt_hash": prompt_hash(),
        "seed": job.seed,
        **job.section.model_dump(include={"engine", "temperature", "max_new_tokens", "max_words"}),
    }
    claim_folder(
        Place(job.out) / "rephraser.json",
        producer,
        expected="rephrases of one engine",
        advice="Rephrase into another folder.",
    )


def _finished(captions: pa.Table, job: RephraseJob) -> npt.NDArray[np.bool_]:
    """Return for each row whether it has a rephrase or a part says that none was valid.

    Raises:
        ValueError: a part was written for another caption of an image.
    """
    rephrased = pc.is_valid(captions["rephrased"]).to_numpy() if "rephrased" in captions.column_names else False
    parts = job.parts.read()
    if not parts.num_columns:
        return np.broadcast_to(rephrased, captions.num_rows)
    places = pc.index_in(captions["image"], parts["image"].combine_chunks())
    theirs = parts["caption"].take(places)
    other = pc.fill_null(pc.not_equal(theirs, captions["caption"]), False)
    if pc.any(other).as_py():
        image = captions["image"].filter(other)[0].as_py()
        raise ValueError(
            f"{Place(job.out)}: expected rephrases of these captions, got one of another caption for {image}. "
            "Rephrase into another folder."
        )
    finished: npt.NDArray[np.bool_] = pc.is_valid(places).to_numpy() | rephrased
    return finished


def _on_actors(
    job: RephraseJob, rows: pa.Table, missing: npt.NDArray[np.bool_], cluster: ClusterSection
) -> Iterator[int]:
    """Rephrase on a pool of actors and yield the number of captions of each finished chunk."""
    chunks = fixed_chunks(rows, missing, job.section.batch)
    if not chunks.num_rows:
        return
    reports = chunk_dataset(chunks).map_batches(
        RephraseActor,
        fn_constructor_kwargs={"job": job},
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=1,
        num_gpus=cluster.gpus_per_worker or None if job.section.engine in WITH_MODEL else None,
        compute=ray.data.ActorPoolStrategy(size=min(job.section.workers, chunks.num_rows)),
    )
    for report in reports.iter_rows():
        if report["error"] is not None:
            raise pickle.loads(report["error"])
        yield report["done"]


def _publish(captions: pa.Table, job: RephraseJob, before: npt.NDArray[np.bool_], seconds: float) -> Summary:
    """Write the caption table and return the summary."""
    parts = job.parts.read()
    parts = parts if parts.num_columns else PART_SCHEMA.empty_table()
    places = pc.index_in(captions["image"], parts["image"].combine_chunks())
    columns = {name: parts[name].take(places) for name in ("rephrased", "rephraser", "refused")}
    for name in ("rephrased", "rephraser"):
        if name in captions.column_names:
            columns[name] = pc.coalesce(columns[name], captions[name])
    table = captions.drop_columns([name for name in columns if name in captions.column_names])
    for name, values in columns.items():
        table = table.append_column(name, values)
    order = [name for name in CAPTION_SCHEMA.names if name in table.column_names]
    table = table.select([*order, *(name for name in table.column_names if name not in order)])
    target = Place(job.out) / "captions.parquet"
    target.write(to_parquet(table))
    now = pc.is_valid(table["rephrased"]).to_numpy() & ~before
    return Summary(
        table=str(target),
        total=captions.num_rows,
        before=int(before.sum()),
        rephrased=int(now.sum()),
        kept=dict(Counter(table["refused"].drop_null().to_pylist()).most_common()),
        seconds=seconds,
    )
