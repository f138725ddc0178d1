"""What is said over HTTP: requests, checked here and nowhere else, and answers.

Pictures travel as base64 in JSON, as a batch of queries needs it anyway and one way is enough.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import AfterValidator, AwareDatetime, Base64Bytes, BaseModel, ConfigDict, Field, model_validator

from tvilfm.config import MAX_BATCH
from tvilfm.terms import MAX_ID, FilterTextSource, SearchKind, is_id

HEADER = "X-API-Key"
RETRY_S = 1
MAX_HITS = 1000
MAX_TEXT = 2000  # characters; the text tower reads 77 tokens
MAX_KEYS = 100  # of an object; none has half as many fields
INT32, INT64 = 2**31 - 1, 2**63 - 1


def _in_utc(time: datetime) -> datetime:
    try:
        return time.astimezone(UTC)
    except OverflowError:
        raise ValueError("expected a time between the years 1 and 9999 in UTC") from None


def _is_id(id: str) -> str:
    if not is_id(id):
        raise ValueError("expected printable characters")
    return id


Time = Annotated[AwareDatetime, AfterValidator(_in_utc)]
RowId = Annotated[str, Field(min_length=1, max_length=MAX_ID), AfterValidator(_is_id)]
Camera = Annotated[int, Field(ge=0, le=INT32)]
Person = Annotated[int, Field(ge=0, le=INT64)]
Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
# pydantic's errors take a kilobyte each, and a body has room for millions: a list stops at its first one (`fail_fast`).
Cameras = Annotated[list[Camera], Field(max_length=1000, fail_fast=True)]
Vector = Annotated[list[float], Field(max_length=1 << 16, fail_fast=True)]


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _has_few_keys(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and len(fields) > MAX_KEYS:
            raise ValueError(f"expected at most {MAX_KEYS} keys, got {len(fields)}")
        return fields


class Weights(Message):
    """Of each modality in the ensemble."""

    infrared: float = Field(1.0, ge=0, le=1000)
    text: float = Field(1.0, ge=0, le=1000)
    fusion: float = Field(1.0, ge=0, le=1000)


class SearchQuery(Message):
    """A person to look for: an infrared picture, a sentence, or both."""

    image: Base64Bytes | None = Field(None, description="infrared picture, a JPEG, PNG, WebP or BMP file in base64")
    sentence: Text | None = Field(None, description="how somebody describes the person")
    infrared_caption: Text | None = Field(
        None, description="what the infrared picture shows anyway: subtracted before image and sentence are fused"
    )
    weights: Weights | None = Field(None, description="of the modalities; null = those of the run's evaluation")
    k: int = Field(20, ge=1, le=MAX_HITS, description="hits wanted")
    cameras: Cameras | None = Field(None, description="search these alone; null = all")
    exclude_cameras: Cameras = Field([], description="do not search these: the query's own")
    since: Time | None = Field(None, description="earliest time of a picture; one without a time is left out")
    until: Time | None = Field(None, description="latest time of a picture; one without a time is left out")
    by_identity: bool = Field(False, description="the best picture of each person alone")
    min_version: int | None = Field(
        None, ge=0, le=INT64, description="gallery version that the answer has to know: that of one's own last write"
    )

    @model_validator(mode="after")
    def _asks_something(self) -> SearchQuery:
        if not self.image and self.sentence is None:
            raise ValueError("expected an image, a sentence, or both, got neither")
        if self.image and self.sentence and self.weights and not any(self.weights.model_dump().values()):
            raise ValueError("weights: expected one above 0, got none")
        return self


class SearchBatch(Message):
    queries: list[SearchQuery] = Field(min_length=1, max_length=MAX_BATCH, fail_fast=True)


class HitMessage(Message):
    """A row of the gallery."""

    id: str
    score: float = Field(description="similarity; of an ensemble, the weighted sum of its modalities'")
    shares: dict[str, float] = Field(description="what each modality adds to the score, its weight included")
    pid: int | None
    camid: int
    time: datetime | None
    image: str | None = Field(description="where the picture came from; the service itself shows a thumbnail")


class SearchAnswer(Message):
    hits: list[HitMessage] = Field(description="best first")
    version: int = Field(description="of the gallery that was searched")
    modalities: list[str] = Field(description="that voted")
    filter_text: FilterTextSource = Field(description="who said what fusion subtracted; none = nothing was subtracted")


class BatchAnswer(Message):
    answers: list[SearchAnswer]


class Row(Message):
    """A picture of a person, or the vectors of one."""

    image: Base64Bytes | None = Field(None, description="visible picture, a JPEG, PNG, WebP or BMP file in base64")
    vector: Vector | None = Field(None, description="in place of a picture: unit, through the current head")
    vector_base: Vector | None = Field(None, description="comes with vector: unit, through the base stage's head")
    space_id: str | None = Field(None, max_length=MAX_ID, description="comes with vector: of the model that made it")
    camid: Camera = Field(description="camera")
    pid: Person | None = Field(None, description="identity, if it is known")
    time: Time | None = Field(None, description="when the picture was taken")
    reference: str | None = Field(None, max_length=2048, description="where the picture lies; kept, never opened")

    @model_validator(mode="after")
    def _has_one_source(self) -> Row:
        given = [part is not None for part in (self.vector, self.vector_base, self.space_id)]
        if bool(self.image) == any(given) or any(given) != all(given):
            raise ValueError("expected an image, or vector, vector_base and space_id")
        return self


class NamedRow(Row):
    id: RowId


class Bulk(Message):
    rows: list[NamedRow] = Field(min_length=1, max_length=MAX_BATCH, fail_fast=True)

    @model_validator(mode="after")
    def _once_each(self) -> Bulk:
        if len({row.id for row in self.rows}) < len(self.rows):
            raise ValueError("expected each id once, got one twice")
        return self


class Written(Message):
    """A write that is on disk."""

    version: int = Field(description="of the gallery that holds it")
    count: int = Field(description="rows that were written or removed")


class ModelFacts(Message):
    """What is known of the model that serves."""

    model: str
    space_id: str = Field(description="of the model's vectors; the gallery's are of the same")
    text: bool = Field(description="whether the model reads sentences")
    captioner: bool = Field(description="whether infrared pictures are captioned for clients that do not")
    weights: Weights = Field(description="of the modalities, where a query gives none")


class Status(ModelFacts):
    """What is served."""

    images: int = Field(description="rows of the gallery")
    version: int = Field(description="of the gallery")
    search: SearchKind = Field(
        description="exact = all rows in memory; index = a part of the rows on disk; scan = all rows on disk, slowly, "
        "as the gallery is large and has no index: compact it"
    )
    cameras: list[int]
    gallery_in_use: bool = Field(description="false once the gallery was indexed again under another model")


class Problem(Message):
    error: str
