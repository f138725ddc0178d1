"""Check keys and their limits in memory. Twice a second, replicas read the keys and exchange their counts."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

from tvilfm.retrieval.database import Connection, Database
from tvilfm.retrieval.store import Unavailable
from tvilfm.service.keys import Key, KeyStore, digest

SYNC_S = 0.5  # time until a change of the keys, and requests to other replicas, are known
MINUTE_S = 60
ADD = """
    INSERT INTO key_use (key, minute, requests) SELECT * FROM unnest(%s::text[], %s::timestamptz[], %s::integer[])
    ON CONFLICT (minute, key) DO UPDATE SET requests = key_use.requests + excluded.requests
"""


class KeyChecker:
    """Find the key of a request, and count the requests of keys that have a limit.

    A limit holds over all replicas, except for what the other replicas accept between two exchanges.

    Args:
        store: where the keys are stored.
        database: the gallery's database, where replicas exchange their counts.
        clock: seconds since 1970.
    """

    def __init__(self, store: KeyStore, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._store, self._database, self._clock = store, database, clock
        self._lock = threading.Lock()
        self._minute = self._now_minute()
        self._exchanged: Counter[str] = Counter()  # of the current minute, over all replicas
        self._own: Counter[str] = Counter()  # of the current minute, not exchanged yet
        self._keys = self._read()

    def find(self, token: str) -> Key | None:
        """Return the valid key that a client sent, or None."""
        key = self._keys.get(digest(token))
        expired = key is not None and key.expires is not None and key.expires.timestamp() <= self._clock()
        return None if expired else key

    def wait_s(self, key: Key) -> int:
        """Count a request, and return 0; or return the seconds until the key may be used again."""
        if key.per_minute is None:
            return 0
        with self._lock:
            self._turn()
            if self._exchanged[key.name] + self._own[key.name] >= key.per_minute:
                return int(self._minute + MINUTE_S - self._clock()) + 1
            self._own[key.name] += 1
        return 0

    def sync(self) -> None:
        """Read the keys, and exchange counts with the other replicas.

        An invalid place of keys lets nobody in; a database that does not answer leaves keys and counts as they were.
        """
        try:
            self._keys = self._read()
        except ValueError as error:
            logging.getLogger(__name__).error("no key is accepted: %s", error)
            self._keys = {}
        if not any(key.per_minute for key in self._keys.values()):
            return
        with self._lock:
            self._turn()
            minute, own, self._own = self._minute, self._own, Counter()
            self._exchanged += own
        try:
            totals = self._exchange(minute, own)
        except Unavailable:
            with self._lock:
                if minute == self._minute:
                    self._own += own
                    self._exchanged -= own
            raise
        with self._lock:
            if minute == self._minute:
                self._exchanged = totals

    def follow(self) -> None:
        """Call `sync` twice a second, in a background thread."""
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        while True:
            time.sleep(SYNC_S)
            try:
                self.sync()
            except Exception:
                logging.getLogger(__name__).exception("keys and counts could not be exchanged; retrying")

    def _read(self) -> dict[str, Key]:
        return {key.sha256: key for key in self._store.read()}

    def _now_minute(self) -> int:
        return int(self._clock() // MINUTE_S) * MINUTE_S

    def _turn(self) -> None:
        """Start counting again at the begin of a minute."""
        if (now := self._now_minute()) != self._minute:
            self._minute, self._exchanged, self._own = now, Counter(), Counter()

    def _exchange(self, minute: int, own: Mapping[str, int]) -> Counter[str]:
        """Add the requests to this replica, and return those to all replicas."""
        when, names = datetime.fromtimestamp(minute, UTC), sorted(own)

        def work(connection: Connection) -> Counter[str]:
            if names:
                connection.execute(ADD, (names, [when] * len(names), [own[name] for name in names]))
            query = "SELECT key, requests FROM key_use WHERE minute = %s"
            return Counter(dict(connection.execute(query, (when,)).fetchall()))

        return self._database.run(work)
