"""Which split of the devices to take, and whether the configuration can run at all. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from actors.settings import ScheduleSettings
from protocol.errors import ConfigError
from rlsys.config import RunConfig
from rlsys.planning.figures import Figures
from rlsys.planning.limits import Limit, Split, expected_load, fluid_limit_s, schedule_limit
from rlsys.planning.room import Room
from rlsys.planning.simulate import Outcome, simulate, simulate_colocated

CANDIDATES = 6
"""Splits that are simulated: those with the lowest limits. The best one is among them unless tails differ much between splits."""
SAMPLES = 60_000
"""Samples that one simulation draws at most, if the batch allows, so that a plan for 1,000 generators takes seconds."""
SKETCH = 2_000
"""Samples of an iteration beyond which splits are compared on a smaller fleet of the same proportions."""
MOST = 100_000
"""Devices of a plan."""
OTHERS: tuple[ScheduleSettings, ...] = (
    ScheduleSettings(name="synchronous"),
    ScheduleSettings(name="one_off"),
    ScheduleSettings(name="bounded"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One schedule on one split."""

    schedule: ScheduleSettings
    split: Split
    limit: Limit
    outcome: Outcome

    @property
    def s_per_iteration(self) -> float:
        return self.outcome.s_per_iteration


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do, and what was compared. `configured` is None if the configuration has other devices than were asked for."""

    figures: Figures
    best: Prediction
    configured: Prediction | None
    candidates: tuple[Prediction, ...]
    others: tuple[Prediction, ...]
    colocated: Outcome
    fluid_s: float


def iterations_of(figures: Figures, bound: int, samples: int = SAMPLES) -> int:
    """Enough iterations for a steady part, fewer for large batches."""
    return max(3 * bound + 4, min(31, samples // figures.samples))


def predict(figures: Figures, split: Split, schedule: ScheduleSettings) -> Prediction:
    """One simulation."""
    iterations = iterations_of(figures, schedule.bound)
    return Prediction(
        schedule=schedule,
        split=split,
        limit=schedule_limit(figures, expected_load(figures), split, schedule.bound, schedule.parts),
        outcome=simulate(figures, split, schedule, iterations=iterations),
    )


def sketched(figures: Figures, split: Split, schedule: ScheduleSettings) -> float:
    """Seconds per iteration to compare splits by: of a large fleet, those of a smaller one with the same samples per device."""
    factor = max(1, figures.samples // SKETCH)
    iterations = iterations_of(figures, schedule.bound)
    if factor > 1:
        reward = figures.reward.model_copy(update={"sandboxes": max(1, figures.reward.sandboxes // factor)})
        figures = figures.model_copy(update={"groups_per_iteration": max(1, figures.groups_per_iteration // factor), "reward": reward})
        split = Split(generators=split.generators / factor, trainers=split.trainers / factor)
        iterations = iterations_of(figures, schedule.bound, SAMPLES // 3)
    return simulate(figures, split, schedule, iterations=iterations).s_per_iteration


def likely_splits(figures: Figures, schedule: ScheduleSettings) -> list[Split]:
    """Splits into whole devices, the lowest limits first."""
    load = expected_load(figures)
    splits = [Split(generators=g, trainers=figures.devices - g) for g in range(1, figures.devices)]
    return sorted(splits, key=lambda split: schedule_limit(figures, load, split, schedule.bound).seconds)[:CANDIDATES]


def make_plan(figures: Figures, schedule: ScheduleSettings, configured: Split | None) -> Plan:
    """Compare splits and schedules. Raises ConfigError when there is nothing to split."""
    if figures.devices < 2:
        raise ConfigError(
            f"{figures.devices} device cannot be split: sampling and training need one each (--devices 2), or use the synchronous schedule on it"
        )
    if figures.devices > MOST:
        raise ConfigError(f"{figures.devices} devices: a plan is made for at most {MOST}")
    small = figures.samples <= SKETCH
    splits = likely_splits(figures, schedule)
    if small:
        candidates = [predict(figures, split, schedule) for split in splits]
    else:
        candidates = [predict(figures, min(splits, key=lambda split: sketched(figures, split, schedule)), schedule)]
    best = min(candidates, key=lambda p: p.s_per_iteration)
    others = []
    for other in OTHERS:
        if other.name != schedule.name:
            likely = likely_splits(figures, other)[: CANDIDATES if small else 2]
            others.append(predict(figures, min(likely, key=lambda split: sketched(figures, split, other)), other))
    own = next((p for p in candidates if p.split == configured), None)
    if own is None and configured is not None and configured.generators + configured.trainers == figures.devices:
        own = predict(figures, configured, schedule)
    return Plan(
        figures=figures,
        best=best,
        configured=own,
        candidates=tuple(candidates),
        others=tuple(others),
        colocated=simulate_colocated(figures, iterations=iterations_of(figures, 0)),
        fluid_s=fluid_limit_s(figures, expected_load(figures)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Bytes: of a device's memory, of the machine's memory, free for weights, free on the disk of the run. None where it is not known."""

    device: float | None
    host: float | None
    weights: float | None
    disk: float | None


