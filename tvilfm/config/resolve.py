"""The complete run description: reading, overriding, validating and writing it."""

from __future__ import annotations

import copy
import difflib
import json
import os
import re
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from tvilfm.config.caption import CaptionSection
from tvilfm.config.cluster import ClusterSection
from tvilfm.config.data import PROTOCOLS, DataSection
from tvilfm.config.evaluate import (
    ATTRIBUTE_NOISE,
    CAPTION_NOISE,
    USUAL_ATTRIBUTE_NOISE,
    USUAL_CAPTION_NOISE,
    EvaluateSection,
)
from tvilfm.config.fidelity import FIDELITY_SWITCHES, Fidelity
from tvilfm.config.model import ModelSection
from tvilfm.config.run import RunSection
from tvilfm.config.section import Section
from tvilfm.config.serve import GallerySection, ServeSection
from tvilfm.config.training import LossSection, OptimSection, TrainSection


class Config(Section):
    fidelity: Fidelity = Field(
        "corrected", description="published = settings of the released code, corrected = our settings (docs/method.md)"
    )
    run: RunSection = RunSection()
    data: DataSection = DataSection()
    caption: CaptionSection = CaptionSection()
    model: ModelSection = ModelSection()
    loss: LossSection = LossSection()
    optim: OptimSection = OptimSection()
    train: TrainSection = TrainSection()
    evaluate: EvaluateSection = EvaluateSection()
    gallery: GallerySection = GallerySection()
    serve: ServeSection = ServeSection()
    cluster: ClusterSection = ClusterSection()

    @model_validator(mode="after")
    def _sections_agree(self) -> Config:
        workers, images = self.cluster.train_workers, self.train.p * self.train.k
        if images % workers:
            raise ValueError(
                f"cluster.train_workers: expected a divisor of train.p x train.k = {images}, got {workers}. Every "
                "worker gets the same number of images."
            )
        if self.caption.source == "finetuned" and workers > self.caption.train.batch:
            raise ValueError(
                f"cluster.train_workers: expected at most caption.train.batch = {self.caption.train.batch} while "
                f"captioners are fine-tuned, got {workers}. Raise caption.train.batch or lower train_workers."
            )
        if self.data.name != "synthetic" and self.data.root is None:
            raise ValueError(
                f"data.root: expected the folder of {self.data.name}, got null. Set data.root=/path/to/it."
            )
        own = PROTOCOLS[self.data.name][0].split("/")[0]
        foreign = [name for name in self.evaluate.protocols if name.split("/")[0] != own]
        if foreign:
            raise ValueError(
                f"evaluate.protocols: expected protocols of {own} for data.name={self.data.name}, got {foreign[0]}. "
                f"Set evaluate.protocols=null for {list(PROTOCOLS[self.data.name])}."
            )
        if "human" in self.evaluate.text_sources and self.data.human_texts is None:
            raise ValueError(
                "data.human_texts: expected a JSON file while evaluate.text_sources has human, got null. Set the path "
                "of the file, or remove human."
            )
        if self.evaluate.reads_attributes and self.data.name != "synthetic":
            raise ValueError(
                f"evaluate.text_noise: expected kinds that work on captions for data.name={self.data.name}, got one of "
                f"{list(ATTRIBUTE_NOISE)}, which needs true attributes. Choose from {list(CAPTION_NOISE)}."
            )
        if self.train.text.cache_views and not self.freezes_features:
            changing = "freeze_gem" if self.train.text.freeze_batch_norm else "freeze_batch_norm"
            raise ValueError(
                f"train.text.cache_views: expected 0 while train.text.{changing} is false, got "
                f"{self.train.text.cache_views}. Features of a network that still changes cannot be cached."
            )
        if self.fidelity == "published" and self.train.base.use_val != self.train.text.use_val:
            raise ValueError("train.text.use_val: expected the same as train.base.use_val with published fidelity.")
        return self

    @property
    def trains_gem(self) -> bool:
        """Whether the text stage trains p of GeM."""
        return not (self.train.text.freeze_gem or self.loss.filter_text)

    @property
    def freezes_features(self) -> bool:
        """Whether raw image features stay constant in the text stage."""
        return self.train.text.freeze_batch_norm and not self.trains_gem

    @property
    def data_root(self) -> Path:
        if self.data.root is not None:
            return self.data.root
        return self.run.dir / "data" / f"synthetic-{self.data.synthetic.size}-{self.data.synthetic.seed}"

    @property
    def gallery_url(self) -> str:
        return self.gallery.url or str(self.run.path / "gallery")

    @property
    def stages_path(self) -> Path:
        return self.run.stages_dir or self.run.path / "stages"


