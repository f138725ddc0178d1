"""Rephrase a caption table on Ray Data. The job scales to a million captions and resumes after a kill.

Captions are cut into fixed chunks before they are distributed, so neither the number of actors nor their speed changes
which captions are rephrased together: the rephrases equal those of a plain loop over the same chunks, row for row. An
actor rephrases a chunk and writes its part atomically; a kill loses only the chunks in progress. With vLLM, the engine
of `ray.data.llm` replaces the actors, and the driver writes parts as rephrases arrive.
"""

from __future__ import annotations

import datetime
import importlib.util
import os
import pickle
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from pydantic import SecretStr

from cluster.progress import ProgressFile, watch
from cluster.session import session
from cluster.tables.job import check_rows, chunk_dataset, claim_folder, fixed_chunks, with_absolute_model
from cluster.tables.parts import Parts, alone, part_name
from tvilfm.captioning.rephrase import Rephrase, completion_prompt, judge, messages, prompt_hash, rephrase_all, seed_of
from tvilfm.config import ClusterSection, Config, RephraseSection
from tvilfm.data.manifest import CAPTION_SCHEMA
from tvilfm.datasets import read_dataset
from tvilfm.datasets.caption_files import read_captions
from tvilfm.place import Place, to_parquet

if TYPE_CHECKING:
    from tvilfm.captioning.rephrase import Rephraser

WITH_MODEL = ("transformers", "vllm")

