"""The sections `gallery` and `serve`: the gallery and the service that searches it."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from pydantic import Field, model_validator

from tvilfm.config.section import Section, check_no_keys

# Upper bound of serve.max_batch; bodies are validated against it before the configured limit applies.
MAX_BATCH = 10_000


class GallerySection(Section):
    """The gallery that a service searches, and its index."""

    uri: str | None = Field(
        None, description="folder or object store prefix of the gallery; null = gallery/ in the run folder"
    )
    exact_limit: int = Field(
        100_000, ge=0, description="maximum rows for exact search in memory; larger galleries use an index (IVF_PQ)"
    )
    partitions: int | None = Field(
        None, ge=1, description="lists of the index (IVF); null = square root of the number of rows"
    )
    sub_vectors: int = Field(
        128, ge=1, description="bytes per vector in the index (PQ); must divide the vector's dimension"
    )
    probes: int = Field(32, ge=1, description="lists of the index per search; more are read if these have too few rows")
    refine: int = Field(10, ge=1, description="candidates per hit that are compared with their full vectors")
    thumbnail_height: int = Field(192, ge=16, description="height of the stored thumbnails, pixels")

    @model_validator(mode="after")
    def _names_no_keys(self) -> GallerySection:
        check_no_keys("uri", self.uri)
        return self


class ServeSection(Section):
    """The retrieval service: address, scaling, limits and retention."""

    host: str = Field("127.0.0.1", description="address to listen on; all addresses except loopback require serve.keys")
    port: int = Field(8000, ge=1, le=65535, description="port to listen on")
    keys: Path | None = Field(None, description="file of API keys (`tvilfm keys add`); null = no keys, loopback only")
    tls_cert: Path | None = Field(None, description="certificate (PEM) for HTTPS; null = HTTP")
    tls_key: Path | None = Field(None, description="private key (PEM) of serve.tls_cert")
    captioner: str | None = Field(
        None,
        description="used when a client sends no infrared caption: null = none, run = the run's, or a model",
    )
    encoders: int = Field(1, ge=1, description="encoder replicas without load (minimum)")
    max_encoders: int = Field(1, ge=1, description="encoder replicas under load (maximum)")
    searchers: int = Field(2, ge=1, description="searcher replicas; each one holds the gallery in memory")
    searcher_gpus: float = Field(0, ge=0, description="GPUs per searcher; 0.2 = five searchers share one GPU, 0 = CPU")
    batch: int = Field(16, ge=1, description="maximum queries that are encoded or searched in one batch")
    batch_wait_ms: float = Field(2.0, ge=0, description="time that a batch waits for more queries, milliseconds")
    follow_s: float = Field(
        1.0, gt=0, description="interval at which searchers check for a new gallery version, seconds"
    )
    max_body_mb: float = Field(16.0, gt=0, description="maximum size of a request body, megabytes (413)")
    max_pixels: int = Field(
        16_000_000, ge=1, description="maximum pixels of an image, and of all images of a request in total (422)"
    )
    max_batch: int = Field(
        64, ge=1, le=MAX_BATCH, description="maximum queries of a batch search, and rows of a bulk write (422)"
    )
    max_queued: int = Field(128, ge=1, description="maximum requests that wait for a replica (429)")
    audit: Path | None = Field(None, description="folder of the audit trail; null = audit/ in the run folder")
    audit_days: int | None = Field(None, ge=1, description="days to keep the audit trail; null = forever")
    retention_days: int | None = Field(
        None, ge=1, description="days after which rows are deleted from the gallery and its files; null = never"
    )

    @model_validator(mode="after")
    def _agree(self) -> ServeSection:
        if self.keys is None and not is_loopback(self.host):
            raise ValueError(
                f"keys: expected a file of API keys with host {self.host}, got null. "
                "Create one with `tvilfm keys add`, or set host to 127.0.0.1."
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_key: expected both tls_cert and tls_key or neither, got one. Set the other one too.")
        if self.max_encoders < self.encoders:
            raise ValueError(f"max_encoders: expected at least encoders = {self.encoders}, got {self.max_encoders}.")
        return self


def is_loopback(host: str) -> bool:
    """Return whether an address can be reached only from this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
