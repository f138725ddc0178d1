"""Evaluate raw features and texts, and return the rows of the result table.

An infrared query is evaluated in four ways: infrared alone (through the base stage's head, which the text stage does
not change), text alone, fusion, and the ensemble of the three (all through the current head). In protocols that search
infrared images, a visible query is evaluated alone, because a text has no missing colour to add. Every result with a
text names its text source: who wrote the query's sentence affects the numbers more than any part of the network
(METHOD 6).

Shapes: Q queries, G gallery, D feature.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from tvilfm.config import EvaluateSection
from tvilfm.data.manifest import column
from tvilfm.evaluation.features import FeatureTable
from tvilfm.evaluation.metrics import RankingMetrics, ranking_metrics
from tvilfm.evaluation.protocols import Protocol, chance_level, get_protocol, select_gallery, select_query
from tvilfm.evaluation.query_texts import QueryTexts, select_query_texts
from tvilfm.evaluation.rerank import expand_queries, k_reciprocal_rerank
from tvilfm.evaluation.score_thresholds import BestScores, best_scores, pooled
from tvilfm.models import TVILFM
from tvilfm.models.ensemble import ensemble_query
from tvilfm.models.fusion import semantic_filtered_fusion
from tvilfm.models.similarity import similarity
from tvilfm.terms import Split, TextSource

Similarity = npt.NDArray[np.float32]
Rows = Callable[[slice], Similarity]  # queries -> their rows of the similarity


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """One row of the table: the result of one query kind, text source and protocol over all gallery draws."""

    query: str
    text_source: TextSource
    protocol: str
    trials: tuple[RankingMetrics, ...]
    chance: float


class Evaluator:
    """Evaluator of a model's features under the protocols.

    Args:
        model: network in eval mode; only its heads are used, not its encoders.
        manifest: rows of the dataset.
        query_texts: sentences of the queries, from `draw_query_texts`.
        images: raw features by image path.
        texts: raw features by sentence; None evaluates queries without text only.
        section: protocols, text sources and ensemble weights.
        filter_text: whether to subtract the infrared caption (SFF); False is the ablation.
        split: test or val identities.
    """

    def __init__(
        self,
        model: TVILFM,
        manifest: pa.Table,
        query_texts: pa.Table,
        images: FeatureTable,
        texts: FeatureTable | None,
        section: EvaluateSection,
        *,
        filter_text: bool,
        split: Split = "test",
    ) -> None:
        self._model, self._manifest, self._query_texts = model, manifest, query_texts
        self._images, self._texts, self._section = images, texts, section
        self._filter_text, self._split = filter_text, split
        self._galleries: dict[tuple[str, int], pa.Table] = {}  # all query kinds of a protocol share the draws

    @property
    def section(self) -> EvaluateSection:
        return self._section

    @property
    def split(self) -> Split:
        return self._split

    def query(self, protocol: Protocol) -> pa.Table:
        return select_query(self._manifest, protocol, split=self._split)

    def gallery(self, protocol: Protocol, trial: int) -> pa.Table:
        key = protocol.name, trial
        if key not in self._galleries:
            self._galleries[key] = select_gallery(self._manifest, protocol, trial=trial, split=self._split)
        return self._galleries[key]

    def texts(self, protocol: Protocol, source: TextSource, *, noise: str = "") -> QueryTexts | None:
        """Return the sentences of a protocol's queries; None if the source does not apply or no text is encoded."""
        if self._texts is None:
            return None
        query = self.query(protocol)
        return select_query_texts(self._query_texts, query, protocol, source, split=self._split, noise=noise)

    @torch.inference_mode()
    def image_vectors(self, table: pa.Table, *, base: bool) -> Tensor:
        """Return (N, D) unit vectors of images through the base stage's head or the current one."""
        raw = self._on_device(self._images.select(table["image"].to_pylist()))
        return self._model.embed_base(raw) if base else self._model.embed(raw)

    @torch.inference_mode()
    def part_vectors(self, query: pa.Table, texts: QueryTexts, *, filter_text: bool | None = None) -> dict[str, Tensor]:
        """Return unit vectors (Q, D) of the ensemble's parts (infrared, text, fusion) through the current head.

        Args:
            query: rows of the queries.
            texts: their sentences.
            filter_text: whether fusion subtracts the infrared caption; None = as the evaluation does.
        """
        assert self._texts is not None
        raw = self._on_device(self._images.select(query["image"].take(pa.array(texts.kept)).to_pylist()))
        text = self._on_device(self._texts.select(texts.texts))
        subtracts = self._filter_text if filter_text is None else filter_text
        filter_D = self._on_device(self._texts.select(texts.filter_texts)) if subtracts else None
        return {
            "infrared": self._model.embed(raw),
            "text": self._model.embed(text),
            "fusion": self._model.embed(semantic_filtered_fusion(self._model.current(raw), text, filter_D)),
        }

    def text_query_vectors(self, query: pa.Table, texts: QueryTexts) -> dict[str, Tensor]:
        """Return vectors (Q, D) of the text, fusion and ensemble queries through the current head."""
        parts = self.part_vectors(query, texts)
        ensemble = ensemble_query(parts, self._section.ensemble.weights)
        return {"text": parts["text"], "fusion": parts["fusion"], "ensemble": ensemble}

    def evaluate(self, *, only_default: bool = False) -> list[CaseResult]:
        """Return the rows of the table: per protocol, the image alone, then each text source that applies.

        Args:
            only_default: whether to evaluate only the protocol and text source of the default table.
        """
        section = self._section
        protocols = section.protocols[:1] if only_default else section.protocols
        sources = (section.default_text_source,) if only_default else section.text_sources
        results = []
        for name in protocols:
            protocol = get_protocol(name)
            query = self.query(protocol)
            results.append(self._case(protocol.query_modality, "none", protocol, query, self._asks_alone(query)))
            if self._texts is None:
                continue
            for source in sources:
                texts = self.texts(protocol, source)
                if texts is not None:
                    results += self._text_cases(protocol, source, query, texts)
        return results

    def evaluate_noise(self) -> dict[str, list[CaseResult]]:
        """Return the text, fusion and ensemble results of the default table under each kind of `text_noise`.

        Returns:
            Noise -> three results; empty if the default text source does not apply to the first protocol.
        """
        protocol, source = get_protocol(self._section.protocols[0]), self._section.default_text_source
        query = self.query(protocol)
        results = {}
        for noise in self._section.text_noise:
            texts = self.texts(protocol, source, noise=noise)
            if texts is not None:
                results[noise] = self._text_cases(protocol, source, query, texts)
        return results

    def open_set(self) -> dict[str, BestScores]:
        """Return the scores that decide about a threshold, for the default protocol and text source.

        They are the scores of the service: plain similarities, without re-ranking and soft votes.

        Returns:
            One of `VOTES` -> its scores; empty if the default protocol searches infrared images, or if the galleries
            have nobody else, as with one identity.
        """
        protocol = get_protocol(self._section.protocols[0])
        if protocol.query_modality != "infrared":
            return {}
        query = self.query(protocol)
        asked = {"infrared": (query, self.image_vectors(query, base=True))}
        texts = self.texts(protocol, self._section.default_text_source)
        if texts is not None:
            kept, weights = query.take(pa.array(texts.kept)), self._section.ensemble.weights
            parts = self.part_vectors(query, texts)
            asked |= {"text": (kept, parts["text"]), "ensemble": (kept, ensemble_query(parts, weights))}
            if self._filter_text:
                parts = self.part_vectors(query, texts, filter_text=False)
                asked["ensemble-unfiltered"] = (kept, ensemble_query(parts, weights))
        galleries = [self.gallery(protocol, trial) for trial in range(protocol.num_trials)]
        scores = {
            name: pooled([self._best_scores(*of, gallery, protocol, base=name == "infrared") for gallery in galleries])
            for name, of in asked.items()
        }
        return {name: of_name for name, of_name in scores.items() if of_name.present_N.size and of_name.absent_N.size}

    def _best_scores(
        self, query: pa.Table, vectors_QD: Tensor, gallery: pa.Table, protocol: Protocol, *, base: bool
    ) -> BestScores:
        gallery_GD = self.image_vectors(gallery, base=base)
        return best_scores(lambda rows: _numbers(similarity(vectors_QD[rows], gallery_GD)), query, gallery, protocol)

    def _text_cases(
        self, protocol: Protocol, source: TextSource, query: pa.Table, texts: QueryTexts
    ) -> list[CaseResult]:
        kept, parts = query.take(pa.array(texts.kept)), self.part_vectors(query, texts)
        return [
            self._case(kind, source, protocol, kept, self._asks(kind, parts)) for kind in ("text", "fusion", "ensemble")
        ]

    def similarity(self, vectors_QD: Tensor, gallery: pa.Table, *, base: bool) -> Rows:
        """Return what computes rows of the (Q, G) similarity to gallery images, re-ranked according to `rerank`.

        Rows are computed when they are asked for; only k-reciprocal re-ranking computes all of them at once.
        """
        rerank, gallery_GD = self._section.rerank, self.image_vectors(gallery, base=base)
        if rerank.method == "none":
            return lambda rows: _numbers(similarity(vectors_QD[rows], gallery_GD))
        unit_QD = F.normalize(vectors_QD, dim=1)  # an ensemble vector is a sum
        if rerank.method == "k_reciprocal":
            similarity_QG = _numbers(
                k_reciprocal_rerank(unit_QD, gallery_GD, k1=rerank.k1, k2=rerank.k2, lambda_value=rerank.lambda_value)
            )
            return lambda rows: similarity_QG[rows]

        def expanded(rows: slice) -> Similarity:
            expanded_QD = expand_queries(unit_QD[rows], gallery_GD, k=rerank.k, alpha=rerank.alpha)
            return _numbers(similarity(expanded_QD, gallery_GD))

        return expanded

    def votes(self, parts: Mapping[str, Tensor], gallery: pa.Table) -> dict[str, Tensor]:
        """Return the (Q, G) votes of each part of the ensemble, before weighting and re-ranking.

        Args:
            parts: unit vectors from `part_vectors`.
            gallery: rows of the manifest.
        """
        return self._votes(parts, self.image_vectors(gallery, base=False))

    def _votes(self, parts: Mapping[str, Tensor], gallery_GD: Tensor) -> dict[str, Tensor]:
        temperature = self._section.ensemble.temperature
        votes = {name: similarity(vectors, gallery_GD) for name, vectors in parts.items()}
        if temperature is None:
            return votes
        return {name: (of_part / temperature).softmax(dim=1) for name, of_part in votes.items()}

    def ensemble_similarity(self, parts: Mapping[str, Tensor], gallery: pa.Table) -> Rows:
        """Return what computes rows of the ensemble's similarity: one search with the summed vectors, or soft votes.

        Args:
            parts: unit vectors from `part_vectors`.
            gallery: rows of the manifest.

        Source: METHOD 7. Differs: `ensemble.temperature`, which is ours; soft votes need one search per part.
        """
        ensemble = self._section.ensemble
        if ensemble.temperature is None:
            return self.similarity(ensemble_query(parts, ensemble.weights), gallery, base=False)

        gallery_GD = self.image_vectors(gallery, base=False)

        def voted(rows: slice) -> Similarity:
            votes = self._votes({name: vectors[rows] for name, vectors in parts.items()}, gallery_GD)
            return _numbers(ensemble_query(votes, ensemble.weights))

        return voted

    def _asks_alone(self, query: pa.Table) -> Callable[[pa.Table], Rows]:
        vectors_QD = self.image_vectors(query, base=True)
        return lambda gallery: self.similarity(vectors_QD, gallery, base=True)

    def _asks(self, kind: str, parts: Mapping[str, Tensor]) -> Callable[[pa.Table], Rows]:
        if kind == "ensemble":
            return lambda gallery: self.ensemble_similarity(parts, gallery)
        return lambda gallery: self.similarity(parts[kind], gallery, base=False)

    def _case(
        self,
        kind: str,
        source: TextSource,
        protocol: Protocol,
        query: pa.Table,
        ask: Callable[[pa.Table], Rows],
    ) -> CaseResult:
        trials, chances = [], []
        for trial in range(protocol.num_trials):
            gallery = self.gallery(protocol, trial)
            trials.append(
                ranking_metrics(
                    ask(gallery),
                    column(query, "pid"),
                    column(gallery, "pid"),
                    column(query, "camid"),
                    column(gallery, "camid"),
                    protocol=protocol.dataset,
                )
            )
            chances.append(chance_level(query, gallery, protocol))
        return CaseResult(
            query=kind,
            text_source=source,
            protocol=protocol.name,
            trials=tuple(trials),
            chance=float(np.mean(chances)),
        )

    def _on_device(self, array: npt.NDArray[np.float32]) -> Tensor:
        return torch.from_numpy(array).to(next(self._model.parameters()).device)


def _numbers(similarity_QG: Tensor) -> Similarity:
    numbers: Similarity = similarity_QG.cpu().numpy()
    return numbers


def default_case(results: Sequence[CaseResult], section: EvaluateSection, kind: str) -> CaseResult | None:
    """Return the result of a query kind in the default table, or None if it was not evaluated."""
    source = "none" if kind in ("infrared", "visible") else section.default_text_source
    for case in results:
        if (case.query, case.text_source, case.protocol) == (kind, source, section.protocols[0]):
            return case
    return None
