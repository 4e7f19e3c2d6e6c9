"""Keys, balances and every charge, in one SQLite file that survives the death of its process.

Write-ahead logging with one transaction a charge: a usage that a client has read is in the file before it was
sent. Amounts are whole nano-units. A key's granted balance is spent before what was topped up. Keys are
stored as SHA-256 of 32 random bytes, so a copy of the file opens nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rorqual.errors import ConfigError
from rorqual.server.usage import Usage

_SCHEMA = """
CREATE TABLE IF NOT EXISTS keys (
  id TEXT PRIMARY KEY, name TEXT NOT NULL, hash BLOB NOT NULL, created_ns INTEGER NOT NULL,
  revoked_ns INTEGER, admin INTEGER NOT NULL, metered INTEGER NOT NULL, granted INTEGER NOT NULL,
  topped_up INTEGER NOT NULL, requests_per_minute INTEGER, tokens_per_minute INTEGER, concurrency INTEGER);
CREATE TABLE IF NOT EXISTS charges (
  request_id TEXT PRIMARY KEY, key_id TEXT, time_ns INTEGER NOT NULL, model TEXT NOT NULL,
  route TEXT NOT NULL,
  hit INTEGER NOT NULL, miss INTEGER NOT NULL, output INTEGER NOT NULL, reasoning INTEGER NOT NULL,
  cost INTEGER NOT NULL, from_granted INTEGER NOT NULL, currency TEXT NOT NULL, outcome TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS charges_by_key ON charges (key_id, time_ns);
"""
_WAIT_S = 5.0  # for another process that writes
_KEY_COLUMNS = (
    "id, name, hash, created_ns, revoked_ns, admin, metered, granted, topped_up, requests_per_minute,"
    " tokens_per_minute, concurrency"
)


@dataclass(frozen=True)
class Key:
    """An API key as stored. Limits of None do not limit; an unmetered key has no balance to run out of."""

    id: str
    name: str
    hash: bytes
    created_ns: int
    revoked_ns: int | None
    admin: bool
    metered: bool
    granted: int
    topped_up: int
    requests_per_minute: int | None
    tokens_per_minute: int | None
    concurrency: int | None

    @property
    def balance(self) -> int:
        """What is left, in nano-units; below zero by no more than what was running when it ran out."""
        return self.granted + self.topped_up

    @classmethod
    def from_row(cls, row: tuple[object, ...]) -> Key:
        """A row of the table, its 0 and 1 as booleans."""
        values = list(row)
        values[5], values[6] = bool(values[5]), bool(values[6])
        return cls(*values)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Charge:
    """One request's use. `outcome` is its finish reason, "abort" where the client left, or the code of the error that
    ended it."""

    request_id: str
    key_id: str | None
    model: str
    route: str
    usage: Usage
    outcome: str


@dataclass(frozen=True)
class Sum:
    """Charges of one key, model and day (UTC) added up."""

    day: str
    key_id: str | None
    model: str
    requests: int
    hit: int
    miss: int
    output: int
    cost: int
    currency: str


class Ledger:
    """The file; ":memory:" for one that nobody keeps. One thread owns an instance; processes may share the
    file.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            if path != ":memory:":
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, isolation_level=None, timeout=_WAIT_S, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.executescript(_SCHEMA)
        except (sqlite3.Error, OSError) as e:
            raise ConfigError(f"ledger {path}: {e}; name another file with --ledger") from e

    def close(self) -> None:
        """Close the file; the write-ahead log is folded in by the last one to close."""
        self._db.close()

    # Keys

    def make_key(
        self,
        name: str,
        *,
        admin: bool = False,
        metered: bool = False,
        granted: int = 0,
        topped_up: int = 0,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        concurrency: int | None = None,
    ) -> str:
        """Store a new key and return its text, which is shown this once and cannot be read back."""
        key_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
        text = f"rq-{key_id}-{secret}"
        row = (key_id, name, _digest(text), time.time_ns(), None, admin, metered, granted, topped_up)
        limits = (requests_per_minute, tokens_per_minute, concurrency)
        self._db.execute(f"INSERT INTO keys ({_KEY_COLUMNS}) VALUES ({','.join('?' * 12)})", row + limits)
        return text

    def find_key(self, text: str) -> Key | None:
        """The live key whose text this is. One digest and one comparison whether or not the id exists."""
        key_id = text.split("-", 2)[1] if text.startswith("rq-") and text.count("-") >= 2 else ""
        key = self.key(key_id)
        known = key.hash if key is not None else bytes(32)
        same = hmac.compare_digest(_digest(text), known)
        return key if same and key is not None and key.revoked_ns is None else None

    def key(self, key_id: str) -> Key | None:
        """The key with this id, revoked or not."""
        row = self._db.execute(f"SELECT {_KEY_COLUMNS} FROM keys WHERE id = ?", (key_id,)).fetchone()
        return Key.from_row(row) if row is not None else None

    def all_keys(self) -> list[Key]:
        """All keys, oldest first."""
        return [
            Key.from_row(row)
            for row in self._db.execute(f"SELECT {_KEY_COLUMNS} FROM keys ORDER BY created_ns")
        ]

    def has_keys(self) -> bool:
        """Whether any key was ever made: a revoked last key must not open the door."""
        return self._db.execute("SELECT 1 FROM keys LIMIT 1").fetchone() is not None

    def revoke(self, key_id: str) -> None:
        """From now on the key opens nothing."""
        self._change(key_id, "UPDATE keys SET revoked_ns = ? WHERE id = ?", (time.time_ns(), key_id))

    def top_up(self, key_id: str, *, granted: int = 0, paid: int = 0) -> None:
        """Add to a key's balances and meter it from now on."""
        sql = "UPDATE keys SET granted = granted + ?, topped_up = topped_up + ?, metered = 1 WHERE id = ?"
        self._change(key_id, sql, (granted, paid, key_id))

    def _change(self, key_id: str, sql: str, values: tuple[object, ...]) -> None:
        if self._db.execute(sql, values).rowcount == 0:
            raise ConfigError(f"key {key_id!r}: no such id; `rorqual keys list` shows them")

    # Charges

    def charge(self, charge: Charge) -> None:
        """Write one request's use and take its cost from the key, granted part first, in one transaction."""
        usage = charge.usage
        self._db.execute("BEGIN IMMEDIATE")
        try:
            from_granted = self._spend(charge.key_id, usage.cost)
            self._db.execute(
                "INSERT INTO charges VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?)",
                (
                    charge.request_id,
                    charge.key_id,
                    time.time_ns(),
                    charge.model,
                    charge.route,
                    usage.cached,
                    usage.missed,
                    usage.completion,
                    usage.reasoning,
                    usage.cost,
                    from_granted,
                    usage.currency,
                    charge.outcome,
                ),
            )
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def try_charge(self, charge: Charge) -> bool:
        """`charge` without waiting; False where another process holds the file's write lock."""
        self._db.execute("PRAGMA busy_timeout=0")
        try:
            self.charge(charge)
        except sqlite3.OperationalError as e:
            if "locked" not in str(e):
                raise
            return False
        finally:
            self._db.execute(f"PRAGMA busy_timeout={_WAIT_S * 1000:.0f}")
        return True

    def _spend(self, key_id: str | None, cost: int) -> int:
        if key_id is None or cost == 0:
            return 0
        row = self._db.execute("SELECT granted FROM keys WHERE id = ? AND metered = 1", (key_id,)).fetchone()
        if row is None:
            return 0
        from_granted: int = min(max(row[0], 0), cost)
        sql = "UPDATE keys SET granted = granted - ?, topped_up = topped_up - ? WHERE id = ?"
        self._db.execute(sql, (from_granted, cost - from_granted, key_id))
        return from_granted

    def sums(self, key_id: str | None = None) -> Iterator[Sum]:
        """Charges by day, key and model, newest day first."""
        where, values = ("WHERE key_id = ?", (key_id,)) if key_id is not None else ("", ())
        sql = f"""SELECT date(time_ns / 1000000000, 'unixepoch') AS day, key_id, model, count(*), sum(hit),
          sum(miss), sum(output), sum(cost), currency FROM charges {where}
          GROUP BY day, key_id, model, currency ORDER BY day DESC"""
        for row in self._db.execute(sql, values):
            yield Sum(*row)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
