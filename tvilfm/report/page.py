"""The result page: one self-contained HTML file with the results of a run and how they were obtained.

`ReportData` holds everything that the page shows, as arrays and plain text; `write_report` draws it. The page loads
nothing from the network: charts are inline SVG, images are base64 JPEG, and the style is in the file. The numbers are
also embedded as JSON. Empty parts are left out, including their headings.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup
from PIL import Image

from tvilfm.captioning.scores import Marks
from tvilfm.datasets.readers import label_of, published_rows
from tvilfm.datasets.record import PUBLISHED_LABEL
from tvilfm.evaluation.results import Results
from tvilfm.place import write_whole
from tvilfm.report import tables
from tvilfm.report.charts.cmc import cmc_chart
from tvilfm.report.charts.comparison import comparison_chart
from tvilfm.report.charts.features import RetrievalFeatures, distance_chart, tsne_chart
from tvilfm.report.charts.learning import learning_chart
from tvilfm.report.charts.noise import noise_chart
from tvilfm.report.charts.open_set import open_set_chart
from tvilfm.report.charts.style import QUERY_COLORS, FloatArray
from tvilfm.report.noise import noise_answer, noise_rows
from tvilfm.report.tables import METRIC_LABELS, QUERY_LABELS
from tvilfm.terms import METRICS, QUERIES, TEXT_SOURCES

ImageArray: TypeAlias = npt.NDArray[np.uint8]

# Thumbnails are shown 96 pixels high; twice this height keeps them sharp on high-density screens.
THUMBNAIL_HEIGHT = 192


class CaptionSample(NamedTuple):
    """One generated caption.

    Args:
        image: uint8, HxWx3.
        modality: "visible" or "infrared".
        caption: the captioner's text.
        rephrased: the LLM's version of it, or None.
    """

    image: ImageArray
    modality: str
    caption: str
    rephrased: str | None = None


@dataclass(frozen=True, kw_only=True)
class RankedRow:
    """The top gallery images for one query modality, best first.

    Args:
        images: uint8 HxWx3 each; 10, or fewer if the gallery is smaller.
        correct: whether each image shows the query's person.
        similarity: higher is closer; only comparable within one row.

    Raises:
        ValueError: the three sequences differ in length.
    """

    images: Sequence[ImageArray]
    correct: Sequence[bool]
    similarity: Sequence[float]

    def __post_init__(self) -> None:
        sizes = (len(self.images), len(self.correct), len(self.similarity))
        if len(set(sizes)) != 1:
            raise ValueError(
                f"ranked_row: expected as many images as marks and similarities, got {sizes}. "
                "Cut all three to the same length."
            )


@dataclass(frozen=True, kw_only=True)
class RankedExample:
    """One query and its ranked lists.

    Args:
        image: uint8, HxWx3: the infrared query.
        person: its identity as the dataset writes it.
        query_text: the visible-style description used as query text; None without text.
        filter_text: the query image's own infrared caption, which SFF subtracts; None without SFF.
        rankings: query modality -> its top gallery images.
    """

    image: ImageArray
    person: str
    query_text: str | None = None
    filter_text: str | None = None
    rankings: Mapping[str, RankedRow]


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything on the page. Only `results` is required; every other part may be empty.

    Args:
        results: the numbers, as in results.json.
        name: name of the run, for the title.
        cmc: query -> fractions at ranks 1-20, for the default protocol and text source.
        examples: ranked lists of a few queries.
        features: query -> unit vectors and identities of both sides.
        learning: metric records, see `learning_chart`.
        captions: samples of the captions.
        marks: modality -> marks of its captioner, if the run trained one.
        facts: facts of the run in display order, e.g. dataset, seed, versions, time by stage.
        config_yaml: the resolved config.
        notes: warnings shown under the verdict, e.g. "selected on the test set".
        seed: seed of t-SNE and of the choice of its identities and images.
    """

    results: Results
    name: str = ""
    cmc: Mapping[str, FloatArray] = field(default_factory=dict)
    examples: Sequence[RankedExample] = ()
    features: Mapping[str, RetrievalFeatures] = field(default_factory=dict)
    learning: Sequence[Mapping[str, Any]] = ()
    captions: Sequence[CaptionSample] = ()
    marks: Mapping[str, Marks] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    config_yaml: str = ""
    notes: Sequence[str] = ()
    seed: int = 0


