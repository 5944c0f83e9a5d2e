"""The supervisor's log: what it does and what it is told, as log records of the run like those of every other process.

    supervisor --log records, events--> logs/supervisor.jsonl --> rlsys logs RUN --merge

`logs/supervisor.log` is what a detached supervisor prints; this file is there for every run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from protocol.messages import Event
from rlsys.logs import machine_handler
from rlsys.progress import event_line

log = logging.getLogger("rlsys.supervisor")

WARNINGS = frozenset({"stalled", "quarantine", "host gone"})
"""Events that are warnings; the others are told for information."""
TOLD_BY_THEMSELVES = frozenset({"guard", "logger failed", "weights refused", "engine restarted", "restart"})
"""Events that stand in the log of whoever saw them already."""


@contextmanager
def chronicle(run_dir: Path, log_mb: float, where: Callable[[], tuple[str, int]]) -> Iterator[Callable[[Event], None]]:
    """Write the records of this process to logs/supervisor.jsonl. Gives what takes the run's events.

    `where` tells the run's id, which is known once the run has begun, and the iteration that is open.
    """
    handler = machine_handler(run_dir, "", "supervisor", 1, log_mb)
    ours, before = logging.getLogger("rlsys"), logging.getLogger("rlsys").level

    def place(record: logging.LogRecord) -> bool:
        run, iteration = where()
        record.__dict__["run"] = run
        record.__dict__.setdefault("iteration", iteration)
        return True

    handler.addFilter(place)
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    try:
        yield record_event
    finally:
        ours.removeHandler(handler)
        ours.setLevel(before)
        handler.close()


def record_event(event: Event) -> None:
    """An event as a line of the log, in the words of the progress; those without words are left out, and those that are logged already."""
    line = None if event.name in TOLD_BY_THEMSELVES else event_line(event)
    if line is None:
        return
    data: dict[str, Any] = event.data
    place = {"iteration": int(data["iteration"])} if "iteration" in data else {}
    if "group" in data:
        place["group"] = int(data["group"])
    name = event.identity.partition("@")[0]
    who = "" if name == "supervisor" or line.startswith(name) else f"{name}: "
    log.log(logging.WARNING if event.name in WARNINGS else logging.INFO, "%s%s", who, line, extra=place)
