"""Who waits for whom at this moment, and who is to blame, in words. Pure: states in, an explanation out.

A process that waits names what it waits for; which process that is follows from what the others say is with them (`facts` of their
heartbeats, see `_facts` of each role): the learner its incomplete groups, the dispatcher whom it gave them to, generators the groups they
sample and the reward actors they sent samples to, reward actors what they score.

Blamed is only who keeps others waiting and shows no life: stopped by a signal, silent without using the processor, at work without any
progress or processor time, or without weights that were published long ago. Whoever is slow, but samples, scores or computes, is named as
the end of a chain of waits and not blamed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from protocol.intervals import WAITING, is_waiting

GRACE_S = 30.0
"""Beyond the time that an engine gives the start of its server: to end the one before, and to tell."""
FIRST_EVAL_GROUP = 1 << 40
"""Groups from here on are evaluation; as in actors/dispatcher.py."""
IMPORTANCE = ("learner", "dispatcher", "generator", "rewarder", "dashboard")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessState:
    """What is known of one process. Times are seconds up to now."""

    name: str
    doing: str = "starting"
    peer: str = ""
    detail: str = ""
    for_s: float = 0.0
    """How long it has been `doing` that."""
    silent_s: float = 0.0
    """Since its last sign of life; since its start before the first."""
    quiet_s: float = 0.0
    """Since its count of useful things grew."""
    stopped: bool = False
    """The operating system says that a signal or a debugger stopped it."""
    computing: bool = True
    """It, or a child of it, used the processor lately."""
    registered: bool = True
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def role(self) -> str:
        return self.name.rpartition("-")[0]

    @property
    def waits(self) -> bool:
        return is_waiting(self.doing)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """From when on something is strange. Seconds."""

    silent_s: float = 5.0
    """Ten heartbeats did not come."""
    quiet_s: float = 30.0
    """At work, without a result and without using the processor."""
    deaf_s: float = 30.0
    """Silent, although it computes."""
    startup_s: float = 150.0
    """Not registered, although it computes: imports take their time on a busy machine."""


EDGES_SHOWN = 4
"""Of one process's waits for processes of one role, in the text for people: fleets may be hundreds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """One edge of the graph: `waiter` waits for `what`, which is with `on`."""

    waiter: str
    on: str
    what: str
    for_s: float
    state: str
    """What `on` does about it, in words; may be empty."""

    @property
    def sentence(self) -> str:
        return f"{self.waiter} waits {self.for_s:.0f} s for {self.what}" + (
            f"; {self.on} {self.state}" if self.state else f" from {self.on}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Blame:
    """A process that keeps the ring from going on."""

    name: str
    kind: str
    """stopped, silent, deaf, stuck, weights, starting, server"""
    for_s: float
    what: str
    """In words, beginning with its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """The answer to "why does nothing happen"."""

    guilty: tuple[Blame, ...]
    waits: tuple[Wait, ...]
    working: tuple[str, ...]
    """Who does what besides, in words."""
    circle: tuple[str, ...] = ()
    """Names around a circle of waits in which nobody is to blame alone."""

    @property
    def sentence(self) -> str:
        """All of it in one line."""
        parts: list[str] = []
        for blame in self.guilty:
            victims = [w for w in self.waits if w.on == blame.name]
            parts.append(blame.what + "".join(f"; {w.waiter} waits {w.for_s:.0f} s for {w.what}" for w in victims[:3]))
        if not parts and self.circle:
            parts.append(f"a circle of waits, in which a message must have been lost: {' for '.join((*self.circle, self.circle[0]))}")
        if not parts:
            parts = [wait.sentence for wait in self.waits[:3]] or list(self.working[:3])
        return ". ".join(parts) or "nothing is known of any process yet"

    def lines(self) -> list[str]:
        """For people: the blamed, then every edge, then the rest."""
        guilty = [f"to blame     {b.what}" for b in self.guilty] or ["to blame     nobody"]
        circle = [f"circle       {' waits for '.join((*self.circle, self.circle[0]))}"] if self.circle else []
        return [
            *guilty,
            *circle,
            *(f"waits        {text}" for text in _shortened(self.waits)),
            *(f"works        {text}" for text in self.working),
        ]

    def data(self) -> dict[str, Any]:
        """For machines."""
        return {
            "sentence": self.sentence,
            "guilty": [asdict(b) for b in self.guilty],
            "waits": [{**asdict(w), "sentence": w.sentence} for w in self.waits],
            "working": list(self.working),
            "circle": list(self.circle),
        }


def _shortened(waits: Sequence[Wait]) -> list[str]:
    """Sentences of the edges; of those from one process to many of one role the first few, and how many more there are."""
    shown, edges = list[str](), dict[tuple[str, str], list[Wait]]()
    for wait in waits:
        edges.setdefault((wait.waiter, wait.on.rpartition("-")[0]), []).append(wait)
    for (waiter, role), of_one in edges.items():
        most = len(of_one) if len(of_one) <= EDGES_SHOWN + 1 else EDGES_SHOWN
        shown += [edge.sentence for edge in of_one[:most]]
        if more := len(of_one) - most:
            shown.append(f"{waiter} waits for {more} more {role}s (--json names them)")
    return shown


def explain(states: Iterable[ProcessState], limits: Limits, clock_s: float = 0.0) -> Explanation:
    """Put together what every process said. `clock_s` is now on the supervisor's clock, for the instants in `facts`."""
    known = sorted(states, key=lambda s: (IMPORTANCE.index(s.role) if s.role in IMPORTANCE else len(IMPORTANCE), s.name))
    ring = [state for state in known if state.role != "dashboard"]
    guilty = [blame for state in known if (blame := _blame(state, ring, limits, clock_s)) is not None]
    waits = [wait for state in ring if state.waits for wait in _waits(state, ring)]
    blamed = {blame.name for blame in guilty}
    working = [_work(state) for state in ring if not state.waits and state.name not in blamed]
    circle: tuple[str, ...] = ()
    if not guilty and not working and all(s.quiet_s > limits.quiet_s for s in ring):
        circle = _circle(waits)
    return Explanation(guilty=tuple(guilty), waits=tuple(waits), working=tuple(working), circle=circle)


def nothing_moves(states: Sequence[ProcessState], for_s: float) -> bool:
    """Whether every process of the ring has been without a result for so long, none that can be heard computes for the learner, and no
    generator starts its engine's server within the time that it has for that."""
    ring = [state for state in states if state.role != "dashboard"]
    trains = any(s.role == "learner" and not s.waits and not s.stopped and s.computing for s in ring)
    starts = any(starts_server(s.facts, s.silent_s) and not s.stopped for s in ring)
    return bool(ring) and not trains and not starts and all(s.registered and s.quiet_s >= for_s for s in ring)


def starts_server(facts: Mapping[str, Any], silent_s: float = 0.0) -> bool:
    """Whether a generator that said `facts` so long ago starts its engine's server, and is not over the time that the engine gives it.

    Imports wait for a disk, and weights for a device, without using the processor; so the engine's own deadline is what counts.
    """
    server = _parse_server(facts)
    return server is not None and server.starts and server.for_s + silent_s <= server.limit_s + GRACE_S


# ---------------------------------------------------------------------------------------------------- who is to blame


def _blame(state: ProcessState, ring: Sequence[ProcessState], limits: Limits, clock_s: float) -> Blame | None:
    def blame(kind: str, for_s: float, text: str) -> Blame:
        return Blame(name=state.name, kind=kind, for_s=for_s, what=f"{state.name} {text}")

    at = f"at {state.doing!r}" + (f" ({state.detail})" if state.detail else "")
    if state.stopped:
        return blame("stopped", state.silent_s, f"is stopped by a signal or a debugger, {state.silent_s:.0f} s after its last word, {at}")
    if not state.registered:
        slow = state.silent_s > limits.startup_s or (state.silent_s > limits.quiet_s and not state.computing)
        how = "" if state.computing else " and uses no processor"
        return blame("starting", state.silent_s, f"has not finished starting for {state.silent_s:.0f} s{how}") if slow else None
    if state.silent_s > limits.silent_s and not state.computing:
        return blame("silent", state.silent_s, f"has been silent for {state.silent_s:.0f} s and uses no processor; it was last {at}")
    if state.silent_s > limits.deaf_s:
        return blame("deaf", state.silent_s, f"computes, but has not answered for {state.silent_s:.0f} s; it was last {at}")
    if (server := _server(state)) is not None:
        starts, for_s, text = server
        kind, patience_s = ("starting", limits.quiet_s) if starts else ("server", limits.silent_s)
        return blame(kind, for_s, text) if for_s > patience_s else None
    if not state.waits and state.role != "dashboard" and state.quiet_s > limits.quiet_s and not state.computing:
        return blame("stuck", state.quiet_s, f"has been {at} for {state.for_s:.0f} s without any result or processor time")
    if (groups := _facts(state, "running")) and state.doing == "waiting:tasks" and min(state.for_s, state.quiet_s) > limits.quiet_s:
        text = f"samples nothing for {state.for_s:.0f} s, though {len(groups)} groups are with it, the first is {groups[0][0]}: its engine lost them"
        return blame("stuck", state.for_s, text)
    return _without_weights(state, ring, limits, clock_s)


def _without_weights(state: ProcessState, ring: Sequence[ProcessState], limits: Limits, clock_s: float) -> Blame | None:
    learner = next((s for s in ring if s.name == "learner-0"), None)
    if state.role != "generator" or learner is None or state.doing == "swap weights" or "version" not in state.facts:
        return None
    newest, loaded = learner.facts.get("version", -1), state.facts["version"]
    age = clock_s - learner.facts.get("published_s", clock_s)
    if newest <= loaded or age <= limits.silent_s:
        return None
    told = state.facts.get("announced", newest) >= newest
    how = "was told of it and has not loaded it" if told else "has not heard of it"
    fetching = state.facts.get("fetching", "")
    if fetching and state.quiet_s <= limits.silent_s:
        return None  # it comes over the network, and pieces still arrive
    how = f"fetches it: {fetching}" if fetching else how
    has = f"has v{loaded}" if loaded >= 0 else "has no weights"
    return Blame(
        name=state.name,
        kind="weights",
        for_s=age,
        what=f"{state.name} {has}: learner-0 published v{newest} {age:.0f} s ago, {state.name} {how}",
    )


def _circle(waits: Sequence[Wait]) -> tuple[str, ...]:
    """The first circle that following waits leads into; empty if every chain ends."""
    following: dict[str, str] = {}
    for wait in waits:
        following.setdefault(wait.waiter, wait.on)
    for start in following:
        path: list[str] = []
        at = start
        while at in following and at not in path:
            path.append(at)
            at = following[at]
        if at in path:
            return tuple(path[path.index(at) :])
    return ()


# ---------------------------------------------------------------------------------------------------- who waits for whom


def _waits(state: ProcessState, ring: Sequence[ProcessState]) -> list[Wait]:
    what = state.doing.removeprefix(WAITING)
    if what == "trajectories":
        found = _missing_samples(state, ring)
        if found:
            return found
    peers = [other for other in ring if other.role == state.peer and other.name != state.name]
    if what in ("batch", "rank 0") or (state.role != "learner" and state.peer == "learner"):
        peers = [other for other in peers if other.name == "learner-0"]
    elif what == "ranks":
        peers = [other for other in peers if not other.waits or other.silent_s > state.for_s] or peers
    elif what == "credits":
        needs = state.facts.get("needs", -1)
        lacking = [other for other in peers if other.facts.get("version", -1) < needs]
        return [
            Wait(
                waiter=state.name,
                on=other.name,
                what=f"a free place with v{needs}",
                for_s=state.for_s,
                state=f"has v{other.facts.get('version', -1)}" if other in lacking else _does(other),
            )
            for other in lacking or peers
        ]
    detail = f" ({state.detail})" if state.detail else ""
    if state.peer and state.peer not in IMPORTANCE:  # no process of the run: a service elsewhere
        return [Wait(waiter=state.name, on=f"the {state.peer}", what=what + detail, for_s=state.for_s, state="")]
    return [Wait(waiter=state.name, on=o.name, what=what + detail, for_s=state.for_s, state=_does(o)) for o in peers]


def _missing_samples(state: ProcessState, ring: Sequence[ProcessState]) -> list[Wait]:
    """The learner's incomplete groups, each with the processes that have its samples; those of one process are one edge."""
    dispatcher = next((other for other in ring if other.role == "dispatcher"), None)
    wanted, complete = state.facts.get("wanted", -1), set(state.facts.get("complete", ()))
    lacking = {g: n for g, n in state.facts.get("missing", ()) if g < FIRST_EVAL_GROUP}
    given = {g: who.partition("@")[0] for g, iteration, who in _facts(dispatcher, "outstanding") if iteration == wanted}
    groups = [g for g in given if g not in complete and g < FIRST_EVAL_GROUP]
    places: dict[str, list[tuple[int, int | None, str]]] = {}
    where = _whereabouts(ring)
    for group in groups:
        for name, count, text in where.get(group) or [(given[group], None, "was given it")]:
            places.setdefault(name, []).append((group, lacking.get(group) if count is None else count, text))
    waits = []
    for name, parts in places.items():
        group, count, text = parts[0]
        some = f"{count} samples" if count != 1 else "1 sample"
        what = f"{some if count is not None else 'samples'} of group {group}"
        if len(parts) > 1:
            what = f"samples of {len(parts)} groups, the first is group {group}"
        waits.append(Wait(waiter=state.name, on=name, what=what, for_s=state.for_s, state=text))
    if not waits and dispatcher is not None and wanted >= 0:
        waits.append(
            Wait(
                waiter=state.name,
                on=dispatcher.name,
                what=f"groups of iteration {wanted} that are not issued",
                for_s=state.for_s,
                state=_does(dispatcher),
            )
        )
    return waits


def _whereabouts(ring: Sequence[ProcessState]) -> dict[int, list[tuple[str, int | None, str]]]:
    """Group -> (process, samples, what it does with them) for each place that has samples of it. One pass: fleets may be hundreds."""
    names = {state.name for state in ring}
    held = {(state.name, group): scoring for state in ring for group, scoring, *_ in _facts(state, "held")}
    places: dict[int, list[tuple[str, int | None, str]]] = {}
    for other in ring:
        server = _server(other)
        for group, left, tokens, most, *_ in _facts(other, "running"):
            so_far = f"{tokens:,} of at most {most:,} tokens" if tokens else f"at most {most:,} tokens"
            it = "it" if left == 1 else "them"
            does = f"has {it} to sample, and {server[2]}" if server else f"samples {it} ({so_far})"
            places.setdefault(group, []).append((other.name, left, does))
        for group, peer, count in _facts(other, "sent"):
            receiver = peer.partition("@")[0]
            scoring = held.get((receiver, group))
            if receiver not in names:
                place = (other.name, count, "has them and no reward actor takes them")
            elif scoring is None:
                place = (receiver, count, f"was sent them by {other.name}")
            else:
                text = "scores them" if scoring else "has scored them and waits for the learner's acknowledgement"
                place = (receiver, scoring or count, text)
            places.setdefault(group, []).append(place)
    return places


def _facts(state: ProcessState | None, name: str) -> list[Any]:
    return list(state.facts.get(name, ())) if state is not None else []


def _server(state: ProcessState) -> tuple[bool, float, str] | None:
    """Whether the server of a generator's engine starts, for how long it has done that or shown no life, and all of it in words without
    the generator's name. None if it samples, or if there is none."""
    server = _parse_server(state.facts)
    if server is None:
        return None
    for_s = server.for_s + state.silent_s
    if server.starts:
        most = f" of at most {server.limit_s:.0f} s" if server.limit_s else ""
        why = f", because of the one before: {server.detail}" if server.detail else ""
        return True, for_s, f"has been {server.verb} its {server.name} for {for_s:.0f} s{most}{why}"
    acts = f"; after {server.limit_s:.0f} s it counts as hung" if server.limit_s else ""
    detail = f" ({server.detail})" if server.detail else ""
    return False, for_s, f"has had no answer from its {server.name} for {for_s:.0f} s{detail}{acts}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Server:
    """What a generator says of its engine's server."""

    name: str
    verb: str
    """What the generator does about a server that is not there yet; empty if it is."""
    for_s: float
    detail: str
    limit_s: float

    @property
    def starts(self) -> bool:
        return bool(self.verb)


def _parse_server(facts: Mapping[str, Any]) -> _Server | None:
    found = facts.get("server")
    if not found:
        return None
    name, doing, for_s, detail, limit_s = found
    verb = {"starts": "starting", "is awaited": "waiting for"}.get(doing, "")
    return _Server(name=name, verb=verb, for_s=for_s, detail=detail, limit_s=limit_s)


def servers(states: Iterable[ProcessState]) -> list[str]:
    """What is up with engines' servers that do not sample, in words."""
    return [f"{state.name} {server[2]}" for state in states if (server := _server(state)) is not None]


def _does(state: ProcessState) -> str:
    if state.stopped:
        return "is stopped"
    if (server := _server(state)) is not None:
        return server[2]
    if state.waits:
        return f"waits for {state.doing.removeprefix(WAITING)}" + (f" from {state.peer}" if state.peer else "")
    return f"is at {state.doing!r}"


def _work(state: ProcessState) -> str:
    if (server := _server(state)) is not None:
        return f"{state.name} {server[2]}"
    detail = f" ({state.detail})" if state.detail else ""
    return f"{state.name} has been at {state.doing!r} for {state.for_s:.0f} s{detail}"
