"""Whether overlap and staleness cost learning: final held-out pass@1 of the quickstart under each schedule, several seeds each.

    python -m benchmarks.learning [--seeds 3] [--results FILE] [--schedule NAME]... [--minutes M] [--json]

Every run is `configs/quickstart.yaml` from the same base model with another seed and schedule; evaluation is at the end alone (160 problems x 8
samples, a standard error of about 0.02 within one run). Printed: mean and standard error over seeds, and the difference from `synchronous` with its
standard error. With --results each run is appended to a JSON lines file and not run again; runs are minutes long.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SCHEDULES: dict[str, list[str]] = {
    "synchronous": ["schedule.name=synchronous"],
    "one_off": ["schedule.name=one_off"],
    "bounded-mask": ["schedule.name=bounded", "schedule.max_staleness=2", "schedule.stragglers=mask"],
    "bounded-drop": ["schedule.name=bounded", "schedule.max_staleness=2", "schedule.stragglers=drop"],
}


def run(schedule: str, seed: int) -> dict[str, Any]:
    """One quickstart. Raises SystemExit with the end of its output when it fails."""
    settings = [f"seed={seed}", "evaluation.at_start=false", *SCHEDULES[schedule]]
    with tempfile.TemporaryDirectory(prefix="rlsys-learning-") as directory:
        command = [sys.executable, "-P", "-m", "rlsys", "up", str(ROOT / "configs" / "quickstart.yaml"), "--plain", "--json"]
        command += ["--run-dir", str(Path(directory) / "run"), *(part for setting in settings for part in ("--set", setting))]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        if done.returncode:
            raise SystemExit(f"{schedule}, seed {seed}: exit code {done.returncode}\n{done.stderr[-2000:]}")
        figures = json.loads(done.stdout.splitlines()[-1])
    final = figures["evaluations"][-1]
    return {
        "schedule": schedule,
        "seed": seed,
        "pass_at_1": final["pass_at_1"],
        "version": final["version"],
        "staleness_mean": figures["staleness_mean"],
        "staleness_max": figures["staleness_max"],
        "s_per_iteration": figures["s_per_iteration"],
    }


def table(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean, standard error and difference from synchronous, by schedule."""
    found = []
    base: tuple[float, float] | None = None
    for schedule in SCHEDULES:
        values = [row["pass_at_1"] for row in rows if row["schedule"] == schedule]
        if not values:
            continue
        mean = statistics.mean(values)
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        if schedule == "synchronous":
            base = mean, error
        chosen = [row for row in rows if row["schedule"] == schedule]
        found.append(
            {
                "schedule": schedule,
                "seeds": len(values),
                "pass_at_1": mean,
                "standard_error": error,
                "difference": mean - base[0] if base else math.nan,
                "difference_error": math.hypot(error, base[1]) if base else math.nan,
                "staleness_mean": statistics.mean(row["staleness_mean"] for row in chosen),
                "staleness_max": max(row["staleness_max"] for row in chosen),
                "values": sorted(values),
            }
        )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--schedule", action="append", choices=list(SCHEDULES), help="default: all")
    parser.add_argument("--results", type=Path, metavar="FILE", help="JSON lines: append runs, and skip those that stand there")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no further run after so long")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    if options.results is not None and options.results.is_file():
        rows = [json.loads(line) for line in options.results.read_text().splitlines()]
    known, started = {(row["schedule"], row["seed"]) for row in rows}, time.monotonic()
    for seed in range(options.seeds):
        for schedule in options.schedule or SCHEDULES:
            if (schedule, seed) in known or time.monotonic() - started > options.minutes * 60:
                continue
            row = run(schedule, seed)
            rows.append(row)
            if options.results is not None:
                with options.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            if not options.json:
                print(f"{schedule:<13} seed {seed}: {row['pass_at_1']:.3f}, {row['s_per_iteration']:.2f} s per iteration", flush=True)
    found = table(rows)
    if options.json:
        print(json.dumps({"runs": rows, "table": found}))
        return 0
    for line in found:
        difference = f"{line['difference']:+.3f} +- {line['difference_error']:.3f} from synchronous"
        staleness = f"staleness mean {line['staleness_mean']:.2f}, most {line['staleness_max']:.0f}"
        values = f"{line['pass_at_1']:.3f} +- {line['standard_error']:.3f} ({line['seeds']} seeds)"
        print(f"{line['schedule']:<13} pass@1 {values}, {difference}; {staleness}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
