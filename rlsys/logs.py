"""Logs of a run: for people in `logs/<process>.log`, for machines in `logs/<process>.jsonl`, with run, process, iteration and group in every line.

The first is also where whatever a process prints ends up, a traceback of a library included; the second holds log records alone. Both are
bounded: past `observe.log_mb` a file is moved aside to `<name>.1`, which replaces the one before.
"""

from __future__ import annotations

import heapq
import json
import logging
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from protocol.clock import now_s
from protocol.errors import ConfigError
from protocol.intervals import here
from protocol.node import ProcessSpec
from rlsys.lines import open_lines

LEVELS = ("debug", "info", "warning", "error", "critical")
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Where(logging.Filter):
    """Adds what the thread is at to every record, unless the record says it itself."""

    def filter(self, record: logging.LogRecord) -> bool:
        iteration, group = here()
        place = {"iteration": iteration, "group": group}
        place |= {name: record.__dict__[name] for name in ("iteration", "group") if name in record.__dict__}
        at = [f"{name} {number}" for name, number in place.items() if number >= 0]
        record.__dict__.update({**place, "at": f" [{', '.join(at)}]" if at else ""})
        return True


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def __init__(self, run_id: str, process: str, start: int) -> None:
        super().__init__()
        self._who = {"run": run_id, "role": process.rpartition("-")[0] or process, "process": process, "start": start}

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time_s": round(record.created, 6),
            "level": record.levelname.lower(),
            **self._who,
            **({"run": record.__dict__["run"]} if "run" in record.__dict__ else {}),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name in ("iteration", "group"):
            number = getattr(record, name, -1)
            line[name] = number if number >= 0 else None
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def machine_handler(run_dir: Path, run: str, process: str, start: int, log_mb: float) -> logging.Handler:
    """What writes the records of a process to logs/<process>.jsonl."""
    path = run_dir / "logs" / f"{process}.jsonl"
    path.parent.mkdir(exist_ok=True)
    open_lines(path).close()  # a process before this one may have died in the middle of a line
    machine = RotatingFileHandler(path, maxBytes=int(log_mb * 1e6), backupCount=1, encoding="utf-8")
    machine.setFormatter(JsonLines(run, process, start))
    return machine


def set_up(spec: ProcessSpec, log_mb: float) -> None:
    """Send the log records of this process to both files. Standard error already goes to the first."""
    human = logging.StreamHandler(sys.stderr)
    human.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s%(at)s: %(message)s"))
    machine = machine_handler(Path(spec.run_dir), spec.run_id, spec.name, spec.start, log_mb)
    for handler in (human, machine):
        handler.addFilter(Where())
    logging.basicConfig(level=logging.INFO, handlers=[human, machine], force=True)


def bound(path: Path, most_bytes: float) -> bool:
    """Move what a file holds aside and empty it, if it is too long. For files that another process has open to append to: what is written
    between the copy and the cut is lost, which for a log is better than a full disk."""
    try:
        if path.stat().st_size <= most_bytes:
            return False
    except FileNotFoundError:
        return False
    aside = path.with_name(f"{path.name}.1")
    try:
        shutil.copyfile(path, aside)
    except OSError:  # no room for two of them: then the older goes
        aside.unlink(missing_ok=True)
    with path.open("r+b") as file:
        file.truncate(0)
    return True


# ---------------------------------------------------------------------------------------------------- reading


def seconds_of(text: str) -> float:
    """ "90", "90s", "5m", "2h", "1d" -> seconds. Raises ConfigError."""
    number, unit = (text[:-1], text[-1]) if text[-1:] in _UNITS else (text, "s")
    try:
        value = float(number) * _UNITS[unit]
    except ValueError:
        raise ConfigError(f"--since {text}: expected a time such as 90s, 5m, 2h or 1d") from None
    if not 0 <= value < float("inf"):
        raise ConfigError(f"--since {text}: expected a time such as 90s, 5m, 2h or 1d")
    return value


def merged(directory: Path, role: str | None = None, since_s: float = 0.0, level: str = "debug") -> Iterator[dict[str, Any]]:
    """Records of all processes (or of a role, or of one process) by time, from `since_s` on, at least as grave as `level`."""
    least = LEVELS.index(level)

    def records(path: Path) -> Iterator[tuple[float, str, dict[str, Any]]]:
        for part in (path.with_name(f"{path.name}.1"), path):
            with part.open(encoding="utf-8", errors="replace") if part.is_file() else _nothing() as file:
                for line in file:
                    try:
                        record = json.loads(line)
                        wanted = record["time_s"] >= since_s and LEVELS.index(record["level"]) >= least
                        _ = record["process"], record["message"]
                    except (ValueError, KeyError, TypeError):  # a line that is being written, was torn, or is not ours
                        continue
                    if wanted:
                        yield record["time_s"], path.stem, record

    found = [p for p in sorted(directory.glob("*.jsonl")) if role is None or p.stem == role or p.stem.rpartition("-")[0] == role]
    for _, _, record in heapq.merge(*map(records, found), key=lambda item: item[:2]):
        yield record


class _nothing:  # noqa: N801 (reads like a function)
    """A file without lines."""

    def __enter__(self) -> list[str]:
        return []

    def __exit__(self, *_: object) -> None: ...


def in_a_line(record: Mapping[str, Any]) -> str:
    """A record for people."""
    clock = time.strftime("%H:%M:%S", time.localtime(record["time_s"])) + f".{int(record['time_s'] * 1000) % 1000:03d}"
    at = [f"{name} {record[name]}" for name in ("iteration", "group") if record.get(name) is not None]
    place = f" [{', '.join(at)}]" if at else ""
    lines = f"\n{record['traceback']}" if "traceback" in record else ""
    return f"{clock} {record['level'].upper():<7} {record['process']:<13}{place} {record['message']}{lines}"


def show_merged(run: Path, role: str | None, since: str | None, level: str, *, as_json: bool) -> int:
    """`rlsys logs RUN --merge`. Raises ConfigError when there are no logs."""
    directory = run / "logs"
    if not directory.is_dir():
        raise ConfigError(f"{run}: holds no run")
    for record in merged(directory, role, now_s() - seconds_of(since) if since else 0.0, level):
        print(json.dumps(record) if as_json else in_a_line(record))
    return 0
