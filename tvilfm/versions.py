"""Versions of this package and of those it uses, also where nothing was installed by pip (a checkout on PYTHONPATH)."""

from __future__ import annotations

import importlib.metadata

from tvilfm import __version__

UNKNOWN = "unknown"


def version_of(package: str) -> str:
    """Return the version of a distribution, or `UNKNOWN` where it has no metadata."""
    if package == "tvilfm":
        return __version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return UNKNOWN
