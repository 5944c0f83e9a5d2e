"""`rlsys scale RUN generators=3`: tell the supervisor of a live run, and wait until its fleets are as large as they shall be."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from protocol.errors import ConfigError
from rlsys.orders import ask
from rlsys.rundir import holder, read_json
from rlsys.scaling import parse_sizes


def scale(run: Path, words: Sequence[str], *, wait_s: float, as_json: bool) -> int:
    """Change the sizes and wait at most `wait_s` for it; without words show them. 1 when it was not done in time."""
    sizes = parse_sizes(words)
    if not sizes:
        return _show(run, as_json=as_json)
    changed = ask(run, "scale", sizes)
    if not as_json:
        for fleet, size in changed.items():
            print(f"{fleet}: {size['before']} -> {size['count']}", flush=True)
    asked_s = time.time()
    done, fewer = wait_s == 0, list[str]()
    deadline = time.monotonic() + wait_s
    while not done and time.monotonic() < deadline and holder(run) is not None:
        time.sleep(0.1)
        status = read_json(run / "status.json") or {}
        done = status.get("time_s", 0.0) > asked_s and settled(status, changed)
        sizes_now = status.get("fleets", {})
        fewer = [f for f in changed if done and sizes_now[f]["wanted"] - sizes_now[f]["joined"] != changed[f]["count"]]
    if as_json:
        print(json.dumps({"changed": changed, "done": done and not fewer, "fleets": (read_json(run / "status.json") or {}).get("fleets")}))
    elif not done:
        still = "it has ended" if holder(run) is None else f"still on its way after {wait_s:g} s; it goes on by itself"
        print(f"rlsys: {run}: {still}", file=sys.stderr)
    elif fewer:
        found = ", ".join(f"{fleet} is not {changed[fleet]['count']}" for fleet in fewer)
        why = "changed again meanwhile, or not all could live here; `rlsys status` and `rlsys logs` tell"
        print(f"rlsys: {run}: {found}: {why}", file=sys.stderr)
    return 0 if done and not fewer else 1


def settled(status: Mapping[str, Any], fleets: Mapping[str, Any]) -> bool:
    """Whether these fleets have their sizes, everyone has registered, and nobody leaves any more."""
    sizes = status.get("fleets", {})
    roles = {fleet.removesuffix("s") for fleet in fleets}
    arrived = all(p["registered"] for p in status.get("processes", ()) if p["name"].rpartition("-")[0] in roles)
    return arrived and all(
        fleet in sizes and sizes[fleet]["count"] == sizes[fleet]["wanted"] and not sizes[fleet]["leaving"] for fleet in fleets
    )


def _show(run: Path, *, as_json: bool) -> int:
    status = read_json(run / "status.json")
    if status is None or holder(run) is None:
        raise ConfigError(f"{run}: is not running")
    fleets = status.get("fleets", {})
    if as_json:
        print(json.dumps(fleets))
        return 0
    for fleet, size in fleets.items():
        words = [f"{size[what]} {word}" for what, word in (("leaving", "leave"), ("joined", "joined from other hosts")) if size[what]]
        print(f"{fleet:<12}{size['count']:>4} of {size['wanted']}" + (f"  ({', '.join(words)})" if words else ""))
    return 0
