"""The ledger: who may write, what was issued, published, committed, and one terminal state per group. SQLite in the run directory.

The supervisor writes `run`, `starts`, `sizes`; rank 0 of the learner `published`, `checkpoints` and `ended`; the dispatcher `issued` and `skipped`.
Whoever writes names its start (`Writer`): the transaction is refused when that role and index has been started again since, so that a
process that wakes up beside its replacement changes nothing.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import quote

from protocol.errors import DataError, Fenced
from protocol.messages import GroupOutcome, Purpose

_SCHEMA = """
CREATE TABLE IF NOT EXISTS run (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS starts (
  role TEXT NOT NULL, idx INTEGER NOT NULL, start INTEGER NOT NULL, epoch INTEGER NOT NULL, pid INTEGER NOT NULL DEFAULT 0,
  ticks INTEGER NOT NULL DEFAULT 0, started_s REAL NOT NULL, ended_s REAL, how TEXT NOT NULL DEFAULT '', PRIMARY KEY (role, idx, start)
);
CREATE TABLE IF NOT EXISTS sizes (
  changed_s REAL NOT NULL, epoch INTEGER NOT NULL, fleet TEXT NOT NULL, count INTEGER NOT NULL, why TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS issued (
  group_id INTEGER NOT NULL, attempt INTEGER NOT NULL, iteration INTEGER NOT NULL, purpose TEXT NOT NULL,
  problem_id TEXT NOT NULL, generator TEXT NOT NULL, issued_s REAL NOT NULL, stage INTEGER NOT NULL DEFAULT 0,
  requeues INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (group_id, attempt)
);
CREATE TABLE IF NOT EXISTS stages (
  stage INTEGER PRIMARY KEY, name TEXT NOT NULL, iteration INTEGER NOT NULL, problems INTEGER NOT NULL, problems_of INTEGER NOT NULL,
  kept TEXT
);
CREATE TABLE IF NOT EXISTS skipped (problem_id TEXT PRIMARY KEY, reason TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS ended (
  group_id INTEGER PRIMARY KEY, iteration INTEGER NOT NULL, purpose TEXT NOT NULL, problem_id TEXT NOT NULL, state TEXT NOT NULL,
  reason TEXT NOT NULL, num_samples INTEGER NOT NULL, num_passed INTEGER NOT NULL, mean_score REAL,
  oldest_version INTEGER NOT NULL, newest_version INTEGER NOT NULL, in_batch INTEGER NOT NULL DEFAULT 0,
  num_truncated INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS published (
  number INTEGER NOT NULL, incarnation INTEGER NOT NULL, start INTEGER NOT NULL, manifest_sha256 TEXT NOT NULL, published_s REAL NOT NULL,
  PRIMARY KEY (number, incarnation)
);
CREATE TABLE IF NOT EXISTS checkpoints (
  number INTEGER PRIMARY KEY, incarnation INTEGER NOT NULL, directory TEXT NOT NULL, sha256 TEXT NOT NULL, journal_segment INTEGER NOT NULL,
  journal_end INTEGER NOT NULL, first_segment INTEGER NOT NULL, committed_s REAL NOT NULL
);
"""


def _columns(schema: str) -> dict[str, set[str]]:
    """Table -> its columns."""
    db = sqlite3.connect(":memory:")
    try:
        db.executescript(schema)
        tables = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {table: {row[1] for row in db.execute(f"PRAGMA table_info({table})")} for table in tables}
    finally:
        db.close()


_COLUMNS = _columns(_SCHEMA)
_FIRST = ("run", "starts", "issued", "ended")
"""Tables that every ledger has."""
LOCKED_S = 30.0
"""Longest wait for another process's transaction, each of which takes milliseconds; then the writer ends and says that the ledger is locked."""
_ENDED = tuple(spec.name for spec in fields(GroupOutcome))
"""The columns of `ended` are the fields of GroupOutcome."""


@dataclass(frozen=True, slots=True)
class Writer:
    """Which start of which process writes."""

    role: str
    index: int
    start: int

    def __str__(self) -> str:
        return f"{self.role}-{self.index}@{self.start}"


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of the run began with groups for `iteration`."""

    stage: int
    name: str
    iteration: int
    problems: int
    """That its filters left; 0 means that they left nothing, so that it has all."""
    problems_of: int
    kept: tuple[str, ...] | None
    """Their ids, as they were decided then; None without filters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Issue:
    """The dispatcher gives a group to a generator; written before the task is sent."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A committed state: version `number`, what its files hash to, and from where on the journal holds all that it does not know."""

    number: int
    incarnation: int
    directory: str
    """Relative to the run directory."""
    sha256: str
    journal_segment: int
    journal_end: int
    """The journal's end when the state was taken."""
    first_segment: int
    """The oldest segment with a trajectory whose group had no terminal state then: a restarted learner reads from here."""
    committed_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One start of a process; `ticks` is its start time in the kernel's clock, so that a pid used again is not taken for it."""

    role: str
    index: int
    start: int
    epoch: int
    pid: int
    ticks: int
    started_s: float
    ended_s: float | None
    how: str


def _connect(path: Path, options: str) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(str(path))}{options}", timeout=LOCKED_S, isolation_level=None, check_same_thread=False, uri=True)


def _readable(db: sqlite3.Connection) -> bool:
    try:
        db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
        return True
    except sqlite3.OperationalError:
        return False


def _unwritten(path: Path) -> bool:
    """Whether transactions stand beside the file that are not in it yet."""
    log = path.with_name(f"{path.name}-wal")
    return log.exists() and log.stat().st_size > 0


class Ledger:
    """One connection to `ledger.sqlite`. Each method is one transaction; any thread may call it.

    Without a `writer` nothing is fenced: the supervisor, readers, and tests of single roles.
    """

    def __init__(self, path: Path, writer: Writer | None = None, *, read_only: bool = False) -> None:
        self._lock = threading.RLock()
        self._writer = writer
        self._path = path
        try:
            self._open(read_only=read_only)
        except BaseException:
            if hasattr(self, "_db"):
                self._db.close()
            raise

    def _open(self, *, read_only: bool) -> None:
        path = self._path
        try:
            self._db = _connect(path, "?mode=ro" if read_only else "")
            if not read_only:
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=NORMAL")
                self._db.executescript(_SCHEMA)
            elif not _readable(self._db) and not _unwritten(path):
                self._db.close()
                self._db = _connect(path, "?immutable=1")  # a directory that cannot be written, in which SQLite cannot make its lock file
            self._check_columns()
        except sqlite3.OperationalError as error:
            raise DataError(f"{path}: the ledger cannot be opened ({error})") from None
        except sqlite3.DatabaseError as error:
            raise DataError(f"{path}: the ledger is damaged ({error})") from None

    def _check_columns(self) -> None:
        """Raise DataError for the ledger of another rlsys, whose tables are others. One that lacks a newer table is an older run's, and read."""
        found = {table: {row[1] for row in self._db.execute(f"PRAGMA table_info({table})")} for table in _COLUMNS}
        for table, columns in _COLUMNS.items():
            missing = sorted(columns - found[table])
            if missing and (found[table] or table in _FIRST):
                lacks = f"column {missing[0]} of table {table}" if found[table] else f"table {table}"
                raise DataError(
                    f"{self._path}: this is no ledger of this version of rlsys (no {lacks}): read it with the version that wrote it"
                )

    def _read(self, query: str, values: Sequence[object] = ()) -> list[Any]:
        """The rows of a query, none of a transaction that another thread is in. Raises DataError when the file is damaged."""
        try:
            with self._lock:
                return self._db.execute(query, values).fetchall()
        except sqlite3.OperationalError as error:
            raise DataError(f"{self._path}: the ledger cannot be read ({error})") from None
        except sqlite3.DatabaseError as error:
            raise DataError(f"{self._path}: the ledger is damaged ({error})") from None

    def check(self) -> None:
        """Raise DataError when the file is damaged."""
        try:
            found = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
        except sqlite3.DatabaseError as error:
            found = str(error)
        if found != "ok":
            raise DataError(f"{self._path}: the ledger is damaged ({' '.join(found.split())})")

    # ------------------------------------------------------------------------------------------------ the supervisor's part

    def get(self, key: str, default: str = "") -> str:
        """A value of the run."""
        rows = self._read("SELECT value FROM run WHERE key = ?", (key,))
        return str(rows[0][0]) if rows else default

    def put(self, key: str, value: str) -> None:
        """Keep a value of the run."""
        with self._transaction(fenced=False) as db:
            db.execute("INSERT INTO run VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value", (key, value))

    def next_start(self, role: str, index: int, epoch: int) -> int:
        """Take the next start number of a process: from now on older starts of it can write nothing."""
        with self._transaction(fenced=False) as db:
            start: int = db.execute("SELECT COALESCE(MAX(start), 0) + 1 FROM starts WHERE role = ? AND idx = ?", (role, index)).fetchone()[
                0
            ]
            db.execute(
                "INSERT INTO starts (role, idx, start, epoch, started_s) VALUES (?,?,?,?,?)", (role, index, start, epoch, time.time())
            )
        return start

    def started(self, role: str, index: int, start: int, pid: int, ticks: int) -> None:
        """The process of a start exists."""
        with self._transaction(fenced=False) as db:
            db.execute("UPDATE starts SET pid = ?, ticks = ? WHERE role = ? AND idx = ? AND start = ?", (pid, ticks, role, index, start))

    def stopped(self, role: str, index: int, start: int, how: str) -> None:
        """The process of a start has ended."""
        with self._transaction(fenced=False) as db:
            db.execute(
                "UPDATE starts SET ended_s = ?, how = ? WHERE role = ? AND idx = ? AND start = ?", (time.time(), how, role, index, start)
            )

    def starts(self) -> list[Start]:
        """Every start, in order."""
        rows = self._read("SELECT role, idx, start, epoch, pid, ticks, started_s, ended_s, how FROM starts ORDER BY started_s, role, idx")
        return [Start(**dict(zip((f.name for f in fields(Start)), row, strict=True))) for row in rows]

    def resized(self, fleet: str, count: int, epoch: int, why: str) -> None:
        """A fleet shall have `count` processes from now on."""
        with self._transaction(fenced=False) as db:
            db.execute("INSERT INTO sizes VALUES (?,?,?,?,?)", (time.time(), epoch, fleet, count, why))

    def sizes(self) -> list[tuple[float, str, int, str]]:
        """Every change of a fleet's size, in order: (time_s, fleet, count, why)."""
        rows = self._read("SELECT changed_s, fleet, count, why FROM sizes ORDER BY rowid")
        return [(float(at), str(fleet), int(count), str(why)) for at, fleet, count, why in rows]

    # ------------------------------------------------------------------------------------------------ the dispatcher's part

    def issued(self, issues: Iterable[Issue]) -> None:
        """Append to the issue log, before the tasks are sent."""
        self._write(f"INSERT INTO issued ({','.join(_ISSUED)}) VALUES ({','.join('?' * len(_ISSUED))})", [astuple(i) for i in issues])

    def skipped(self, problems: Iterable[tuple[str, str]]) -> None:
        """Problems that no group is made of: (problem_id, reason)."""
        self._write("INSERT OR IGNORE INTO skipped VALUES (?,?)", list(problems))

    def num_skipped(self) -> int:
        """Problems that no group is made of."""
        return int(self._read("SELECT COUNT(*) FROM skipped")[0][0])

    def stage(self, stage: int, name: str, iteration: int, problems: int, problems_of: int, kept: Iterable[str] | None) -> None:
        """A stage began with groups for `iteration`; `kept` are the problems that its filters left, None if it has none."""
        text = None if kept is None else "\n".join(kept)
        self._write("INSERT OR IGNORE INTO stages VALUES (?,?,?,?,?,?)", [(stage, name, iteration, problems, problems_of, text)])

    def stages(self) -> list[Stage]:
        """The stages that have begun, in their order."""
        rows = self._read("SELECT stage, name, iteration, problems, problems_of, kept FROM stages ORDER BY stage")
        return [
            Stage(stage, name, iteration, problems, of, None if kept is None else tuple(str(kept).split("\n")))
            for stage, name, iteration, problems, of, kept in rows
        ]

    def issues(self) -> list[Issue]:
        """The issue log in its order."""
        rows = self._read(f"SELECT {','.join(_ISSUED)} FROM issued ORDER BY rowid")
        return [Issue(**dict(zip(_ISSUED, row, strict=True))) for row in rows]

    # ------------------------------------------------------------------------------------------------ the learner's part

    def ended(self, outcomes: Iterable[GroupOutcome]) -> None:
        """Write terminal states that no update depends on. A group that has one already raises sqlite3.IntegrityError: always a bug."""
        self._write(_INSERT_ENDED, [_ended_row(outcome) for outcome in outcomes])

    def publish(self, number: int, incarnation: int, manifest_sha256: str, make_visible: Callable[[], object]) -> None:
        """Let a version appear: `make_visible` renames its directory inside the transaction that checks the fence."""
        with self._transaction() as db:
            start = self._writer.start if self._writer else 0
            db.execute("INSERT INTO published VALUES (?,?,?,?,?)", (number, incarnation, start, manifest_sha256, time.time()))
            make_visible()

    def commit(self, checkpoint: Checkpoint, outcomes: Iterable[GroupOutcome]) -> None:
        """The commit: a checkpoint and the terminal states that it stands for, durable when this returns."""
        with self._lock:
            self._db.execute("PRAGMA synchronous=FULL")
            try:
                with self._transaction() as db:
                    db.execute("INSERT INTO checkpoints VALUES (?,?,?,?,?,?,?,?)", astuple(checkpoint))
                    db.executemany(_INSERT_ENDED, [_ended_row(outcome) for outcome in outcomes])
            finally:
                self._db.execute("PRAGMA synchronous=NORMAL")

    def checkpoints(self) -> list[Checkpoint]:
        """What was committed, newest first."""
        rows = self._read(
            "SELECT number, incarnation, directory, sha256, journal_segment, journal_end, first_segment, committed_s "
            "FROM checkpoints ORDER BY number DESC"
        )
        return [Checkpoint(**dict(zip((f.name for f in fields(Checkpoint)), row, strict=True))) for row in rows]

    def journal_end(self) -> tuple[int, int]:
        """(segment, offset) up to which commits stand for what the journal holds; (-1, 0) without any."""
        return max(((c.journal_segment, c.journal_end) for c in self.checkpoints()), default=(-1, 0))

    def forget_checkpoints(self, numbers: Iterable[int]) -> None:
        """Their directories are about to be removed, because newer ones are committed."""
        self._write("DELETE FROM checkpoints WHERE number = ?", [(number,) for number in numbers])

    def roll_back(self, number: int) -> None:
        """Go back to the state of version `number`, because every later checkpoint is damaged: what they committed is open again.

        That is every group with a place in a batch from this version on, whatever became of it: the batch is trained again as a whole.
        """
        with self._transaction() as db:
            db.execute("DELETE FROM checkpoints WHERE number > ?", (number,))
            db.execute("DELETE FROM ended WHERE purpose = 'train' AND in_batch = 1 AND iteration >= ?", (number,))

    def versions(self) -> list[tuple[int, int]]:
        """(number, incarnation) of every published version, in the order of publication."""
        return [(int(n), int(i)) for n, i in self._read("SELECT number, incarnation FROM published ORDER BY rowid")]

    def outcomes(self) -> list[GroupOutcome]:
        """Every terminal state, by group."""
        rows = self._read(f"SELECT {','.join(_ENDED)} FROM ended ORDER BY group_id")
        return [_outcome(row) for row in rows]

    def outcomes_of(self, group_ids: Iterable[int]) -> list[GroupOutcome]:
        """The terminal states that these groups have."""
        wanted = list(group_ids)
        found = []
        for start in range(0, len(wanted), 500):
            some = wanted[start : start + 500]
            query = f"SELECT {','.join(_ENDED)} FROM ended WHERE group_id IN ({','.join('?' * len(some))})"
            found += [_outcome(row) for row in self._read(query, some)]
        return found

    def open_groups(self) -> dict[int, str]:
        """Training groups that were issued and have no terminal state here, with their problems, in their order."""
        rows = self._read(
            "SELECT group_id, problem_id FROM issued WHERE purpose = 'train' AND attempt = 0 AND NOT EXISTS "
            "(SELECT 1 FROM ended WHERE ended.group_id = issued.group_id) ORDER BY group_id"
        )
        return {int(group_id): str(problem_id) for group_id, problem_id in rows}

    def ended_groups(self) -> set[int]:
        """Groups that have a terminal state."""
        return {int(row[0]) for row in self._read("SELECT group_id FROM ended")}

    def counts(self) -> dict[str, int]:
        """Groups by terminal state."""
        return dict(self._read("SELECT state, COUNT(*) FROM ended GROUP BY state"))

    def close(self) -> None:
        """After the transaction that another thread may be in."""
        with self._lock:
            self._db.close()

    # ------------------------------------------------------------------------------------------------ transactions

    def _write(self, statement: str, rows: Sequence[tuple[object, ...]]) -> None:
        if rows:
            with self._transaction() as db:
                db.executemany(statement, rows)

    @contextmanager
    def _transaction(self, *, fenced: bool = True) -> Iterator[sqlite3.Connection]:
        """All or nothing. Raises Fenced when this writer has been replaced."""
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                if fenced and self._writer is not None:
                    self._check_fence(self._writer)
                yield self._db
                self._db.execute("COMMIT")
            except sqlite3.IntegrityError:
                self._db.execute("ROLLBACK")
                raise  # a key stands twice: a bug of the writer, no fault of the file
            except sqlite3.DatabaseError as error:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise DataError(f"{self._path}: the ledger cannot be written ({error})") from None
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _check_fence(self, writer: Writer) -> None:
        newest = self._db.execute("SELECT MAX(start) FROM starts WHERE role = ? AND idx = ?", (writer.role, writer.index)).fetchone()[0]
        if newest is not None and newest != writer.start:
            raise Fenced(f"{writer} has been replaced by {writer.role}-{writer.index}@{newest}: what it writes no longer counts")


_ISSUED = tuple(spec.name for spec in fields(Issue))
_INSERT_ENDED = f"INSERT INTO ended ({','.join(_ENDED)}) VALUES ({','.join('?' * len(_ENDED))})"


def _outcome(row: Sequence[Any]) -> GroupOutcome:
    return GroupOutcome(**{**dict(zip(_ENDED, row, strict=True)), "in_batch": bool(row[_ENDED.index("in_batch")])})


def _ended_row(outcome: GroupOutcome) -> tuple[object, ...]:
    return tuple(getattr(outcome, column) for column in _ENDED)
