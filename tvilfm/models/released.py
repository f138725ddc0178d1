"""Read and write checkpoints in the released code's layout.

Both networks have the same tensors under different names, so reading a file means renaming its keys; `_RENAMED` is the
complete mapping. Two things in a released file have no place in our network: the unused `logit_scale`, and the order
and types of the tensors. They are kept beside the model as `Notes`, so a file that is read and written again is
bit-identical.
"""

from __future__ import annotations

import math
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tvilfm.models.tvilfm import TVILFM, ModelSpec

Stage = Literal["base", "text"]

LOGIT_SCALE = math.log(1 / 0.07)  # CLIP's temperature; the released network stores it but never uses it
_HEAD_WIDTH = 64  # CLIP: heads = width / 64
_CLASSIFIER = "classifier.classifier.weight"
_EMBEDDING = "base_model.token_embedding.weight"
_BLOCK = re.compile(r"base_model\.transformer\.resblocks\.(\d+)\.")
_TEXT = (
    "base_model.token_embedding.",
    "base_model.positional_embedding",
    "base_model.transformer.",
    "base_model.ln_final.",
    "base_model.text_projection",
)
_GEM = "base_model.visual.GEM.p"
_BACKUP = ("backup_pool.", "backup_classifier.")
_NOTES = "released_notes"
_SHOWN = 5

# Our prefix -> released prefix (METHOD 10), in the order of a written file.
_RENAMED = (
    ("backbone.visible_stem.conv1.", "base_model.visual.rgb_model.resnet_conv.0."),
    ("backbone.visible_stem.bn1.", "base_model.visual.rgb_model.resnet_conv.1."),
    ("backbone.infrared_stem.conv1.", "base_model.visual.ir_model.resnet_conv.0."),
    ("backbone.infrared_stem.bn1.", "base_model.visual.ir_model.resnet_conv.1."),
    *((f"backbone.layer{n}.", f"base_model.visual.shared_model.resnet_conv.{n - 1}.") for n in range(1, 5)),
    ("pool.p", "base_model.visual.GEM.p"),
    ("text.tower.", "base_model."),
    ("head.bn.", "classifier.BN."),
    ("head.classifier.", "classifier.classifier."),
    ("base_pool.p", "backup_pool.p"),
    ("base_head.bn.", "backup_classifier.BN."),
    ("base_head.classifier.", "backup_classifier.classifier."),
)


@dataclass(frozen=True, kw_only=True)
class Notes:
    """Contents of a released file that have no place in our network.

    Attributes:
        logit_scale: scalar.
        dtypes: key -> stored type, for every key of the file in its order.
    """

    logit_scale: Tensor
    dtypes: dict[str, torch.dtype]


def load_released(path_or_state_dict: str | Path | Mapping[str, Tensor], *, num_classes: int | None = None) -> TVILFM:
    """Read a released checkpoint of the base or the text stage into our network, strictly.

    A base-stage file has no `backup_*` keys. Our text stage keeps a copy of the base stage's GeM and head; for such a
    file, the copy is taken from the file's current GeM and head, from which the text stage starts. A base-stage file
    without a text tower yields a network without one.

    Args:
        path_or_state_dict: a pickled state dict, read with `weights_only=True`, or the dict itself.
        num_classes: required number of training identities in the classifier; None accepts any number.

    Returns:
        The network on the CPU, in training mode, with copies of the weights.

    Raises:
        ValueError: the file does not exist or is not a plain state dict; a key is missing, unknown or of the wrong
            shape (the message names it); a weight is NaN or infinite; or the number of classes differs.

    Source: METHOD 10. Differs: none known.
    """
    state = _read(path_or_state_dict)
    spec = _spec(state)
    # Compare names and shapes before allocating a quarter of a gigabyte.
    with torch.device("meta"):
        ours = {name: value for name, value in TVILFM(spec).state_dict().items()}
    has_backup = any(key.startswith(_BACKUP) for key in state)
    expected = {_released_name(name): value for name, value in ours.items()}
    if not has_backup:
        expected = {key: value for key, value in expected.items() if not key.startswith(_BACKUP)}
    expected["logit_scale"] = torch.empty((), device="meta")
    _compare(state, expected)
    if num_classes not in (None, spec.num_classes):
        raise ValueError(
            f"num_classes: expected the checkpoint's {spec.num_classes} training identities, got {num_classes}. "
            "The checkpoint was trained on another dataset or split."
        )
    source = {name: _source(_released_name(name), has_backup) for name in ours}
    model = TVILFM(spec)
    model.load_state_dict({name: state[key] for name, key in source.items()}, strict=True)
    model.__dict__[_NOTES] = Notes(
        logit_scale=state["logit_scale"].detach().clone(), dtypes={key: value.dtype for key, value in state.items()}
    )
    return model


