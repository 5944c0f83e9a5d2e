"""What happened in a run, gathered once from its files for the timeline and the report. Works while the run goes on.

Reads metrics.jsonl, events/, ledger.sqlite, the journal, config.yaml, status.json and exit.json; what is not there yet is left out.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml

from protocol.errors import ConfigError, DataError
from protocol.messages import Trajectory, token_versions
from rlsys.lines import read_lines
from rlsys.rundir import read_json
from rlsys.samples import read_trajectories
from rlsys.usage import Row, read_rows, tracks

NEWEST_SEGMENTS = 2
"""Of the journal: half a gigabyte at most is read, the newest samples."""
STRAGGLERS = 12
STRAGGLER_TIMES = 2.0
"""A sample that was under way this many times as long as the median of its iteration is a straggler."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One trajectory without its tokens."""

    group: int
    index: int
    iteration: int
    purpose: str
    problem: str
    generator: str
    rewarder: str
    tokens: int
    versions: tuple[int, ...]
    finish: str
    score: float | None
    passed: bool
    verdict: str
    started_s: float
    finished_s: float
    scored_s: float
    scoring_s: float

    @property
    def sampling_s(self) -> float:
        return self.finished_s - self.started_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """Everything that the timeline and the report show."""

    run_dir: Path
    name: str
    state: str
    reason: str
    config: dict[str, Any]
    start_s: float
    end_s: float
    iterations: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    events: list[dict[str, Any]]
    rows: dict[str, list[Row]]
    """By track."""
    samples: list[Sample] = field(default_factory=list)
    staleness: dict[int, int] = field(default_factory=dict)
    """Tokens of training samples by staleness against the iteration that they were sampled for."""

    @property
    def devices(self) -> dict[str, list[str]]:
        """Device -> the processes that sample or train on it, as they said. Processes without one use the host alone."""
        found: dict[str, list[str]] = defaultdict(list)
        said = {e["process"]: e["device"] for e in self.events if e["event"] == "on device"}
        for process, device in sorted(said.items()):
            if self.rows.get(process):
                found[device].append(process)
        return dict(sorted(found.items()))

    @property
    def processes(self) -> dict[str, list[Row]]:
        """The main track of each process, generators first."""
        order = ("generator", "rewarder", "learner", "dispatcher", "dashboard")
        main = [name for name in self.rows if "+" not in name]
        main.sort(key=lambda n: (order.index(n.rpartition("-")[0]) if n.rpartition("-")[0] in order else 9, len(n), n))
        return {name: self.rows[name] for name in main}


def read_story(run_dir: Path) -> Story:
    """Gather it. Raises ConfigError when the directory holds no run."""
    if not (run_dir / "config.yaml").exists():
        raise ConfigError(f"{run_dir}: holds no run (no config.yaml)")
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    ended, status = read_json(run_dir / "exit.json"), read_json(run_dir / "status.json") or {}
    path = run_dir / "metrics.jsonl"
    records = read_lines(path) if path.is_file() else []
    rows = {track: read_rows(run_dir, track) for track in tracks(run_dir)}
    starts = [r[0].start_s for r in rows.values() if r]
    ends = [r[-1].end_s for r in rows.values() if r]
    start = min(starts, default=status.get("since_s", 0.0))
    samples: list[Sample] = []
    staleness: Counter[int] = Counter()
    with contextlib.suppress(DataError):
        for trajectory in read_trajectories(run_dir, newest_segments=NEWEST_SEGMENTS):
            samples.append(_sample(trajectory))
            if trajectory.purpose == "train" and len(trajectory.spans):
                ages, counts = np.unique(trajectory.iteration - token_versions(trajectory.spans), return_counts=True)
                staleness.update(dict(zip(ages.tolist(), counts.tolist(), strict=True)))
    return Story(
        run_dir=run_dir,
        name=str(config.get("name", "run")),
        state=ended.get("outcome", "unknown") if ended else status.get("state", "unknown"),
        reason=(ended or {}).get("reason", ""),
        config=config,
        start_s=start,
        end_s=max(ends, default=start),
        iterations=[r for r in records if "reward/mean" in r],
        evaluations=[r for r in records if r.get("event") == "eval"],
        events=[r for r in records if "event" in r and r["event"] != "eval"],
        rows=rows,
        samples=samples,
        staleness=dict(sorted(staleness.items())),
    )


def _sample(t: Trajectory) -> Sample:
    return Sample(
        group=t.group_id,
        index=t.index,
        iteration=t.iteration,
        purpose=t.purpose,
        problem=t.problem_id,
        generator=t.generator.partition("@")[0],
        rewarder=t.rewarder.partition("@")[0],
        tokens=len(t.token_ids),
        versions=tuple(sorted({int(v) for v in t.spans[:, 0]})) if len(t.spans) else (),
        finish=t.finish_reason,
        score=t.score,
        passed=t.passed,
        verdict=t.status,
        started_s=t.started_s,
        finished_s=t.finished_s,
        scored_s=t.scored_s,
        scoring_s=t.scoring_s,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Straggler:
    """The sample that an iteration had to wait for, or that took much longer than its fellows."""

    sample: Sample
    times: float
    """Its time under way, from its group's start to its score, over the median of its iteration."""
    last: bool
    """Whether it was the last one of its iteration to be scored."""


def stragglers(samples: Iterable[Sample]) -> list[Straggler]:
    """Of every iteration: the last sample to be scored, and all beyond STRAGGLER_TIMES the median; the worst first."""
    by_iteration: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        if sample.purpose == "train":
            by_iteration[sample.iteration].append(sample)
    found = []
    for members in by_iteration.values():
        middle = median(s.scored_s - s.started_s for s in members)
        last = max(members, key=lambda s: s.scored_s)
        for sample in members:
            times = (sample.scored_s - sample.started_s) / middle if middle > 0 else 1.0
            if sample is last or times > STRAGGLER_TIMES:
                found.append(Straggler(sample=sample, times=times, last=sample is last))
    return sorted(found, key=lambda s: -s.times)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemCost:
    """What one problem took, over all of its samples."""

    problem: str
    samples: int
    passed: int
    tokens: float
    sampling_s: float
    scoring_s: float
    """Means."""


def slowest_problems(samples: Iterable[Sample], count: int = 12) -> list[ProblemCost]:
    """By mean time of sampling and scoring."""
    groups: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.problem].append(sample)

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    costs = [
        ProblemCost(
            problem=problem,
            samples=len(members),
            passed=sum(s.passed for s in members),
            tokens=mean([s.tokens for s in members]),
            sampling_s=mean([s.sampling_s for s in members]),
            scoring_s=mean([s.scoring_s for s in members]),
        )
        for problem, members in groups.items()
    ]
    return sorted(costs, key=lambda c: -(c.sampling_s + c.scoring_s))[:count]


def verdicts(samples: Iterable[Sample]) -> dict[str, int]:
    """Training samples by verdict, the most frequent first."""
    return dict(Counter(s.verdict for s in samples if s.purpose == "train").most_common())
