"""The dashboard: gathers what every process observed, and writes it where people and tools look.

    every process --Metrics, Intervals, Event--> [ dashboard ] --> loggers (TensorBoard), metrics.jsonl, events/, Prometheus
    learner --Distribution, Trajectory (a few)-->      |------> Snapshot --> supervisor

It waits for observations alone and wakes nobody: the ring runs on without it.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protocol.errors import RunEnded, UserError
from protocol.messages import Distribution, Event, Intervals, Metrics, Snapshot, Trajectory
from protocol.node import Node
from protocol.registry import resolve
from rlsys.config import RunConfig
from rlsys.fleets import Fleets, role_of
from rlsys.guards import Guards
from rlsys.lines import BoundedLines, open_lines
from rlsys.loggers import LOGGERS, LoggedRun, Logger
from rlsys.report import read_iterations

if TYPE_CHECKING:
    from actors.text import Text
    from rlsys.prometheus import Exporter

log = logging.getLogger("rlsys.dashboard")

SNAPSHOT_S = 0.5
QUIET_S = 0.5
"""Without any observation of others, after which a dashboard that was told to stop does."""
LATEST_S = 3.0
"""After which it does in any case."""
EVENTS_BYTES = 32 << 20
"""Of a track's file before it is moved aside; with the old one, at most twice that. A busy track writes about 2 kB/s: hours."""


def finite(value: float) -> float | None:
    """JSON knows no NaN: what is not a finite number is null."""
    return value if math.isfinite(value) else None


