"""What no schedule can beat, from the figures alone. Pure arithmetic, all in seconds per iteration.

Sampling one iteration is work for the generators, training on it is work for the learner; a split gives n_g devices to one and n_t to the
other. With staleness bound S, groups of iteration k start when version k - S is published and S + 1 iterations are under way at most, so

    limit(S, split) = max( sampling work / n_g,  training work / n_t,  scoring work / sandboxes,  (latency of a batch + reward + train) / (S + 1) )

where the latency of a batch is at least that of its longest sample running alone, and at least the batch's work on all generators. Without
a split, N devices that change between the roles for nothing could at best share all work evenly:

    fluid limit = (sampling work + training work) / N

Where all parts share C cores, both are at least (all work, scoring and passing samples on included) / C.

A static split in whole devices cannot reach the fluid limit unless the works divide evenly (`best_split_share`).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from actors.dispatcher import sample_seed
from actors.engines.lengths import Lengths
from rlsys.planning.figures import Figures, SamplingFigures

POINTS = 400
"""Of the quadrature of the expected longest sample; twice as many change it by less than 0.1 %."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Devices of each fleet. Fractions are shares of a device that both fleets use."""

    generators: float
    trainers: float

    def __str__(self) -> str:
        return f"{self.generators:g}+{self.trainers:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """Seconds per iteration of each term; `seconds` is the largest."""

    sampling: float
    training: float
    scoring: float
    latency: float
    cores: float = 0.0

    @property
    def seconds(self) -> float:
        return max(self.sampling, self.training, self.scoring, self.latency, self.cores)

    @property
    def bound(self) -> str:
        """Which term it is."""
        terms = asdict(self)
        return max(terms, key=terms.__getitem__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What one iteration asks for, on average."""

    tokens: float
    """Of all completions together."""
    longest: float
    """Of the longest completion."""


def expected_load(figures: Figures) -> Load:
    """The mean over all draws."""
    return Load(tokens=figures.samples * Lengths(figures.lengths).mean, longest=longest_tokens(figures))


def drawn_load(figures: Figures, seed: int, first: int, last: int) -> Load:
    """The mean over iterations first..last - 1 of a run with this seed, whose lengths are fixed by it."""
    lengths, size = Lengths(figures.lengths), figures.groups_per_iteration
    drawn = [
        [lengths(sample_seed(seed, group, i)) for group in range(k * size, (k + 1) * size) for i in range(figures.group_size)]
        for k in range(first, last)
    ]
    return Load(tokens=sum(map(sum, drawn)) / len(drawn), longest=sum(map(max, drawn)) / len(drawn))


def full_rate(sampling: SamplingFigures) -> float:
    """Tokens per second of a device with every slot taken."""
    alone, together, slots = sampling.tokens_per_s_sample, sampling.tokens_per_s, sampling.slots
    return slots / (1 / alone + (slots - 1) / together) if sampling.additive else min(together, slots * alone)


def sampling_work_s(figures: Figures, load: Load) -> float:
    """Device-seconds to sample one iteration at the device's full rate, prompts included."""
    sampling = figures.sampling
    work = load.tokens / full_rate(sampling)
    if sampling.prefill_tokens_per_s is not None:
        work += figures.groups_per_iteration * figures.prompt_tokens / sampling.prefill_tokens_per_s
    return work


def training_work_s(figures: Figures, load: Load) -> float:
    """Device-seconds to train on one iteration; what does not scale with devices (`fixed_s`, `publish_s`) is not in it."""
    tokens = figures.training.trained_share * (load.tokens + figures.samples * figures.prompt_tokens)
    return tokens / figures.training.tokens_per_s


def train_s(figures: Figures, load: Load, trainers: float) -> float:
    """Seconds of one step and its publication on so many devices."""
    training = figures.training
    return training.fixed_s + training.publish_s + training_work_s(figures, load) / trainers


def longest_tokens(figures: Figures) -> float:
    """Expected tokens of the longest of one iteration's samples: the integral of quantile(u^(1/n)) over u, stragglers included."""
    lengths, count = Lengths(figures.lengths), figures.samples
    plain = sum(lengths.quantile(((i + 0.5) / POINTS) ** (1.0 / count)) for i in range(POINTS)) / POINTS
    options = figures.lengths
    if options.straggler_tokens is None:
        return plain
    some = 1.0 - math.exp(count * math.log1p(-options.straggler_share))
    return some * max(plain, float(options.straggler_tokens)) + (1.0 - some) * plain


def batch_latency_s(figures: Figures, load: Load, generators: float) -> float:
    """At least so long from the first token of a batch to its last, alone on the generators."""
    alone = min(figures.sampling.tokens_per_s_sample, figures.sampling.tokens_per_s)
    return max(load.longest / alone, sampling_work_s(figures, load) / generators)


def schedule_limit(figures: Figures, load: Load, split: Split, max_staleness: int, parts: int = 1) -> Limit:
    """The limit of any schedule with this bound on this split.

    With `parts`, an iteration is trained in so many steps as its groups come: only the last one must follow the last sample.
    """
    reward, trained = figures.reward, train_s(figures, load, split.trainers)
    return Limit(
        sampling=sampling_work_s(figures, load) / split.generators + figures.sampling.update_s,
        training=trained,
        scoring=figures.samples * reward.seconds / reward.sandboxes,
        latency=(batch_latency_s(figures, load, split.generators) + reward.seconds + trained / parts) / (max_staleness + 1),
        cores=_cores_s(figures, load),
    )


def _cores_s(figures: Figures, load: Load) -> float:
    """All work of one iteration on the cores that the parts share; 0 where every device is its own."""
    if figures.cores is None:
        return 0.0
    others = figures.samples * (figures.reward.cores * figures.reward.seconds + figures.ring_s)
    sampling, training = figures.sampling.cores * sampling_work_s(figures, load), figures.training.cores * training_work_s(figures, load)
    return (sampling + training + others) / figures.cores


def fluid_limit_s(figures: Figures, load: Load) -> float:
    """Seconds per iteration if all devices shared all work evenly and changing roles cost nothing."""
    work = sampling_work_s(figures, load) + training_work_s(figures, load)
    return max(work / figures.devices, _cores_s(figures, load))


def colocated_limit_s(figures: Figures, load: Load) -> float:
    """The synchronous schedule on shared devices: sample on all, score beside it, switch, train on all, switch back."""
    reward, count = figures.reward, figures.devices
    sampled = max(batch_latency_s(figures, load, count) + reward.seconds, figures.samples * reward.seconds / reward.sandboxes)
    return sampled + train_s(figures, load, count) + 2 * figures.switch_s


def best_split_share(figures: Figures, load: Load) -> float:
    """The largest share of the fluid limit that a split into whole devices allows, which needs two devices at least."""
    sampling, training = sampling_work_s(figures, load), training_work_s(figures, load)
    best = min(max(sampling / g, training / (figures.devices - g)) for g in range(1, figures.devices))
    return fluid_limit_s(figures, load) / max(best, _cores_s(figures, load))
