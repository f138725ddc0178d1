"""Documents that other programs read: dictionaries, and the YAML that they are written as."""

from __future__ import annotations

from typing import Any

import yaml

Document = dict[str, Any]


def given(value: str | None, key: str, what: str) -> str:
    """Return a value that a target needs.

    Raises:
        ValueError: it is None; the message names the key and what it expects.
    """
    if value is None:
        raise ValueError(f"{key}: expected {what}, got null. Set it in ray_config.yaml or as {key}=... .")
    return value


def resource(api: str, kind: str, name: str, spec: Document) -> Document:
    """Return a resource of Kubernetes."""
    return {"apiVersion": api, "kind": kind, "metadata": {"name": name}, "spec": spec}


class _Dumper(yaml.SafeDumper):
    """YAML dumper that writes multi-line strings as blocks and uses no aliases."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def to_text(*documents: Document) -> str:
    """Return documents as one YAML file."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=120)