class Dashboard:
    """The loop of the dashboard process."""

    def __init__(self, node: Node, config: RunConfig) -> None:
        self._node, self._config = node, config
        self._fleets = Fleets()
        self._observations = node.serve("observe", on_gone=self._fleets.left)
        run_dir = Path(node.spec.run_dir)
        before = read_iterations(run_dir)
        self._metrics = open_lines(run_dir / "metrics.jsonl")
        self._events_dir = run_dir / "events"
        self._events_dir.mkdir(exist_ok=True)
        self._tracks: dict[str, BoundedLines] = {}
        self._guards = Guards(config.guards)
        self._values: dict[str, Any] = {"iteration": 0, "iterations": config.iterations, "rewards": []}
        self._rewards: deque[float] = deque(maxlen=200)
        for record in before:
            self._go_on(record)
        self._next_s = 0.0
        self._text: Text | None = None
        self._shown: list[tuple[int, int, int]] = []
        run = LoggedRun(name=config.name, run_dir=run_dir, config=config.model_dump(mode="json"))
        self._loggers: dict[str, Logger] = {name: resolve(name, LOGGERS, "logger")(run) for name in config.observe.loggers}
        self._exporter: Exporter | None = None
        if config.observe.prometheus:
            from rlsys.prometheus import Exporter

            self._exporter = Exporter({"run": run_dir.name})
            self._values["prometheus"] = self._exporter.address

    def run(self) -> None:
        """Write until the run ends, and then what arrives in a last moment."""
        self._node.start()
        try:
            while True:
                self._node.recorder.enter("waiting:observations", "everyone")
                self._node.poll(SNAPSHOT_S)
                self._node.recorder.enter("writing")
                self._take()
                if time.monotonic() >= self._next_s:
                    self._next_s = time.monotonic() + SNAPSHOT_S
                    self._snapshot()
        except RunEnded:
            self._drain()
            self._snapshot()  # the last numbers, told as this process leaves
            raise
        finally:
            self._log(lambda logger: logger.close())
            self._metrics.close()
            for track in self._tracks.values():
                track.close()
            if self._exporter is not None:
                self._exporter.close()

    def _drain(self) -> None:
        """Other processes flush when they end, which is before this one is told to: take that too, until nothing has come for a while."""
        quiet_since = time.monotonic()
        deadline = quiet_since + LATEST_S
        while True:
            now = time.monotonic()  # before the look: what came while this process stood still is taken
            if self._take():
                quiet_since = now
            if now >= min(deadline, quiet_since + QUIET_S):
                break
            try:
                self._node.poll(0.05)
            except RunEnded:
                pass

    def _take(self) -> int:
        """Write what has arrived. Returns how much of it came from others: what this process says of itself never ends."""
        count = 0
        for _, message in self._observations.receive():
            count += getattr(message, "identity", "") != self._node.identity
            if isinstance(message, Metrics) and message.iteration < 0:
                self._fleets.gauge(message.identity, message.values)
            elif isinstance(message, Metrics):
                self._iteration(message)
            elif isinstance(message, Intervals):
                self._fleets.intervals(message)
                rows = {"offset_s": message.offset_s, "names": message.names, "rows": message.rows.tolist()}
                name = message.identity.partition("@")[0] + (f"+{message.track}" if message.track else "")
                self._track(name).write(json.dumps(rows))
            elif isinstance(message, Distribution):
                self._distribution(message)
            elif isinstance(message, Trajectory):
                self._sample(message)
            elif isinstance(message, Event):
                self._event(message)
        return count

    def _track(self, name: str) -> BoundedLines:
        if name not in self._tracks:
            self._tracks[name] = BoundedLines(self._events_dir / f"{name}.jsonl", EVENTS_BYTES)
        return self._tracks[name]

    def _iteration(self, message: Metrics) -> None:
        """The learner finished an iteration: everything of this moment is written at that step."""
        if role_of(message.identity) != "learner":
            return
        values = {**message.values, **self._fleets.window(message.time_s), **self._fleets.now()}
        self._write(message.iteration, message.time_s, values)
        self._rewards.append(values.get("reward/mean", float("nan")))
        self._values.update(
            iteration=message.iteration + 1, rewards=[round(r, 4) for r in self._rewards], last={k: round(v, 6) for k, v in values.items()}
        )
        for alarm in self._guards.observe(message.iteration, values):
            stop = self._config.guards.action == "stop"
            log.warning("guard: %s", alarm.sentence, extra={"iteration": alarm.iteration})
            self._node.event("guard", guard=alarm.guard, iteration=alarm.iteration, what=alarm.what, look=alarm.look, stop=stop)
            self._event(Event(identity=self._node.identity, time_s=message.time_s, name="guard", data={"what": alarm.sentence}))

    def _go_on(self, record: Mapping[str, Any]) -> None:
        """An iteration that a dashboard before this one wrote: the screen and the guards go on from there."""
        names = {name: float(value) for name, value in record.items() if "/" in name and value is not None}
        self._rewards.append(names.get("reward/mean", float("nan")))
        self._values.update(
            iteration=int(record["iteration"]) + 1,
            rewards=[finite(round(r, 4)) for r in self._rewards],
            last={k: round(v, 6) for k, v in names.items()},
        )
        self._guards.observe(int(record["iteration"]), names)

    def _distribution(self, m: Distribution) -> None:
        edges, counts = m.edges.tolist(), m.counts.tolist()
        self._log(lambda logger: logger.histogram(m.iteration, m.time_s, m.name, edges, counts))

    def _sample(self, t: Trajectory) -> None:
        """One sample to read: prompt, completion, verdict, score."""
        if self._text is None:
            from actors.text import Text

            self._text = Text(self._config.model.path)
        score = "none" if t.score is None else f"{t.score:g}"
        head = f"**{t.problem_id}**, sample {t.group_id}/{t.index}: **{t.status}**, score {score}, {len(t.token_ids)} tokens, {t.finish_reason}"
        parts = [head, *([f"> {t.detail}"] if t.detail else [])]
        parts += [_fenced("prompt", self._text.decode(t.prompt_ids)), _fenced("completion", self._text.decode(t.token_ids))]
        text = "\n\n".join(parts)
        self._log(lambda logger: logger.text(t.iteration, t.scored_s, f"samples/{self._place(t)}", text))

    def _place(self, t: Trajectory) -> int:
        """0, 1, 2, ... within its iteration, so that each place has one text over time."""
        self._shown = [key for key in self._shown if key[0] == t.iteration] + [(t.iteration, t.group_id, t.index)]
        return len(self._shown) - 1

    def _event(self, message: Event) -> None:
        record = {"time_s": message.time_s, "identity": message.identity, "event": message.name, **message.data}
        self._metrics.write(json.dumps(record) + "\n")
        if message.name == "eval":
            self._write(
                message.data["version"],
                message.time_s,
                {
                    "eval/pass_at_1": message.data["pass_at_1"],
                    "eval/problems": message.data["problems"],
                    "eval/failed": message.data["failed"],
                },
            )

    def _write(self, step: int, time_s: float, values: dict[str, float]) -> None:
        self._log(lambda logger: logger.scalars(step, time_s, values))
        if self._exporter is not None:
            self._exporter.update({**values, "iteration": float(step)})
        self._metrics.write(
            json.dumps({"time_s": round(time_s, 3), "iteration": step, **{name: finite(value) for name, value in values.items()}}) + "\n"
        )

    def _log(self, call: Callable[[Logger], object]) -> None:
        """Each logger in turn. One that fails (a full disk, a lost server) is reported and left out: a run is worth more than its curves."""
        for name, logger in list(self._loggers.items()):
            try:
                call(logger)
            except UserError:
                raise
            except Exception as error:  # of a library that is not ours
                del self._loggers[name]
                log.exception("logger %s failed and is left out from here on", name)
                if not self._node.closed and not self._node.stopping:
                    self._node.event("logger failed", logger=name, error=f"{type(error).__name__}: {error}")

    def _snapshot(self) -> None:
        now, live = self._fleets.now(), self._fleets.live(time.monotonic())
        if self._exporter is not None:
            self._exporter.update(now | live)
        queues = {name: value for name, value in now.items() if name.startswith("queues/")}
        memory = {name: value for name, value in now.items() if name.startswith("memory/")}
        rounded = {name: round(value, 3) for name, value in live.items()}
        values = {
            **self._values,
            "now": rounded,
            "queues": queues,
            "memory": memory,
            "sampled_tokens": self._fleets.sum("generator/tokens"),
        }
        self._node.tell(Snapshot(time_s=time.time(), values=values))


def _fenced(title: str, text: str) -> str:
    """A block that shows text as it is, also text with fences of its own."""
    ticks = "`" * max(3, 1 + max((len(run) for run in text.replace("\n", " ").split(" ") if set(run) == {"`"}), default=0))
    return f"{title}\n\n{ticks}\n{text}\n{ticks}"
