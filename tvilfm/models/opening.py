"""Open a model from a run folder, a model folder, a hub, or a checkpoint file of the released code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from tvilfm.config import Config, load_config
from tvilfm.files import content_digests
from tvilfm.models.released import load_released, read_pickle
from tvilfm.models.tvilfm import TVILFM, download

WRAPPERS = ("state_dict", "model")
SETTINGS_FILE = "settings.json"  # in a folder that was exported
PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and of torch.compile


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """A model and what is known about how it was trained.

    Attributes:
        load: reads the network from the files; see `model`.
        config: the run's, or the defaults for a model without a run.
        reported: what the opening assumed or changed, one sentence each.
        path: what was opened.
    """

    load: Callable[[], TVILFM]
    config: Config
    reported: tuple[str, ...]
    path: Path

    @cached_property
    def model(self) -> TVILFM:
        """The network in eval mode, on the CPU, read at the first access, which takes seconds.

        Raises:
            ValueError: files that hold no TVI-LFM model.
        """
        with _WithoutDraws():
            return self.load().eval()

    @property
    def settings(self) -> dict[str, Any]:
        """What a search needs beside the weights; `open_model` reads it from `SETTINGS_FILE`."""
        config = self.config
        return {
            "height": config.data.height,
            "width": config.data.width,
            "filter_text": config.loss.filter_text,
            "ensemble": config.evaluate.ensemble.model_dump(),
        }

    @property
    def height(self) -> int:
        return self.config.data.height

    @property
    def width(self) -> int:
        return self.config.data.width


class _WithoutDraws(TorchFunctionMode):
    """Skip random initial weights, which take seconds and are replaced by the file's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.normal_, Tensor.uniform_):
            return args[0]
        return func(*args, **(kwargs or {}))


def open_model(path: Path) -> OpenedModel:
    """Open a run folder, a folder of `save_pretrained`, `owner/model` of a hub, or a released checkpoint file.

    A checkpoint file may hold the state dict as `state_dict` or `model`, and its keys may begin with `module.` or
    `_orig_mod.`; a file of the base stage gives a model without a text stage.

    Args:
        path: of the folder or the file.

    Raises:
        ValueError: nothing there, an unfinished run, or a file that is no checkpoint.
    """
    if not path.exists() and not is_hub_name(path):
        raise ValueError(
            f"model: expected a run folder, a model folder or a checkpoint file, got {path}, which does not exist. "
            "Check the path."
        )
    recorded = (path / "run.json").is_file()
    load: Callable[[], TVILFM]
    if path.is_file():
        state, reported = _read_file(path)
        load, config = partial(load_released, state), Config()
    else:
        folder, config, reported = _open_folder(path)
        load = partial(TVILFM.from_pretrained, folder)
        recorded = recorded or (folder / SETTINGS_FILE).is_file()
    if not recorded:
        reported.append(
            f"{path} does not record its settings: images are resized to {config.data.height} x {config.data.width} "
            "(height x width), and the modalities have equal weights."
        )
    return OpenedModel(load=load, config=config, reported=tuple(reported), path=path)


def is_hub_name(path: Path) -> bool:
    """Return whether a path that does not exist may be `owner/model` of a hub."""
    return len(path.parts) == 2 and not path.suffix and not path.parent.exists()


def _settings(folder: Path) -> Config:
    file = folder / SETTINGS_FILE
    if not file.is_file():
        return Config()
    settings = json.loads(file.read_text())
    written = {
        "data.height": settings["height"],
        "data.width": settings["width"],
        "loss.filter_text": settings["filter_text"],
        "evaluate.ensemble": settings["ensemble"],
    }
    return load_config(None, [f"{key}={json.dumps(value)}" for key, value in written.items()])


def model_fingerprint(path: Path) -> str:
    """Return a hash of the bytes of a model's files, wherever they are.

    Args:
        path: as of `open_model`.

    Raises:
        ValueError: as `open_model`, of folders.
    """
    files = [path]
    if not path.is_file():
        folder = _run_model(path)[0] if (path / "run.json").is_file() else path
        if not folder.exists() and is_hub_name(folder):
            folder = download(str(folder))
        files = [folder / "model.safetensors", folder / "config.json"]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise ValueError(
            f"model: expected a run folder, a model folder or a checkpoint file, got {path} without {missing[0].name}. "
            "Check the path."
        )
    digest = hashlib.sha256()
    for file in files:
        digest.update(*content_digests(file.parent, [file.name]))
    return digest.hexdigest()[:16]


def _run_model(path: Path) -> tuple[Path, str]:
    """Return the folder of a run's model, and the stage that wrote it."""
    try:
        stages = dict(json.loads((path / "run.json").read_text())["stages"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / 'run.json'}: expected the stages of a run, got {error!r}. Run it again.") from None
    name = next((name for name in ("text", "trained", "base") if name in stages), None)
    if name is None:
        raise ValueError(f"{path}: expected a run with a trained stage, got {sorted(stages)}. Finish it: tvilfm train.")
    folder = path / stages[name] / "model"
    if not folder.is_dir():
        raise ValueError(f"{path}: expected its model in {folder}, got no such folder. Copy the run's stages too.")
    return folder, name


def _open_folder(path: Path) -> tuple[Path, Config, list[str]]:
    """Return the model folder of a run folder, a model folder or a hub name, its settings and what to report."""
    if not (path / "run.json").is_file():
        folder = path if path.is_dir() else download(str(path))
        return folder, _settings(folder), []
    folder, name = _run_model(path)
    reported = [] if name != "base" else [f"{path} has only a base stage: its model cannot read sentences."]
    return folder, load_config(path / "config.yaml"), reported


def _read_file(path: Path) -> tuple[Mapping[str, Tensor], list[str]]:
    held, reported = read_pickle(path), []
    for key in WRAPPERS:
        if isinstance(held, Mapping) and isinstance(held.get(key), Mapping):
            held = held[key]
            reported.append(f"{path}: the state dict was read from {key!r}.")
            break
    state, removed = _without_prefixes(held)
    if removed:
        reported.append(f"{path}: the prefix {removed!r} was removed from the keys.")
    return state, reported


def _without_prefixes(held: Any) -> tuple[Mapping[str, Tensor], str]:
    """Return the state dict without a prefix that wrappers put before all keys, and the prefix."""
    removed = ""
    while isinstance(held, Mapping) and held:
        prefix = next((prefix for prefix in PREFIXES if all(str(key).startswith(prefix) for key in held)), None)
        if prefix is None:
            break
        held = {str(key).removeprefix(prefix): value for key, value in held.items()}
        removed += prefix
    return held, removed
