"""Identities as people write them: text such as `p17` or `0042`, with numbers inside the program.

All later steps work on whole numbers. The original text is kept in the metadata of the manifest and is shown wherever
an identity is shown. A negative number (`-1` in Market-1501) marks images of nobody: they are never people.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping

import pyarrow as pa

PEOPLE = b"people"  # metadata key of a manifest: pid -> original text, for identities that are written differently
_NUMBER = re.compile(r"-?[0-9]+")
_INT32 = range(-(2**31), 2**31)


def number_people(written: Iterable[str]) -> tuple[dict[str, int], dict[int, str]]:
    """Number identities.

    If all are whole numbers of 32 bits, they keep their values, so `0042` is 42. Otherwise they are numbered from 1 in
    natural order (`p2` before `p10`), except negative numbers, which keep their values.

    Args:
        written: identities as written; spaces around them do not count.

    Returns:
        Text as written -> number, and number -> text for every number whose text is different.
    """
    spelled = {text: spelling(text) for text in written}
    values = {person: _as_number(person) for person in spelled.values()}
    if None in values.values():
        people = sorted((person for person, value in values.items() if value is None or value >= 0), key=natural)
        values |= {person: number for number, person in enumerate(people, start=1)}
    numbers = {text: value for text, person in spelled.items() if (value := values[person]) is not None}
    names: dict[int, str] = {}
    for text, number in numbers.items():
        names.setdefault(number, text.strip())
    return numbers, {number: name for number, name in names.items() if name != str(number)}


def with_people(manifest: pa.Table, names: Mapping[int, str]) -> pa.Table:
    """Return the manifest with the original texts of its identities in its metadata."""
    if not names:
        return manifest
    metadata = dict(manifest.schema.metadata or {})
    return manifest.replace_schema_metadata(metadata | {PEOPLE: json.dumps(dict(names), sort_keys=True)})


def people_of(manifest: pa.Table) -> dict[int, str]:
    """Return number -> original text of the identities that are written differently."""
    return {int(pid): name for pid, name in json.loads((manifest.schema.metadata or {}).get(PEOPLE, b"{}")).items()}


def person_name(manifest: pa.Table, pid: int) -> str:
    """Return the original text of an identity."""
    return people_of(manifest).get(pid, str(pid))


def spelling(person: str) -> str:
    """Return one spelling of an identity: `0042` and `42` are the same."""
    person = person.strip()
    return str(int(person)) if person.isascii() and person.removeprefix("-").isdigit() else person


def _as_number(text: str) -> int | None:
    if not _NUMBER.fullmatch(text) or len(text) > 11 or int(text) not in _INT32:
        return None
    return int(text)


def natural(text: str) -> tuple[list[tuple[int, int, str]], str]:
    """Return the key that sorts `p2` before `p10`."""
    parts = re.split(r"([0-9]+)", text)
    return [(0, int(part), "") if part.isascii() and part.isdigit() else (1, 0, part) for part in parts if part], text
