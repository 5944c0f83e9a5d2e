"""CPU-seconds per iteration of 128 samples: rlsys, all of its processes, against TRL's GRPOTrainer, on the same work in the same run.

Alike on both sides: the quickstart's base model, its prompts in the same order (16 x 8 samples), at most 80 new tokens at temperature 1,
every sample trained on, the clipped token-level loss, AdamW, one thread of torch per process, and the isolated unit-test reward in two
sandbox cells. The learning rate is 1e-6, so that both sample from the same policy all the time. rlsys runs as in the quickstart (`rlsys up`:
two generators of 64 slots in float32, two reward actors, a learner in bfloat16, dispatcher, dashboard, supervisor); TRL runs in one process, with
transformers' `generate()`, since vLLM has no use without a GPU, once in float32 and once in bfloat16: the cheaper counts. Iterations in which
a pipeline fills or empties do not count. The reward is the same code on both sides: it is printed and left out of the ratio; of rlsys's
reward actors only the scoring threads and cells are reward, the rest is overhead and counts.

    python -m benchmarks.step [--json] [--iterations 8] [--repeats 3]

TRL comes with the extra `bench` (pip install -e '.[bench]').
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol.messages import Event
from rlsys.config import RunConfig, load_config
from rlsys.launchers.local import cpu_seconds
from rlsys.prepare import prepare
from rlsys.progress import Progress
from rlsys.report import read_iterations
from rlsys.rundir import RunDir
from rlsys.supervisor import Process, Supervisor

ROOT = Path(__file__).parent.parent
PARTS = ("sampling", "reward", "learning", "everything else")
WARM_UP = 2
DRAIN = 2
"""Iterations at the end of a run that sample nothing for later ones any more."""
SAMPLE_S = 0.25
LEARNING_RATE = 1e-6
TRL_DEADLINE_S = 1800.0
MISSING = "benchmarks.step: TRL is not installed here; pip install -e '.[bench]' brings it (or pass --only rlsys)"

OVERRIDES = (
    "evaluation.at_start=false",
    "evaluation.at_end=false",
    f"learner.optimizer.lr={LEARNING_RATE}",
    "learner.zero_variance=keep",  # TRL trains on every sample
    "learner.overlong=keep",
    "generators.slots=64",  # all 128 samples at once, as TRL does; the quickstart takes 32, so that decoding lasts while the learner trains
)


# ---------------------------------------------------------------------------------------------------- rlsys


@dataclass(frozen=True, slots=True)
class Reading:
    """CPU seconds so far by (role, "own" or "reward") at a moment of time.time()."""

    time_s: float
    cpu_s: dict[tuple[str, str], float]


def scoring_seconds(pid: int) -> float:
    """CPU time of a reward actor's scoring threads: all but its main thread and ZeroMQ's."""
    ticks = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        name, _, rest = (task / "stat").read_text().partition("(")[2].rpartition(")")
        if int(task.name) != pid and not name.startswith("ZMQbg"):
            ticks += sum(int(field) for field in rest.split()[11:13])
    return ticks / os.sysconf("SC_CLK_TCK")


def own_seconds(pid: int) -> float:
    """CPU time of one process without its children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(field) for field in fields[11:13]) / os.sysconf("SC_CLK_TCK")


class Meter:
    """Reads the CPU time of a run's processes now and then, and what it takes for that itself."""

    def __init__(self, processes: dict[str, Process]) -> None:
        self.readings: list[Reading] = []
        self._processes = processes
        self._next_s = self._spent_s = 0.0

    def tick(self) -> None:
        """Read, if it is time."""
        if time.monotonic() >= self._next_s:
            self.read()

    def read(self) -> None:
        """Read now."""
        self._next_s = time.monotonic() + SAMPLE_S
        started = time.thread_time()
        found: dict[tuple[str, str], float] = defaultdict(float)
        for process in list(self._processes.values()):
            role, pid = process.child.spec.role, process.child.pid
            try:
                everything, own = cpu_seconds({pid}), own_seconds(pid)
                scoring = scoring_seconds(pid) if role == "rewarder" else 0.0
            except OSError:  # it has ended
                return
            found[role, "reward" if role == "rewarder" else "own"] += everything - own + scoring
            found[role, "own"] += own - scoring
        self._spent_s += time.thread_time() - started
        found["supervisor", "own"] = time.process_time() - self._spent_s
        self.readings.append(Reading(time.time(), dict(found)))

    def at(self, time_s: float) -> dict[tuple[str, str], float]:
        """Between the two readings around `time_s`, in proportion."""
        after = next((i for i, reading in enumerate(self.readings) if i and reading.time_s >= time_s), len(self.readings) - 1)
        a, b = self.readings[after - 1], self.readings[after]
        share = (time_s - a.time_s) / (b.time_s - a.time_s)
        return {key: a.cpu_s.get(key, 0.0) + share * (b.cpu_s[key] - a.cpu_s.get(key, 0.0)) for key in b.cpu_s}


