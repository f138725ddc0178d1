"""Print the audit trail and what is stored about a person: as text, JSON or CSV."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, fields
from datetime import UTC, datetime
from typing import Any

import typer

from tvilfm.retrieval.audit import Entry, PersonRecord


def print_as_csv(entries: Iterable[Entry]) -> None:
    """Print a header and a row per entry; ids and facts are JSON."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(field.name for field in fields(Entry))
    for entry in entries:
        values = asdict(entry) | {"ids": json.dumps(entry.ids), "facts": json.dumps(entry.facts)}
        writer.writerow(value.isoformat() if isinstance(value, datetime) else value for value in values.values())


def print_as_json(entries: Iterable[Entry], record: PersonRecord | None) -> None:
    """Print an object with the entries and, if asked for, the person's images, erasures, and whether all are gone."""
    content: dict[str, Any] = {"entries": [asdict(entry) for entry in entries]}
    if record is not None:
        content["person"] = asdict(record) | {"gone": not record.stored}
    typer.echo(json.dumps(content, indent=2, default=datetime.isoformat))


def print_as_text(entries: Iterable[Entry], person: str | None, record: PersonRecord | None) -> None:
    """Print a line per entry and, if asked for, what is stored about the person."""
    for entry in entries:
        facts = ", ".join(f"{name}: {value}" for name, value in entry.facts.items())
        images = f"{len(entry.ids)} images" if entry.ids else ""
        typer.echo("  ".join(filter(None, (_utc(entry.time), _actor(entry), entry.action, images, facts))))
    if record is None:
        return
    for image in record.stored:
        parts = [name for name in ("thumbnail", "feature", "reference") if getattr(image, name)]
        taken = "unknown" if image.time is None else _utc(image.time)
        typer.echo(
            f"stored: {image.id}, camera {image.camera}, taken {taken}, added {_utc(image.added)}, with "
            f"{', '.join((*parts, 'vectors'))}, in {image.space}"
        )
    for entry in record.erasures:
        typer.echo(f"erased: {len(entry.ids)} images on {_utc(entry.time)} by {_actor(entry)}")
    state = f"{len(record.stored)} images are stored" if record.stored else "nothing is stored"
    typer.echo(f"person {person}: {state} (galleries read: {record.galleries})")


def _actor(entry: Entry) -> str:
    return entry.key or f"role {entry.role or 'unknown'}"


def _utc(time: datetime) -> str:
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M:%S}"
