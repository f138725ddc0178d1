"""Collect the result table and the data of the result page from an evaluator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from tvilfm.captioning.scores import Marks
from tvilfm.config import Config, to_yaml
from tvilfm.data.captions import texts_of
from tvilfm.data.manifest import column, rows_of, select
from tvilfm.data.people import person_name
from tvilfm.evaluation.evaluator import CaseResult, Evaluator, Rows, default_case
from tvilfm.evaluation.protocols import Protocol, get_protocol, ignored_gallery
from tvilfm.evaluation.query_texts import QueryTexts
from tvilfm.evaluation.results import ResultRow, Results
from tvilfm.report.charts.features import RetrievalFeatures
from tvilfm.report.page import CaptionSample, RankedExample, RankedRow, ReportData
from tvilfm.terms import QUERIES

TOP = 10
NUM_EXAMPLES = 6
NUM_TSNE_IDENTITIES = 20


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Facts about the run for the page, apart from its results.

    Attributes:
        versions: package -> version.
        dataset_fingerprint: fingerprint of the dataset's rows and images.
        seconds: stage -> duration in seconds.
        learning: records of all epochs; empty if nothing was trained.
        provenance: notes about a model that was not trained in this run.
    """

    versions: Mapping[str, str]
    dataset_fingerprint: str
    seconds: Mapping[str, float]
    learning: Sequence[Mapping[str, object]]
    provenance: Sequence[str] = ()


def build_results(evaluator: Evaluator, config: Config, *, validation: Results | None = None) -> Results:
    """Evaluate every case and return the table of results.

    Args:
        evaluator: of test or validation identities.
        config: config of the run.
        validation: results on validation identities, whose score thresholds are used; None = there are none. Results
            on validation identities fit their own.
    """
    cases = evaluator.evaluate()
    open_set = {}
    for name, scores in evaluator.open_set().items():
        fitted = None
        if evaluator.split == "val":
            fitted = scores.fit(config.evaluate.max_false_accepts)
        elif validation is not None and name in validation.open_set:
            fitted = validation.open_set[name].fitted
        open_set[name] = scores.open_set(fitted)
    return Results(
        dataset=config.data.name,
        default_text_source=config.evaluate.default_text_source,
        default_protocol=config.evaluate.protocols[0],
        chance={case.protocol: case.chance for case in cases if case.text_source == "none"},
        rows=[_row(case) for case in cases],
        open_set=open_set,
        text_noise={noise: [_row(case) for case in of_noise] for noise, of_noise in evaluator.evaluate_noise().items()},
    )


def _row(case: CaseResult) -> ResultRow:
    ranks = {"rank1": 0, "rank5": 4, "rank10": 9}
    values = {name: [float(trial.cmc[rank]) for trial in case.trials] for name, rank in ranks.items()}
    values |= {name: [float(getattr(trial, name)) for trial in case.trials] for name in ("mAP", "mINP")}
    return ResultRow(
        query=case.query,
        text_source=case.text_source,
        protocol=case.protocol,
        **{name: float(np.mean(of_trials)) for name, of_trials in values.items()},
        std={name: float(np.std(of_trials)) for name, of_trials in values.items()},
        num_trials=len(case.trials),
    )


