"""What looking costs: the quickstart with everything observed against the same with nothing observed, and whether its times add up.

    python -m benchmarks.observe [--config configs/quickstart.yaml] [--iterations 30] [--rounds 2] [--json]
    python -m benchmarks.observe --run RUN        the second part alone, of a run that has ended

On: intervals, TensorBoard, histograms, samples as text at every iteration, Prometheus, guards. Off: none of these; rates and metrics.jsonl stay,
because the run needs them itself. The learning rate is so small that no weight changes: with one seed per sample both sample and train the same
tokens, so that lengths which differ from run to run are not taken for the cost of looking. The two of a round run at the same time, side by
side, because a shared machine gives equal runs one after the other processor seconds that differ by 10 %. Compared are processor seconds of
training over all processes; the cost is the median over the rounds of on / off - 1. The wall seconds are of both runs on the same cores.

Then, for each process of the last run with everything on: busy seconds and idle seconds by cause against its wall time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from protocol.errors import ConfigError, UserError
from protocol.intervals import Recorder
from protocol.messages import Event
from rlsys.config import RunConfig, load_config
from rlsys.launchers.local import cpu_seconds
from rlsys.prepare import prepare
from rlsys.rundir import RunDir, read_json
from rlsys.supervisor import Supervisor
from rlsys.usage import read_rows, tracks, usage

PROBES = 100_000
NO_STEP = 1e-12
"""A learning rate that moves no weight."""
ON: dict[str, Any] = {
    "observe": {"intervals": True, "loggers": ["tensorboard"], "histograms": True, "samples_every": 1, "samples": 4, "prometheus": True},
    "guards": {"action": "warn"},
}
OFF: dict[str, Any] = {
    "observe": {"intervals": False, "loggers": [], "histograms": False, "samples_every": 0, "prometheus": False},
    "guards": {"action": "off"},
}


def variant(config: RunConfig, iterations: int, changes: dict[str, Any]) -> RunConfig:
    """The same run, shorter, without evaluation, observed as `changes` say."""
    content = config.model_dump(mode="json") | {"iterations": iterations, **changes}
    content["evaluation"] |= {"at_start": False, "at_end": False, "every": 0}
    content["learner"]["optimizer"]["lr"] = NO_STEP
    return RunConfig.model_validate(content)


def measure(config: RunConfig, directory: Path) -> dict[str, float]:
    """Run it; wall and processor seconds of its training, and the processor seconds of each process with its children."""
    run_dir = RunDir(directory)
    run_dir.claim(config)
    supervisor = Supervisor(config, run_dir)
    marks: dict[str, dict[str, float]] = {}

    def on_event(event: Event) -> None:
        if event.name in ("training started", "training ended"):
            marks[event.name] = {name: cpu_seconds({process.pid}) for name, process in supervisor.view.processes.items()}

    supervisor.on_event = on_event
    ending = supervisor.run()
    if ending.outcome != "done":
        raise ConfigError(f"the run {ending.outcome}: {ending.reason}")
    phases = {phase["name"]: phase for phase in (read_json(directory / "exit.json") or {})["phases"]}
    each = {name: seconds - marks["training started"][name] for name, seconds in marks["training ended"].items()}
    tokens = sum(
        row["data/tokens"] for row in map(json.loads, (directory / "metrics.jsonl").read_text().splitlines()) if "data/tokens" in row
    )
    return {"wall_s": phases["training"]["wall_s"], "cpu_s": phases["training"]["cpu_s"], "tokens": tokens, **each}


def side_by_side(*calls: Callable[[], dict[str, float]]) -> list[dict[str, float]]:
    """Call all at the same time, each in a process of its own; what they return, in order. Raises what one of them raised."""
    with ProcessPoolExecutor(len(calls), mp_context=get_context("spawn")) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def sums(run_dir: Path) -> dict[str, dict[str, float]]:
    """Process -> its wall seconds, and busy and idle seconds from the first row to the last: what should be alike."""
    found = {}
    for track in tracks(run_dir, main_only=True):
        rows = read_rows(run_dir, track)
        whole = usage(rows, rows[0].start_s, rows[-1].end_s)
        recorded = sum(row.end_s - row.start_s for row in rows)
        found[track] = {"wall_s": whole.wall_s, "busy_s": whole.busy_s, "idle_s": sum(whole.idle_s.values()), "recorded_s": recorded}
    return found


def recording_share(run_dir: Path) -> float:
    """The part of one core that recording took in a run: changes of activity per second times what one costs here."""
    recorder = Recorder("probe")
    started = time.perf_counter()
    for i in range(PROBES):
        recorder.enter("decode" if i % 2 else "prefill", iteration=i % 7)
    recorder.drain()
    each_s = (time.perf_counter() - started) / PROBES
    rows = [read_rows(run_dir, track) for track in tracks(run_dir)]
    seconds = max(r[-1].end_s for r in rows if r) - min(r[0].start_s for r in rows if r)
    busiest = max(len(r) for r in rows)
    return busiest / seconds * each_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.run is not None:
        if not tracks(options.run):
            print(f"rlsys: {options.run}: holds no intervals", file=sys.stderr)
            return 2
        print_sums(sums(options.run), recording_share(options.run))
        return 0
    figures: dict[str, list[dict[str, float]]] = {"off": [], "on": []}
    try:
        config = prepare(load_config(options.config), lambda text: None).config
        with tempfile.TemporaryDirectory(prefix="rlsys-observe-") as directory:
            for i in range(options.rounds):
                sides = (("off", OFF), ("on", ON)) if i % 2 == 0 else (("on", ON), ("off", OFF))
                calls = (
                    partial(measure, variant(config, options.iterations, changes), Path(directory) / f"{name}-{i}")
                    for name, changes in sides
                )
                for (name, _), one in zip(sides, side_by_side(*calls), strict=True):
                    figures[name].append(one)
                    if not options.json:
                        print(
                            f"{name:<4} wall {one['wall_s']:.1f} s, processors {one['cpu_s']:.1f} s, {one['tokens']:,.0f} tokens",
                            flush=True,
                        )
            last = Path(directory) / f"on-{options.rounds - 1}"
            added, share = sums(last), recording_share(last)
    except (UserError, OSError) as error:
        print(f"rlsys: {error}", file=sys.stderr)
        return 2
    cost = {
        key: statistics.median(on[key] / off[key] for off, on in zip(figures["off"], figures["on"], strict=True)) - 1
        for key in ("wall_s", "cpu_s")
    }
    by_process = {
        name: tuple(statistics.median(f[name] for f in figures[kind]) for kind in ("off", "on"))
        for name in figures["on"][0]
        if not name.endswith("_s") and name != "tokens"
    }
    costs = sorted(on["cpu_s"] / off["cpu_s"] - 1 for off, on in zip(figures["off"], figures["on"], strict=True))
    worst = max(abs(one["recorded_s"] / one["wall_s"] - 1) for one in added.values())
    if options.json:
        print(json.dumps({"runs": figures, "cost": cost, "costs": costs, "sums": added, "worst_gap": worst, "recording_share": share}))
        return 0
    print(f"cost of looking: {cost['cpu_s']:+.1%} of processor time, {cost['wall_s']:+.1%} of wall time")
    print(f"of processor time by round: {', '.join(f'{one:+.1%}' for one in costs)}")
    for name, (off, on) in by_process.items():
        print(f"  {name:<14} {off:7.2f} processor s with nothing observed, {on:7.2f} with everything ({on - off:+.2f})")
    print_sums(added, share)
    return 0


def print_sums(added: dict[str, dict[str, float]], share: float) -> None:
    """The second part in words."""
    for name, one in added.items():
        print(
            f"  {name:<14} wall {one['wall_s']:7.1f} s = busy {one['busy_s']:7.1f} + idle {one['idle_s']:7.1f}, recorded {one['recorded_s']:7.1f}"
        )
    print(f"recording intervals took {share:.3%} of the time of the process that records most")
    worst = max(abs(one["recorded_s"] / one["wall_s"] - 1) for one in added.values())
    print(f"largest difference between recorded and wall time: {worst:.3%}")


if __name__ == "__main__":
    sys.exit(main())
