"""The base class of the sections of the run description, and a check that several sections share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

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


def check_no_secret(name: str, url: str | None, advice: str) -> None:
    """Check that a URL contains neither a password nor a token: the description is stored with runs and reports.

    Args:
        name: key of the URL.
        url: the URL; its text is not part of the error.
        advice: where the secret belongs.

    Raises:
        ValueError: it contains one.
    """
    parts = urlsplit(url or "")
    secret = parts.password or any(
        word in key.lower() for key, _ in parse_qsl(parts.query) for word in ("password", "token", "key", "secret")
    )
    if secret:
        raise ValueError(f"{name}: expected a URL without a password or token, got one with it. {advice}")
