"""The real engine and the real learner with a core each, beside the synchronous schedule that has every core for each phase, and the plan of it.

    python -m benchmarks.pinned [--iterations 14] [--json]

Runs the quickstart's problems from its base model, evaluation off: under `one_off` with one generator pinned to the first core and the learner to the
second (rewards and everything else run where there is room), and under `synchronous` with two generators and a learner of two threads on both cores.
Seconds per iteration are the median after the first two. `rlsys plan --measure` then predicts the quickstart as it is configured, which is
run as well. Two cores are shared by all processes, so no more can be gained than what the synchronous schedule leaves idle.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from benchmarks.overlap import seconds_per_iteration
from benchmarks.runs import ROOT, running
from rlsys.cli import main as rlsys
from rlsys.rundir import read_json

CONFIG = ROOT / "configs" / "quickstart.yaml"
PLAIN = ["evaluation.at_start=false", "evaluation.at_end=false"]


def run(iterations: int, settings: Sequence[str], pins: dict[str, int]) -> float:
    """Median seconds per iteration of one run; `pins` is role -> core."""
    with tempfile.TemporaryDirectory(prefix="rlsys-pinned-") as directory:
        run_dir = Path(directory) / "run"
        pinned: set[int] = set()
        with running(CONFIG, run_dir, (f"iterations={iterations}", *PLAIN, *settings)) as process:
            while process.poll() is None:
                for one in (read_json(run_dir / "status.json") or {}).get("processes", []):
                    core = pins.get(one["name"].rpartition("-")[0])
                    if core is not None and one["pid"] not in pinned:
                        _pin(one["pid"], core)
                        pinned.add(one["pid"])
                try:
                    process.wait(0.2)
                except subprocess.TimeoutExpired:
                    pass
        if process.returncode:
            raise SystemExit(f"the run ended with exit code {process.returncode}")
        return seconds_per_iteration(run_dir)


def _pin(pid: int, core: int) -> None:
    """Every thread of a process to one core."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            os.sched_setaffinity(int(task.name), {core})
        except ProcessLookupError:
            pass  # a thread that has ended


def planned() -> float:
    """What `rlsys plan --measure` predicts for the quickstart as it is configured."""
    out = io.StringIO()
    with redirect_stdout(out):
        rlsys(["plan", str(CONFIG), "--measure", "--json"])
    seconds: float = json.loads(out.getvalue())["configured"]["s_per_iteration"]
    return seconds


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=14)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        print("two cores are needed", file=sys.stderr)
        return 2
    figures: dict[str, Any] = {"plan_s": planned()}
    figures["quickstart_s"] = run(options.iterations, [], {})
    figures["pinned_s"] = run(
        options.iterations, ["generators.count=1", "generators.slots=64"], {"generator": cores[0], "learner": cores[1]}
    )
    figures["synchronous_s"] = run(options.iterations, ["schedule.name=synchronous", "learner.threads=2"], {})
    if options.json:
        print(json.dumps(figures))
        return 0
    ratio = figures["synchronous_s"] / figures["pinned_s"]
    print(f"one_off, generator and learner pinned to a core each  {figures['pinned_s']:.2f} s per iteration")
    print(f"synchronous, both cores for each phase                {figures['synchronous_s']:.2f} s ({ratio:.2f}x)")
    error = figures["plan_s"] / figures["quickstart_s"] - 1
    print(
        f"quickstart as configured                              {figures['quickstart_s']:.2f} s, planned {figures['plan_s']:.2f} s ({error:+.0%})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
