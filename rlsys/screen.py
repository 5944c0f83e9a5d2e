"""The live screen of a run, from the content of status.json: fleets, queues, rates, staleness, reward, who waits for whom. Pure."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from protocol.intervals import WAITING, is_waiting

SPARK = "▁▂▃▄▅▆▇█"
PAINT = {"decode": "blue", "prefill": "cyan", "scoring": "yellow", "forward backward": "green", "train": "green", "swap weights": "magenta"}


def sparkline(values: Sequence[float], width: int = 32) -> str:
    """The last values as bars between 0 and the largest."""
    recent = [v for v in values[-width:] if math.isfinite(v)]
    top = max([*recent, 1e-9])
    return "".join(SPARK[max(0, int(v / top * (len(SPARK) - 1) + 0.5))] for v in recent)


def duration(seconds: float) -> str:
    """ "1:02:03" or "2:03"."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def figure(value: float | None, form: str = ",.0f") -> str:
    """A number, or a question mark where it is not known yet."""
    return "?" if value is None or not math.isfinite(value) else format(value, form)


def rates(content: Mapping[str, Any]) -> str:
    """Tokens a second: sampled, over the last seconds; trained, over the wall time of the last iterations, waits included."""
    newest: Mapping[str, float] = {**(content.get("last") or {}), **(content.get("now") or {})}
    sampling, training = (figure(newest.get(f"throughput/{kind}_tokens_per_s")) for kind in ("sampled", "trained"))
    return f"sampling {sampling} tok/s  training {training} tok/s"


def screen(content: Mapping[str, Any], events: Sequence[str] = (), now_s: float | None = None) -> RenderableType:
    """Everything at a glance. `content` is what `rlsys status --json` prints; what is not there yet is left out."""
    now = time.time() if now_s is None else now_s
    if content.get("state", "running") not in ("running", "ending"):  # it is over: as it was then
        now = content.get("time_s", now)
    age = now - content.get("time_s", now)
    return Group(_head(content, now, age), *_stall(content), _numbers(content), _processes(content, age), *_events(events))


def _head(content: Mapping[str, Any], now: float, age: float) -> RenderableType:
    done, total = content.get("iteration", 0), content.get("iterations", 0)
    left = ""
    since = content.get("training_since_s")
    if done and total and since:
        left = f"   left {duration((content.get('time_s', now) - since) / done * (total - done))}"
    filled = int(30 * done / total) if total else 0
    bar = f"[green]{'━' * filled}[/green][dim]{'━' * (30 - filled)}[/dim]"
    stale = f"   [red]no news for {age:.0f} s[/red]" if age > 5 else ""
    state = escape(str(content.get("state", "?")))
    text = f"[bold]{escape(str(content.get('run_dir', '')))}[/bold]  {state}\n{bar} iteration {done}/{total}"
    reason = f"\n{escape(str(content['reason']))}" if content.get("reason") else ""
    return Text.from_markup(f"{text}   running {duration(now - content.get('since_s', now))}{left}{stale}{reason}")


def _numbers(content: Mapping[str, Any]) -> RenderableType:
    last: Mapping[str, float] = content.get("last") or {}
    table = Table.grid(padding=(0, 2))
    rewards = [r for r in content.get("rewards", ()) if r is not None]
    if rewards:
        recent = rewards[-5:]
        table.add_row("reward", f"[green]{sparkline(rewards)}[/green]  {sum(recent) / len(recent):.3f}")
    for result in content.get("evaluations", [])[-2:]:
        table.add_row("pass@1", f"{result['pass_at_1']:.3f} at v{result['version']} on {result['problems']} problems")
    newest = {**last, **(content.get("now") or {})}
    if newest:
        scoring = figure(newest.get("throughput/scored_samples_per_s"), ",.1f")
        table.add_row("rates", f"{rates(content)}  scoring {scoring} samples/s")
    if last:
        table.add_row("staleness", f"mean {last.get('staleness/mean', 0):.2f}, most {last.get('staleness/max', 0):.0f} versions")
    idle = [f"{role} {newest[f'idle/{role}']:.0%}" for role in ("generator", "rewarder", "learner") if f"idle/{role}" in newest]
    if idle:
        table.add_row("idle", "   ".join(idle))
    queues = content.get("queues") or {}
    if queues:
        words = "   ".join(f"{name.removeprefix('queues/').replace('_', ' ')} {value:.0f}" for name, value in queues.items())
        table.add_row("queues", words)
    return table


def _processes(content: Mapping[str, Any], age: float) -> RenderableType:
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2))
    for head in ("process", "pid", "memory", "for", "doing"):
        table.add_column(head, justify="right" if head in ("pid", "memory", "for") else "left", no_wrap=head != "doing")
    memory = content.get("memory") or {}
    for process in content.get("processes", ()):
        doing, detail = str(process["doing"]), str(process.get("detail", ""))
        resident = memory.get("memory/" + process["name"].replace("-", "_"))
        what = doing.removeprefix(WAITING) if is_waiting(doing) else doing
        more = f" ({detail})" if detail else ""
        if not process.get("registered", True) and not process.get("stopped"):
            line = "[dim]starting[/dim]"
        elif process.get("stopped") or process.get("silent_s", 0.0) + age > 5:
            silent = f"{process.get('silent_s', 0.0) + age:.0f} s without a word"
            line = f"[red]{'stopped' if process.get('stopped') else 'silent'}, {silent}; last at {escape(doing)}[/red]"
        elif is_waiting(doing):
            line = f"[dim]waits for {escape(what)} from {escape(str(process.get('peer', '')))}{escape(more)}[/dim]"
        else:
            line = f"[{PAINT.get(doing, 'white')}]{escape(what)}[/]{escape(more)}"
        size = f"{resident / 1e6:,.0f} MB" if resident else ""
        if process.get("leaving"):
            line += "  [dim]leaves when it is empty[/dim]"
        table.add_row(process["name"], str(process["pid"]), size, f"{process.get('for_s', 0.0):.0f} s", line)
    return table


def _stall(content: Mapping[str, Any]) -> list[RenderableType]:
    if not content.get("stalled"):
        return []
    return [Panel(escape(str(content.get("why", ""))), title="nothing moves", border_style="red", expand=False)]


def _events(events: Sequence[str]) -> list[RenderableType]:
    return [Text("\n".join(events), style="dim")] if events else []
