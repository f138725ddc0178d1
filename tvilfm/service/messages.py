"""The messages of the HTTP API: requests, which are validated only here, and responses.

Images are sent as base64 in JSON: batches need this anyway, and one format is enough.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AwareDatetime,
    Base64Bytes,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

from tvilfm.config import MAX_BATCH
from tvilfm.terms import MAX_ID, DepthRange, FilterTextSource, SearchKind, is_blank, is_id, is_nobody

HEADER = "X-API-Key"
RETRY_S = 1
MAX_HITS = 1000
MAX_TEXT = 2000  # characters; the text tower reads 77 tokens
MAX_KEYS = 100  # of a JSON object; no message has half as many fields
INT64 = 2**63 - 1
OLDEST = datetime(1900, 1, 1, tzinfo=UTC)
CLOCK_SKEW = timedelta(days=1)  # of cameras


def _in_utc(time: datetime) -> datetime:
    try:
        return time.astimezone(UTC)
    except OverflowError:
        raise ValueError("expected a time between the years 1 and 9999 in UTC") from None


def _is_id(id: str) -> str:
    if not is_id(id):
        raise ValueError("expected printable characters")
    return id


def _text_of_number(name: Any) -> Any:
    return str(name) if type(name) is int else name


def _is_somebody(person: str) -> str:
    if is_nobody(person):
        raise ValueError(f"expected a person, got {person}, which marks images of nobody. Send no pid with these")
    return person


def _is_plausible(time: datetime) -> datetime:
    if not OLDEST <= time <= datetime.now(UTC) + CLOCK_SKEW:
        raise ValueError(f"expected a time between {OLDEST:%Y-%m-%d} and now, got {time.isoformat()}")
    return time


def _is_said(text: str) -> str:
    if is_blank(text):
        raise ValueError("expected words, got blank text")
    return text


def _without_data_url(image: Any) -> Any:
    """Return the base64 part of a `data:image/png;base64,...` URL, as a browser writes it; other values unchanged."""
    if isinstance(image, str) and image.startswith("data:"):
        return image.partition(",")[2]
    return image


ImageFile = Annotated[Base64Bytes, BeforeValidator(_without_data_url)]
Time = Annotated[AwareDatetime, AfterValidator(_in_utc)]
TakenAt = Annotated[Time, AfterValidator(_is_plausible)]
RowId = Annotated[str, Field(min_length=1, max_length=MAX_ID), AfterValidator(_is_id)]
Name = Annotated[
    str,
    BeforeValidator(_text_of_number),
    StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_ID),
    AfterValidator(_is_id),
]
Person = Annotated[Name, AfterValidator(_is_somebody)]
Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT), AfterValidator(_is_said)]
# Each pydantic error takes a kilobyte, and a body could cause millions, so lists stop at the first error (`fail_fast`).
Cameras = Annotated[list[Name], Field(max_length=1000, fail_fast=True)]
Score = Annotated[float, Field(ge=-1e6, le=1e6)]
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
    """Weight of each modality in the ensemble."""

    infrared: float = Field(1.0, ge=0, le=1000)
    text: float = Field(1.0, ge=0, le=1000)
    fusion: float = Field(1.0, ge=0, le=1000)


class SearchQuery(Message):
    """A person to search for: an infrared image, a sentence, or both, or an image of the gallery."""

    image: ImageFile | None = Field(None, description="infrared image, a JPEG, PNG, WebP or BMP file in base64")
    sentence: Text | None = Field(None, description="description of the person")
    infrared_caption: Text | None = Field(
        None,
        description="what the infrared image already shows; subtracted before image and sentence are fused",
    )
    like: RowId | None = Field(
        None, description="instead of image and sentence: id of a gallery image to which the hits are similar"
    )
    weights: Weights | None = Field(
        None, description="weights of the modalities; null = the weights of the run's evaluation"
    )
    k: int = Field(20, ge=1, le=MAX_HITS, description="number of hits")
    cameras: Cameras | None = Field(None, description="search only these cameras; null = all")
    exclude_cameras: Cameras = Field([], description="cameras to skip, such as the camera of the query")
    since: Time | None = Field(None, description="earliest time of an image; images without a time are skipped")
    until: Time | None = Field(None, description="latest time of an image; images without a time are skipped")
    by_identity: bool = Field(False, description="return only the best image of each person")
    min_score: Score | Literal["fitted", "none"] | None = Field(
        None,
        description="leave out hits below this score; fitted = the run's threshold for the modalities that vote "
        "(min_scores of the status), none = leave out nothing, null = as the service is set (serve.min_score)",
    )
    min_version: int | None = Field(
        None, ge=0, le=INT64, description="minimum gallery version to search (read-your-own-writes)"
    )

    @model_validator(mode="after")
    def _asks_something(self) -> SearchQuery:
        if self.like is not None and (self.image or self.sentence is not None):
            raise ValueError("like: expected no image and no sentence beside it, got one")
        if self.like is None and not self.image and self.sentence is None:
            raise ValueError("expected an image, a sentence, or both, got neither")
        if self.image and self.sentence and self.weights and not any(self.weights.model_dump().values()):
            raise ValueError("weights: expected one above 0, got none")
        return self


class SearchBatch(Message):
    queries: list[SearchQuery] = Field(min_length=1, max_length=MAX_BATCH, fail_fast=True)


class Picture(Message):
    image: ImageFile = Field(description="infrared image, a JPEG, PNG, WebP or BMP file in base64")


class Caption(Message):
    caption: str = Field(description="what the image shows, without colors")


class HitMessage(Message):
    """A ranked row of the gallery."""

    model_config = ConfigDict(from_attributes=True)

    id: str
    score: float = Field(description="similarity; for an ensemble, the weighted sum over its modalities")
    shares: dict[str, float] = Field(description="contribution of each modality to the score, weight included")
    pid: str | None
    camid: str
    time: datetime | None
    image: str | None = Field(description="reference to the original image; the service itself stores a thumbnail")


class SearchAnswer(Message):
    hits: list[HitMessage] = Field(description="best first")
    version: int = Field(description="gallery version that was searched; each write of the database raises it")
    modalities: list[str] = Field(description="modalities that voted")
    filter_text: FilterTextSource = Field(
        description="source of the text that fusion subtracted; none = nothing was subtracted"
    )
    infrared_caption: str | None = Field(None, description="the text that fusion subtracted")
    min_score: float | None = Field(None, description="hits below this score were left out; null = none")
    left_out: int = Field(0, description="number of the k best hits with a lower score")
    sentence_cut: bool = Field(False, description="whether a text was longer than 77 tokens, so its end was not read")


class BatchAnswer(Message):
    answers: list[SearchAnswer]


class Row(Message):
    """An image of a person, or the vectors of one."""

    image: ImageFile | None = Field(None, description="visible image, a JPEG, PNG, WebP or BMP file in base64")
    vector: Vector | None = Field(None, description="instead of an image: unit vector from the current head")
    vector_base: Vector | None = Field(None, description="required with vector: unit vector from the base stage's head")
    space_id: str | None = Field(None, max_length=MAX_ID, description="required with vector: space of the vectors")
    camid: Name = Field(description="camera, as people write it; a number becomes its text")
    pid: Person | None = Field(None, description="identity as people write it, if known; a number becomes its text")
    time: TakenAt | None = Field(None, description="time at which the image was taken")
    reference: str | None = Field(
        None, max_length=2048, description="location of the original image; stored, but never opened"
    )

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

    version: int = Field(description="gallery version that holds the write")
    count: int = Field(description="number of written or removed rows")


class ModelFacts(Message):
    """Facts about the served model."""

    model: str
    space_id: str = Field(description="space of the vectors of the model and the gallery")
    dim: int = Field(description="length of the vectors")
    width: int = Field(description="length of a raw feature, from which both vectors follow")
    text: bool = Field(description="whether the model reads sentences")
    captioner: bool = Field(description="whether the service captions infrared images of clients that send no caption")
    weights: Weights = Field(description="default weights of the modalities")
    min_scores: dict[str, float] = Field(
        {},
        description="score thresholds that the run fitted on validation identities: infrared alone, text alone, "
        "both with the default weights (ensemble), and both if nothing is subtracted (ensemble-unfiltered)",
    )
    min_score: Literal["fitted"] | None = Field(None, description="min_score of requests that have none")
    depth_range: DepthRange = Field(None, description="scaling of images above 8 bits: data.depth_range of the run")


class Status(ModelFacts):
    """Status of the model and the gallery."""

    images: int = Field(description="number of gallery rows")
    version: int = Field(description="gallery version")
    search: SearchKind = Field(
        description="exact = all rows in memory; index = part of the rows in the database; scan = all rows in the "
        "database, which is slow: the gallery is large and has no index, so build it with tvilfm gallery optimize"
    )
    cameras: list[str]
    gallery_in_use: bool = Field(description="false once the gallery has been indexed again with another model")


class Problem(Message):
    error: str