PART_SCHEMA = pa.schema(
    [
        pa.field("image", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("rephrased", pa.string()),
        pa.field("rephraser", pa.string()),
        pa.field("refused", pa.string()),
        pa.field("tries", pa.int32()),
        pa.field("time", pa.timestamp("ms", "UTC")),
    ]
)


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


@dataclass(frozen=True, kw_only=True)
class _Job:
    """Everything that a worker needs to rephrase captions."""

    section: RephraseSection
    out: str
    seed: int
    device: str
    dtype: str
    key: SecretStr | None

    @classmethod
    def of(cls, section: RephraseSection, cluster: ClusterSection, *, out: str, seed: int, dtype: str) -> _Job:
        return cls(
            section=with_absolute_model(section) if section.engine in WITH_MODEL else section,
            out=out,
            seed=seed,
            device="cuda" if cluster.gpus_per_worker else "cpu",
            dtype=dtype,
            key=_key(section),
        )

    def load(self) -> Rephraser:
        # Imported here: the driver does not need torch and transformers.
        from tvilfm.captioning.engines import EndpointRephraser, RuleParaphraser, TransformersRephraser

        if self.section.engine == "transformers":
            return TransformersRephraser(self.section, device=self.device, dtype=self.dtype)
        if self.section.engine == "openai":
            return EndpointRephraser(self.section, key=self.key)
        return RuleParaphraser()

    @property
    def rephraser(self) -> str:
        return "rules" if self.section.engine == "rules" else self.section.model

    @property
    def parts(self) -> Parts:
        return Parts(self.out, "parts", "rephrases")


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
    with (
        tempfile.TemporaryDirectory() as folder,
        session(config.cluster),
        watch(Path(folder) / "progress.json", "rephrase", "captions"),
    ):
        return rephrase_table(
            table,
            modalities,
            out,
            config.caption.rephrase,
            config.cluster,
            seed=config.run.seed,
            dtype=config.caption.dtype,
            progress=ProgressFile(Path(folder) / "progress.json"),
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
    job = _Job.of(section, cluster, out=out, seed=seed, dtype=dtype)
    with alone(out):
        _introduce(job)
        job.parts.compact()
        finished = _finished(captions, job)
        done, total = int(finished.sum()), captions.num_rows
        counts = (
            _through_vllm(job, rows.filter(~finished))
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


def _key(section: RephraseSection) -> SecretStr | None:
    """Return the API key from the environment of the driver, because workers do not have this environment."""
    value = os.environ.get(section.key_variable)
    return SecretStr(value) if value else None


def _introduce(job: _Job) -> None:
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


def _finished(captions: pa.Table, job: _Job) -> npt.NDArray[np.bool_]:
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


def _on_actors(job: _Job, rows: pa.Table, missing: npt.NDArray[np.bool_], cluster: ClusterSection) -> Iterator[int]:
    """Rephrase on a pool of actors and yield the number of captions of each finished chunk."""
    chunks = fixed_chunks(rows, missing, job.section.batch)
    if not chunks.num_rows:
        return
    reports = chunk_dataset(chunks).map_batches(
        _Actor,
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


class _Actor:
    """Actor that loads a rephraser once, then rephrases chunks and writes their parts."""

    def __init__(self, job: _Job) -> None:
        self._job = job

    @cached_property
    def _rephraser(self) -> Rephraser:
        return self._job.load()

    def __call__(self, chunk: pa.Table) -> pa.Table:
        (columns,) = chunk.to_pylist()
        name, error = part_name(columns["image"]), None
        # Ray may process a chunk again after a failure.
        if not self._job.parts.has(name):
            try:
                self._job.parts.write(name, self._rephrase(columns))
            except (
                ConnectionError,
                ValueError,
            ) as fault:  # users can fix these errors, but Ray Data would lose their messages
                error = pickle.dumps(fault)
        return pa.table({"done": [len(columns["image"])], "error": pa.array([error], type=pa.binary())})

    def _rephrase(self, columns: Mapping[str, Any]) -> pa.Table:
        section = self._job.section
        rephrases = rephrase_all(
            self._rephraser,
            columns["caption"],
            columns["modality"],
            seed=seed_of(self._job.seed, columns["start"]),
            retries=section.retries,
            max_words=section.max_words,
        )
        rows = [
            _row(image, caption, one)
            for image, caption, one in zip(columns["image"], columns["caption"], rephrases, strict=True)
        ]
        return _part(rows, self._job)


def _through_vllm(job: _Job, rows: pa.Table) -> Iterator[int]:
    """Rephrase with the vLLM engine of `ray.data.llm` and yield numbers of finished captions."""
    for attempt in range(1 + job.section.retries):
        if not rows.num_rows:
            return
        rows = yield from _one_pass(job, rows, _vllm_processor(job, attempt), last=attempt == job.section.retries)


def _one_pass(
    job: _Job, rows: pa.Table, processor: Callable[[ray.data.Dataset], ray.data.Dataset], *, last: bool
) -> Generator[int, None, pa.Table]:
    """Write the valid rephrases of a pass, on the last pass also the unchanged captions; return the rows to retry."""
    batch = job.section.batch
    blocks = [rows.slice(start, batch) for start in range(0, rows.num_rows, batch)]
    again = []
    answers: Iterator[pa.Table] = processor(ray.data.from_arrow(blocks)).iter_batches(  # type: ignore[assignment]
        batch_size=batch, batch_format="pyarrow"
    )
    for answered in answers:
        kept = pa.array([False] * answered.num_rows) if last else pc.is_valid(answered["refused"])
        settled = answered.filter(pc.invert(kept)).to_pylist()
        again += answered["image"].filter(kept).to_pylist()
        if settled:
            job.parts.write(part_name(row["image"] for row in settled), _part(settled, job))
            yield len(settled)
    return rows.filter(pc.is_in(rows["image"], pa.array(again, type=pa.string())))


def _vllm_processor(job: _Job, attempt: int) -> Callable[[ray.data.Dataset], ray.data.Dataset]:
    """Return the pipeline from rows to judged rephrases: prompt, vLLM, checks."""
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig
    from transformers import AutoTokenizer

    section = job.section
    chat = AutoTokenizer.from_pretrained(section.model).chat_template is not None
    return build_processor(
        vLLMEngineProcessorConfig(
            model_source=section.model,
            batch_size=section.batch,
            concurrency=section.workers,
            chat_template_stage=chat,
        ),
        preprocess=partial(_to_vllm, section=section, chat=chat, seed=seed_of(job.seed, attempt)),
        postprocess=partial(_from_vllm, section=section, tries=attempt + 1),
    )


def _to_vllm(row: Mapping[str, Any], *, section: RephraseSection, chat: bool, seed: int) -> dict[str, Any]:
    own_seed = seed_of(seed, zlib.crc32(row["image"].encode()))
    sampling = {"temperature": section.temperature, "max_tokens": section.max_new_tokens, "seed": own_seed}
    ask = {"messages": messages} if chat else {"prompt": completion_prompt}
    asked = {name: write(row["caption"], row["modality"], max_words=section.max_words) for name, write in ask.items()}
    return {**row, **asked, "sampling_params": sampling}


def _from_vllm(row: Mapping[str, Any], *, section: RephraseSection, tries: int) -> dict[str, Any]:
    one = judge(row["caption"], row["generated_text"], row["modality"], max_words=section.max_words, tries=tries)
    return _row(row["image"], row["caption"], one)


def _row(image: str, caption: str, one: Rephrase) -> dict[str, Any]:
    return {"image": image, "caption": caption, "rephrased": one.text, "refused": one.refused, "tries": one.tries}


def _part(rows: Sequence[Mapping[str, Any]], job: _Job) -> pa.Table:
    common = {"rephraser": job.rephraser, "time": datetime.datetime.now(datetime.UTC)}
    return pa.Table.from_pylist([{**row, **common} for row in rows], schema=PART_SCHEMA)


def _publish(captions: pa.Table, job: _Job, before: npt.NDArray[np.bool_], seconds: float) -> Summary:
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