def write_report(data: ReportData, path: Path) -> None:
    """Write the page to `path` atomically; its folder is created if missing.

    Args:
        data: what to show.
        path: the HTML file, usually runs/<name>/report/index.html.
    """
    write_whole(path, render_report(data))


def render_report(data: ReportData) -> str:
    """Return the page as HTML. Captions, config and facts are escaped.

    Raises:
        ValueError: `cmc`, `features` or a ranked list has an unknown query modality.
    """
    named = {"cmc": data.cmc, "features": data.features}
    named |= {f"examples[{index}].rankings": example.rankings for index, example in enumerate(data.examples)}
    for part, by_query in named.items():
        unknown = sorted(set(by_query) - set(QUERIES))
        if unknown:
            raise ValueError(f"report.{part}: expected keys among {list(QUERIES)}, got {unknown}. Rename the query.")

    results = data.results
    chance = results.chance.get(results.default_protocol)
    return page_template("template.html.j2").render(
        name=data.name,
        dataset=label_of(results.dataset),
        results=results,
        verdict=tables.verdict(results),
        notes=data.notes,
        table=_default_table(results),
        chance_sentence=tables.chance_sentence(results),
        text_source_sentence=tables.text_source_sentence(results),
        spread_sentence=tables.spread_sentence(results.default_rows),
        published=_published_table(results),
        published_label=PUBLISHED_LABEL,
        metric_labels=[METRIC_LABELS[metric] for metric in METRICS],
        colors=QUERY_COLORS,
        query_labels=QUERY_LABELS,
        comparison=markup(comparison_chart(results.default_rows, chance=chance) if results.default_rows else None),
        cmc=markup(cmc_chart(data.cmc, chance=chance) if data.cmc else None),
        protocols=_full_table(results) if len(results.rows) > len(results.default_rows) else [],
        text_sources={
            source: meaning
            for source, meaning in tables.TEXT_SOURCE_MEANINGS.items()
            if any(row.text_source == source for row in results.rows)
        },
        noise=_noise(results),
        open_set=_open_set(results),
        markdown=tables.markdown_table(results),
        examples=[_example(example) for example in data.examples],
        tsne=markup(tsne_chart(data.features, seed=data.seed)),
        distances=markup(distance_chart(data.features, seed=data.seed)),
        captions=[
            {"image": _jpeg(image), "modality": modality, "caption": caption, "rephrased": rephrased}
            for image, modality, caption, rephrased in data.captions
        ],
        marks=[_marks(modality, marks) for modality, marks in data.marks.items()],
        learning=markup(learning_chart(data.learning)),
        facts=data.facts,
        config_yaml=data.config_yaml,
        results_json=_script_json(results),
    )


def _noise(results: Results) -> dict[str, Any] | None:
    """Return the part about `evaluate.text_noise`, or None if there was none."""
    if not results.text_noise:
        return None
    rows = [
        (label, [tables.metric_cell(by_query[q], m) for q in ("text", "fusion", "ensemble") for m in ("rank1", "mAP")])
        for label, by_query in noise_rows(results).items()
    ]
    return {"answer": noise_answer(results), "chart": markup(noise_chart(results)), "rows": rows}


def _open_set(results: Results) -> dict[str, Any] | None:
    """Return the part about score thresholds, or None if there are none."""
    if not results.open_set:
        return None
    rows = []
    for name, one in results.open_set.items():
        accepts, rejects = one.fitted_false_accepts, one.fitted_false_rejects
        if one.fitted is not None and accepts is not None and rejects is not None:
            errors = (tables.percent(accepts), tables.percent(rejects))
            rows.append((tables.VOTES_LABELS[name], f"{one.fitted:.3f}", *errors))
    people = next(iter(results.open_set.values())).gallery_people
    return {"chart": markup(open_set_chart(results.open_set)), "rows": rows, "people": f"{people:.0f}"}


def _marks(modality: str, marks: Marks) -> dict[str, Any]:
    cells = {"BLEU-4": f"{marks.bleu4:.3f}", "CIDEr": f"{marks.cider:.2f}"}
    cells["with a colour word"] = f"{tables.percent(marks.colour_words)}%"
    rows = [
        (name.replace("_", " "), tables.percent(score.accuracy), tables.percent(score.named))
        for name, score in marks.attributes.items()
    ]
    return {"modality": modality, "pictures": marks.pictures, "cells": cells, "rows": rows}


