"""Merge a user's YAML file into rendered documents, so that nobody has to edit them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster.machines.documents import Document

IDENTITY = ("kind", "apiVersion")
KEYS = ("name", "groupName")  # by which items of a list are the same


def overlaid(documents: Sequence[Document], path: Path) -> list[Document]:
    """Return documents with those of a file merged in.

    A document of the file is merged into the rendered one of the same `kind` (and `metadata.name`, if it has one), and
    is added if there is none. Mappings are merged; items of lists are merged if both have the same `name` or
    `groupName`, and added otherwise; other lists and values are replaced; null removes a key.

    Raises:
        ValueError: the file cannot be read as YAML mappings.
    """
    try:
        layers = [layer for layer in yaml.safe_load_all(path.read_text()) if layer is not None]
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"cluster.overlay: expected a YAML file, got {error}. Fix it or set null.") from None
    if not all(isinstance(layer, dict) for layer in layers):
        raise ValueError(f"cluster.overlay: expected mappings, got other values in {path}. See docs/cluster.md.")
    merged = list(documents)
    for layer in layers:
        index = next((index for index, document in enumerate(merged) if _is_same(document, layer)), None)
        if index is None:
            merged.append(layer)
        else:
            merged[index] = _merged(merged[index], layer)
    return merged


def _is_same(document: Document, layer: Document) -> bool:
    name = layer.get("metadata", {}).get("name")
    return all(layer.get(key, document.get(key)) == document.get(key) for key in IDENTITY) and (
        name is None or name == document["metadata"]["name"]
    )


def _merged(value: Any, layer: Any) -> Any:
    if isinstance(value, dict) and isinstance(layer, dict):
        merged = {key: _merged(value.get(key), below) for key, below in layer.items() if below is not None}
        return {key: below for key, below in {**value, **merged}.items() if layer.get(key, below) is not None}
    if isinstance(value, list) and isinstance(layer, list):
        return _merged_lists(value, layer)
    return layer


def _merged_lists(items: list[Any], layers: list[Any]) -> list[Any]:
    key = next((key for key in KEYS if all(isinstance(one, dict) and key in one for one in (*items, *layers))), None)
    if key is None:
        return layers
    merged = {item[key]: item for item in items}
    for layer in layers:
        merged[layer[key]] = _merged(merged.get(layer[key]), layer)
    return list(merged.values())
