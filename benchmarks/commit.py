"""What the record costs: ledger, journal and commits.

    python -m benchmarks.commit [--gigabytes 2]     a state of this size is committed while a loop computes
    python -m benchmarks.commit --run RUN           what a run's learner recorded as journaling and committing
    python -m benchmarks.commit --rounds 3          the quickstart with the record and without any, side by side

The first trains a small network in a loop, commits a state of the given size in the background meanwhile, and prints how much slower the loop
was until the commit stood, beside the same loop without one. The second adds up what a run's learner recorded as journaling and committing. The third
compares wall and processor seconds of training of two runs at the same time, and says the seconds of the second way too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rlsys.config import RunConfig

ACTIVITIES = ("journal batch", "snapshot", "commit", "journal")
"""What the learner records for the record's sake, on both of its threads."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument("--iterations", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.run:
        figures = of_run(options.run)
    elif options.rounds:
        figures = of_pairs(options.config, options.iterations, options.rounds)
    else:
        figures = of_state(options.gigabytes)
    print(json.dumps(figures) if options.json else "\n".join(f"{name:<24} {value:.4g}" for name, value in figures.items()))
    return 0


def of_run(run: Path) -> dict[str, float]:
    """Seconds of journal, snapshots and commits of a finished run, and their share of its training time."""
    seconds = dict.fromkeys(ACTIVITIES, 0.0)
    for path in sorted((run / "events").glob("learner-0*.jsonl")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            for row in record["rows"]:
                name = record["names"][row[0]]
                if name in seconds:
                    seconds[name] += (row[2] - row[1]) / 1e6
    ended = json.loads((run / "exit.json").read_text())
    wall = next(phase["wall_s"] for phase in ended["phases"] if phase["name"] == "training")
    return {**{f"{name}_s": value for name, value in seconds.items()}, "training_s": wall, "share": sum(seconds.values()) / wall}


def measure_blank(config: RunConfig, directory: Path, blank_dir: Path) -> dict[str, float]:
    """`measure` of a run whose processes put nothing on record."""
    from benchmarks.observe import measure
    from benchmarks.without_record import blank

    with blank(blank_dir):
        return measure(config, directory)


def of_pairs(config_path: Path, iterations: int, rounds: int) -> dict[str, float]:
    """Runs with the record and without, side by side and with the same tokens, so that a machine that changes its speed does so for both."""
    from benchmarks.observe import measure, side_by_side, variant
    from rlsys.config import load_config
    from rlsys.prepare import prepare

    config = prepare(load_config(config_path), lambda text: None).config
    learner = config.learner.model_dump(mode="json")
    on, off = variant(config, iterations, {}), variant(config, iterations, {"learner": {**learner, "commit_every": 0}})
    runs: dict[str, list[dict[str, float]]] = {"on": [], "off": []}
    recorded: list[float] = []
    with tempfile.TemporaryDirectory(prefix="rlsys-record-") as name:
        directory = Path(name)
        for i in range(rounds):
            one, other = side_by_side(
                partial(measure_blank, off, directory / f"off-{i}", directory / f"blank-{i}"), partial(measure, on, directory / f"on-{i}")
            )
            runs["off"].append(one)
            runs["on"].append(other)
            left = sum(path.stat().st_size for path in (directory / f"off-{i}" / "journal").iterdir())
            if left:
                raise RuntimeError(f"the run without a record journaled {left} bytes")
            recorded.append(of_run(directory / f"on-{i}")["share"])
            for side in ("off", "on"):
                print(
                    f"{side:<4} wall {runs[side][-1]['wall_s']:.1f} s, processors {runs[side][-1]['cpu_s']:.1f} s",
                    file=sys.stderr,
                    flush=True,
                )

    def cost(key: str) -> float:
        return statistics.median(on[key] / off[key] for on, off in zip(runs["on"], runs["off"], strict=True)) - 1

    return {"cost_of_wall": cost("wall_s"), "cost_of_processors": cost("cpu_s"), "recorded_share_of_wall": statistics.median(recorded)}


def of_state(gigabytes: float) -> dict[str, float]:
    """Commit a state of this size while a loop computes."""
    import torch
    from torch import Tensor

    from learner.commits import CommitPolicy, Committer, Pending
    from learner.parallel import Group, SingleProcess
    from protocol.ledger import Ledger

    torch.set_num_threads(1)

    class State:
        """A state that nobody trains: the loop below is the training."""

        group: Group = SingleProcess()

        def __init__(self) -> None:
            self.tensors = {f"part.{i}": torch.rand(int(gigabytes * 1e9) // 4 // 16) for i in range(16)}

        def live_state(self) -> dict[str, Tensor]:
            return self.tensors

        def state_to_fill(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
            return self.tensors

        def adopt_state(self, tensors: Mapping[str, Tensor]) -> None:
            """Nothing to do."""

        def about(self) -> dict[str, str]:
            return {"model": "benchmark", "optimizer": "none"}

    a, b = torch.rand(512, 512), torch.rand(512, 512)

    def step() -> float:
        started = time.monotonic()
        for _ in range(4):
            a @ b
        return time.monotonic() - started

    with tempfile.TemporaryDirectory(prefix="rlsys-b-", dir=".") as directory:
        ledger = Ledger(Path(directory) / "ledger.sqlite")
        committer = Committer(Path(directory) / "checkpoints", CommitPolicy(1), ledger=ledger)
        state: Any = State()
        alone = statistics.median(step() for _ in range(50))
        started = time.monotonic()
        committer.begin(state, 1, Pending(0, (), (0, 0), 0))
        stood_s = time.monotonic() - started
        beside = []
        while committer.busy:
            beside.append(step())
        committer.wait()
        written_s = time.monotonic() - started
        ledger.close()
    return {
        "gigabytes": gigabytes,
        "stood_still_s": stood_s,
        "until_committed_s": written_s,
        "steps_meanwhile": len(beside),
        "step_alone_ms": 1e3 * alone,
        "step_meanwhile_ms": 1e3 * statistics.median(beside) if beside else float("nan"),
        "slower": statistics.median(beside) / alone if beside else float("nan"),
    }


if __name__ == "__main__":
    sys.exit(main())
