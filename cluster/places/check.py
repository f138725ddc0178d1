"""Where jobs on a cluster keep what they make: a test of it before a long job, and what relative paths mean there."""

from __future__ import annotations

import json
import os
import threading
import uuid
from pathlib import Path

from pydantic import BaseModel

from tvilfm.config import Config
from tvilfm.place import Place

# Never part of a program: version control, environments, caches, builds, weights, secrets.
EXCLUDED = (
    *(".git", ".venv", "venv", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info", "/build", "/dist"),
    *("*.pt", "*.pth", "*.ckpt", "*.safetensors", "*.onnx", "*.gguf", "*.npy"),
    *(".env", ".env.*", "*.pem", "*.key", "id_rsa", "id_ed25519"),
)
# What a store's error says, and what to do about it; the first that fits.
ADVICE = (
    ("NO_SUCH_BUCKET", "Make the bucket, or mend its name."),
    ("bucket does not exist", "Make the bucket, or mend its name."),
    ("ACCESS_DENIED", "Give these credentials the right to read, write and delete there."),
    ("Permission denied", "Give this user the right to write there."),
    (
        "INVALID_ACCESS_KEY",
        "Set the store's credentials in the environment (AWS_ACCESS_KEY_ID, ...), on every machine.",
    ),
    ("SIGNATURE_DOES_NOT_MATCH", "Mend the secret key in the environment, on every machine."),
    ("credentials", "Set the store's credentials in the environment, on every machine."),
    ("NETWORK_CONNECTION", "Mend the endpoint in the URI (endpoint_override, scheme), or the network."),
    ("resolve", "Mend the endpoint in the URI (endpoint_override, scheme), or the network."),
    ("Not a directory", "A file stands in the way: name another folder."),
    ("No space left", "Free some space, or name another place."),
    ("Read-only", "Mount it writable, or name another place."),
    ("Operation not permitted", "Name a folder that can be written."),
    ("No such file", "Name a folder that can be written."),
    ("no answer", "Mend the endpoint in the URI (endpoint_override, scheme), or the network."),
)
ANSWER_S = 60.0


def check_storage(uri: str) -> None:
    """Write, read and delete one object in a folder or under a URI, as a long job will want to.

    Raises:
        ValueError: one of the three failed or took longer than `ANSWER_S`; it says which, why, and what to do.
    """
    place = Place(uri)
    trial = _Trial(place)
    # Google's client tries an endpoint that is not there for a quarter of an hour.
    trial.thread.start()
    trial.thread.join(ANSWER_S)
    error = trial.error
    if trial.thread.is_alive():
        error = TimeoutError(f"no answer within {ANSWER_S:g} s")
    if error is not None:
        advice = next((advice for sign, advice in ADVICE if sign.lower() in str(error).lower()), "Try another place.")
        raise ValueError(f"{place}: expected a place to {trial.step}, got {error}. {advice}") from None


class _Trial:
    """One object written, read and deleted, in a thread that a program need not wait for."""

    def __init__(self, folder: Place) -> None:
        self.step = "write"
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._run, args=(folder,), daemon=True)

    def _run(self, folder: Place) -> None:
        place, content = folder / f".check-{uuid.uuid4().hex}", uuid.uuid4().bytes
        try:
            place.write(content)
            self.step = "read"
            if place.read() != content:
                raise OSError("other bytes than were written")
            self.step = "delete"
            place.filesystem.delete_file(place.path)
        except Exception as error:  # told by the thread that waits
            self.error = error


def storage_folder(config: Config) -> Path | None:
    """`cluster.storage` where it is a folder: relative paths of jobs on the cluster lie in it."""
    storage = config.cluster.storage
    return None if storage is None or Place(storage).is_uri else Path(storage)


def paths_of(config: Config) -> dict[str, str]:
    """The paths in a description, dotted key -> path or URI; those of its cluster section are about this machine."""
    paths: dict[str, str] = {}
    for name, section in config:
        if isinstance(section, BaseModel) and name != "cluster":
            paths |= {f"{name}.{key}": str(value) for key, value in section if isinstance(value, Path)}
    return paths | ({"gallery.uri": config.gallery.uri} if config.gallery.uri else {})


def is_relative(path: str) -> bool:
    """Whether it means another place in another folder."""
    return Place(path).is_relative


def absolute_paths(config: Config, base: Path | None) -> list[str]:
    """Overrides that make a description's relative paths mean the same on every machine.

    Args:
        config: the description.
        base: the folder that they lie in; None = there is none that every machine sees.

    Raises:
        ValueError: there are relative paths and no such folder.
    """
    relative = {key: path for key, path in paths_of(config).items() if is_relative(path)}
    if relative and base is None:
        key, path = next(iter(relative.items()))
        raise ValueError(
            f"{key}: expected an absolute path for other machines, got {path}. Set cluster.storage to a folder that "
            f"all of them see, or {key}=/path/on/them."
        )
    return [f"{key}={json.dumps(str(base / path))}" for key, path in relative.items() if base]


def excluded(config: Config, folder: Path) -> list[str]:
    """What of a folder stays on this machine, as gitignore patterns: `EXCLUDED`, data, runs, galleries, keys."""
    secrets = [path for path in (config.cluster.token_path, config.cluster.provider.ssh_key) if path is not None]
    named = [path for path in paths_of(config).values() if not Place(path).is_uri]
    paths: list[Path] = [folder / Path(path).expanduser() for path in [*map(str, secrets), *named]]
    inside = set()
    for meant in (os.path.abspath, os.path.realpath):  # Ray follows links, so that both ends of one stay
        here = meant(folder)
        found = (os.path.relpath(meant(path), here) for path in paths)
        inside |= {f"/{path}" for path in found if path.partition("/")[0] not in (".", "..")}
    return [*EXCLUDED, *sorted(inside)]
