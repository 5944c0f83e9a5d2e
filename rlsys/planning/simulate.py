"""A run by events: the pacing rule of the dispatcher and the device model of the simulated engine, without processes and without waiting.

    Pacer --group--> FluidDevice x n --sample--> sandboxes --group--> Line --batch--> learner --version--> Pacer

`Pacer`, `FluidDevice` and `Line` are the objects that the dispatcher, the simulated engine and the batcher decide with. Messages take no time
besides `figures.dispatch_s`. Lengths are those of the run's own seeds, so that a run of real processes with simulated parts and this one draw
the same. What is sampled of a group that was given up is sampled to its end, as generators do.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from actors.dispatcher import sample_seed
from actors.engines.fluid import FluidDevice
from actors.engines.lengths import Lengths
from actors.pacing import Pacer
from actors.settings import ScheduleSettings
from learner.line import Choice, Line
from rlsys.planning.figures import Figures
from rlsys.planning.limits import Split, full_rate
from rlsys.schedules import rules

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
    busy: list[Interval]
    """(start, end, "scoring" | "passing on") of every sample: what cores do besides sampling and training."""
    tokens: float
    staleness_max: int
    dropped: int
    """Groups that ended without a place in a batch: late, or without a token that is new enough."""
    capacity: float
    """Tokens per second of all generators together with every slot taken."""
    batch_tokens: list[float] = field(default_factory=list)
    """Sampled tokens of each iteration's batch."""

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

    def sampling_share(self) -> float:
        """Tokens of the steady part's batches, of what the generators could sample meanwhile at their full rate."""
        first, last = steady(self.iterations, self.max_staleness)
        start, end = self.window()
        return sum(self.batch_tokens[first:last]) / (self.capacity * (end - start))

    def generator_shares(self) -> dict[str, float]:
        """Share of the steady part by activity over all generators; they sum to 1. "idle:pacing" waits for a version."""
        start, end = self.window()
        total: dict[str, float] = {}
        for device in self.generators:
            for name, share in shares(device, start, end, rest="idle:pacing").items():
                total[name] = total.get(name, 0.0) + share / len(self.generators)
        return total


def share_cores(outcome: Outcome, cores: int, wanted: Mapping[str, float]) -> Outcome:
    """The same run when everything that is busy shares so many cores evenly: while k are asked for, all is slower by max(1, k / cores).

    `wanted` are the cores that an activity keeps busy, 1 if it is not named; waiting keeps none busy. One factor holds for all at a time, so the
    order of events stays and only the clock is stretched.
    """
    busy = [interval for device in outcome.generators for interval in device] + outcome.busy
    busy += [interval for interval in outcome.learner if interval[2] in ("train", "publish")]
    weighed = [(a, b, wanted.get(name, 1.0)) for a, b, name in busy if b > a]
    edges = sorted([(a, weight) for a, _, weight in weighed] + [(b, -weight) for _, b, weight in weighed])
    stops, stretched = [0.0], [0.0]
    count = 0.0
    for at, change in edges:
        if at > stops[-1]:
            stretched.append(stretched[-1] + (at - stops[-1]) * max(1.0, count / cores))
            stops.append(at)
        count += change

    def real(time: float) -> float:
        place = min(bisect.bisect_right(stops, time), len(stops) - 1)
        before = max(0, place - 1)
        if time >= stops[-1]:
            return stretched[-1] + time - stops[-1]
        return stretched[before] + (stretched[place] - stretched[before]) * (time - stops[before]) / (stops[place] - stops[before])

    def moved(intervals: Sequence[Interval]) -> list[Interval]:
        return [(real(a), real(b), name) for a, b, name in intervals]

    return replace(
        outcome,
        published=[real(time) for time in outcome.published],
        generators=[moved(device) for device in outcome.generators],
        learner=moved(outcome.learner),
        busy=moved(outcome.busy),
    )


