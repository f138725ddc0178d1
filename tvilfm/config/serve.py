"""The sections `gallery` and `serve`: the gallery that is searched, and the service."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from pydantic import Field, model_validator

from tvilfm.config.section import Section, check_no_keys

MAX_BATCH = 10_000  # that serve.max_batch may be: so much is checked of a body before it is counted


class GallerySection(Section):
    """The people that a service searches, and how."""

    uri: str | None = Field(
        None, description="folder or object store prefix of the gallery; null = gallery/ in the run folder"
    )
    exact_limit: int = Field(
        100_000, ge=0, description="up to this many rows, search is exact and in memory; above, it uses IVF_PQ"
    )
    partitions: int | None = Field(None, ge=1, description="lists of the index (IVF); null = square root of the rows")
    sub_vectors: int = Field(
        128, ge=1, description="bytes per vector in the index (PQ); must divide the vector's dimension"
    )
    probes: int = Field(32, ge=1, description="lists of the index that a search reads; more if they have too few rows")
    refine: int = Field(10, ge=1, description="candidates per hit that are compared by their full vectors")
    thumbnail_height: int = Field(192, ge=16, description="height of the stored thumbnails, pixels")

    @model_validator(mode="after")
    def _names_no_keys(self) -> GallerySection:
        check_no_keys("uri", self.uri)
        return self


class ServeSection(Section):
    """The retrieval service: where it listens, how far it scales, what it refuses and what it keeps."""

    host: str = Field("127.0.0.1", description="address to listen on; any address but loopback needs serve.keys")
    port: int = Field(8000, ge=1, le=65535, description="port to listen on")
    keys: Path | None = Field(
        None, description="file of API keys (`tvilfm keys add`); null = no keys, only on loopback"
    )
    tls_cert: Path | None = Field(None, description="certificate (PEM) for HTTPS; null = HTTP")
    tls_key: Path | None = Field(None, description="private key (PEM) of serve.tls_cert")
    captioner: str | None = Field(
        None,
        description="who says what an infrared image shows if the client does not: null = nobody, run = the run's "
        "fine-tuned captioner, or a transformers model",
    )
    encoders: int = Field(1, ge=1, description="encoder replicas without load")
    max_encoders: int = Field(1, ge=1, description="encoder replicas under load")
    searchers: int = Field(2, ge=1, description="searcher replicas; each holds the gallery in memory")
    searcher_gpus: float = Field(0, ge=0, description="GPUs of each searcher; 0.2 lets it share one, 0 = CPU")
    batch: int = Field(16, ge=1, description="maximum queries that are encoded or searched together")
    batch_wait_ms: float = Field(2.0, ge=0, description="how long a batch waits for more queries, milliseconds")
    follow_s: float = Field(1.0, gt=0, description="how often searchers look for a new gallery version, seconds")
    max_body_mb: float = Field(16.0, gt=0, description="largest request body, megabytes (413)")
    max_pixels: int = Field(
        16_000_000, ge=1, description="maximum pixels of an image, and of all images of a request together (422)"
    )
    max_batch: int = Field(
        64, ge=1, le=MAX_BATCH, description="queries of a batch search, and rows of a bulk write (422)"
    )
    max_queued: int = Field(128, ge=1, description="maximum requests that wait for a replica (429)")
    audit: Path | None = Field(None, description="folder of the audit trail; null = audit/ in the run folder")
    audit_days: int | None = Field(None, ge=1, description="days to keep the audit trail; null = forever")
    retention_days: int | None = Field(
        None, ge=1, description="days after which people are deleted from the gallery and its files; null = never"
    )

    @model_validator(mode="after")
    def _agree(self) -> ServeSection:
        if self.keys is None and not is_loopback(self.host):
            raise ValueError(
                f"keys: expected a file of API keys with host {self.host}, got null. Make one with `tvilfm keys add`, "
                "or listen at 127.0.0.1."
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_key: expected both tls_cert and tls_key or none of them, got one.")
        if self.max_encoders < self.encoders:
            raise ValueError(f"max_encoders: expected at least encoders = {self.encoders}, got {self.max_encoders}.")
        return self


def is_loopback(host: str) -> bool:
    """Return whether an address can be reached only from this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
