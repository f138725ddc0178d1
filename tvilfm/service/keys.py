"""API keys and their scopes. A file holds the hashes of the keys; a key itself is shown only once, on creation.

A key is 256 random bits, so one round of SHA-256 protects it as well as a slow hash protects a password.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from tvilfm.config import explain
from tvilfm.place import lock, write_whole

Scope = Literal["read", "write", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
PREFIX = "tvi_"  # lets secret scanners recognise a leaked key


class Key(BaseModel):
    """Entry of a key in the file.

    Attributes:
        name: name of the key, as recorded in the audit trail.
        scopes: read: search, images, status. write: add and remove images. admin: erase people.
        sha256: hash of the key, hexadecimal.
        created: time of creation.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    scopes: tuple[Scope, ...]
    sha256: str
    created: datetime


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: list[Key] = []


class KeyFile:
    """The keys of a file. The file is read again when it changes, so a removed key stops working at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int] | None = None
        self._keys: list[Key] = []
        self.read()

    def read(self) -> Sequence[Key]:
        """Return all keys that are currently in the file.

        Raises:
            ValueError: the file does not exist, or it is not a file of keys.
        """
        try:
            status = self._path.stat()
        except OSError:
            raise ValueError(
                f"serve.keys: expected a file of API keys, got {self._path}, which does not exist. "
                f"Create one with tvilfm keys add NAME --file {self._path}."
            ) from None
        if self._stamp != (stamp := (status.st_mtime_ns, status.st_ino)):
            self._keys, self._stamp = _read(self._path), stamp
        return self._keys

    def find(self, token: str) -> Key | None:
        """Return the entry of a key, or None if it is unknown. The time does not depend on which entry matches."""
        digest = _digest(token)
        match = None
        for key in self.read():
            if hmac.compare_digest(key.sha256, digest):
                match = key
        return match


def add_key(path: Path, name: str, scopes: Sequence[str]) -> str:
    """Create a key and add its hash to a file, which is created if missing.

    Returns:
        The key; it cannot be recovered later.

    Raises:
        ValueError: the name already has a key, a scope is not in `SCOPES`, or the file is not a file of keys.
    """
    unknown = sorted(set(scopes) - set(SCOPES))
    if unknown or not scopes:
        raise ValueError(f"scope: expected some of {', '.join(SCOPES)}, got {', '.join(unknown) or 'none'}.")
    if not name.isprintable() or not name.strip():
        raise ValueError(f"name: expected printable characters, got {name!r}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path):
        keys = _read(path) if path.exists() else []
        if any(key.name == name for key in keys):
            raise ValueError(
                f"name: expected a new one, got {name}, which has a key. Remove it first with tvilfm keys remove."
            )
        token, now = PREFIX + secrets.token_urlsafe(32), datetime.now(UTC)
        entry = {"name": name, "scopes": scopes, "sha256": _digest(token), "created": now}
        _write(path, [*keys, Key.model_validate(entry)])
    return token


def remove_key(path: Path, name: str) -> None:
    """Remove a key from a file; it stops working at once, also in a running service.

    Raises:
        ValueError: there is no key of that name, or the file is not a file of keys.
    """
    file = KeyFile(path)
    with _alone(path):
        keys = list(file.read())
        if name not in [key.name for key in keys]:
            raise ValueError(f"name: expected one of {[key.name for key in keys]}, got {name}.")
        _write(path, [key for key in keys if key.name != name])


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Lock the file of keys, so that concurrent commands do not overwrite each other's changes."""
    with lock(path.with_name(f"{path.name}.lock")):
        yield


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def _read(path: Path) -> list[Key]:
    try:
        return _File.model_validate(yaml.safe_load(path.read_text()) or {}).keys
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: expected YAML, got {error}. Create the file with tvilfm keys add.") from None
    except ValidationError as error:
        raise ValueError(f"{path}: {explain(error, {'keys'}, see='tvilfm keys add')}") from None


def _write(path: Path, keys: Sequence[Key]) -> None:
    text = yaml.safe_dump(_File(keys=list(keys)).model_dump(mode="json"), sort_keys=False)
    write_whole(path, text, mode=0o600)
