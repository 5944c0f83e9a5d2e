"""A run by events: the pacing rule of the dispatcher and the device model of the simulated engine, without processes and without waiting.

    Pacer --group--> FluidDevice x n --sample--> sandboxes --group--> learner --version--> Pacer

`Pacer` and `FluidDevice` are the objects that the dispatcher and the simulated engine use; the rest (credits, batches) follows the same
rules in a few lines. Messages take no time besides `figures.dispatch_s`. Lengths are those of the run's own seeds, so that a simulated run
of real processes and this one draw the same.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from actors.dispatcher import sample_seed
from actors.engines.fluid import FluidDevice
from actors.engines.lengths import Lengths
from actors.pacing import Pacer, PacingRule
from rlsys.planning.figures import Figures
from rlsys.planning.limits import Split

Interval = tuple[float, float, str]


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What a simulated run did. Times in seconds from its start."""

    published: list[float]
    """When each version came out, version 0 first."""
    max_staleness: int
    generators: list[list[Interval]]
    """What each generator device did: (start, end, "sampling" | "update")."""
    learner: list[Interval]
    """(start, end, "train" | "publish" | "waiting:samples" | "waiting:rewards")."""
    tokens: float
    staleness_max: int
    capacity: float
    """Tokens per second of all generators together."""

    @property
    def iterations(self) -> int:
        return len(self.published) - 1

    def window(self) -> tuple[float, float]:
        """The steady part: without the first iterations, which fill the pipeline, and the last, which drain it."""
        first, last = steady(self.iterations, self.max_staleness)
        return self.published[first], self.published[last]

    @property
    def s_per_iteration(self) -> float:
        first, last = steady(self.iterations, self.max_staleness)
        return (self.published[last] - self.published[first]) / (last - first)

    def learner_shares(self) -> dict[str, float]:
        """Share of the steady part by activity; they sum to 1."""
        return shares(self.learner, *self.window())

    def generator_shares(self) -> dict[str, float]:
        """Share of the steady part by activity over all generators; they sum to 1. "idle:pacing" waits for a version."""
        start, end = self.window()
        total: dict[str, float] = {}
        for device in self.generators:
            for name, share in shares(device, start, end, rest="idle:pacing").items():
                total[name] = total.get(name, 0.0) + share / len(self.generators)
        return total


def steady(iterations: int, max_staleness: int) -> tuple[int, int]:
    """The versions between which seconds per iteration are taken: two iterations and the bound to fill, the bound and one to drain."""
    first = min(2 + max_staleness, max(0, iterations - 1))
    last = max(first + 1, iterations - max_staleness - 1)
    return first, min(last, iterations)


def shares(intervals: Sequence[Interval], start: float, end: float, rest: str = "other") -> dict[str, float]:
    """Share of [start, end] by name; what no interval covers is `rest`."""
    total: dict[str, float] = {}
    for a, b, name in intervals:
        overlap = min(b, end) - max(a, start)
        if overlap > 0:
            total[name] = total.get(name, 0.0) + overlap
    covered = sum(total.values())
    if end - start - covered > 1e-9:
        total[rest] = total.get(rest, 0.0) + end - start - covered
    return {name: seconds / (end - start) for name, seconds in sorted(total.items())}


@dataclass(slots=True)
class _Batch:
    """Iteration k as the learner sees it."""

    complete: int = 0
    tokens: float = 0.0
    sampled_s: float = 0.0
    """When its last sample ended."""


@dataclass(slots=True)
class _Group:
    iteration: int
    left: int
    tokens: float = 0.0


@dataclass(slots=True)
class _Generator:
    device: FluidDevice[tuple[int, int]]
    stamp: int = 0
    busy_since: float | None = None
    intervals: list[Interval] = field(default_factory=list)


