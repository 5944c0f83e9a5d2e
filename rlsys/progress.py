"""What `rlsys up` shows while it runs: a live panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from typing import TextIO

from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from protocol.messages import Event
from rlsys.screen import duration, rates, screen
from rlsys.states import from_data
from rlsys.supervisor import View
from rlsys.waits import servers

REFRESH_S = 0.5
PLAIN_S = 10.0
"""Without a terminal, a line at least this often, and one for each event."""


def time_left(view: View) -> str:
    """From the pace of the iterations so far."""
    done, since = view.snapshot.get("iteration", 0), view.training_since_s
    if not done or since is None:
        return "?"
    return duration((time.time() - since) / done * (view.config.iterations - done))


def event_line(event: Event) -> str | None:
    """An event as a sentence; None for those that are not worth a line."""
    data = event.data
    if event.name == "eval":
        share = data["pass_at_1"]
        versions = f"v{data['oldest_version']}" + (
            f"..v{data['newest_version']}" if data["newest_version"] != data["oldest_version"] else ""
        )
        failed = f", {data['failed']} problems without a score" if data["failed"] else ""
        return f"held-out pass@1 {share:.3f} at {versions} ({data['problems']} problems, {data['samples']} samples{failed})"
    if event.name == "skipped":
        return f"{data['count']} prompts skipped ({data['reason']}): {', '.join(data['first'])}"
    if event.name == "stage":
        left = f"{data['problems']} of {data['of']} problems" if data["problems"] != data["of"] else f"{data['of']} problems"
        return f"stage {data['stage']} is sampled for iterations from {data['from_iteration']} on ({left})"
    if event.name in ("training started", "training ended"):
        return event.name
    if event.name == "stalled":
        return f"nothing has moved for {data['for_s']:g} s: {data['why']}"
    if event.name == "guard":
        return f"guard: {data['guard']} at iteration {data['iteration']}: {data['what']}. Look at: {data['look']}"
    if event.name == "logger failed":
        return f"logger {data['logger']} failed and is left out: {data['error']}"
    if event.name == "moving again":
        return "it moves again"
    if event.name == "restart":
        return f"{data['how']}; it is started again"
    if event.name == "scale":
        return f"{data['fleet']}: {data['before']} -> {data['count']} ({data['why']})"
    if event.name == "left":
        return f"{data['process']} {data['how']} ({data['why']})"
    if event.name == "host joined":
        return f"host {data['host']} joins with {data['count']} {data['role']}s"
    if event.name == "host gone":
        return str(data["why"])
    if event.name == "learner resized":
        return f"the learner goes on with {data['count']} ranks instead of {data['before']}"
    if event.name == "learner resumed":
        return f"the learner goes on from v{data['version']} and trains {data['batches']} recorded batches again"
    if event.name == "engine restarted":
        return f"{event.identity.partition('@')[0]} lost its server and starts it again ({data['restarts']} so far): {data['fault'][:300]}"
    if event.name == "quarantine":
        return f"{event.identity.partition('@')[0]} takes back {data['groups']} groups and loads its weights once more: {data['reason']}"
    if event.name == "weights refused":
        return f"{data['generator']} refused v{data['version']}: {data['error']}"
    return None


def summary(view: View) -> str:
    """One line: where the run is, and which servers of engines do not sample."""
    return "; ".join([_where(view), *servers(from_data(process) for process in view.status.get("processes", ()))])


def _where(view: View) -> str:
    snapshot, last = view.snapshot, view.snapshot.get("last", {})
    if not last and view.training_since_s is not None:
        running = snapshot.get("queues", {}).get("queues/samples_running", 0)
        return f"iteration 0/{view.config.iterations}  {running:.0f} samples running  {rates(snapshot)}"
    if not last:
        ready = sum(p.registered is not None for p in view.processes.values())
        running = snapshot.get("queues", {}).get("queues/samples_running", 0)
        return f"starting: {ready} of {len(view.processes)} processes ready, {running:.0f} samples running"
    recent = [reward for reward in snapshot.get("rewards", []) if reward is not None][-5:]
    reward = f"{sum(recent) / len(recent):.3f}" if recent else "?"
    return (
        f"iteration {snapshot['iteration']}/{snapshot['iterations']}  reward {reward}  {rates(snapshot)}  "
        f"staleness {last['staleness/mean']:.2f} (max {last['staleness/max']:.0f})  left {time_left(view)}"
    )


class Progress:
    """Shows a view. `plain` forces lines."""

    def __init__(self, view: View, out: TextIO, *, plain: bool | None = None) -> None:
        self._view = view
        self._console = Console(file=out, highlight=False, soft_wrap=True)
        self._plain = (not self._console.is_terminal) if plain is None else plain
        self._live: Live | None = None
        self._next_s = 0.0
        self._lines = 0
        self._notes: deque[str] = deque()

    def __enter__(self) -> Progress:
        if not self._plain:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def event(self, event: Event) -> None:
        """A line that stays."""
        line = event_line(event)
        if line is not None:
            self.say(line)

    def say(self, line: str) -> None:
        """Print a line that stays, with the time since the start."""
        self._console.print(f"[dim]{duration(time.time() - self._view.started_s):>7}[/dim]  {escape(line)}")

    def note(self, line: str) -> None:
        """As `say`, at the next refresh; from any thread."""
        self._notes.append(line)
        self._next_s = 0.0

    def tick(self) -> None:
        """Refresh if it is time."""
        while self._notes:
            self.say(self._notes.popleft())
        now = time.monotonic()
        if now < self._next_s:
            return
        self._next_s = now + (PLAIN_S if self._plain else REFRESH_S)
        if self._live is not None:
            self._live.update(self._panel(), refresh=True)
        else:
            self._lines += 1
            if self._lines > 1:
                self.say(summary(self._view))

    def _panel(self) -> RenderableType:
        return screen(self._view.status) if self._view.status else Text.from_markup(escape(summary(self._view)))
