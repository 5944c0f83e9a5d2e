"""What overlap is worth: a finished run beside the same configuration under the synchronous schedule, both cores free to each phase.

    python -m benchmarks.overlap RUN [--iterations 12] [--json]

RUN is the directory of a finished run, such as the one `make quickstart` leaves behind. The synchronous run starts from the same base model with
the same fleets, but its learner may use every core (nothing else runs while it trains); evaluation is off. Seconds per iteration are the median
over iterations after the first two, which still warm up. A synchronous iteration is sampling + reward + training + publishing in turn.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from learner.step import pick_device
from protocol.errors import ConfigError, UserError
from rlsys.config import RunConfig
from rlsys.report import read_iterations, summarise
from rlsys.roles import load_run
from rlsys.rundir import RunDir
from rlsys.supervisor import Supervisor

WARM_UP = 2


def seconds_per_iteration(run_dir: Path, first: int = WARM_UP, last: int | None = None) -> float:
    """Median time between the ends of consecutive iterations, from `first` up to `last`."""
    times = [record["time_s"] for record in read_iterations(run_dir)][first:last]
    if len(times) < 2:
        raise ConfigError(f"{run_dir}: only {len(times)} iterations after the warm-up, at least 2 are needed")
    return float(statistics.median(b - a for a, b in itertools.pairwise(times)))


def synchronous(config: RunConfig, iterations: int) -> RunConfig:
    """The same run, synchronous: every core for the learner, no evaluation."""
    content = config.model_dump(mode="json")
    content["iterations"] = iterations
    content["schedule"] = {"name": "synchronous"}
    content["learner"]["threads"] = os.cpu_count() or 1
    content["evaluation"] |= {"at_start": False, "at_end": False, "every": 0}
    return RunConfig.model_validate(content)


def measure(config: RunConfig) -> dict[str, Any]:
    """Run a configuration in a temporary directory; its figures."""
    with tempfile.TemporaryDirectory(prefix="rlsys-overlap-") as directory:
        run_dir = RunDir(Path(directory) / "run")
        run_dir.claim(config)
        ending = Supervisor(config, run_dir).run()
        if ending.outcome != "done":
            raise ConfigError(f"the synchronous run {ending.outcome}: {ending.reason}")
        figures = summarise(run_dir.path)
        figures["median_s"] = seconds_per_iteration(run_dir.path)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    try:
        config = load_run(options.run)
        ours = summarise(options.run)
        ours["median_s"] = seconds_per_iteration(options.run)
        ours["early_s"] = seconds_per_iteration(options.run, last=options.iterations)
        if not options.json:
            print(f"timing {options.iterations} iterations of the same run under the synchronous schedule", flush=True)
        other = measure(synchronous(config, options.iterations))
    except (UserError, OSError, yaml.YAMLError) as error:
        print(f"rlsys: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps({config.schedule.name: ours, "synchronous": other}))
        return 0
    for name, figures in ((config.schedule.name, ours), ("synchronous", other)):
        overlap = figures.get("overlap")
        print(
            f"{name:<12} {figures['median_s']:.2f} s per iteration (median), {figures['cpu_share']:.0%} of {os.cpu_count()} cores busy, "
            f"a generator decoded during {overlap or 0.0:.0%} of the learner's busy time, mean staleness {figures['staleness_mean']:.2f}"
        )
    ratio = other["median_s"] / ours["early_s"]
    print(f"speed-up     {ratio:.2f}x over the first {options.iterations} iterations of each (the same lengths of completions)")
    if config.generators.device == "cpu" and pick_device(config.learner.device, 0).type == "cpu":
        idle = 1 - other["cpu_share"]
        print(
            f"             both phases share the cores here: overlap can use only what the synchronous schedule leaves idle of them, {idle:.0%}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
