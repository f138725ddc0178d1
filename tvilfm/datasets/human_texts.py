"""Sentences that people wrote: one per identity, such as YYDS's coarse descriptions of SYSU-MM01, RegDB and LLCM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from tvilfm.data.manifest import select
from tvilfm.data.people import person_name, spelling
from tvilfm.data.splits import TEST_SPLITS
from tvilfm.data.text_files import read_text
from tvilfm.terms import is_blank


def read_human_texts(path: Path, manifest: pa.Table) -> pa.Table:
    """Read a JSON file `{identity: sentence}` for the identities of a manifest.

    Args:
        path: `data.human_texts`. Identities are written as in the dataset; `0001` and `1` are the same.
        manifest: rows of the dataset. Sentences of other identities are ignored.

    Returns:
        Table with `pid` and `text`, by ascending pid.

    Raises:
        ValueError: the file has another format, two sentences belong to one identity, a sentence is blank, or a test
            identity has none.

    Source: Du et al., "YYDS: Visible-Infrared Person Re-Identification with Coarse Descriptions", 2024.
    """
    if not path.is_file():
        raise ValueError(f"data.human_texts: expected a JSON file, got no file {path}. Check the path.")
    text = read_text(path)
    try:
        entries: Any = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {error}. Fix the file.") from None
    if not isinstance(entries, dict) or not all(isinstance(sentence, str) for sentence in entries.values()):
        raise ValueError(
            f"{path}: expected {{identity: sentence}}, got another format. Write one sentence per identity."
        )
    pid_of = {spelling(person_name(manifest, pid)): pid for pid in set(manifest["pid"].to_pylist())}
    texts: dict[int, str] = {}
    for person, sentence in entries.items():
        pid = pid_of.get(spelling(person))
        if pid is None:
            continue
        if pid in texts or is_blank(sentence):
            found = "two" if pid in texts else "a blank one"
            raise ValueError(f"{path}: expected one sentence per identity, got {found} of {person}. Fix the file.")
        texts[pid] = sentence.strip()
    tested = {pid for pid in select(manifest, split=TEST_SPLITS)["pid"].to_pylist() if pid >= 0}
    missing = sorted(tested - texts.keys())
    if missing:
        raise ValueError(
            f"{path}: expected a sentence of every test identity, got none of {len(missing)} of {len(tested)}, the "
            f"first {person_name(manifest, missing[0])}. Add them, or remove human from evaluate.text_sources."
        )
    return pa.table({"pid": pa.array(sorted(texts), pa.int32()), "text": [texts[pid] for pid in sorted(texts)]})
