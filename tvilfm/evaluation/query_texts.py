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
from tvilfm.terms import Split, TextSource

QUERY_TEXTS_FILE = "query_texts.parquet"
QUERY_TEXTS_SCHEMA = pa.schema(
    [pa.field(name, pa.string(), nullable=False)
     for name in ("protocol", "text_source", "split", "image", "text", "filter_text")]
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
            common = {"protocol": name, "text_source": source, "split": split}
            rows += [
                {**common, "image": image, "text": text, "filter_text": filter_text}
                for image, text, filter_text in zip(images, texts, own, strict=True)
                if text is not None
            ]
    return pa.Table.from_pylist(rows, schema=QUERY_TEXTS_SCHEMA)


def sentences_of(query_texts: pa.Table) -> list[str]:
    """Return the sorted distinct sentences whose features an evaluation needs."""
    return sorted({text for name in ("text", "filter_text") for text in query_texts[name].to_pylist()})


def select_query_texts(
    query_texts: pa.Table, query: pa.Table, protocol: Protocol, source: TextSource, *, split: Split
) -> QueryTexts | None:
    """Return the sentences of a protocol's queries, or None if the source does not apply to the protocol.

    Args:
        query_texts: table from `draw_query_texts`.
        query: rows from `select_query`.
        protocol, source, split: protocol, text source and split of the sentences.
    """
    conditions = {"protocol": protocol.name, "text_source": source, "split": split}
    mask = pa.array(np.ones(query_texts.num_rows, dtype=bool))
    for name, value in conditions.items():
        mask = pc.and_(mask, pc.equal(query_texts[name], value))
    rows = query_texts.filter(mask)
    if not rows.num_rows:
        return None
    kept = pc.index_in(rows["image"].combine_chunks(), query["image"].combine_chunks())
    assert kept.null_count == 0, "query texts of another dataset"
    return QueryTexts(
        kept=np.asarray(kept.to_numpy(), dtype=np.int64),
        texts=rows["text"].to_pylist(),
        filter_texts=rows["filter_text"].to_pylist(),
    )
