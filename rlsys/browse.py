"""`rlsys samples`: read what the policy wrote, to find answers that please the reward and not the task."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from protocol.errors import ConfigError, DataError
from protocol.messages import Trajectory
from rlsys.samples import Filter, read_trajectories, record_of


def samples(run: Path, chosen: Filter, *, limit: int, sort: str, reverse: bool, as_json: bool) -> int:
    """Print the newest `limit` samples that pass, or the first by `sort`: reward, length, time."""
    text = _text(run)
    passing = (t for t in read_trajectories(run) if chosen.admits(t))
    newest = deque(passing, maxlen=limit or None) if not sort else ()
    shown = sorted(passing, key=_key(sort), reverse=reverse)[: limit or None] if sort else list(newest)
    for t in shown:
        record = record_of(t, text)
        print(json.dumps(record) if as_json else _in_words(record))
    if not shown and not as_json:
        print("no sample passes these filters")
    return 0


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
        return first, (int(high) if high else 1 << 60) if colon else first
    except ValueError:
        raise ConfigError(f"--{what} {text}: expected a number, or two with a colon, such as 10:20") from None
