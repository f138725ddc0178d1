"""The section `evaluate`: protocols, query texts, ensemble weights and re-ranking."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tvilfm.config.data import PROTOCOLS
from tvilfm.config.section import Section

WitnessDraw = Literal["released", "seeded"]
QueryTextSource = Literal["witness", "witness-heldout", "own", "human"]


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
    ensemble: EnsembleWeights = EnsembleWeights()
    rerank: RerankSection = RerankSection()
    batch: int = Field(128, ge=1, description="images or captions per extraction batch")

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
        if not self.protocols:
            raise ValueError("protocols: expected at least one, got none. Set null for all of the dataset.")
        return self