def build_report(
    results: Results,
    evaluator: Evaluator,
    config: Config,
    *,
    manifest: pa.Table,
    captions: pa.Table,
    pixels: npt.NDArray[np.uint8],
    marks: Mapping[str, Marks],
    facts: RunFacts,
) -> ReportData:
    """Collect everything on the page for the default protocol, the default text source and gallery draw 0.

    Args:
        results: result of `build_results`.
        evaluator: the evaluator that `build_results` used.
        config: config of the run.
        manifest, captions: the dataset's tables.
        pixels: uint8 (N, H, W, 3), in manifest order.
        marks: modality -> marks of the captioner that the run trained.
        facts: facts about the run.
    """
    protocol = get_protocol(config.evaluate.protocols[0])
    query, gallery = evaluator.query(protocol), evaluator.gallery(protocol, 0)
    texts = evaluator.texts(protocol, config.evaluate.default_text_source)
    alone = protocol.query_modality
    vectors: dict[str, Tensor] = {alone: evaluator.image_vectors(query, base=True)}
    kept: dict[str, npt.NDArray[np.int64]] = {alone: np.arange(query.num_rows)}
    if texts is not None:
        for kind, of_text in evaluator.text_query_vectors(query, texts).items():
            vectors[kind], kept[kind] = of_text, texts.kept
    similarity = {
        kind: evaluator.similarity(of_kind, gallery, base=kind == alone)
        for kind, of_kind in vectors.items()
        if kind != "ensemble"
    }
    if texts is not None:
        similarity["ensemble"] = evaluator.ensemble_similarity(evaluator.part_vectors(query, texts), gallery)
    cases = evaluator.evaluate(only_default=True)
    cmc = {}
    for kind in QUERIES:
        case = default_case(cases, config.evaluate, kind)
        if case is not None:
            cmc[kind] = np.mean([trial.cmc for trial in case.trials], axis=0)
    return ReportData(
        results=results,
        name=config.run.name,
        cmc=cmc,
        examples=_examples(query, gallery, texts, similarity, kept, manifest, pixels, protocol),
        features=_features(evaluator, query, gallery, vectors, kept, alone),
        learning=list(facts.learning),
        captions=_caption_samples(manifest, captions, pixels),
        marks=marks,
        facts=_facts(config, facts, manifest, query, gallery),
        config_yaml=to_yaml(config),
        notes=[*facts.provenance, *_notes(config)],
        seed=config.run.seed,
    )


def _examples(
    query: pa.Table,
    gallery: pa.Table,
    texts: QueryTexts | None,
    similarity: Mapping[str, Rows],
    kept: Mapping[str, npt.NDArray[np.int64]],
    manifest: pa.Table,
    pixels: npt.NDArray[np.uint8],
    protocol: Protocol,
) -> list[RankedExample]:
    """Return examples of queries that are evenly spaced in the query list, so that good results are not preferred."""
    rows = kept[protocol.query_modality] if texts is None else texts.kept
    chosen = rows[np.linspace(0, len(rows) - 1, min(NUM_EXAMPLES, len(rows))).round().astype(int)]
    query_pixels, gallery_pixels = rows_of(manifest, query), rows_of(manifest, gallery)
    query_pids, gallery_pids = column(query, "pid"), column(gallery, "pid")
    query_camids = column(query, "camid")
    examples = []
    for row in chosen:
        ignored = ignored_gallery(protocol, int(query_pids[row]), int(query_camids[row]), gallery)
        rankings = {}
        for kind, of_kind in similarity.items():
            place = int(np.searchsorted(kept[kind], row))
            (scores,) = of_kind(slice(place, place + 1))
            order = [g for g in np.argsort(-scores, kind="stable") if not ignored[g]][:TOP]
            rankings[kind] = RankedRow(
                images=[pixels[gallery_pixels[g]] for g in order],
                correct=[bool(gallery_pids[g] == query_pids[row]) for g in order],
                similarity=[float(scores[g]) for g in order],
            )
        position = None if texts is None else int(np.searchsorted(texts.kept, row))
        examples.append(
            RankedExample(
                image=pixels[query_pixels[row]],
                person=person_name(query, int(query_pids[row])),
                query_text=None if texts is None or position is None else texts.texts[position],
                filter_text=None if texts is None or position is None else texts.filter_texts[position],
                rankings=rankings,
            )
        )
    return examples


