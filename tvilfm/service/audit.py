"""The audit trail: who searched or wrote what and when, as JSON lines, one file per day; never pixels or texts."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path


class Audit:
    """Append lines to the audit trail. Each line is a single write, so several processes can share a folder.

    Args:
        folder: created if missing, readable only by its owner.
        days: number of days that a file is kept; None = forever.
    """

    def __init__(self, folder: Path, *, days: int | None = None) -> None:
        self._folder, self._days = folder, days
        self._today: date | None = None
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def note(self, action: str, *, key: str | None, version: int, ids: Sequence[str], **facts: int) -> None:
        """Add a line.

        Args:
            action: name of the action.
            key: name of the API key; None = the service requires no keys.
            version: gallery version that was searched or that the write created.
            ids: ids of the hits or of the written rows.
            facts: additional numbers.
        """
        now = datetime.now(UTC)
        if now.date() != self._today:
            self._today = now.date()
            self._forget()
        entry = {"time": now.isoformat(timespec="milliseconds"), "key": key, "action": action, "version": version}
        line = json.dumps({**entry, **facts, "ids": list(ids)}) + "\n"
        file = os.open(self._folder / f"{now.date()}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)

    def _forget(self) -> None:
        if self._days is None or self._today is None:
            return
        oldest = self._today - timedelta(days=self._days)
        for path in self._folder.glob("????-??-??.jsonl"):
            if path.stem < oldest.isoformat():
                path.unlink(missing_ok=True)  # another process may have removed it already
