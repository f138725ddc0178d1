"""Checkpoints in the released code's layout: read strictly into our network, and written back from it.

The two networks are the same tensors under other names, so reading is renaming: `_RENAMED` is the whole translation.
Two things of a released file have no place in ours and are kept beside the model, as `Notes`: the unused `logit_scale`
and the order and types of the file's tensors. With them a file that is read and written again is the same, bit for bit.
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

LOGIT_SCALE = math.log(1 / 0.07)  # CLIP's temperature, which the released network carries and never uses
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

# Ours -> released, by prefix (METHOD 10), in the order that a file is written.
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
        dtypes: every key of the file in its order, and the type it is stored in.
    """

    logit_scale: Tensor
    dtypes: dict[str, torch.dtype]


def load_released(path_or_state_dict: str | Path | Mapping[str, Tensor], *, num_classes: int | None = None) -> TVILFM:
    """Read a released checkpoint of the base or the text stage into our network, strictly.

    A base-stage file has no `backup_*`; the copy of the GeM and head that our text stage keeps is then made from the
    file's own, which is what the text stage starts from. A base-stage file without the text tower gives a network
    without one.

    Args:
        path_or_state_dict: a pickled state dict, read with `weights_only=True`, or the dict itself.
        num_classes: training identities that the classifier must have; None takes the file's.

    Returns:
        The network on the CPU, in training mode, its weights copied.

    Raises:
        ValueError: no such file, not a plain state dict, a missing, unknown or misshapen key (named), NaN or infinite
            weights, or another number of classes.

    Source: METHOD 10. Differs: none known.
    """
    state = _read(path_or_state_dict)
    spec = _spec(state)
    # Names and shapes are compared before a quarter of a gigabyte is filled.
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
            "It was trained on another dataset or split."
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
        model: ours; the released code can only build resnet50 with CLIP's RN50 tower.
        stage: base leaves the kept copy of GeM and head out, text has it.

    Returns:
        Key -> tensor on the CPU, sharing memory as `state_dict` does, in the order and types of the file that the
        model was read from, or in METHOD 10's order. A type that would round the present weights is not used.

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
        ValueError: no such file, or one that this refuses.
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
    """Return the network that a file's keys and shapes describe; missing ones are assumed as published."""
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
            "Give a TVI-LFM checkpoint of the base or text stage; our own are read by TVILFM.from_pretrained."
        )
    for key, value in expected.items():
        if state[key].shape != value.shape:
            raise ValueError(
                f"checkpoint.{key}: expected shape {tuple(value.shape)}, got {tuple(state[key].shape)}. "
                "The checkpoint is of another network."
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
    """Return the key to read a weight from: a base-stage file has no kept copy, so its own GeM and head are used."""
    if has_backup or not key.startswith(_BACKUP):
        return key
    return key.replace("backup_pool.", "base_model.visual.GEM.").replace("backup_classifier.", "classifier.")


def _position(key: str) -> tuple[int, int]:
    """Return a sort key: METHOD 10's groups in order, and the network's order within a group."""
    groups = [released for _, released in _RENAMED if released != "base_model."]
    for index, released in enumerate(groups):
        if key.startswith(released):
            return index, 0
    text = groups.index("base_model.visual.GEM.p")
    return (text, 1) if key.startswith("base_model.") else (len(groups), 0)


def _stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    stored = value.to(dtype)
    return stored if torch.equal(stored.to(value.dtype), value) else value
