"""What workers of the rephrasing job do: rephrase a chunk of captions and write its part."""

from __future__ import annotations

import datetime
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pydantic import SecretStr

from cluster.tables.job import with_absolute_model
from cluster.tables.parts import Parts, part_name
from tvilfm.captioning.rephrase import Rephrase, rephrase_all, seed_of
from tvilfm.config import ClusterSection, RephraseSection

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
class RephraseJob:
    """Everything that a worker needs to rephrase captions."""

    section: RephraseSection
    out: str
    seed: int
    device: str
    dtype: str
    key: SecretStr | None

    @classmethod
    def of(cls, section: RephraseSection, cluster: ClusterSection, *, out: str, seed: int, dtype: str) -> RephraseJob:
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


def _key(section: RephraseSection) -> SecretStr | None:
    """Return the API key from the environment of the driver, because workers do not have this environment."""
    value = os.environ.get(section.key_variable)
    return SecretStr(value) if value else None


class RephraseActor:
    """Actor that loads a rephraser once, then rephrases chunks and writes their parts."""

    def __init__(self, job: RephraseJob) -> None:
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
            part_row(image, caption, one)
            for image, caption, one in zip(columns["image"], columns["caption"], rephrases, strict=True)
        ]
        return part_table(rows, self._job)


def part_row(image: str, caption: str, one: Rephrase) -> dict[str, Any]:
    return {"image": image, "caption": caption, "rephrased": one.text, "refused": one.refused, "tries": one.tries}


def part_table(rows: Sequence[Mapping[str, Any]], job: RephraseJob) -> pa.Table:
    common = {"rephraser": job.rephraser, "time": datetime.datetime.now(datetime.UTC)}
    return pa.Table.from_pylist([{**row, **common} for row in rows], schema=PART_SCHEMA)