# Keys of earlier versions. Runs store all keys, so a removed one is ignored if it has its former default.
FORMER_DEFAULTS: dict[str, Any] = {
    "gallery.uri": None,
    "gallery.partitions": None,
    "gallery.sub_vectors": 128,
    "gallery.probes": 32,
    "serve.audit": None,
    "serve.encoders": 1,
    "serve.max_encoders": 1,
    "serve.searchers": 2,
}


def load_config(path: Path | None = None, overrides: Iterable[str] = (), *, size: str | None = None) -> Config:
    """Resolve a run description.

    Args:
        path: YAML file, nested like the sections; None = only defaults.
        overrides: `section.key=value` strings; see `override_value`.
        size: name of a recipe in the file's `sizes` mapping, applied after the file and before the overrides.

    Raises:
        ValueError: the YAML cannot be parsed, a key is unknown (the message suggests the closest key), or a value is
            not valid.
    """
    return resolve(read_description(path), overrides, size=size)


def default_description() -> Path:
    """Return ./ray_config.yaml, or the description in the package if the current folder has none."""
    own = Path("ray_config.yaml")
    return own if own.is_file() else Path(__file__).parents[1] / "ray_config.yaml"


def run_folder(arguments: Sequence[str]) -> Path | None:
    """Return the run folder that a command's first argument names; None if that argument is an override or missing.

    Raises:
        ValueError: the first argument is neither an override nor a run folder.
    """
    if not arguments or "=" in arguments[0]:
        return None
    folder = Path(arguments[0])
    if not (folder / "config.yaml").is_file():
        raise ValueError(
            f"{arguments[0]}: expected section.key=value or the folder of a run, such as runs/demo, got neither "
            "(it has no config.yaml). Check the path, or create the run with `tvilfm run`."
        )
    return folder


def load_run(folder: Path, overrides: Iterable[str] = ()) -> Config:
    """Return the resolved description that is stored in a run folder.

    Args:
        folder: current path of the run folder; it replaces the stored run.dir and run.name.
        overrides: as in `load_config`.
    """
    folder = Path(os.path.normpath(folder))
    if folder.name in ("", ".."):
        folder = folder.resolve()
    where = {"run.dir": str(folder.parent), "run.name": folder.name}
    written = [f"{key}={json.dumps(value)}" for key, value in where.items()]
    return load_config(folder / "config.yaml", [*written, *overrides])


def read_description(path: Path | None) -> dict[str, Any]:
    """Return the sections of a description file without validation; see `load_config` for arguments and errors."""
    values: dict[str, Any] = {}
    if path is not None:
        if not path.is_file():
            raise ValueError(f"--config: expected a YAML file, got {path}. Check the path, or use `tvilfm init`.")
        try:
            values = yaml.load(path.read_text(), _Loader) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: expected YAML, got {error}. Fix the file.") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected sections, got {type(values).__name__}. See ray_config.yaml.")
    for key, default in FORMER_DEFAULTS.items():
        section, _, name = key.partition(".")
        part = values.get(section)
        if isinstance(part, dict) and name in part and part[name] == default:
            del part[name]
    return values


def resolve(description: Mapping[str, Any], overrides: Iterable[str] = (), *, size: str | None = None) -> Config:
    """Resolve a description from `read_description`, which is not modified; see `load_config`."""
    values: dict[str, Any] = copy.deepcopy(dict(description))
    sizes = values.pop("sizes", None) or {}
    if size is not None:
        if size not in sizes:
            raise ValueError(f"--size: expected one of {sorted(sizes)}, got {size}.")
        _merge(values, sizes[size])
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not all(key.split(".")):
            raise ValueError(f"override: expected section.key=value, got {override!r}.")
        node: dict[str, Any] = {}
        set_value(node, key, override_value(key, text))
        _merge(values, node)
    fidelity, dataset = values.get("fidelity", "corrected"), str(value_at(values, "data.name") or "synthetic")
    if fidelity in get_args(Fidelity):  # other values fail in the validation
        for key, switch in FIDELITY_SWITCHES.items():
            if value_at(values, key) is None:
                set_value(values, key, switch.value(fidelity, dataset))
    if value_at(values, "evaluate.protocols") is None and dataset in PROTOCOLS:
        set_value(values, "evaluate.protocols", PROTOCOLS[dataset])
    evaluate = values.get("evaluate")
    if isinstance(evaluate, dict) and evaluate.get("text_noise", ()) is None:
        of_attributes = USUAL_ATTRIBUTE_NOISE if dataset == "synthetic" else ()
        evaluate["text_noise"] = (*of_attributes, *USUAL_CAPTION_NOISE)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ValueError(explain(error)) from None


