"""`rlsys samples`: read what the policy wrote, to find answers that please the reward and not the task."""

from __future__ import annotations

import json
import math
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from protocol.errors import ConfigError, DataError
from protocol.messages import Trajectory
from rlsys.samples import Filter, read_trajectories, record_of


def samples(run: Path, chosen: Filter, *, limit: int, sort: str, reverse: bool, as_json: bool) -> int:
    """Print the newest `limit` samples that pass, or the first by `sort`: reward, length, time."""
    text = _text(run)
    found: Counter[str] = Counter()
    passing = (t for t in _counted(read_trajectories(run), found) if chosen.admits(t))
    newest = deque(passing, maxlen=limit or None) if not sort else ()
    shown = sorted(passing, key=_key(sort), reverse=reverse)[: limit or None] if sort else list(newest)
    if unknown := [verdict for verdict in chosen.verdicts if verdict not in found]:
        there = ", ".join(f"{name} ({count})" for name, count in found.most_common()) or "none"
        raise ConfigError(f"--verdict {unknown[0]}: no sample has it; there are: {there}")
    for t in shown:
        record = record_of(t, text)
        print(json.dumps(record) if as_json else _in_words(record))
    if not shown and not as_json:
        print("no sample passes these filters")
    return 0


def _counted(trajectories: Iterator[Trajectory], found: Counter[str]) -> Iterator[Trajectory]:
    for t in trajectories:
        found[t.status] += 1
        yield t


def _key(sort: str) -> Callable[[Trajectory], float]:
    keys: dict[str, Callable[[Trajectory], float]] = {
        "reward": lambda t: float("-inf") if t.score is None else t.score,
        "length": lambda t: float(len(t.token_ids)),
        "time": lambda t: t.scored_s - t.started_s,
    }
    return keys[sort]


def _text(run: Path) -> Callable[[object], str]:
    """Token ids to text by the run's tokenizer; ids as they are where it is gone."""
    from actors.text import Text

    path = run / "config.yaml"
    if not path.exists():
        raise ConfigError(f"{run}: holds no run (no config.yaml)")
    try:
        decode: Any = Text(Path(yaml.safe_load(path.read_text())["model"]["path"])).decode
    except DataError:
        return lambda ids: str(list(ids))  # type: ignore[call-overload]
    return lambda ids: str(decode(ids))


def _in_words(record: dict[str, Any]) -> str:
    score = "no score" if record["score"] is None else f"score {record['score']:g}"
    versions = "..".join(f"v{v}" for v in sorted(set(record["versions"])))
    head = (
        f"=== {record['problem_id']}  sample {record['group_id']}/{record['index']}  iteration {record['iteration']} ({record['purpose']})  "
        f"{record['verdict']}, {score}  {record['tokens']} tokens, {record['finish_reason']}  {versions}"
    )
    detail = f"\n    {record['detail']}" if record["detail"] else ""
    return f"{head}{detail}\n--- prompt\n{record['prompt']}\n--- completion\n{record['completion']}\n"


def interval_of(text: str | None, what: str) -> tuple[int, int] | None:
    """ "7" -> (7, 7); "3:9" -> (3, 9); ":9" and "3:" are open. Raises ConfigError."""
    if text is None:
        return None
    low, colon, high = text.partition(":")
    try:
        first = int(low) if low else 0
        last = (int(high) if high else 1 << 60) if colon else first
    except ValueError:
        raise ConfigError(f"--{what} {text}: expected a number, or two with a colon, such as 10:20") from None
    if not text or not 0 <= first <= last:
        raise ConfigError(f"--{what} {text}: expected numbers from 0 on, the smaller one first, such as 10:20")
    return first, last


def reward_of(least: float | None, most: float | None) -> tuple[float, float] | None:
    """The interval of scores between two options. Raises ConfigError where no score can lie in it."""
    if least is None and most is None:
        return None
    low, high = -math.inf if least is None else least, math.inf if most is None else most
    if math.isnan(low) or math.isnan(high) or low > high:
        raise ConfigError(f"--reward-min {low:g} and --reward-max {high:g}: no score lies between them")
    return low, high
