"""Modules of open_clip without the package, whose import loads all of its model families and takes seconds."""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

BARE = "tvilfm_open_clip"  # the package under a name of its own, so that `import open_clip` still runs all of it


@cache
def open_clip_module(name: str) -> ModuleType:
    """Return one module of open_clip, with the modules that it imports itself.

    Args:
        name: such as `tokenizer`.
    """
    if BARE not in sys.modules:
        spec = find_spec("open_clip")
        assert spec is not None and spec.submodule_search_locations is not None
        package = ModuleType(BARE)
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules[BARE] = package
    return import_module(f"{BARE}.{name}")
