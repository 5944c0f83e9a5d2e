"""Many generators on one dispatcher and one learner: `python -m benchmarks.many_generators [--generators 200 --rate 500 --seconds 480]`.

Every generator is a process of its own, the production one with the simulated engine: its own sockets, identity, heartbeats and weights. Engines
are set to sample --rate samples a second in all, and everybody else is faster than that. Once all generators work, over --seconds:

    samples/s    completed iterations, in samples
    dispatcher   its share of a core (all of its threads, from the kernel), and processor time of each sample
    memory       of dispatcher and learner, each second; the mean of each sixth of the time: buffers and caches fill in the first minutes

Then the run is ended and audited. Processor shares hold on a busy machine as well, as long as the rate is reached; where it is not, the share at
the goal is estimated from the time of each sample, which counts what does not depend on samples too often.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.runs import running, status_when
from rlsys.audit import audit_run
from rlsys.rundir import read_json

GOAL_RATE, GOAL_SHARE = 500.0, 0.5
GROUP_SIZE = 8
SLOTS = 2 * GROUP_SIZE
WATCHED = ("dispatcher-0", "learner-0", "dashboard-0", "supervisor")
TICKS = os.sysconf("SC_CLK_TCK")


def configuration(generators: int, rate: float, tokens: int, rewarders: int) -> dict[str, Any]:
    """A run of which the generators are the bound: their devices sample `rate` samples of `tokens` tokens a second in all."""
    each = rate * tokens / generators
    return {
        "name": "many-generators",
        "iterations": 1_000_000,
        "model": {"path": "builtin:simulated"},
        "data": {"train": "builtin:simulated"},
        "sampling": {"groups_per_iteration": max(8, 5 * generators // 4), "group_size": GROUP_SIZE, "max_tokens": 4 * tokens},
        "evaluation": {"at_start": False, "at_end": False},
        "schedule": {"name": "bounded", "max_staleness": 4},
        "generators": {
            "count": generators,
            "slots": SLOTS,
            "engine": "simulated",
            "options": {
                "tokens_per_s_sample": each,
                "tokens_per_s": each,
                "lengths": {"mean": tokens, "sigma": 0.3, "cap": 4 * tokens},
            },
        },
        "rewarders": {"reward": "simulated", "count": rewarders, "concurrency": 4},
        "learner": {
            "step": "simulated",
            "step_options": {"tokens_per_s": 1e9},
            "zero_variance": "keep",
            "overlong": "keep",
        },
        "deadlines": {"startup_s": 1800.0, "heartbeat_s": 300.0, "quiet_s": 300.0, "shutdown_s": 120.0},
    }


@dataclass
class Watch:
    """What was read of the watched processes, second by second."""

    time_s: list[float] = field(default_factory=list)
    iteration: list[int] = field(default_factory=list)
    cpu_s: dict[str, list[float]] = field(default_factory=dict)
    rss_bytes: dict[str, list[float]] = field(default_factory=dict)

    def look(self, status: dict[str, Any]) -> None:
        """One row. Raises RuntimeError when one of them was replaced: its figures begin anew."""
        pids = {p["name"]: p["pid"] for p in status["processes"]} | {"supervisor": status["pid"]}
        if status.get("restarts"):
            raise RuntimeError(f"{status['restarts'][0]['how']}: no figures of a run in which processes were replaced")
        self.time_s.append(time.monotonic())
        self.iteration.append(int(status["iteration"]))
        for name in WATCHED:
            self.cpu_s.setdefault(name, []).append(cpu_s(pids[name]))
            self.rss_bytes.setdefault(name, []).append(rss_bytes(pids[name]))

    @property
    def seconds(self) -> float:
        return self.time_s[-1] - self.time_s[0]

    def share(self, name: str) -> float:
        """Of a core, over all of the time."""
        return (self.cpu_s[name][-1] - self.cpu_s[name][0]) / self.seconds

    def sixths(self, name: str) -> list[float]:
        """Mean memory of each sixth of the time, in bytes."""
        rows, parts = self.rss_bytes[name], min(6, len(self.rss_bytes[name]))
        return [statistics.fmean(rows[len(rows) * i // parts : len(rows) * (i + 1) // parts]) for i in range(parts)]


def cpu_s(pid: int) -> float:
    """Processor time of a process so far, all threads."""
    fields_ = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields_[11]) + int(fields_[12])) / TICKS


def rss_bytes(pid: int) -> float:
    """Memory of a process that is in RAM and its own: what it maps of files is no growth of it."""
    resident, shared = Path(f"/proc/{pid}/statm").read_text().split()[1:3]
    return float((int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE"))


def private_bytes(pid: int) -> float:
    """Memory that a process alone has."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(float(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(("Private_Clean", "Private_Dirty")))