def released_state_dict(model: TVILFM, *, stage: Stage) -> dict[str, Tensor]:
    """Return a model's weights under the released names.

    Args:
        model: our network; the released code can only build resnet50 with CLIP's RN50 tower.
        stage: `text` includes the kept copy of the base stage's GeM and head; `base` omits it.

    Returns:
        Key -> tensor on the CPU, sharing memory as `state_dict` does. Order and types are those of the file that the
        model was read from; without such a file, the order is METHOD 10's. A tensor keeps its type where the file's
        type would round its values.

    Raises:
        ValueError: the text stage of a model that has no text tower.

    Source: METHOD 10. Differs: a base-stage model of ours has no text tower, so its file has none either.
    """
    if stage == "text" and model.text is None:
        raise ValueError("stage: expected base for a model without a text tower, got text. Train the text stage first.")
    notes: Notes | None = model.__dict__.get(_NOTES)
    state = {_released_name(name): value.detach().cpu() for name, value in model.state_dict().items()}
    if stage == "base":
        state = {key: value for key, value in state.items() if not key.startswith(_BACKUP)}
    state["logit_scale"] = torch.tensor(LOGIT_SCALE) if notes is None else notes.logit_scale
    order = sorted(state, key=_position)
    if notes is not None and notes.dtypes.keys() == state.keys():
        order = list(notes.dtypes)
        state = {key: _stored(value, notes.dtypes[key]) for key, value in state.items()}
    return {key: state[key] for key in order}


def write_released(model: TVILFM, path: Path, *, stage: Stage) -> None:
    """Write a checkpoint that the released code reads; see `released_state_dict`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(released_state_dict(model, stage=stage), path)


def read_pickle(path: Path) -> Any:
    """Read a checkpoint file onto the CPU with `weights_only=True`.

    Raises:
        ValueError: the file does not exist, or `weights_only` loading rejects it.
    """
    if not path.is_file():
        raise ValueError(f"checkpoint: expected a released state-dict file, got {path}. Check the path.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"checkpoint: expected a pickled state dict, got {path}, which weights_only loading refuses: {first}"
        ) from None


def _read(source: str | Path | Mapping[str, Tensor]) -> dict[str, Tensor]:
    state: Any = read_pickle(Path(source)) if isinstance(source, str | Path) else source
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        held = ", ".join(map(repr, list(state)[:_SHOWN])) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(
            f"checkpoint: expected a plain state dict of tensors, got one that holds {held}. "
            "Save the state dict inside it by itself."
        )
    return dict(state)


def _spec(state: Mapping[str, Tensor]) -> ModelSpec:
    """Return the network that a file's keys and shapes describe, with published sizes for missing keys."""
    with_text = any(key.startswith((*_TEXT, *_BACKUP)) for key in state)
    classifier, embedding = state.get(_CLASSIFIER), state.get(_EMBEDDING)
    width = embedding.shape[1] if embedding is not None and embedding.ndim == 2 else 512
    blocks = [int(match[1]) for key in state if (match := _BLOCK.match(key))]
    return ModelSpec(
        backbone="resnet50",
        num_classes=len(classifier) if classifier is not None and classifier.ndim == 2 else 1,
        text_width=width,
        text_layers=max(blocks) + 1 if blocks else 12,
        text_heads=max(1, width // _HEAD_WIDTH),
        with_text=with_text,
        trained_pool="backup_pool.p" in state
        and not torch.equal(state["backup_pool.p"], state.get(_GEM, state["backup_pool.p"])),
    )


def _compare(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    missing = [key for key in expected if key not in state]
    unknown = [key for key in state if key not in expected]
    if missing or unknown:
        raise ValueError(
            f"checkpoint: expected the released layout, got {_named(missing)} missing and {_named(unknown)} unknown. "
            "Use a TVI-LFM checkpoint of the base or text stage. Read models of this package with "
            "TVILFM.from_pretrained."
        )
    for key, value in expected.items():
        if state[key].shape != value.shape:
            raise ValueError(
                f"checkpoint.{key}: expected shape {tuple(value.shape)}, got {tuple(state[key].shape)}. "
                "The checkpoint belongs to another network."
            )
        if state[key].is_floating_point() and not state[key].isfinite().all():
            raise ValueError(f"checkpoint.{key}: expected finite weights, got NaN or infinity. Training had diverged.")


def _named(keys: list[str]) -> str:
    if not keys:
        return "no key"
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + more


def _released_name(name: str) -> str:
    for ours, released in _RENAMED:
        if name.startswith(ours):
            return released + name.removeprefix(ours)
    raise AssertionError(f"{name} has no place in the released layout")


def _source(key: str, has_backup: bool) -> str:
    """Return the file's key for a weight; a base-stage file has no kept copy, so its current GeM and head are used."""
    if has_backup or not key.startswith(_BACKUP):
        return key
    return key.replace("backup_pool.", "base_model.visual.GEM.").replace("backup_classifier.", "classifier.")


def _position(key: str) -> tuple[int, int]:
    """Return a sort key for METHOD 10's groups; within a group, the network's order is kept."""
    groups = [released for _, released in _RENAMED if released != "base_model."]
    for index, released in enumerate(groups):
        if key.startswith(released):
            return index, 0
    text = groups.index("base_model.visual.GEM.p")
    return (text, 1) if key.startswith("base_model.") else (len(groups), 0)


def _stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    stored = value.to(dtype)
    return stored if torch.equal(stored.to(value.dtype), value) else value
