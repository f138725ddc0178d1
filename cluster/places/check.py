"""Storage of jobs on a cluster: test it before a long job, and resolve relative paths on it."""

from __future__ import annotations

import json
import os
import threading
import uuid
from pathlib import Path

from pydantic import BaseModel

from tvilfm.config import Config
from tvilfm.place import Place

# Never sent with a job: version control, environments, caches, builds, weights, secrets.
EXCLUDED = (
    *(".git", ".venv", "venv", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info", "/build", "/dist"),
    *("*.pt", "*.pth", "*.ckpt", "*.safetensors", "*.onnx", "*.gguf", "*.npy"),
    *(".env", ".env.*", "*.pem", "*.key", "*.p12", "*.pfx", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*"),
    *(".netrc", ".git-credentials", ".pgpass", ".aws", ".kube", ".ssh", ".gnupg", ".docker", ".azure", "gcloud"),
    *("credentials*.json", "application_default_credentials.json", ".ray"),
)
# (text of a store's error, advice); the first match is used.
ADVICE = (
    ("NO_SUCH_BUCKET", "Create the bucket, or fix its name."),
    ("bucket does not exist", "Create the bucket, or fix its name."),
    ("ACCESS_DENIED", "Allow these credentials to read, write and delete objects in it."),
    ("Permission denied", "Allow this user to write to it."),
    (
        "INVALID_ACCESS_KEY",
        "Set the store's credentials in the environment (AWS_ACCESS_KEY_ID, ...), on every machine.",
    ),
    ("SIGNATURE_DOES_NOT_MATCH", "Fix the secret key in the environment, on every machine."),
    ("credentials", "Set the store's credentials in the environment, on every machine."),
    ("NETWORK_CONNECTION", "Fix the endpoint in the URI (endpoint_override, scheme), or the network."),
    ("resolve", "Fix the endpoint in the URI (endpoint_override, scheme), or the network."),
    ("Not a directory", "A part of the path is a file: choose another folder."),
    ("No space left", "Free some space, or choose another place."),
    ("Read-only", "Mount it writable, or choose another place."),
    ("Operation not permitted", "Choose a writable folder."),
    ("No such file", "Choose a writable folder."),
    ("no answer", "Fix the endpoint in the URI (endpoint_override, scheme), or the network."),
)
ANSWER_S = 60.0


def check_storage(uri: str) -> None:
    """Check that a folder or URI works: write, read and delete one object in it.

    Raises:
        ValueError: one of the three steps failed or took longer than `ANSWER_S`. The message names the step, the reason
            and the fix.
    """
    place = Place(uri)
    trial = _Trial(place)
    # Google's client retries a missing endpoint for 15 minutes.
    trial.thread.start()
    trial.thread.join(ANSWER_S)
    error = trial.error
    if trial.thread.is_alive():
        error = TimeoutError(f"no answer within {ANSWER_S:g} s")
    if error is not None:
        advice = next(
            (advice for sign, advice in ADVICE if sign.lower() in str(error).lower()), "Choose another place."
        )
        raise ValueError(f"{place}: expected a place to {trial.step}, got {error}. {advice}") from None


class _Trial:
    """Writes, reads and deletes one object, in a daemon thread that does not keep the program alive."""

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
                raise OSError("bytes that differ from those written")
            self.step = "delete"
            place.filesystem.delete_file(place.path)
        except Exception as error:  # raised by the thread that waits
            self.error = error


def storage_folder(config: Config) -> Path | None:
    """Return `cluster.storage` if it is a folder, else None. Relative paths of jobs on the cluster start there."""
    storage = config.cluster.storage
    return None if storage is None or Place(storage).is_uri else Path(storage)


def paths_of(config: Config) -> dict[str, str]:
    """Return dotted key -> path or URI of a description. The cluster section is left out: its paths are local."""
    paths: dict[str, str] = {}
    for name, section in config:
        if isinstance(section, BaseModel) and name != "cluster":
            paths |= {f"{name}.{key}": str(value) for key, value in section if isinstance(value, Path)}
    url = config.gallery.url
    return paths | ({"gallery.url": url} if url and "://" not in url else {})


def absolute_paths(config: Config, base: Path | None) -> list[str]:
    """Return overrides that make the relative paths of a description absolute, so that all machines resolve them alike.

    Args:
        config: the description.
        base: folder that the paths are relative to; None = no folder is shared by all machines.

    Raises:
        ValueError: the description has relative paths and there is no shared folder.
    """
    relative = {key: path for key, path in paths_of(config).items() if Place(path).is_relative}
    if relative and base is None:
        key, path = next(iter(relative.items()))
        raise ValueError(
            f"{key}: expected an absolute path for other machines, got {path}. Set cluster.storage to a folder that "
            f"all machines share, or set {key} to an absolute path."
        )
    return [f"{key}={json.dumps(str(base / path))}" for key, path in relative.items() if base]


def excluded(config: Config, folder: Path) -> list[str]:
    """Return gitignore patterns of files that are not sent with a job: `EXCLUDED`, data, runs, galleries, keys."""
    secrets = [path for path in (config.cluster.token_path, config.cluster.provider.ssh_key) if path is not None]
    named = [path for path in paths_of(config).values() if not Place(path).is_uri]
    paths: list[Path] = [folder / Path(path).expanduser() for path in [*map(str, secrets), *named]]
    inside = set()
    for absolute in (os.path.abspath, os.path.realpath):  # Ray follows links, so exclude a link and its target
        here = absolute(folder)
        relative = (os.path.relpath(absolute(path), here) for path in paths)
        inside |= {f"/{path}" for path in relative if path.partition("/")[0] not in (".", "..")}
    return [*EXCLUDED, *sorted(inside)]
