"""Draw the sentences of the queries once, as a table for the evaluation and the report.

Shapes: Q queries.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tvilfm.config import EvaluateSection
from tvilfm.data.captions import texts_of
from tvilfm.evaluation.protocols import Protocol, get_protocol, select_query, witness_captions
from tvilfm.evaluation.text_noise import noisy_texts
from tvilfm.terms import Split, TextSource

QUERY_TEXTS_FILE = "query_texts.parquet"
QUERY_TEXTS_SCHEMA = pa.schema(
    [pa.field(name, pa.string(), nullable=False)
     for name in ("protocol", "text_source", "noise", "split", "image", "text", "filter_text")]
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class QueryTexts:
    """The sentences of a protocol's queries.

    Attributes:
        kept: int64, indices of the query rows that have a text of this source.
        texts: query sentence of each of these rows.
        filter_texts: infrared caption of each of these rows.
    """

    kept: npt.NDArray[np.int64]
    texts: list[str]
    filter_texts: list[str]


def draw_query_texts(
    manifest: pa.Table,
    captions: pa.Table,
    section: EvaluateSection,
    *,
    seed: int,
    splits: Sequence[Split] = ("test",),
    human: Mapping[int, str] | None = None,
) -> pa.Table:
    """Draw the sentences of every protocol, text source and query.

    Args:
        manifest: all rows.
        captions: caption table.
        section: protocols, text sources and method of the witness draw.
        seed: seed of the witness draw.
        splits: test, val or both.
        human: pid -> a person's sentence, for the source `human`.

    Returns:
        Table of `QUERY_TEXTS_SCHEMA`, with queries in the order of `select_query`. There is no row for a query without
        a text of a source, or for a protocol to which the source does not apply.

    Source: METHOD 6. Differs: with `evaluate.witness_draw: seeded`, `seed` decides the draw.
    """
    rows: list[dict[str, str]] = []
    for split, name in itertools.product(splits, section.protocols):
        protocol = get_protocol(name)
        if protocol.query_modality != "infrared":
            continue  # a visible query has colour, so it needs no text
        query = select_query(manifest, protocol, split=split)
        images = query["image"].to_pylist()
        own, _ = texts_of(captions, images)
        for source in section.text_sources:
            texts: Sequence[str | None] = own
            if source == "human":
                texts = [(human or {}).get(pid) for pid in query["pid"].to_pylist()]
            elif source != "own":
                texts = witness_captions(
                    manifest,
                    captions,
                    query,
                    protocol,
                    seed=seed,
                    held_out=source == "witness-heldout",
                    split=split,
                    draw=section.witness_draw,
                )
            common = {"protocol": name, "text_source": source, "noise": "", "split": split}
            rows += [
                {**common, "image": image, "text": text, "filter_text": filter_text}
                for image, text, filter_text in zip(images, texts, own, strict=True)
                if text is not None
            ]
    return pa.Table.from_pylist(rows, schema=QUERY_TEXTS_SCHEMA)


def with_noise(
    query_texts: pa.Table,
    manifest: pa.Table,
    section: EvaluateSection,
    *,
    seed: int,
    attributes: Mapping[int, Mapping[str, str]] | None = None,
) -> pa.Table:
    """Add the noisy sentences of the default table's queries.

    Args:
        query_texts: table from `draw_query_texts`.
        manifest: all rows.
        section: default protocol and text source, and `text_noise`.
        seed: seed of all draws.
        attributes: as in `noisy_texts`.

    Returns:
        The table, and for each kind of noise a row for every test query of the first protocol with a text of the
        default source. There are none if the source does not apply to this protocol.
    """
    rows = _selected(query_texts, get_protocol(section.protocols[0]), section.default_text_source, split="test")
    pid_of = dict(zip(manifest["image"].to_pylist(), manifest["pid"].to_pylist(), strict=True))
    images, texts = rows["image"].to_pylist(), rows["text"].to_pylist()
    pids = [pid_of[image] for image in images]
    noisy = []
    for noise in section.text_noise:
        changed = noisy_texts(noise, texts, pids, images, seed=seed, attributes=attributes)
        columns = {"text": pa.array(changed, pa.string()), "noise": pa.array([noise] * len(changed), pa.string())}
        noisy.append(pa.table([columns.get(name, rows[name]) for name in rows.schema.names], schema=rows.schema))
    return pa.concat_tables([query_texts, *noisy])


def sentences_of(query_texts: pa.Table) -> list[str]:
    """Return the sorted distinct sentences whose features an evaluation needs."""
    return sorted({text for name in ("text", "filter_text") for text in query_texts[name].to_pylist()})


def select_query_texts(
    query_texts: pa.Table, query: pa.Table, protocol: Protocol, source: TextSource, *, split: Split, noise: str = ""
) -> QueryTexts | None:
    """Return the sentences of a protocol's queries, or None if the source does not apply to the protocol.

    Args:
        query_texts: table from `draw_query_texts`.
        query: rows from `select_query`.
        protocol, source, split, noise: protocol, text source, split and noise of the sentences.
    """
    rows = _selected(query_texts, protocol, source, split=split, noise=noise)
    if not rows.num_rows:
        return None
    kept = pc.index_in(rows["image"].combine_chunks(), query["image"].combine_chunks())
    assert kept.null_count == 0, "query texts of another dataset"
    return QueryTexts(
        kept=np.asarray(kept.to_numpy(), dtype=np.int64),
        texts=rows["text"].to_pylist(),
        filter_texts=rows["filter_text"].to_pylist(),
    )


def _selected(
    query_texts: pa.Table, protocol: Protocol, source: TextSource, *, split: Split, noise: str = ""
) -> pa.Table:
    conditions = {"protocol": protocol.name, "text_source": source, "noise": noise, "split": split}
    mask = pa.array(np.ones(query_texts.num_rows, dtype=bool))
    for name, value in conditions.items():
        mask = pc.and_(mask, pc.equal(query_texts[name], value))
    return query_texts.filter(mask)
