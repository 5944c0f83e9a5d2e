"""Which bytes of a version a host fetches, and from whom. Pure: no sockets, no clocks, no files.

A version's files are cut into blocks of BLOCK_BYTES, numbered the same on every host. Of n hosts that fetch, host number i takes every n-th
block, from i on, from the learner and all others from the host whose block it is, which passes it on as soon as it has it. So the learner's link
carries a version about once, however many hosts there are. Who dies, is slow or has nothing loses its blocks to the learner; only bytes that
differ from what the host has already (frozen tensors, adapters) travel at all.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BLOCK_BYTES = 1 << 20
"""Large enough that a request costs little beside its bytes, small enough that a link of 10 Mbit/s delivers one in a second."""
WINDOW = 4
"""Blocks that are asked of one source at a time: 4 MB, what 1 Gbit/s with a round trip of 30 ms holds."""
REST_S = 2.0
"""How long a source that had nothing to give is left alone; twice as long each further time, at most REST_LIMIT_S."""
REST_LIMIT_S = 32.0
SILENT_S = 5.0
"""A source that owes blocks and sends none for so long is taken for cut off: others are asked, and it rests."""

ORIGIN = ""
"""The learner's name among sources; all others are names of hosts."""


@dataclass(frozen=True, slots=True)
class Region:
    """Consecutive bytes of a file that have a hash of their own: a header, a tensor, or a whole small file."""

    file: str
    start: int
    end: int
    xxh3_128: str


@dataclass(frozen=True, slots=True)
class Block:
    """Bytes of one block that are missing: [start, end) of a file. `number` counts the version's blocks."""

    number: int
    file: str
    start: int
    end: int