def steady(iterations: int, max_staleness: int) -> tuple[int, int]:
    """The versions between which seconds per iteration are taken: without two and the bound that fill, and the bound and one that drain.

    A whole number of (S + 1), for iterations may be long and short in turn with that period. With enough iterations the same for S = 0, 1 and 2.
    """
    period = max_staleness + 1
    for edge in (max(max_staleness, 2), max_staleness):
        first, last = 2 + edge, iterations - edge - 1
        if last - first >= period:
            return first, last - (last - first) % period
    first = min(2 + max_staleness, max(0, iterations - 1))
    return first, min(max(first + 1, iterations - max_staleness - 1), iterations)


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
class _Group:
    started: int
    """The version that its generator had."""
    left: int
    tokens: float = 0.0
    sampled_s: float = 0.0
    """When its last sample ended, and the version then."""
    ended: int = 0


@dataclass(slots=True)
class _Generator:
    device: FluidDevice[tuple[int, int]]
    stamp: int = 0
    busy_since: float | None = None
    intervals: list[Interval] = field(default_factory=list)


class Simulation:
    """One run. `run` returns when the last version is out."""

    def __init__(
        self, figures: Figures, split: Split, schedule: ScheduleSettings, *, iterations: int, seed: int = 0, extra_step_s: float = 0.0
    ) -> None:
        self._figures, self._split, self._schedule = figures, split, schedule
        self._iterations, self._seed, self._extra_step_s = iterations, seed, extra_step_s
        pacing, batching = rules(schedule, iterations, figures.groups_per_iteration)
        self._pacer, self._line = Pacer(pacing), Line(batching)
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
                    additive=sampling.additive,
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
        self._ready: dict[int, _Group] = {}
        self._given_up: set[int] = set()
        self._groups_taken = 0
        self._credits: list[tuple[int, int]] = []
        self._settled = -1
        """The iteration for which all ready groups were looked at."""
        self._training = self._last_part = False
        self._learner_free_s = 0.0
        self._learner: list[Interval] = []
        self._published: list[float] = []
        self._busy: list[Interval] = []
        self._tokens = 0.0
        self._batch_tokens = [0.0] * iterations
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
                self._trained()
        for generator in self._generators:
            if generator.busy_since is not None:
                generator.intervals.append((generator.busy_since, self._now, "sampling"))
        return Outcome(
            published=self._published,
            max_staleness=self._schedule.bound,
            generators=[generator.intervals for generator in self._generators],
            learner=self._learner,
            busy=self._busy,
            tokens=self._tokens,
            staleness_max=self._staleness_max,
            dropped=len(self._given_up),
            capacity=full_rate(self._figures.sampling) * self._split.generators,
            batch_tokens=self._batch_tokens,
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
            self._issue(index)
            touched.add(index)
            self._offer(index)
        for index in touched:
            self._watch(index)

    def _issue(self, index: int) -> None:
        group_id, figures = self._next_group, self._figures
        self._next_group += 1
        self._pacer.issue()
        self._groups[group_id] = _Group(self._loaded, figures.group_size)
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
            self._busy.append((done - seconds, done, "scoring"))
        if self._figures.ring_s:
            self._busy.append((done, done + self._figures.ring_s, "passing on"))
        group = self._groups[group_id]
        group.left -= 1
        if not group.left:
            group.sampled_s, group.ended = at, self._loaded
            self._at(max(done, self._now), "group", group_id)

    def _group_scored(self, group_id: int) -> None:
        group = self._groups.pop(group_id)
        if group_id not in self._given_up:
            self._ready[group_id] = group
            self._settle([group_id] if self._settled == self._line.iteration else None)
            self._train()

    def _settle(self, numbers: Sequence[int] | None = None) -> None:
        """Ready groups that no batch may take any more end here: too old as a whole (mask), or in a part (otherwise).

        `numbers` are those that came since all were looked at for this iteration; not given, all are.
        """
        self._settled = self._line.iteration
        oldest, mask = self._line.iteration - self._schedule.bound, self._schedule.stragglers == "mask"
        for number in list(self._ready) if numbers is None else numbers:
            group = self._ready[number]
            if (group.ended if mask else group.started) < oldest:
                del self._ready[number]
                self._give_up(number)

    def _give_up(self, group_id: int) -> None:
        self._line.leave(group_id)
        self._given_up.add(group_id)
        self._pacer.give_up()

    def _train(self) -> None:
        """Begin the next part of the open iteration if its batch can close and the learner is free."""
        line, figures = self._line, self._figures
        if self._training or line.finished or len(self._published) <= line.iteration or not line.may_close(self._ready):
            return
        choice = line.choice(self._ready)
        if line.lacks(choice):
            return
        iteration, last = line.iteration, line.last_part
        groups = [self._ready.pop(number) for number in choice.taken]
        if last and self._schedule.stragglers == "drop":
            self._drop(choice)
        line.close(choice)
        self._training, self._last_part = True, last
        self._groups_taken += len(groups)
        sampled_s = max((g.sampled_s for g in groups), default=0.0)
        waited = self._learner_free_s
        if sampled_s > waited:
            self._learner.append((waited, min(sampled_s, self._now), "waiting:samples"))
            waited = min(sampled_s, self._now)
        if self._now > waited:
            self._learner.append((waited, self._now, "waiting:rewards"))
        started = [g.started for g in groups if g.started >= iteration - self._schedule.bound]
        self._staleness_max = max([self._staleness_max, *(iteration - version for version in started)])
        training, tokens = figures.training, sum(g.tokens for g in groups)
        trained = training.trained_share * (tokens + len(groups) * figures.group_size * figures.prompt_tokens)
        seconds = figures.dispatch_s + self._extra_step_s + training.fixed_s + trained / (training.tokens_per_s * self._split.trainers)
        self._learner.append((self._now, self._now + seconds, "train"))
        self._tokens += tokens
        self._batch_tokens[iteration] += tokens
        self._at(self._now + seconds, "trained", 0)

    def _drop(self, choice: Choice) -> None:
        """The stragglers of this batch end; the youngest of those that were passed by are the over-issue."""
        for number in self._line.rule.late([number for number in choice.passed if number < self._next_group]):
            self._give_up(number)

    def _trained(self) -> None:
        self._training, self._learner_free_s = False, self._now
        if not self._last_part:
            self._train()
            return
        publish_s = self._figures.training.publish_s
        self._training = True
        self._at(self._now + publish_s, "version", len(self._published))
        if publish_s:
            self._learner.append((self._now, self._now + publish_s, "publish"))

    def _version(self, number: int) -> None:
        self._published.append(self._now)
        self._training, self._learner_free_s = False, self._now
        self._settle()
        self._pacer.publish(number, self._groups_taken)
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


def simulate(figures: Figures, split: Split, schedule: ScheduleSettings, *, iterations: int, seed: int = 0) -> Outcome:
    """A run on two fleets."""
    outcome = Simulation(figures, split, schedule, iterations=iterations, seed=seed).run()
    return outcome if figures.cores is None else share_cores(outcome, figures.cores, _wanted_cores(figures, split))


def _wanted_cores(figures: Figures, split: Split) -> dict[str, float]:
    """By activity, for `share_cores`. All ranks of a learner train at once; one of them publishes."""
    return {
        "sampling": figures.sampling.cores,
        "update": figures.sampling.cores,
        "train": figures.training.cores * split.trainers,
        "scoring": figures.reward.cores,
    }


def simulate_colocated(figures: Figures, *, iterations: int, seed: int = 0, devices: int | None = None) -> Outcome:
    """The synchronous schedule on shared devices: all sample, rewards beside it, all train; they change roles twice an iteration."""
    count = devices or figures.devices
    split, schedule = Split(generators=count, trainers=count), ScheduleSettings(name="synchronous")
    outcome = Simulation(figures, split, schedule, iterations=iterations, seed=seed, extra_step_s=2 * figures.switch_s).run()
    return outcome if figures.cores is None else share_cores(outcome, figures.cores, _wanted_cores(figures, split))