def at_work(status: dict[str, Any]) -> int:
    """How many generators have sampled anything."""
    return sum(p["name"].startswith("generator") and p["progress"] > 0 for p in status.get("processes", ()))


def measure(
    run: Path,
    *,
    generators: int = 200,
    rate: float = GOAL_RATE,
    tokens: int = 128,
    rewarders: int = 4,
    seconds: float = 480.0,
    start_s: float = 1800.0,
) -> dict[str, Any]:
    """Figures of one run, which is ended and audited."""
    config = configuration(generators, rate, tokens, rewarders)
    samples = config["sampling"]["groups_per_iteration"] * GROUP_SIZE
    watch, began = Watch(), time.monotonic()
    run.parent.mkdir(parents=True, exist_ok=True)
    path = run.parent / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    with running(path, run) as process:
        status = status_when(run, process, lambda s: at_work(s) == generators, start_s)
        started_s = time.monotonic() - began
        first = status["iteration"] + 3  # buffers and tables have their size by then
        status_when(run, process, lambda s: s["iteration"] >= first, 600)
        end = time.monotonic() + seconds
        while time.monotonic() < end and process.poll() is None:
            try:
                watch.look(read_json(run / "status.json") or status)
            except FileNotFoundError as error:
                raise RuntimeError(f"a watched process is gone ({error.filename}): {(run.parent / 'log').read_text()[-500:]}") from None
            time.sleep(1.0)
        status = read_json(run / "status.json") or status
        memory = statistics.fmean(private_bytes(p["pid"]) for p in status["processes"] if p["name"].startswith("generator"))
        load = os.getloadavg()[0]
    audit = audit_run(run)
    reached = (watch.iteration[-1] - watch.iteration[0]) * samples / watch.seconds
    dispatcher_us = watch.share("dispatcher-0") / reached * 1e6 if reached else float("nan")
    return {
        "generators": generators,
        "start_s": started_s,
        "seconds": watch.seconds,
        "samples_per_s": reached,
        "goal_samples_per_s": GOAL_RATE,
        "dispatcher_share": watch.share("dispatcher-0"),
        "dispatcher_us_per_sample": dispatcher_us,
        "dispatcher_share_at_goal": dispatcher_us * GOAL_RATE / 1e6,
        "goal_share": GOAL_SHARE,
        "shares": {name: watch.share(name) for name in WATCHED},
        "memory_bytes": {name: watch.sixths(name) for name in WATCHED},
        "memory_rows": watch.rss_bytes,
        "generator_private_bytes": memory,
        "load": load,
        "audit": {name: audit[name] for name in ("lost", "doubled", "too_stale", "iterations", "reissued")},
        "restarts": len((read_json(run / "exit.json") or {}).get("restarts", [])),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generators", type=int, default=200)
    parser.add_argument("--rate", type=float, default=1.1 * GOAL_RATE, help="samples a second that all engines together are set to")
    parser.add_argument("--tokens", type=int, default=128, help="of a sample, on average")
    parser.add_argument("--rewarders", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=480.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="rlsys-many-") as directory:
        try:
            figures = measure(
                Path(directory) / "r" / "run",
                generators=options.generators,
                rate=options.rate,
                tokens=options.tokens,
                rewarders=options.rewarders,
                seconds=options.seconds,
            )
        except RuntimeError as error:
            print(f"no figures: {error}", file=sys.stderr)
            return 1
    if options.json:
        print(json.dumps(figures))
        return 0
    audit, shares = figures["audit"], figures["shares"]
    print(
        f"{figures['generators']} generators at work after {figures['start_s']:.0f} s, {figures['generator_private_bytes'] / 1e6:.0f} MB each"
    )
    print(f"{figures['samples_per_s']:.0f} samples/s over {figures['seconds']:.0f} s (goal {GOAL_RATE:g}; load {figures['load']:.1f})")
    print(
        f"dispatcher {figures['dispatcher_share']:.1%} of a core (goal: below {GOAL_SHARE:.0%}), {figures['dispatcher_us_per_sample']:.0f} us each"
    )
    print("others     " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items() if name != "dispatcher-0"))
    for name in ("dispatcher-0", "learner-0"):
        means = figures["memory_bytes"][name]
        print(
            f"memory     {name} {', '.join(f'{mean / 1e6:.1f}' for mean in means)} MB, sixth by sixth; the last {means[-1] / means[-2] - 1:+.1%}"
        )
    print(
        f"audit      {audit['lost']} lost, {audit['doubled']} doubled, {audit['too_stale']} too stale in {audit['iterations']} iterations"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