class Simulation:
    """One run. `run` returns when the last version is out."""

    def __init__(
        self, figures: Figures, split: Split, *, max_staleness: int, iterations: int, seed: int = 0, extra_step_s: float = 0.0
    ) -> None:
        self._figures, self._split = figures, split
        self._max_staleness, self._iterations, self._seed = max_staleness, iterations, seed
        self._extra_step_s = extra_step_s
        self._pacer = Pacer(
            PacingRule(iterations=iterations, groups_per_iteration=figures.groups_per_iteration, max_staleness=max_staleness)
        )
        self._lengths = Lengths(figures.lengths)
        sampling = figures.sampling
        device_shares = [1.0] * math.floor(split.generators + 1e-9)
        if split.generators - len(device_shares) > 1e-9:
            device_shares.append(split.generators - len(device_shares))
        self._generators = [
            _Generator(
                FluidDevice(
                    sample_rate=min(sampling.tokens_per_s_sample, share * sampling.tokens_per_s),
                    total_rate=share * sampling.tokens_per_s,
                    slots=max(1, round(share * sampling.slots)),
                )
            )
            for share in device_shares
        ]
        prefill = sampling.prefill_tokens_per_s
        self._prefill_s = figures.prompt_tokens / prefill if prefill is not None else 0.0
        self._sandboxes = [0.0] * figures.reward.sandboxes
        self._events: list[tuple[float, int, str, int, int]] = []
        self._order = itertools.count()
        self._now = 0.0
        self._loaded = -1
        self._next_group = 0
        self._groups: dict[int, _Group] = {}
        self._batches: dict[int, _Batch] = {}
        self._credits: list[tuple[int, int]] = []
        self._training = -1
        self._learner_free_s = 0.0
        self._learner: list[Interval] = []
        self._published: list[float] = []
        self._tokens = 0.0
        self._staleness_max = 0

    def run(self) -> Outcome:
        """Until the last iteration is published."""
        for i in range(len(self._generators)):
            self._offer(i)
        self._at(self._figures.training.publish_s, "version", 0)
        while self._events and len(self._published) <= self._iterations:
            self._now, _, kind, what, stamp = heapq.heappop(self._events)
            if kind == "device":
                if stamp == self._generators[what].stamp:
                    self._move(what)
                    self._watch(what)
                    self._dispatch()
            elif kind == "version":
                self._version(what)
            elif kind == "loaded":
                self._loaded = what
                self._dispatch()
            elif kind == "group":
                self._group_scored(what)
            elif kind == "trained":
                self._learner_free_s = self._now
                self._at(self._now + self._figures.training.publish_s, "version", what + 1)
                if self._figures.training.publish_s:
                    self._learner.append((self._now, self._now + self._figures.training.publish_s, "publish"))
        for generator in self._generators:
            if generator.busy_since is not None:
                generator.intervals.append((generator.busy_since, self._now, "sampling"))
        return Outcome(
            published=self._published,
            max_staleness=self._max_staleness,
            generators=[generator.intervals for generator in self._generators],
            learner=self._learner,
            tokens=self._tokens,
            staleness_max=self._staleness_max,
            capacity=sum(generator.device.total_rate for generator in self._generators),
        )

    def _at(self, time: float, kind: str, what: int, stamp: int = 0) -> None:
        heapq.heappush(self._events, (time, next(self._order), kind, what, stamp))

    # ------------------------------------------------------------------------------------------------ sampling

    def _credit(self, index: int) -> int:
        """Groups that a generator would take: as many as its free slots hold, a partly free place counted whole."""
        device = self._generators[index].device
        return max(0, -(-(device.slots - device.running - device.waiting) // self._figures.group_size))

    def _offer(self, index: int) -> None:
        credit = self._credit(index)
        if credit:
            heapq.heappush(self._credits, (-credit, index))

    def _dispatch(self) -> None:
        """Issue what pacing allows to whoever has the most credit."""
        touched: set[int] = set()
        while (iteration := self._pacer.next_iteration()) is not None and self._loaded >= self._pacer.rule.min_version(iteration):
            while self._credits and self._credit(self._credits[0][1]) != -self._credits[0][0]:
                heapq.heappop(self._credits)
            if not self._credits:
                break
            _, index = heapq.heappop(self._credits)
            self._issue(index, iteration)
            touched.add(index)
            self._offer(index)
        for index in touched:
            self._watch(index)

    def _issue(self, index: int, iteration: int) -> None:
        group_id, figures = self._next_group, self._figures
        self._next_group += 1
        self._pacer.issue()
        self._groups[group_id] = _Group(iteration, figures.group_size)
        self._staleness_max = max(self._staleness_max, iteration - self._loaded)
        generator = self._generators[index]
        self._move(index)
        for i in range(figures.group_size):
            tokens = self._lengths(sample_seed(self._seed, group_id, i))
            generator.device.submit((group_id, i), tokens, self._prefill_s if i == 0 else 0.0)
            self._groups[group_id].tokens += tokens
        if generator.busy_since is None:
            generator.busy_since = self._now

    def _move(self, index: int) -> None:
        """Bring a device to the present; what ended is scored."""
        generator = self._generators[index]
        ended = generator.device.advance(self._now)
        for at, (group_id, _) in ended:
            self._sampled(at, group_id)
        if ended:
            self._offer(index)
        if generator.busy_since is not None and not generator.device.running:
            generator.intervals.append((generator.busy_since, ended[-1][0] if ended else self._now, "sampling"))
            generator.busy_since = None

    def _watch(self, index: int) -> None:
        """Come back when the next sample of a device ends."""
        generator = self._generators[index]
        generator.stamp += 1
        event = generator.device.next_event()
        if event is not None:
            self._at(max(event, math.nextafter(self._now, math.inf)), "device", index, generator.stamp)

    # ------------------------------------------------------------------------------------------------ scoring and training

    def _sampled(self, at: float, group_id: int) -> None:
        seconds, done = self._figures.reward.seconds, at
        if seconds:
            done = max(at, self._sandboxes[0]) + seconds
            heapq.heapreplace(self._sandboxes, done)
        group = self._groups[group_id]
        group.left -= 1
        batch = self._batches.setdefault(group.iteration, _Batch())
        batch.sampled_s = max(batch.sampled_s, at)
        if not group.left:
            self._at(max(done, self._now), "group", group_id)

    def _group_scored(self, group_id: int) -> None:
        group = self._groups.pop(group_id)
        batch = self._batches[group.iteration]
        batch.complete += 1
        batch.tokens += group.tokens
        self._train()

    def _train(self) -> None:
        """Begin the next iteration if its batch is complete and the learner is free."""
        k, figures = len(self._published) - 1, self._figures
        batch = self._batches.get(k)
        if k < 0 or self._training >= k or batch is None or batch.complete < figures.groups_per_iteration or k >= self._iterations:
            return
        self._training = k
        waited = self._learner_free_s
        if batch.sampled_s > waited:
            self._learner.append((waited, min(batch.sampled_s, self._now), "waiting:samples"))
            waited = min(batch.sampled_s, self._now)
        if self._now > waited:
            self._learner.append((waited, self._now, "waiting:rewards"))
        training = figures.training
        tokens = training.trained_share * (batch.tokens + figures.samples * figures.prompt_tokens)
        seconds = figures.dispatch_s + self._extra_step_s + training.fixed_s + tokens / (training.tokens_per_s * self._split.trainers)
        self._learner.append((self._now, self._now + seconds, "train"))
        self._tokens += batch.tokens
        self._at(self._now + seconds, "trained", k)
        del self._batches[k]

    def _version(self, number: int) -> None:
        self._published.append(self._now)
        self._learner_free_s = self._now
        self._pacer.publish(number, number * self._figures.groups_per_iteration)
        update = self._figures.sampling.update_s
        if update and number:
            for index, generator in enumerate(self._generators):
                self._move(index)
                generator.device.stall(update)
                if generator.busy_since is not None:
                    generator.intervals.append((generator.busy_since, self._now, "sampling"))
                    generator.busy_since = self._now + update
                generator.intervals.append((self._now, self._now + update, "update"))
                self._watch(index)
        self._at(self._now + (update if number else 0.0), "loaded", number)
        self._train()


def simulate(figures: Figures, split: Split, *, max_staleness: int, iterations: int, seed: int = 0) -> Outcome:
    """A run on two fleets."""
    return Simulation(figures, split, max_staleness=max_staleness, iterations=iterations, seed=seed).run()


def simulate_colocated(figures: Figures, *, iterations: int, seed: int = 0, devices: int | None = None) -> Outcome:
    """The synchronous schedule on shared devices: all sample, rewards beside it, all train; they change roles twice an iteration."""
    count = devices or figures.devices
    split = Split(generators=count, trainers=count)
    return Simulation(figures, split, max_staleness=0, iterations=iterations, seed=seed, extra_step_s=2 * figures.switch_s).run()
