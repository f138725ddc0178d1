"""Open a model from a run folder, a model folder, the hub, or a checkpoint file of the released code."""

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
from tvilfm.models.wrappers import unwrapped

SETTINGS_FILE = "settings.json"  # in an exported folder


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """A model and what is known about how it was trained.

    Attributes:
        load: function that reads the network from the files; see `model`.
        config: config of the run, or the defaults for a model without a run.
        reported: assumptions and changes made when opening, one sentence each.
        path: the opened path.
    """

    load: Callable[[], TVILFM]
    config: Config
    reported: tuple[str, ...]
    path: Path

    @cached_property
    def model(self) -> TVILFM:
        """The network in eval mode, on the CPU. It is read at the first access, which takes seconds.

        Raises:
            ValueError: the files do not contain a TVI-LFM model.
        """
        with _WithoutDraws():
            return self.load().eval()

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that a search needs besides the weights; `open_model` reads them from `SETTINGS_FILE`."""
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
    """Skip the random initialisation, which takes seconds and is overwritten by the weights from the file."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.normal_, Tensor.uniform_):
            return args[0]
        return func(*args, **(kwargs or {}))


def open_model(path: Path) -> OpenedModel:
    """Open a run folder, a `save_pretrained` folder, a hub repository `owner/model`, or a released checkpoint file.

    A checkpoint file may contain the state dict under `state_dict` or `model`, and its keys may begin with `module.`
    or `_orig_mod.`. A base-stage file yields a model without a text stage.

    Args:
        path: folder, file or hub name.

    Raises:
        ValueError: the path does not exist, the run is unfinished, or the file is not a checkpoint.
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
    """Return whether a path that does not exist may be a hub name `owner/model`."""
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
    """Return a hash of the contents of a model's files; it does not depend on their location.

    Args:
        path: as for `open_model`.

    Raises:
        ValueError: a file is missing, or the run is unfinished.
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
    """Return the folder of a run's model and the name of the stage that wrote it."""
    try:
        stages = dict(json.loads((path / "run.json").read_text())["stages"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / 'run.json'}: expected the stages of a run, got {error!r}. Run it again.") from None
    name = next((name for name in ("text", "trained", "base") if name in stages), None)
    if name is None:
        raise ValueError(f"{path}: expected a run with a trained stage, got {sorted(stages)}. Finish it: tvilfm train.")
    folder = path / stages[name] / "model"
    if not folder.is_dir():
        raise ValueError(f"{path}: expected its model in {folder}, got no such folder. Copy the run's stages as well.")
    return folder, name


def _open_folder(path: Path) -> tuple[Path, Config, list[str]]:
    """Return the model folder, config and report lines of a run folder, a model folder or a hub name."""
    if not (path / "run.json").is_file():
        folder = path if path.is_dir() else download(str(path))
        return folder, _settings(folder), []
    folder, name = _run_model(path)
    reported = [] if name != "base" else [f"{path} has only a base stage: its model cannot read sentences."]
    return folder, load_config(path / "config.yaml"), reported


def _read_file(path: Path) -> tuple[Mapping[str, Tensor], list[str]]:
    state, notes = unwrapped(read_pickle(path))
    return state, [f"{path}: {note}" for note in notes]