def faults(config: RunConfig, figures: Figures, split: Split, room: Room, machine: Machine) -> list[str]:
    """Why the configuration cannot run on this machine, one sentence each; empty if it can."""
    found = []
    if figures.devices < 2:
        found.append(f"{figures.devices} device: sampling and training need one each")
    if machine.device is not None:
        for what, need, key in (
            ("generator", room.generator, "generators.slots or model.max_context"),
            ("learner rank", room.learner, "learner.tokens_per_microbatch, or shard with more ranks"),
        ):
            if need > machine.device:
                found.append(f"a {what} needs {gigabytes(need)} and its device has {gigabytes(machine.device)}: reduce {key}")
    total = math.ceil(split.generators) * room.generator + math.ceil(split.trainers) * room.learner
    if machine.host is not None and total > machine.host:
        found.append(
            f"generators and learner ranks need {gigabytes(total)} of memory together and the machine has {gigabytes(machine.host)}"
        )
    if machine.weights is not None and room.weights > machine.weights:
        found.append(
            f"three published versions need {gigabytes(room.weights)} and {gigabytes(machine.weights)} are free where they go: set weights.directory"
        )
    if machine.disk is not None and room.journal + room.checkpoints > machine.disk:
        found.append(
            f"journal and checkpoints of {config.iterations} iterations need {gigabytes(room.journal + room.checkpoints)} and "
            f"{gigabytes(machine.disk)} are free on the run's disk"
        )
    longest = figures.lengths.straggler_tokens or figures.lengths.cap
    context = config.model.max_context
    if context is not None and longest is not None and longest >= context:
        found.append(f"completions of {longest} tokens do not fit into model.max_context {context}")
    return found


def gigabytes(count: float) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def advice(plan: Plan) -> list[str]:
    """What would help, from what the best split waits for."""
    best, figures = plan.best, plan.figures
    words = []
    if best.limit.bound == "scoring":
        needed = math.ceil(figures.samples * figures.reward.seconds / max(best.limit.sampling, best.limit.training))
        words.append(f"rewards are the limit: {needed} sandboxes would keep up")
    faster = [p for p in plan.others if p.s_per_iteration < 0.97 * best.s_per_iteration]
    if faster:
        better = min(faster, key=lambda p: p.s_per_iteration)
        words.append(
            f"schedule {better.schedule.name} (staleness {better.schedule.bound}) would take {better.s_per_iteration:.3g} s on {better.split}"
        )
    fair = math.ceil(figures.sampling.tokens_per_s / figures.sampling.tokens_per_s_sample)
    if not figures.sampling.additive and figures.sampling.slots > 2 * fair and best.schedule.bound:
        trial = figures.model_copy(update={"sampling": figures.sampling.model_copy(update={"slots": fair})})
        tried = predict(trial, best.split, best.schedule)
        if tried.s_per_iteration < 0.97 * best.s_per_iteration:
            words.append(
                f"generators.slots {fair} would take {tried.s_per_iteration:.3g} s: fewer samples at once let the long ones end earlier"
            )
    waiting = best.outcome.learner_shares()
    if best.outcome.staleness_max == 0 and best.schedule.bound == 0 and sum(s for n, s in waiting.items() if n.startswith("waiting")) > 0.3:
        words.append("the learner waits while samples are drawn: staleness 1 (one_off) would overlap both")
    return words


def table(predictions: Sequence[Prediction]) -> list[str]:
    """One line each."""
    return [
        f"  {p.schedule.name:<12} {p.split!s:>9}  {p.s_per_iteration:9.4g} s  limit {p.limit.seconds:9.4g} s ({p.limit.bound})"
        for p in predictions
    ]
