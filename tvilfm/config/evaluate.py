"""The section `evaluate`: protocols, query texts, ensemble weights and re-ranking."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, model_validator

from tvilfm.config.data import PROTOCOLS
from tvilfm.config.section import Section

WitnessDraw = Literal["released", "seeded"]
QueryTextSource = Literal["witness", "witness-heldout", "own", "human"]
# Kinds of `evaluate.text_noise` and their lowest level, which follows the kind ("typos-2"); None = without a level.
CAPTION_NOISE: dict[str, int | None] = {
    "no-colours": None,
    "colours": 1,
    "synonyms": 1,
    "typos": 1,
    "clauses": 1,
    "chatter": None,
    "other-person": None,
}
ATTRIBUTE_NOISE: dict[str, int | None] = {"named": 1, "missing": 0, "wrong": 1}
# What null stands for: the first on every dataset, the second where people have true attributes too.
USUAL_CAPTION_NOISE = ("no-colours", "colours-1", "synonyms-2", "typos-2", "clauses-1", "other-person")
USUAL_ATTRIBUTE_NOISE = (
    *("missing-0", "missing-1", "missing-3", "named-6", "named-3", "named-1"),
    *("wrong-1", "wrong-3"),
)


def noise_level(noise: str) -> tuple[str, int]:
    """Return the kind and the level of one value of `evaluate.text_noise`; the level is 0 if the kind has none.

    Raises:
        ValueError: the kind is unknown, or the level is missing, too low or unwanted.
    """
    kinds = CAPTION_NOISE | ATTRIBUTE_NOISE
    kind, dash, level = noise.rpartition("-")
    if noise in kinds and kinds[noise] is None:
        return noise, 0
    lowest = kinds.get(kind) if dash else None
    if lowest is None or re.fullmatch("[0-9]{1,3}", level) is None or int(level) < lowest:
        known = [name if least is None else f"{name}-N" for name, least in kinds.items()]
        raise ValueError(f"text_noise: expected {', '.join(known)} with a number N, got {noise}.")
    return kind, int(level)


class EnsembleWeights(Section):
    """Weights of the three query vectors in the ensemble (MER, METHOD 7)."""

    infrared: float = Field(1.0, ge=0, description="weight of the infrared query in the ensemble")
    text: float = Field(1.0, ge=0, description="weight of the text query in the ensemble")
    fusion: float = Field(1.0, ge=0, description="weight of the fusion query in the ensemble")
    temperature: float | None = Field(
        None, gt=0, description="temperature of each vote's softmax over the gallery; null = plain similarities"
    )

    @model_validator(mode="after")
    def _somebody_votes(self) -> EnsembleWeights:
        if not (self.infrared or self.text or self.fusion):
            raise ValueError("fusion: expected at least one weight above 0, got three zeros. Raise one.")
        return self

    @property
    def weights(self) -> dict[str, float]:
        return {"infrared": self.infrared, "text": self.text, "fusion": self.fusion}


class RerankSection(Section):
    """Re-ranking of the hits."""

    method: Literal["none", "k_reciprocal", "query_expansion"] = Field(
        "none", description="re-ranking of all queries: none, k_reciprocal (Zhong et al. 2017), query_expansion"
    )
    k1: int = Field(20, ge=1, description="k_reciprocal: size of the neighbourhood")
    k2: int = Field(6, ge=1, description="k_reciprocal: neighbours whose encodings are averaged; 1 = no averaging")
    lambda_value: float = Field(0.3, ge=0, le=1, description="k_reciprocal: weight of the original distance, 0 to 1")
    k: int = Field(5, ge=1, description="query_expansion: gallery features added to the query")
    alpha: float = Field(
        3.0, ge=0, description="query_expansion: exponent of the similarity, the weight of an added feature"
    )


class EvaluateSection(Section):
    protocols: tuple[str, ...] = Field(
        PROTOCOLS["synthetic"],
        description="protocols to report, the first in the default table; null = all of the dataset",
    )
    text_sources: tuple[QueryTextSource, ...] = Field(
        ("witness", "witness-heldout", "own"),
        description="sources of query texts to report (METHOD 6); human: data.human_texts",
    )
    default_text_source: QueryTextSource = Field(
        "witness", description="text source of the default table; witness = drawn with the ground truth (published)"
    )
    witness_draw: WitnessDraw = Field(
        "seeded",
        description="seed of witness sentences: seeded (run.seed), released (1); null = set by fidelity",
    )
    text_noise: tuple[str, ...] = Field(
        (),
        description="changes of the default query texts to evaluate too (METHOD 6), like typos-2; null = a selection",
    )
    max_false_accepts: float = Field(
        0.1,
        ge=0,
        le=1,
        description="share of searches for an absent person that may have a hit; fits the score thresholds (METHOD 8)",
    )
    ensemble: EnsembleWeights = EnsembleWeights()
    rerank: RerankSection = RerankSection()
    batch: int = Field(128, ge=1, description="images or captions per extraction batch")

    @property
    def reads_attributes(self) -> bool:
        """Whether `text_noise` needs the true attributes of people."""
        return any(noise.rpartition("-")[0] in ATTRIBUTE_NOISE for noise in self.text_noise)

    @model_validator(mode="after")
    def _default_is_evaluated(self) -> EvaluateSection:
        if self.default_text_source not in self.text_sources:
            raise ValueError(
                f"default_text_source: expected one of {list(self.text_sources)}, got {self.default_text_source}."
            )
        if self.ensemble.temperature is not None and self.rerank.method != "none":
            raise ValueError(
                f"ensemble.temperature: expected null with rerank.method={self.rerank.method}, got "
                f"{self.ensemble.temperature}. Re-ranking takes one query vector, an ensemble with temperature three."
            )
        for noise in self.text_noise:
            noise_level(noise)
        if len(set(self.text_noise)) < len(self.text_noise):
            raise ValueError(f"text_noise: expected each kind once, got one twice in {list(self.text_noise)}.")
        if not self.protocols:
            raise ValueError("protocols: expected at least one, got none. Set null for all of the dataset.")
        return self
