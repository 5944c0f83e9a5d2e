"""Whether throughput follows `rlsys scale`: `python -m benchmarks.scaling [--from 1 --to 3 --times 3 --window 15] [--set K=V]`.

Starts `configs/simulated.yaml` with a learner and rewards that hold nobody up, so that generators are the bound, changes their number up and down,
and prints the tokens sampled a second at each size as a multiple of those at the first, and how long `rlsys scale` took. The engine is simulated:
it takes the time that a device would, so the ratio says what the system does, not what a device can.
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

from benchmarks.runs import ROOT, running, status_when
from rlsys.scale import settled

CONFIG = ROOT / "configs" / "simulated.yaml"
START_S = 300.0
SETTLE_S = 5.0
"""After a change, before it counts: groups under way fill the new engines."""
GENEROUS = (
    "learner.step_options.devices=64",
    "rewarders.concurrency=128",
    "schedule.name=bounded",
    "schedule.max_staleness=4",
    "sampling.groups_per_iteration=64",
)
SPEED = ("generators.options.speed", "rewarders.options.speed", "learner.step_options.speed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", type=int, default=1, dest="low", metavar="N")
    parser.add_argument("--to", type=int, default=3, dest="high", metavar="N")
    parser.add_argument("--times", type=int, default=3, help="up and down")
    parser.add_argument("--window", type=float, default=15.0, metavar="S", help="measured at each size")
    parser.add_argument("--speed", type=float, default=10.0, help="of simulated devices")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rlsys-b-") as directory:
        rows = measure(Path(directory) / "run", options)
    base = statistics.median(row["tokens_per_s"] for row in rows if row["count"] == options.low)
    if options.json:
        print(json.dumps(rows))
        return 0
    for count in (options.low, options.high):
        found = [row for row in rows if row["count"] == count]
        rate, took = statistics.median(r["tokens_per_s"] for r in found), [r["scale_s"] for r in found if r["scale_s"]]
        slow = f"rlsys scale took {statistics.median(took):.1f} s, median of {len(took)}" if took else "never scaled to"
        print(f"{count} generators  {rate:,.0f} tokens/s  {rate / base:.2f} x  ({slow})")
    return 0


def measure(run: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each size, in order. The run is ended."""
    changes = [*GENEROUS, *(f"{key}={options.speed}" for key in SPEED), *options.overrides]
    changes += ["iterations=1000000", f"generators.count={options.low}"]
    with running(CONFIG, run, changes) as process:
        status_when(run, process, lambda status: status.get("iteration", 0) >= 2, START_S)
        rows = [{"count": options.low, "scale_s": 0.0, "tokens_per_s": rate(run, process, options.window)}]
        for count in [options.high, options.low] * options.times:
            began = time.monotonic()
            subprocess.run([sys.executable, "-m", "rlsys", "scale", str(run), f"generators={count}"], check=True, stdout=subprocess.DEVNULL)
            took = time.monotonic() - began
            status_when(run, process, lambda status: settled(status, {"generators": {}}), START_S)
            time.sleep(SETTLE_S)
            rows.append({"count": count, "scale_s": took, "tokens_per_s": rate(run, process, options.window)})
            print(f"{count} generators: {rows[-1]['tokens_per_s']:,.0f} tokens/s", file=sys.stderr)
        return rows


def rate(run: Path, process: subprocess.Popen[bytes], window_s: float) -> float:
    """Tokens sampled a second, over a window."""
    first = status_when(run, process, bool, START_S)
    last = status_when(run, process, lambda status: status.get("time_s", 0.0) > first["time_s"] + window_s, window_s + START_S)
    return float((last["sampled_tokens"] - first["sampled_tokens"]) / (last["time_s"] - first["time_s"]))


if __name__ == "__main__":
    sys.exit(main())
