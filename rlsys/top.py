"""`rlsys top`: the live screen of a run in this terminal, from the files that its supervisor and dashboard write."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live

from protocol.messages import Event
from rlsys.lines import parse_lines
from rlsys.progress import event_line
from rlsys.rundir import holder, read_json, read_status
from rlsys.screen import duration, screen

REFRESH_S = 0.5
EVENTS = 6


class Tail:
    """The last lines worth a look in metrics.jsonl, read on from where the last call stopped."""

    def __init__(self, path: Path, since_s: float) -> None:
        self._path, self._since_s = path, since_s
        self._offset = 0
        self.lines: deque[str] = deque(maxlen=EVENTS)

    def read(self) -> list[str]:
        """As the progress of `rlsys up` says them."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        for record in parse_lines(whole.decode("utf-8", "replace")):
            if "event" in record:
                data_ = {key: value for key, value in record.items() if key not in ("time_s", "identity", "event")}
                try:
                    text = event_line(Event(identity=record["identity"], time_s=record["time_s"], name=record["event"], data=data_))
                except KeyError:  # of another version of rlsys
                    text = None
                if text:
                    self.lines.append(f"{duration(record['time_s'] - self._since_s):>7}  {text}")
        return list(self.lines)


def _ended(run: Path, content: dict[str, Any]) -> dict[str, Any]:
    """With how the run ended, if it has: the supervisor may have had no time to write its status again."""
    ended = read_json(run / "exit.json")
    if ended is not None:
        done = {"iteration": ended["iterations_done"], "iterations": ended["iterations"]} if "iterations_done" in ended else {}
        return {**content, **done, "state": ended.get("outcome", "unknown"), "reason": ended.get("reason", "")}
    return (
        content if holder(run) is not None else {**content, "state": "dead" if content.get("state") == "running" else content.get("state")}
    )


def top(run: Path, out: TextIO, *, once: bool) -> int:
    """Show it until the run ends or Ctrl-C; with `once`, and without a terminal, print it a single time."""
    content = read_status(run)
    console = Console(file=out, highlight=False)
    tail = Tail(run / "metrics.jsonl", content.get("since_s", 0.0))
    if once or not console.is_terminal:
        console.print(screen(_ended(run, content), tail.read()))
        return 0
    with Live(console=console, auto_refresh=False, screen=True) as live:
        try:
            while holder(run) is not None:
                live.update(screen(read_json(run / "status.json") or content, tail.read()), refresh=True)
                time.sleep(REFRESH_S)
        except KeyboardInterrupt:
            return 0
    console.print(screen(_ended(run, read_json(run / "status.json") or content), tail.read()))
    return 0
