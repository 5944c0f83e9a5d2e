"""How large fleets shall be: what `rlsys scale` may ask for, who comes and who leaves, and when reward actors are added by themselves. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from actors.settings import MOST_ACTORS
from protocol.errors import ConfigError
from rlsys.config import RunConfig, parse_config

FLEETS = {
    "generators": ("generator", "generators.count"),
    "rewarders": ("rewarder", "rewarders.count"),
    "learner": ("learner", "learner.ranks"),
}
"""What a user calls a fleet -> its role, and the key of its size."""


def parse_sizes(words: Sequence[str]) -> dict[str, int]:
    """{"generators": 3} of ["generators=3"]. Raises ConfigError with the word and what was expected."""
    sizes: dict[str, int] = {}
    for word in words:
        fleet, equals, number = word.partition("=")
        if not equals or not number.isdigit() or fleet not in FLEETS:
            raise ConfigError(f"{word!r}: expected FLEET=COUNT, such as generators=3; fleets are {', '.join(FLEETS)}")
        if fleet in sizes:
            raise ConfigError(f"{word!r}: {fleet} stands twice")
        if len(number) > 6:  # any that is meant is shorter, and would be told its own limit
            raise ConfigError(f"{fleet}={number[:12]}...: a fleet has at most {MOST_ACTORS} processes")
        sizes[fleet] = int(number)
    return sizes


def sizes_of(config: RunConfig) -> dict[str, int]:
    """How large each fleet is configured to be."""
    return {"generators": config.generators.count, "rewarders": config.rewarders.count, "learner": config.learner.ranks}


def resized(config: RunConfig, sizes: Mapping[str, int]) -> RunConfig:
    """The configuration with these fleets. Raises ConfigError for a fleet that there is not, or a size that the configuration does not allow."""
    content = config.model_dump(mode="json")
    for fleet, count in sizes.items():
        if fleet not in FLEETS:
            raise ConfigError(f"{fleet!r} is no fleet; fleets are {', '.join(FLEETS)}")
        if type(count) is not int or count < 1:
            raise ConfigError(f"{fleet}={count}: at least 1 is needed for the run to go on; `rlsys down` ends it")
        group, _, key = FLEETS[fleet][1].partition(".")
        content[group][key] = count
    if sizes.get("learner", config.learner.ranks) != config.learner.ranks and config.learner.commit_every == 0:
        raise ConfigError("learner.commit_every is 0: nothing is committed, so the learner's size cannot change while it runs")
    return parse_config(content, "scale")


def newcomers(used: Collection[int], have: int, wanted: int) -> list[int]:
    """Indices of the processes to start, so that `wanted` are there instead of `have`: the lowest that nobody uses, who leaves included."""
    free = (index for index in range(len(used) + max(0, wanted - have) + 1) if index not in used)
    return [next(free) for _ in range(max(0, wanted - have))]


def leavers(staying: Collection[int], wanted: int) -> list[int]:
    """Indices of the processes that leave, the highest first, so that `wanted` are left."""
    return sorted(staying, reverse=True)[: max(0, len(staying) - wanted)]


@dataclass(slots=True)
class QueueRule:
    """How many reward actors there shall be, by what waits for them. Times are seconds of any clock that does not go back.

    Too many wait when more than `PER_PLACE` completions wait for each place (actor x concurrency) for `after_s`: then as many actors come as
    would bring that down to one, at most twice as many as there are. One leaves after three times as long in which the others would have had
    places to spare. The pause between, and the two bounds so far apart, keep it from swinging.
    """

    low: int
    high: int
    concurrency: int
    after_s: float
    _since_s: float = -1.0
    _sign: int = 0

    PER_PLACE = 2.0
    SPARE = 0.5
    """Share of the places of those who stay that may be in use when one leaves."""

    def wanted(self, count: int, waiting: int, busy: int, now_s: float) -> int:
        """The size for `count` actors that score `busy` samples while `waiting` more wait; `count` itself when nothing is to change."""
        places = count * self.concurrency
        sign = 0
        if waiting > self.PER_PLACE * places and count < self.high:
            sign = 1
        elif waiting == 0 and busy <= self.SPARE * (count - 1) * self.concurrency and count > self.low:
            sign = -1
        if sign != self._sign:
            self._sign, self._since_s = sign, now_s
        if not sign or now_s - self._since_s < self.after_s * (1 if sign > 0 else 3):
            return count
        self._since_s = now_s  # what is changed now must show before the next change
        if sign < 0:
            return max(self.low, count - 1)
        return min(self.high, 2 * count, max(count + 1, -(-waiting // self.concurrency)))