class _Loader(yaml.SafeLoader):
    """YAML in which whole numbers are decimal: YAML 1.1 reads 010 as eight and 1:30 as ninety."""

    def decimal(self, node: yaml.ScalarNode) -> int | str:
        text = str(self.construct_scalar(node))
        return int(text) if re.fullmatch(r"[+-]?[0-9]+", text) else text


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.decimal)


def override_value(key: str, text: str) -> Any:
    """Return the value of an override: text as typed for keys that hold text, otherwise YAML.

    So `run.name=0042` and `run.name=2026-05-01` are names. Quotes around a text are removed, and `null` is None.

    Raises:
        ValueError: the text is not YAML.
    """
    kinds = _kinds_of(key)
    is_text = bool(kinds) and all(kind in (str, Path) or isinstance(kind, str) for kind in kinds - {type(None)})
    none = ("null", "") if type(None) in kinds else ("null",)
    if is_text and text not in none and text[:1] not in ("'", '"'):
        return text
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise ValueError(f"{key}: expected a YAML value, got {text!r}. Check its quotes and brackets.") from None


def _kinds_of(key: str) -> set[Any]:
    """Return the types that a key accepts, and the texts of a choice; empty for an unknown key."""
    section: Any = Config
    for part in key.split("."):
        fields = section.model_fields if isinstance(section, type) and issubclass(section, BaseModel) else {}
        if part not in fields:
            return set()
        section = fields[part].annotation
    kinds: set[Any] = set()
    waiting = [section]
    while waiting:
        kind = waiting.pop()
        if get_origin(kind) in (Union, UnionType, Literal, Annotated):
            waiting += get_args(kind)
        else:
            kinds.add(kind if isinstance(kind, Hashable) else object)
    return kinds


def explain(
    error: ValidationError, known: Collection[str] | None = None, *, see: str = "`tvilfm config schema`"
) -> str:
    """Return one line per error: the dotted key, the expected value, the actual value, and what to do.

    Args:
        error: the pydantic error.
        known: existing dotted keys; None = keys of the run description.
        see: where the keys are described.
    """
    known = known_keys() if known is None else known
    lines = []
    for fault in error.errors():
        key = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            near = " or ".join(_nearest(key, known))
            lines.append(f"{key}: expected a known key, got an unknown one. Did you mean {near}?")
        elif fault["type"] == "value_error":
            # The message of a section's validator begins with the key inside that section.
            lines.append(f"{key}.{fault['ctx']['error']}" if key else str(fault["ctx"]["error"]))
        else:
            lines.append(f"{key}: {fault['msg'].lower()}, got {fault['input']!r}. See {see}.")
    return "\n".join(lines)


def _nearest(key: str, known: Collection[str]) -> list[str]:
    """Return the keys that an unknown key may stand for: keys of another section with its name, or the most similar."""
    name = key.rpartition(".")[2]
    same = [one for one in known if one.rpartition(".")[2] == name]
    if same:
        return difflib.get_close_matches(key, same, n=3, cutoff=0.0)
    sections = {one.rpartition(".")[0] for one in known} - {""}
    return difflib.get_close_matches(key, [*known, *sections], n=1, cutoff=0.0)


def known_keys(section: type[BaseModel] = Config, prefix: str = "") -> dict[str, str]:
    """Return a mapping from every dotted key to its description."""
    keys: dict[str, str] = {}
    for name, info in section.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            keys |= known_keys(info.annotation, f"{prefix}{name}.")
        else:
            keys[f"{prefix}{name}"] = info.description or ""
    return keys


def to_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML, in the order of the sections."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def set_value(values: dict[str, Any], dotted: str, value: object) -> None:
    """Set the value at a dotted key of nested mappings, and create missing mappings."""
    *sections, key = dotted.split(".")
    for section in sections:
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):  # fails in the validation, which names the key
            return
    values[key] = value


def value_at(values: Mapping[str, Any], dotted: str) -> Any:
    """Return the value at a dotted key of nested mappings, or None."""
    node: Any = values
    for part in dotted.split("."):
        if not isinstance(node, Mapping):
            return None
        node = node.get(part)
    return node
