"""The ledger: one terminal state per group, in SQLite in the run directory.

Rank 0 of the learner is the only writer of terminal rows, the dispatcher of issue rows. Either sees what the other committed.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from protocol.messages import GroupOutcome, Purpose

_SCHEMA = """
CREATE TABLE IF NOT EXISTS run (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS issued (
  group_id INTEGER NOT NULL, attempt INTEGER NOT NULL, iteration INTEGER NOT NULL, purpose TEXT NOT NULL,
  problem_id TEXT NOT NULL, generator TEXT NOT NULL, issued_s REAL NOT NULL, stage INTEGER NOT NULL DEFAULT 0,
  requeues INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (group_id, attempt)
);
CREATE TABLE IF NOT EXISTS skipped (problem_id TEXT PRIMARY KEY, reason TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS ended (
  group_id INTEGER PRIMARY KEY, iteration INTEGER NOT NULL, purpose TEXT NOT NULL, problem_id TEXT NOT NULL, state TEXT NOT NULL,
  reason TEXT NOT NULL, num_samples INTEGER NOT NULL, num_passed INTEGER NOT NULL, mean_score REAL,
  oldest_version INTEGER NOT NULL, newest_version INTEGER NOT NULL, in_batch INTEGER NOT NULL DEFAULT 0
);
"""

_ENDED = tuple(spec.name for spec in fields(GroupOutcome))
"""The columns of `ended` are the fields of GroupOutcome."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Issue:
    """The dispatcher gave a group to a generator."""

    group_id: int
    attempt: int
    iteration: int
    purpose: Purpose
    problem_id: str
    generator: str
    issued_s: float
    stage: int = 0
    requeues: int = 0
    """How often this problem was given back before, by a group that was given up."""


class Ledger:
    """One connection to `ledger.sqlite`. Each method is one transaction; any thread may call it."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, timeout=30.0, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.executescript(_SCHEMA)

    def issued(self, issues: Iterable[Issue]) -> None:
        """Append to the issue log."""
        rows = [(i.group_id, i.attempt, i.iteration, i.purpose, i.problem_id, i.generator, i.issued_s, i.stage, i.requeues) for i in issues]
        self._write("INSERT INTO issued VALUES (?,?,?,?,?,?,?,?,?)", rows)

    def skipped(self, problems: Iterable[tuple[str, str]]) -> None:
        """Problems that no group is made of: (problem_id, reason)."""
        self._write("INSERT OR IGNORE INTO skipped VALUES (?,?)", list(problems))

    def ended(self, outcomes: Iterable[GroupOutcome]) -> None:
        """Write terminal states. A group that has one already raises sqlite3.IntegrityError: always a bug."""
        rows = [tuple(getattr(outcome, column) for column in _ENDED) for outcome in outcomes]
        self._write(f"INSERT INTO ended ({','.join(_ENDED)}) VALUES ({','.join('?' * len(_ENDED))})", rows)

    def outcomes(self) -> list[GroupOutcome]:
        """Every terminal state, by group."""
        rows = self._db.execute(f"SELECT {','.join(_ENDED)} FROM ended ORDER BY group_id").fetchall()
        return [GroupOutcome(**{**dict(zip(_ENDED, row, strict=True)), "in_batch": bool(row[-1])}) for row in rows]

    def counts(self) -> dict[str, int]:
        """Groups by terminal state."""
        return dict(self._db.execute("SELECT state, COUNT(*) FROM ended GROUP BY state").fetchall())

    def close(self) -> None:
        self._db.close()

    def _write(self, statement: str, rows: Sequence[tuple[object, ...]]) -> None:
        if not rows:
            return
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._db.executemany(statement, rows)
                self._db.execute("COMMIT")
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