def _features(
    evaluator: Evaluator,
    query: pa.Table,
    gallery: pa.Table,
    vectors: Mapping[str, Tensor],
    kept: Mapping[str, npt.NDArray[np.int64]],
    alone: str,
) -> dict[str, RetrievalFeatures]:
    gallery_pids, query_pids = column(gallery, "pid"), column(query, "pid")
    features = {}
    for kind in QUERIES:
        if kind in vectors:
            unit = torch.nn.functional.normalize(vectors[kind], dim=1).cpu().numpy()
            images = evaluator.image_vectors(gallery, base=kind == alone).cpu().numpy()
            features[kind] = RetrievalFeatures(unit, query_pids[kept[kind]], images, gallery_pids)
    return features


def _caption_samples(
    manifest: pa.Table, captions: pa.Table, pixels: npt.NDArray[np.uint8], count: int = 4
) -> list[CaptionSample]:
    samples = []
    for modality in ("visible", "infrared"):
        subset = select(manifest, split=("query", "gallery", "test"), modality=modality)
        subset = subset.take(pa.array(np.linspace(0, subset.num_rows - 1, count).round().astype(int)))
        texts, rephrased = texts_of(captions, subset["image"].to_pylist())
        for row, text, other in zip(rows_of(manifest, subset), texts, rephrased, strict=True):
            samples.append(CaptionSample(pixels[row], modality, text, other))
    return samples


def _facts(config: Config, facts: RunFacts, manifest: pa.Table, query: pa.Table, gallery: pa.Table) -> dict[str, str]:
    counts = {}
    if config.model.trained is None:
        for name, split in (("training", "train"), ("validation", "val")):
            rows = select(manifest, split=split)
            counts[name] = f"{len(set(column(rows, 'pid')))} identities, {rows.num_rows} images"
    described = {
        "dataset": config.data.name
        + (
            f" ({config.data.synthetic.size}, seed {config.data.synthetic.seed})"
            if config.data.name == "synthetic"
            else ""
        ),
        **counts,
        "test": f"{len(set(column(query, 'pid')))} identities, {query.num_rows} queries, "
        f"{gallery.num_rows} gallery images per draw",
        "dataset fingerprint": facts.dataset_fingerprint,
        **_network(config),
        "seed": str(config.run.seed),
    }
    if facts.seconds:
        described["time by stage"] = ", ".join(f"{name} {value:.0f} s" for name, value in facts.seconds.items())
    described["versions"] = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    return described


def _network(config: Config) -> dict[str, str]:
    if config.model.trained is not None:
        return {"model": str(config.model.trained)}
    return {
        "network": f"{config.model.backbone}, text tower {config.model.text.layers} x {config.model.text.width}",
        "initial weights": f"{config.model.weights} (images), {config.model.text.weights} (text)",
        "fidelity": config.fidelity,
    }


def _notes(config: Config) -> list[str]:
    notes = []
    trains = config.model.trained is None
    if trains and "test" in (config.train.base.select, config.train.text.select):
        notes.append(
            "A checkpoint was selected on the test identities, as for the published numbers. So these results are "
            "optimistic."
        )
    if config.evaluate.rerank.method != "none":
        notes.append(
            f"Every ranking was re-ranked ({config.evaluate.rerank.method}), which uses other queries or the gallery. "
            "Compare only with methods that do the same."
        )
    if config.data.name == "synthetic":
        notes.append(
            "Synthetic benchmark: rendered people, with captions that describe the drawing and contain deliberate "
            "errors. It shows that the method and this program work; its numbers say nothing about real cameras."
        )
    if config.caption.source == "finetuned":
        notes.append(
            "Captions were written by captioners that were trained on the captions of the training identities. The "
            "captions of test images depend only on the images."
        )
    if config.caption.rephrase.engine == "rules" and config.caption.source != "files":
        notes.append("Rephrases come from a rule-based paraphraser, not from a language model.")
    if trains and config.model.weights == "attributes":
        notes.append(
            "The backbone was pre-trained on attributes of a disjoint synthetic split, an offline replacement for "
            "ImageNet weights."
        )
    return notes
