"""`rlsys up --resume RUN`: which run it is, and what may be different this time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from protocol.errors import ConfigError
from protocol.ledger import Ledger
from rlsys.config import RunConfig, load_config
from rlsys.rundir import holder, read_json

MAY_CHANGE = (
    "iterations",
    "generators",
    "rewarders.count",
    "rewarders.min",
    "rewarders.max",
    "rewarders.scale_after_s",
    "rewarders.concurrency",
    "rewarders.retries",
    "learner.ranks",
    "learner.sharding",
    "learner.threads",
    "learner.device",
    "learner.commit_every",
    "learner.checkpoints",
    "learner.collective_timeout_s",
    "learner.tokens_per_microbatch",
    "learner.gradient_checkpointing",
    "journal",
    "weights.directory",
    "weights.transfer",
    "weights.cache",
    "transport",
    "ray",
    "observe",
    "guards",
    "deadlines",
    "restarts",
)
"""Keys, or groups of keys, that do not decide what is sampled, scored or trained; fleet sizes are among them."""


def resumed_config(run: Path, overrides: Sequence[str]) -> RunConfig:
    """The configuration of a run that is to go on, changed by `overrides`. Raises ConfigError for what may not change or cannot go on,
    DataError for a damaged ledger."""
    path = run / "config.yaml"
    if not path.exists() or not (run / "ledger.sqlite").exists():
        raise ConfigError(f"{run}: holds no run that could go on (no {'ledger.sqlite' if path.exists() else 'config.yaml'})")
    if (pid := holder(run)) is not None:
        raise ConfigError(f"{run} is in use by process {pid}: it is running")
    ledger = Ledger(run / "ledger.sqlite", read_only=True)  # one that cannot be read is refused before anything of the run is touched
    try:
        ledger.check()
        published = max((number for number, _ in ledger.versions()), default=0)
    finally:
        ledger.close()
    before, after = load_config(path), load_config(path, overrides)
    for key in changed(before.model_dump(mode="json"), after.model_dump(mode="json")):
        if not any(key == allowed or key.startswith(f"{allowed}.") for allowed in MAY_CHANGE):
            raise ConfigError(f"--set {key}: cannot change when a run goes on; these can: {', '.join(MAY_CHANGE)}")
    done = max(published, (read_json(run / "exit.json") or {}).get("iterations_done", 0))  # a killed supervisor wrote no exit.json
    if after.iterations < max(done, 1):
        raise ConfigError(f"--set iterations={after.iterations}: {done} iterations are done already")
    return after


def changed(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Paths of the keys whose values differ. Pure."""
    found = []
    for key in {**before, **after}:
        a, b, path = before.get(key), after.get(key), f"{prefix}{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += changed(a, b, f"{path}.")
        elif a != b:
            found.append(path)
    return found


def is_done(run: Path, config: RunConfig) -> bool:
    """Whether nothing is left to do."""
    ended = read_json(run / "exit.json") or {}
    return ended.get("outcome") == "done" and ended.get("iterations", config.iterations) >= config.iterations
