"""The base class of the sections of the run description, and a check that several sections share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _at_home(cls, value: Any) -> Any:
        """Expand `~` of paths: a shell does not expand it within `run.dir=~/runs`."""
        if (isinstance(value, Path | str) and str(value).startswith("~/")) or value == Path("~"):
            return type(value)(os.path.expanduser(value))
        return value


def check_no_keys(name: str, uri: str | None) -> None:
    """Check that a URI contains no keys: the description is written to run folders, reports and rendered files.

    Raises:
        ValueError: the URI contains a user or keys.
    """
    user = "" if uri is None else uri.partition("://")[2].partition("?")[0].rpartition("@")[0]
    if user not in ("", "anonymous"):
        raise ValueError(
            f"{name}: expected a URI without keys, got one with keys. Set them in the environment of every machine "
            "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, ...)."
        )
