"""How long until a killed process does useful work again, by role: `python -m benchmarks.recovery CONFIG [--kills 5] [--set K=V]`.

Starts a run, kills one process after the other with `rlsys chaos`, and prints for each role the median time from the kill until its replacement
has done something, beside the time that a process of that role needs to start at all (from `rlsys up` to its first sign of life).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.runs import running, status_when
from rlsys.chaos import ROLES, chaos

START_S = 300.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--kills", type=int, default=5, help="of each role")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rlsys-b-") as directory:
        figures = measure(options.config, Path(directory) / "run", options.kills, options.overrides)
    if options.json:
        print(json.dumps(figures))
        return 0
    for role, row in figures.items():
        after, start = row["median_s"], row["start_s"]
        print(
            f"{role:<11} {row['kills']} kills  at work after {after:.1f} s (median); start-up {start:.1f} s, beyond it {after - start:.1f} s"
        )
    return 0


def measure(config: Path, run: Path, kills: int, overrides: list[str]) -> dict[str, Any]:
    """Role -> its figures. The run is ended."""
    limits = [f"restarts.{role}=1000" for role in ROLES]
    with running(config, run, (*overrides, "iterations=1000000", "evaluation.at_start=false", *limits)) as process:
        ready = _starts(run, process)
        figures = {}
        for role in ROLES:
            hits = chaos(
                run, seed=0, kills=kills, roles=[role], mode="kill", mean_pause_s=1.0, timeout_s=120.0,
                say=lambda text: print(text, file=sys.stderr),
            )["hits"]  # fmt: skip
            times = [hit["useful_after_s"] for hit in hits if hit["useful_after_s"] is not None]
            figures[role] = {"kills": len(hits), "median_s": statistics.median(times), "start_s": ready[role]}
        return figures


def _starts(run: Path, process: subprocess.Popen[bytes]) -> dict[str, float]:
    """Role -> seconds from the start of the processes until all of it were at work; returns once the first iteration is done."""
    status_when(run, process, bool, START_S)
    begun, ready = time.monotonic(), dict[str, float]()

    def look(status: dict[str, Any]) -> bool:
        for role in ROLES:
            states = [p for p in status.get("processes", []) if p["name"].startswith(f"{role}-")]
            if role not in ready and states and all(p["doing"] != "starting" for p in states):
                ready[role] = time.monotonic() - begun
        return bool(status.get("iteration", 0) >= 1)

    status_when(run, process, look, START_S)
    return ready


if __name__ == "__main__":
    sys.exit(main())
