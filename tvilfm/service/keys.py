"""API keys: who may ask what. A file holds their hashes; a key itself is shown once, to whoever makes it.

A key is 256 random bits, so one round of SHA-256 keeps it as well as a slow hash would keep a password.
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
PREFIX = "tvi_"  # lets scanners of leaked secrets find one


class Key(BaseModel):
    """What is kept of a key.

    Attributes:
        name: the key id, as it stands in the audit trail.
        scopes: read: search, pictures, status. write: add and remove pictures. admin: erase people, compact.
        sha256: of the key, hexadecimal.
        created: when it was made.
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
    """The keys of a file, which is read again when it changes: a key that is removed there opens nothing any more."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int] | None = None
        self._keys: list[Key] = []
        self.read()

    def read(self) -> Sequence[Key]:
        """All keys of the file as it is now.

        Raises:
            ValueError: there is no such file, or it is none of keys.
        """
        try:
            status = self._path.stat()
        except OSError:
            raise ValueError(
                f"serve.keys: expected a file of API keys, got {self._path}, which is none. "
                f"Make one: tvilfm keys add NAME --file {self._path}."
            ) from None
        if self._stamp != (stamp := (status.st_mtime_ns, status.st_ino)):
            self._keys, self._stamp = _read(self._path), stamp
        return self._keys

    def find(self, token: str) -> Key | None:
        """The key with that secret, None if there is none; it takes as long whichever it is."""
        digest = _digest(token)
        found = None
        for key in self.read():
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found


def add_key(path: Path, name: str, scopes: Sequence[str]) -> str:
    """Make a key and write its hash into a file, which is made if need be.

    Returns:
        The key, which nobody can tell again.

    Raises:
        ValueError: a key of that name is there, a scope is none of `SCOPES`, or the file is none of keys.
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
                f"name: expected a new one, got {name}, which has a key. Remove it first: tvilfm keys remove."
            )
        token, now = PREFIX + secrets.token_urlsafe(32), datetime.now(UTC)
        made = {"name": name, "scopes": scopes, "sha256": _digest(token), "created": now}
        _write(path, [*keys, Key.model_validate(made)])
    return token


def remove_key(path: Path, name: str) -> None:
    """Take a key's rights away, of a running service too.

    Raises:
        ValueError: there is no key of that name, or the file is none of keys.
    """
    file = KeyFile(path)
    with _alone(path):
        keys = list(file.read())
        if name not in [key.name for key in keys]:
            raise ValueError(f"name: expected one of {[key.name for key in keys]}, got {name}.")
        _write(path, [key for key in keys if key.name != name])


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Change a file while no other command does: what it changed would be lost, a key that was removed come back."""
    with lock(path.with_name(f"{path.name}.lock")):
        yield


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def _read(path: Path) -> list[Key]:
    try:
        return _File.model_validate(yaml.safe_load(path.read_text()) or {}).keys
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: expected YAML, got {error}. Make the file with tvilfm keys add.") from None
    except ValidationError as error:
        raise ValueError(f"{path}: {explain(error, {'keys'}, see='tvilfm keys add')}") from None


def _write(path: Path, keys: Sequence[Key]) -> None:
    text = yaml.safe_dump(_File(keys=list(keys)).model_dump(mode="json"), sort_keys=False)
    write_whole(path, text, mode=0o600)
