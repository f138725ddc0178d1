"""API keys, their scopes and limits, and the places that store their hashes: the gallery's database, or a file.

A key itself is shown only once, on creation. It is 256 random bits, so one round of SHA-256 protects it as well as a
slow hash protects a password.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Protocol, get_args

import yaml
from psycopg import errors
from psycopg.rows import dict_row
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from tvilfm.config import explain
from tvilfm.place import lock, write_whole
from tvilfm.retrieval.audit import NewEntry, write_entries
from tvilfm.retrieval.database import Connection, Database

Scope = Literal["read", "write", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
PREFIX = "tvi_"  # lets secret scanners recognise a leaked key


class Key(BaseModel):
    """A stored key.

    Attributes:
        name: name of the key, as recorded in the audit trail.
        scopes: read: search, images, status. write: add and remove images. admin: erase people.
        sha256: hash of the key, hexadecimal.
        created: time of creation.
        expires: time from which the key is refused; None = never.
        per_minute: maximum searches and writes in a minute; None = no limit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    scopes: tuple[Scope, ...]
    sha256: str
    created: AwareDatetime
    expires: AwareDatetime | None = None
    per_minute: int | None = Field(None, ge=1)


class KeyStore(Protocol):
    """A place that stores keys."""

    def read(self) -> list[Key]:
        """Return all keys.

        Raises:
            ValueError: the place is missing or invalid, or this program may not read it.
        """

    def add(self, key: Key) -> None:
        """Store a new key.

        Raises:
            ValueError: its name is taken, or this program may not store keys.
        """

    def remove(self, name: str) -> None:
        """Remove a key. Running services refuse it within a second.

        Raises:
            ValueError: no key has this name, or this program may not remove keys.
        """


def add_key(
    store: KeyStore,
    name: str,
    scopes: Sequence[str],
    *,
    expires: datetime | None = None,
    per_minute: int | None = None,
) -> str:
    """Create and store a key.

    Args:
        store: where the key is stored.
        name, scopes, expires, per_minute: see `Key`.

    Returns:
        The key; it cannot be recovered later.

    Raises:
        ValueError: the name is taken or not printable, a scope is not in `SCOPES`, or the time is not in the future.
    """
    unknown = sorted(set(scopes) - set(SCOPES))
    if unknown or not scopes:
        raise ValueError(f"scope: expected some of {', '.join(SCOPES)}, got {', '.join(unknown) or 'none'}.")
    if not name.isprintable() or not name.strip():
        raise ValueError(f"name: expected printable characters, got {name!r}.")
    now = datetime.now(UTC)
    if expires is not None and expires <= now:
        raise ValueError(f"expires: expected a time in the future, got {expires.isoformat()}.")
    token = PREFIX + secrets.token_urlsafe(32)
    facts = {"name": name, "scopes": scopes, "sha256": digest(token), "created": now}
    store.add(Key.model_validate(facts | {"expires": expires, "per_minute": per_minute}))
    return token


def digest(token: str) -> str:
    """Return the hash of a key, hexadecimal."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


class KeyTable:
    """The keys in the table `api_key` of the gallery's database. Each change has an entry in the audit trail."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def read(self) -> list[Key]:
        query = "SELECT name, scopes, sha256, created, expires, per_minute FROM api_key ORDER BY created, name"

        def work(connection: Connection) -> list[Key]:
            rows = connection.cursor(row_factory=dict_row).execute(query).fetchall()
            return [Key.model_validate(row) for row in rows]

        return self._database.run(work)

    def add(self, key: Key) -> None:
        query = (
            "INSERT INTO api_key (name, scopes, sha256, created, expires, per_minute) VALUES (%(name)s, %(scopes)s, "
            "%(sha256)s, %(created)s, %(expires)s, %(per_minute)s)"
        )

        def work(connection: Connection) -> None:
            connection.execute(query, key.model_dump() | {"scopes": list(key.scopes)})
            facts = key.model_dump(mode="json", exclude={"sha256", "created"})
            write_entries(connection, NewEntry("add key", facts))

        try:
            self._database.run(work)
        except errors.UniqueViolation:
            raise _taken(key.name) from None

    def remove(self, name: str) -> None:
        def work(connection: Connection) -> None:
            if not connection.execute("DELETE FROM api_key WHERE name = %s", (name,)).rowcount:
                known = [one for (one,) in connection.execute("SELECT name FROM api_key ORDER BY name")]
                raise _unknown(name, known)
            write_entries(connection, NewEntry("remove key", {"name": name}))

        self._database.run(work)


def key_store(place: Literal["database"] | Path, database: Database) -> KeyStore:
    """Return the store that `serve.keys` names."""
    return KeyTable(database) if place == "database" else KeyFile(place)


class _Content(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: list[Key] = []


class KeyFile:
    """The keys in a file, for places that get their secrets as files, such as Kubernetes."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> list[Key]:
        try:
            return _Content.model_validate(yaml.safe_load(self._path.read_text()) or {}).keys
        except OSError:
            raise ValueError(
                f"serve.keys: expected a file of API keys, got {self._path}, which cannot be read. "
                f"Create one with tvilfm keys add NAME --file {self._path}."
            ) from None
        except yaml.YAMLError as error:
            raise ValueError(
                f"{self._path}: expected YAML, got {error}. Create the file with tvilfm keys add."
            ) from None
        except ValidationError as error:
            raise ValueError(f"{self._path}: {explain(error, {'keys'}, see='tvilfm keys add')}") from None

    def add(self, key: Key) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with lock(self._lock):
            keys = self.read() if self._path.exists() else []
            if any(one.name == key.name for one in keys):
                raise _taken(key.name)
            self._write([*keys, key])

    def remove(self, name: str) -> None:
        with lock(self._lock):
            keys = self.read()
            if name not in (known := [key.name for key in keys]):
                raise _unknown(name, known)
            self._write([key for key in keys if key.name != name])

    @property
    def _lock(self) -> Path:
        return self._path.with_name(f"{self._path.name}.lock")

    def _write(self, keys: Sequence[Key]) -> None:
        text = yaml.safe_dump(_Content(keys=list(keys)).model_dump(mode="json", exclude_none=True), sort_keys=False)
        write_whole(self._path, text, mode=0o600)


def _taken(name: str) -> ValueError:
    return ValueError(
        f"name: expected a new one, got {name}, which has a key. Remove it first with tvilfm keys remove."
    )


def _unknown(name: str, known: Sequence[str]) -> ValueError:
    return ValueError(f"name: expected one of {list(known)}, got {name}.")
