"""What all sections of the run description have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def check_no_keys(name: str, uri: str | None) -> None:
    """Refuse keys in a URI, because the description is written into run folders, reports and rendered files."""
    user = "" if uri is None else uri.partition("://")[2].partition("?")[0].rpartition("@")[0]
    if user not in ("", "anonymous"):
        raise ValueError(
            f"{name}: expected a URI without keys, got one with. Set them in the environment of every machine "
            "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, ...)."
        )
