"""The section `evaluate`: protocols, query texts, ensemble weights and re-ranking."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tvilfm.config.data import PROTOCOLS
from tvilfm.config.section import Section

WitnessDraw = Literal["released", "seeded"]
QueryTextSource = Literal["witness", "witness-heldout", "own"]


class EnsembleWeights(Section):
    """MER (METHOD 7): weights of the three query vectors."""

    infrared: float = Field(1.0, ge=0, description="weight of the infrared query")
    text: float = Field(1.0, ge=0, description="weight of the text query")
    fusion: float = Field(1.0, ge=0, description="weight of the fusion query")
    temperature: float | None = Field(
        None, gt=0, description="temperature of a softmax over the gallery for each vote; null = plain similarities"
    )

    @model_validator(mode="after")
    def _somebody_votes(self) -> EnsembleWeights:
        if not (self.infrared or self.text or self.fusion):
            raise ValueError("fusion: expected a weight above 0 for one query at least, got three zeros. Raise one.")
        return self

    @property
    def weights(self) -> dict[str, float]:
        return {"infrared": self.infrared, "text": self.text, "fusion": self.fusion}


class RerankSection(Section):
    """Re-ranking with the gallery's help."""

    method: Literal["none", "k_reciprocal", "query_expansion"] = Field(
        "none", description="none, k_reciprocal (Zhong et al. 2017) or query_expansion; applies to all queries"
    )
    k1: int = Field(20, ge=1, description="k_reciprocal: neighbourhood size")
    k2: int = Field(6, ge=1, description="k_reciprocal: encodings averaged; 1 = none")
    lambda_value: float = Field(0.3, ge=0, le=1, description="k_reciprocal: share of the original distance")
    k: int = Field(5, ge=1, description="query_expansion: gallery features added")
    alpha: float = Field(3.0, ge=0, description="query_expansion: power of the similarity that weighs them")


class EvaluateSection(Section):
    protocols: tuple[str, ...] = Field(
        PROTOCOLS["synthetic"], description="the first one is that of the default table; null = the dataset's own"
    )
    text_sources: tuple[QueryTextSource, ...] = Field(
        ("witness", "witness-heldout", "own"), description="sources of query texts to report (METHOD 6)"
    )
    default_text_source: QueryTextSource = Field("witness", description="text source of the default table")
    witness_draw: WitnessDraw = Field(
        "seeded",
        description="who draws witness sentences: run.seed (seeded), or RandomState(1) as released; null = fidelity",
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
                f"{self.ensemble.temperature}. A second look takes one query vector, and soft votes have three."
            )
        if not self.protocols:
            raise ValueError("protocols: expected at least one, got none. Set null for the dataset's own.")
        return self