def page_template(name: str) -> Template:
    """Return a template of this folder that escapes all text and fails on undefined names."""
    environment = Environment(
        loader=PackageLoader("tvilfm", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def markup(svg: str | None) -> Markup | None:
    """Mark a chart as safe HTML; None stays None."""
    return None if svg is None else Markup(svg)


def _script_json(results: Results) -> Markup:
    """Return results.json for a <script type="application/json">; characters that could end the element are escaped."""
    text = json.dumps(results.to_dict(), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _default_table(results: Results) -> list[dict[str, Any]]:
    rows = results.default_rows
    best = {metric: max((row.metric(metric) for row in rows), default=0.0) for metric in METRICS}
    return [
        {
            "query": row.query,
            "text_source": row.text_source,
            "cells": [
                {
                    "text": tables.metric_cell(row, metric),
                    "best": len(rows) > 1 and row.metric(metric) == best[metric],
                }
                for metric in METRICS
            ],
        }
        for row in rows
    ]


_BLOCKS = {source: place for place, source in enumerate(TEXT_SOURCES)} | {"none": 0}


def _full_table(results: Results) -> list[dict[str, Any]]:
    """Group all rows by protocol, the default protocol first; queries are in the order of the headline table."""
    first = results.default_protocol
    protocols = [first, *(name for name in results.protocols if name != first)]
    groups = []
    for protocol in protocols:
        rows = [row for row in results.rows if row.protocol == protocol]
        # "none" sorts with "witness", so that infrared alone comes first in the block of the first text source.
        rows.sort(key=lambda row: (_BLOCKS[row.text_source], QUERIES.index(row.query)))
        chance = results.chance.get(protocol)
        groups.append(
            {
                "protocol": protocol,
                "is_default": protocol == first,
                "chance": None if chance is None else tables.percent(chance),
                "rows": [
                    {
                        "query": row.query,
                        "text_source": row.text_source,
                        "cells": [tables.metric_cell(row, metric) for metric in METRICS],
                        "num_trials": row.num_trials,
                    }
                    for row in rows
                ],
            }
        )
    return groups


def _published_table(results: Results) -> list[dict[str, Any]]:
    """Group the published numbers by how they were obtained; groups are in the order of their first rows."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in published_rows(results.dataset):
        cells = ["" if value is None else tables.percent(value) for value in (row.rank1, row.mAP, row.mINP)]
        if row.rank1_std is not None:
            cells[0] += f" ± {tables.percent(row.rank1_std)}"
        groups.setdefault(row.note, []).append(
            {"method": row.method, "setting": row.setting, "query": row.query, "cells": cells}
        )
    return [{"note": note, "rows": rows} for note, rows in groups.items()]


def _example(example: RankedExample) -> dict[str, Any]:
    rankings = []
    for query in QUERIES:
        row = example.rankings.get(query)
        if row is None:
            continue
        hits = [rank for rank, correct in enumerate(row.correct, start=1) if correct]
        rankings.append(
            {
                "query": query,
                "summary": f"first match at rank {hits[0]}" if hits else f"no match in the top {len(row.correct)}",
                "found": [
                    {
                        "rank": rank,
                        "image": _jpeg(image),
                        "correct": bool(correct),
                        "similarity": f"{similarity:.3f}",
                    }
                    for rank, (image, correct, similarity) in enumerate(
                        zip(row.images, row.correct, row.similarity, strict=True), start=1
                    )
                ],
            }
        )
    return {
        "image": _jpeg(example.image),
        "person": example.person,
        "query_text": example.query_text,
        "filter_text": example.filter_text,
        "rankings": rankings,
    }


def _jpeg(image: ImageArray) -> str:
    """Return the image as a `data:` URL with a JPEG of at most `THUMBNAIL_HEIGHT` pixels height."""
    picture = Image.fromarray(np.ascontiguousarray(image)).convert("RGB")
    if picture.height > THUMBNAIL_HEIGHT:
        width = max(1, round(picture.width * THUMBNAIL_HEIGHT / picture.height))
        picture = picture.resize((width, THUMBNAIL_HEIGHT), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