def run_rlsys(config: RunConfig, iterations: int, scratch: Path) -> dict[str, Any]:
    """One run of WARM_UP + iterations + DRAIN; CPU seconds per iteration by part and by process, of those in the middle."""
    run_dir = RunDir(scratch)
    run_dir.claim(config)
    supervisor = Supervisor(config, run_dir)
    meter = Meter(supervisor.view.processes)
    with Path(os.devnull).open("w") as nowhere, Progress(supervisor.view, nowhere, plain=True) as progress:

        def event(news: Event) -> None:
            progress.event(news)
            if news.name == "training ended":  # a short run may end before the next reading is due
                meter.read()

        supervisor.on_event = event

        def tick() -> None:
            progress.tick()
            meter.tick()

        supervisor.on_tick = tick
        ending = supervisor.run()
    if ending.outcome != "done":
        raise RuntimeError(f"the run ended {ending.outcome}: {ending.reason}\n" + "\n".join(supervisor.tail(ending.role)))
    records = read_iterations(run_dir.path)
    first, last = records[WARM_UP - 1]["time_s"], records[WARM_UP - 1 + iterations]["time_s"]
    before, after = meter.at(first), meter.at(last)
    spent = {key: (after[key] - before[key]) / iterations for key in after}
    parts = dict.fromkeys(PARTS, 0.0)
    for (role, kind), seconds in spent.items():
        part = {"generator": "sampling", "learner": "learning"}.get(role, "everything else")
        parts["reward" if kind == "reward" else part] += seconds
    measured = records[WARM_UP : WARM_UP + iterations]
    return {
        "cpu_s": parts,
        "by_process": {f"{role}{' (scoring and cells)' if kind == 'reward' else ''}": round(s, 4) for (role, kind), s in spent.items()},
        "wall_s": (last - first) / iterations,
        "tokens": statistics.mean(record["data/completion_tokens_mean"] for record in measured),
    }


# ---------------------------------------------------------------------------------------------------- TRL


def run_trl(config: RunConfig, iterations: int, scratch: Path, options: argparse.Namespace, *, bf16: bool) -> dict[str, Any]:
    """CPU seconds per iteration by part, from a process in a session of its own (benchmarks/step_trl.py)."""
    job = {
        "model": str(config.model.path),
        "train": str(config.data.train),
        "template": config.data.prompt_template,
        "seed": config.seed,
        "groups": config.sampling.groups_per_iteration,
        "group_size": config.sampling.group_size,
        "max_tokens": config.sampling.max_tokens,
        "lr": config.learner.optimizer.lr,
        "warm_up": WARM_UP,
        "iterations": iterations,
        "scorers": config.rewarders.count,
        "micro_batch": options.micro_batch,
        "bf16": bf16,
        "scratch": str(scratch / "trl"),
        "out": str(scratch / "trl.json"),
    }
    log = scratch / "trl.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.step_trl", json.dumps(job)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
        )
        try:
            code = process.wait(TRL_DEADLINE_S)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code:
        raise RuntimeError(f"TRL ended with exit code {code}:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-20:]))
    found = json.loads((scratch / "trl.json").read_text())
    samples = iterations * config.sampling.groups_per_iteration * config.sampling.group_size
    return {"cpu_s": {part: s / iterations for part, s in found["cpu_s"].items()}, "tokens": found["tokens"] / samples}


# ---------------------------------------------------------------------------------------------------- the comparison


def without_reward(found: dict[str, Any]) -> float:
    """CPU seconds of an iteration that the system is answerable for."""
    return float(sum(seconds for part, seconds in found["cpu_s"].items() if part != "reward"))


def middle(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run of median cost, so that its parts add up."""
    return sorted(runs, key=without_reward)[(len(runs) - 1) // 2]


def measure(options: argparse.Namespace, sides: list[str]) -> dict[str, Any]:
    """Every side once per repeat, in turn, so that a neighbour on the machine disturbs all alike."""
    overrides = [*OVERRIDES, f"iterations={WARM_UP + options.iterations + DRAIN}", *options.set]
    config = prepare(load_config(ROOT / "configs" / "quickstart.yaml", overrides), lambda line: print(line, file=sys.stderr)).config
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(options.repeats):
        for side in sides:
            with tempfile.TemporaryDirectory(prefix="rlsys-step-") as name:
                scratch = Path(name)
                if side == "rlsys":
                    runs[side].append(run_rlsys(config, options.iterations, scratch / "run"))
                else:
                    runs[side].append(run_trl(config, options.iterations, scratch, options, bf16=side == "trl bfloat16"))
    found: dict[str, Any] = {side: middle(runs[side]) for side in sides}
    rivals = [found[side] for side in sides if side != "rlsys"]
    if "rlsys" in found and rivals:
        found["ratio"] = without_reward(found["rlsys"]) / min(map(without_reward, rivals))
    return found


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Command line; returns the figures as well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--iterations", type=int, default=8, help="counted in one repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--micro-batch", type=int, default=32, help="TRL's; cheaper here than 128, the whole iteration at once")
    parser.add_argument("--only", choices=["rlsys", "trl"], help="one side alone, without a ratio")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of configs/quickstart.yaml")
    options = parser.parse_args(arguments)
    sides = [side for side in ("rlsys", "trl float32", "trl bfloat16") if side.startswith(options.only or "")]
    if len(sides) > 1 and importlib.util.find_spec("trl") is None:
        print(MISSING, file=sys.stderr)
        raise SystemExit(2)
    found = measure(options, sides)
    if options.json:
        print(json.dumps(found))
        return found
    print(f"CPU-seconds per iteration, the middle of {options.repeats} repeats of {options.iterations} iterations:")
    for side in sides:
        parts = ", ".join(f"{part} {seconds:.3f}" for part, seconds in found[side]["cpu_s"].items())
        print(f"{side:13} {without_reward(found[side]):.3f} without the reward: {parts}; {found[side]['tokens']:.1f} tokens per completion")
    if "rlsys" in found:
        print("rlsys by process: " + ", ".join(f"{name} {seconds:.3f}" for name, seconds in found["rlsys"]["by_process"].items()))
    if "ratio" in found:
        print(f"rlsys takes {found['ratio']:.2f} of what the cheaper TRL takes")
    return found


if __name__ == "__main__":
    main()
