"""The sections `gallery` and `serve`: the gallery and the service that searches it."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qsl, urlsplit

from pydantic import Field, model_validator

from tvilfm.config.section import Section

# Upper bound of serve.max_batch; bodies are validated against it before the configured limit applies.
MAX_BATCH = 10_000


class GallerySection(Section):
    """The gallery that a service searches, and its index."""

    url: str | None = Field(
        None,
        description="postgresql://HOST/DATABASE of a server with pgvector, or a folder for an embedded server on this "
        "machine; null = gallery/ in the run folder",
    )
    read_url: str | None = Field(
        None,
        description="postgresql://HOST/DATABASE of a read replica of the server, from which searchers read; null = "
        "gallery.url",
    )
    exact_limit: int = Field(
        100_000,
        ge=0,
        description="maximum rows for exact search in memory; larger galleries use an index (HNSW)",
    )
    m: int = Field(16, ge=2, le=100, description="links per row in the index (HNSW)")
    ef_construction: int = Field(
        64, ge=4, le=1000, description="candidates per row while the index is built; at least twice gallery.m"
    )
    ef_search: int = Field(100, ge=1, le=1000, description="minimum candidates per search with the index")
    refine: int = Field(10, ge=1, description="candidates per hit that are compared with their full vectors")
    build_mb: int = Field(1024, ge=64, description="memory of the server to build the index, megabytes")
    thumbnail_height: int = Field(192, ge=16, description="height of the stored thumbnails, pixels")

    @model_validator(mode="after")
    def _agree(self) -> GallerySection:
        if self.url is not None:
            _check_url("url", self.url)
        if self.read_url is not None:
            _check_url("read_url", self.read_url)
            if "://" not in self.read_url or self.url is None or "://" not in self.url:
                raise ValueError("read_url: expected postgresql://... beside url: postgresql://..., got another place.")
        if self.ef_construction < 2 * self.m:
            raise ValueError(f"ef_construction: expected at least 2 * m = {2 * self.m}, got {self.ef_construction}.")
        return self


class ServeSection(Section):
    """The retrieval service: address, scaling, limits and retention."""

    host: str = Field("127.0.0.1", description="address to listen on; all addresses except loopback require serve.keys")
    port: int = Field(8000, ge=1, le=65535, description="port to listen on")
    keys: Literal["database"] | Path | None = Field(
        None,
        description="API keys (`tvilfm keys add`): database = those in the gallery's database, or a file, such as a "
        "secret of Kubernetes; null = no keys, loopback only",
    )
    tls_cert: Path | None = Field(None, description="certificate (PEM) for HTTPS; null = HTTP")
    tls_key: Path | None = Field(None, description="private key (PEM) of serve.tls_cert")
    captioner: str | None = Field(
        None,
        description="used when a client sends no infrared caption: null = none, run = the run's, or a model",
    )
    min_score: Literal["fitted"] | None = Field(
        None,
        description="hits to leave out: fitted = below the run's score threshold (docs/operations.md); null = none",
    )
    replicas: int = Field(2, ge=1, description="replicas without load (minimum); each encodes and searches")
    max_replicas: int = Field(2, ge=1, description="replicas under load (maximum)")
    shared_encoders: int = Field(
        0, ge=0, description="encoders that all replicas share, for GPUs; 0 = each replica encodes itself"
    )
    shards: int = Field(
        1, ge=1, description="processes that the rows of the gallery are divided over; 1 = each replica holds all rows"
    )
    searcher_gpus: float = Field(
        0, ge=0, description="GPUs for the search, per replica or shard; 0.2 = five share one GPU, 0 = CPU"
    )
    batch: int = Field(16, ge=1, description="maximum queries that are encoded or searched in one batch")
    batch_wait_ms: float = Field(0.0, ge=0, description="time that a batch waits for more queries, milliseconds")
    follow_s: float = Field(1.0, gt=0, description="longest time until searchers see a change of the gallery, seconds")
    max_body_mb: float = Field(16.0, gt=0, description="maximum size of a request body, megabytes (413)")
    max_pixels: int = Field(
        16_000_000, ge=1, description="maximum pixels of an image, and of all images of a request in total (422)"
    )
    max_batch: int = Field(
        64, ge=1, le=MAX_BATCH, description="maximum queries of a batch search, and rows of a bulk write (422)"
    )
    max_queued: int = Field(128, ge=1, description="maximum requests that a replica works on or keeps waiting (429)")
    audit_days: int | None = Field(None, ge=1, description="days to keep the audit trail; null = forever")
    retention_days: int | None = Field(
        None, ge=1, description="days after which rows are deleted from the gallery; null = never"
    )

    @model_validator(mode="after")
    def _agree(self) -> ServeSection:
        if self.keys is None and not is_loopback(self.host):
            raise ValueError(
                f"keys: expected database, or a file of API keys, with host {self.host}, got null. "
                "Create keys with `tvilfm keys add`, or set host to 127.0.0.1."
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_key: expected both tls_cert and tls_key or neither, got one. Set the other one too.")
        if self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas: expected at least replicas = {self.replicas}, got {self.max_replicas}.")
        return self


def is_loopback(host: str) -> bool:
    """Return whether an address can be reached only from this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_url(key: str, url: str) -> None:
    scheme, has_scheme, _ = url.partition("://")
    if has_scheme and scheme not in ("postgresql", "postgres"):
        raise ValueError(f"{key}: expected postgresql://... or a folder, got {scheme}://...")
    if has_scheme and _password_in(url):
        raise ValueError(
            f"{key}: expected no password, because the description is stored with the run, got one. Set PGPASSWORD, or "
            "PGPASSFILE to the path of a password file, on every machine."
        )


def _password_in(url: str) -> str | None:
    """Return the password in a URL of a database, before the host or as an option."""
    parts = urlsplit(url)
    return parts.password or next((value for name, value in parse_qsl(parts.query) if name == "password"), None)