class Layout:
    """Files, regions and blocks of a version, from its manifest."""

    def __init__(self, manifest: Mapping[str, Any]) -> None:
        """Raises KeyError, TypeError or ValueError for what is no manifest of ours."""
        self.sizes: dict[str, int] = {name: int(entry["bytes"]) for name, entry in sorted(manifest["files"].items())}
        self.regions: list[Region] = []
        self._first: dict[str, int] = {}
        self.num_blocks = 0
        for name, size in self.sizes.items():
            entry = manifest["files"][name]
            if "/" in name or name.startswith(".") or size < 0:
                raise ValueError(f"{name!r} is no name of a published file")
            self._first[name] = self.num_blocks
            self.num_blocks += -(-size // BLOCK_BYTES)
            self.regions.append(Region(name, 0, int(entry["hashed_bytes"]), entry["xxh3_128"]))
            for tensor in manifest["shards"].get(name, {}).values():
                start, end = tensor["bytes"]
                if not 0 <= start <= end <= size:
                    raise ValueError(f"{name}: a tensor at {start}:{end} of {size} bytes")
                self.regions.append(Region(name, start, end, tensor["xxh3_128"]))
        self.regions.sort(key=lambda region: (region.file, region.start))
        self._holds: dict[int, list[Region]] = {}
        for region in self.regions:
            for number in self.numbers(region):
                self._holds.setdefault(number, []).append(region)

    def number(self, file: str, offset: int) -> int:
        """The block that holds this byte."""
        return self._first[file] + offset // BLOCK_BYTES

    def numbers(self, region: Region) -> range:
        """The blocks that hold any byte of a region."""
        if region.start == region.end:
            return range(0)
        return range(self.number(region.file, region.start), self.number(region.file, region.end - 1) + 1)

    def regions_of(self, number: int) -> list[Region]:
        """The regions of which a block holds any byte."""
        return self._holds.get(number, [])

    def blocks(self, regions: Iterable[Region]) -> list[Block]:
        """What of each block must be fetched so that these regions are there: from its first missing byte to its last."""
        bounds: dict[int, tuple[str, int, int]] = {}
        for region in regions:
            for number in self.numbers(region):
                base = (number - self._first[region.file]) * BLOCK_BYTES
                start, end = max(region.start, base), min(region.end, base + BLOCK_BYTES)
                if number in bounds:
                    start, end = min(start, bounds[number][1]), max(end, bounds[number][2])
                bounds[number] = (region.file, start, end)
        return [Block(number, *bounds[number]) for number in sorted(bounds)]


class Picker:
    """What to ask of whom next. Every block is asked of one source at a time, until it has come.

    `own` is this host's name. With `origin_only` nothing is asked of other hosts, because what they gave was wrong. Times are seconds of any
    clock that only goes forward, given by the caller.
    """

    def __init__(self, blocks: Sequence[Block], own: str, *, origin_only: bool = False) -> None:
        self._own = own
        self._left = {block.number: block for block in blocks}
        self._origin_only = origin_only
        self._shares: dict[str, deque[Block]] = {own: deque(blocks)}
        """Host -> its share of the blocks that nobody was asked for yet."""
        self._asked: dict[int, str] = {}
        self._flying: Counter[str] = Counter()
        self._hosts: list[str] = [own]
        self._sources: set[str] = set()
        self._rest: dict[str, tuple[float, float]] = {}
        """Source -> until when it rests, and for how long it did."""
        self._heard: dict[str, float] = {}

    @property
    def done(self) -> bool:
        """Whether every block has come."""
        return not self._left

    @property
    def num_left(self) -> int:
        """Blocks that have not come."""
        return len(self._left)

    @property
    def missing(self) -> list[Block]:
        """Blocks that have not come."""
        return list(self._left.values())

    @property
    def owing(self) -> dict[str, int]:
        """Source -> blocks that it was asked for and has not sent."""
        return {source: count for source, count in self._flying.items() if count}

    def sources(self, names: Collection[str]) -> None:
        """Who can be asked: ORIGIN and names of other hosts that fetch too. Whoever is not among them any more is gone, with what it owes."""
        wanted = {name for name in names if name == ORIGIN or (name != self._own and not self._origin_only)}
        if wanted == self._sources:
            return
        for source in self._sources - wanted:
            self._take_back(source)
            self._rest.pop(source, None)
        self._sources = wanted
        hosts = sorted(self._sources - {ORIGIN} | {self._own})
        if hosts != self._hosts:
            self._hosts = hosts
            self._share()

    def _share(self) -> None:
        self._shares = {host: deque() for host in self._hosts}
        for number, block in self._left.items():
            if number not in self._asked:
                self._shares[self._owner(number)].append(block)

    def _owner(self, number: int) -> str:
        return self._hosts[number % len(self._hosts)]

    def ask(self, now_s: float) -> list[tuple[str, Block]]:
        """Requests to send now, in this order; each counts as sent."""
        requests: list[tuple[str, Block]] = []
        for source in sorted(self._sources):
            if self._resting(source, now_s):
                continue
            if not self._flying[source]:
                self._heard[source] = now_s
            while self._flying[source] < WINDOW and (block := self._next(source, now_s)) is not None:
                self._asked[block.number] = source
                self._flying[source] += 1
                requests.append((source, block))
        return requests

    def _next(self, source: str, now_s: float) -> Block | None:
        own = self._shares[self._own]
        if source != ORIGIN:
            if share := self._shares[source]:
                return share.popleft()
            if ORIGIN in self._sources and not self._resting(ORIGIN, now_s):
                return None
            return own.popleft() if own else None  # from a host that may have what this one cannot take from the learner now
        if own:
            return own.popleft()
        # with its own share under way a host takes over what is the furthest from being asked for: first of those who give nothing
        others = [host for host, share in self._shares.items() if share]
        return self._shares[max(others, key=lambda h: (self._resting(h, now_s), len(self._shares[h])))].pop() if others else None

    def _resting(self, source: str, now_s: float) -> bool:
        return self._rest.get(source, (now_s, 0.0))[0] > now_s

    def arrived(self, source: str, number: int, now_s: float) -> bool:
        """A block came. Whether it is one that was missing; what comes late, from whoever it was, is taken as well."""
        self._heard[source] = now_s
        self._rest.pop(source, None)
        asked = self._asked.pop(number, None)
        if asked is not None:
            self._flying[asked] -= 1
        block = self._left.pop(number, None)
        if block is not None and asked is None:
            self._shares[self._owner(number)].remove(block)
        return block is not None

    def refused(self, source: str, number: int, now_s: float) -> None:
        """A source has not got that block: it rests, and everything that it owes is asked of others."""
        self._heard[source] = now_s
        if self._asked.get(number) == source:
            self._let_rest(source, now_s)

    def broken(self, source: str) -> None:
        """The connection to a source broke and is made anew: what it owes is lost and asked for again, of it or of others."""
        self._take_back(source)

    def silent(self, now_s: float) -> list[str]:
        """Sources that owe blocks and have sent none for SILENT_S: they rest now, and are worth a new connection."""
        found = [s for s, count in self._flying.items() if count and now_s - self._heard[s] >= SILENT_S]
        for source in found:
            self._let_rest(source, now_s)
        return found

    def _let_rest(self, source: str, now_s: float) -> None:
        self._take_back(source)
        seconds = min(REST_LIMIT_S, 2 * self._rest[source][1]) if source in self._rest else REST_S
        self._rest[source] = (now_s + seconds, seconds)

    def _take_back(self, source: str) -> None:
        for number in [n for n, asked in self._asked.items() if asked == source]:
            del self._asked[number]
            owner = self._owner(number)
            self._shares[owner if owner in self._shares else self._own].appendleft(self._left[number])
        self._flying[source] = 0
