"""Who holds which sample: what is issued again after deaths, in every order of events that hypothesis can think of."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from actors.custody import PENDING, Custody
from learner.batcher import Assembler
from protocol.messages import Trajectory
from tests.learner.trajectories import trajectory


def issued(generator: str = "generator-0@1") -> Custody:
    custody = Custody()
    custody.issued(7, 0, range(3), generator)
    return custody


def test_what_nobody_has_is_issued_again_and_nothing_else() -> None:
    custody = issued()
    custody.journaled([(7, 0, 0)])
    assert not custody.due
    custody.died("generator-0@1")
    assert custody.due
    assert custody.suspects == {(7, 1), (7, 2)}
    number = custody.ask(["rewarder-0@1", "rewarder-1@1"])
    custody.answer("rewarder-0@1", number, [(7, 2, 0)])
    assert custody.settle() is None, "one has not answered"
    assert custody.asking == {"rewarder-1@1"}
    custody.answer("rewarder-1@1", number, [])
    assert custody.settle() == {7: [1]}
    assert custody.attempt(7) == 1
    assert not custody.due
    custody.issued(7, 1, [1], "generator-1@1")
    custody.died("rewarder-0@1")
    custody.ask([])
    assert custody.settle() == {7: [2]}, "its only copy died with the reward actor"
    assert custody.attempt(7) == 2


def test_slowness_is_no_death() -> None:
    custody = issued()
    custody.died("generator-9@1")
    assert not custody.due
    assert custody.suspects == set()


def test_a_death_during_an_inventory_makes_it_void() -> None:
    custody = issued()
    custody.died("generator-0@1")
    old = custody.ask(["rewarder-0@1", "rewarder-1@1"])
    custody.answer("rewarder-0@1", old, [(7, 0, 0), (7, 1, 0), (7, 2, 0)])
    custody.died("rewarder-0@1")
    custody.answer("rewarder-1@1", old, [])
    assert custody.settle() is None
    assert custody.due
    number = custody.ask(["rewarder-1@1"])
    custody.answer("rewarder-1@1", old, [(7, 0, 0)])
    assert custody.settle() is None, "that was the answer to another question"
    custody.answer("rewarder-1@1", number, [])
    assert custody.settle() == {7: [0, 1, 2]}


def test_a_restarted_dispatcher_learns_who_holds_what() -> None:
    custody = issued("")
    custody.doubt()
    custody.journaled([(7, 0, 0)])
    custody.claimed("generator-1@1", [(7, 1, 0)])
    number = custody.ask(["generator-1@1"])
    custody.answer("generator-1@1", number, [(7, 1, 0)])
    assert custody.settle() == {7: [2]}
    assert (7, 2) not in custody.suspects, f"it is {PENDING} until it is given out"


def test_what_a_broken_connection_lost_is_asked_for_and_issued_again() -> None:
    custody = issued()
    custody.journaled([(7, 0, 0)])
    custody.claimed("generator-0@1", [(7, 1, 0)])
    assert custody.due and custody.suspects == {(7, 2)}
    number = custody.ask(["generator-0@1"])
    custody.answer("generator-0@1", number, [(7, 1, 0)])
    assert custody.settle() == {7: [2]}
    custody.claimed("generator-0@1", [(7, 1, 0)])
    assert not custody.due, "a Hello that changes nothing asks nothing"


def test_what_was_journaled_before_its_group_was_known_counts() -> None:
    custody = Custody()
    custody.journaled([(7, 1, 0)])
    custody.issued(7, 0, range(2), "generator-0@1")
    custody.died("generator-0@1")
    assert custody.suspects == {(7, 0)}
    custody.ended(7)
    assert custody.suspects == set()


SIZE = 3


class Ring(RuleBasedStateMachine):
    """Generators, reward actors, a learner and a dispatcher, all of whom may die, with the real bookkeeping of dispatcher and learner.

    Messages are moved one at a time by the rules, so that every interleaving of sends, acknowledgements, deaths and questions can happen.
    """

    @initialize()
    def begin(self) -> None:
        self.starts: dict[str, int] = {}
        self.generators: dict[str, dict[tuple[int, int, int], str]] = {}
        """Held samples -> the reward actor that was sent it, "" if none, "running" before it ended."""
        self.rewarders: dict[str, set[tuple[int, int, int]]] = {}
        self.inboxes: list[tuple[str, tuple[int, int, int]]] = []
        self.journal: list[Trajectory] = []
        self.log: list[tuple[int, int, tuple[int, ...], str]] = []
        self.again: list[tuple[int, int, list[int]]] = []
        self.assembler = Assembler(SIZE, SIZE)
        self.custody = Custody()
        self.news: list[tuple[int, int, int]] = []
        self.number = 0
        self.broken: set[str] = set()
        """Generators whose connection to the dispatcher broke with something on it; they have yet to say Hello again."""
        for name in ("generator-0", "generator-1"):
            self._start(name)
        for name in ("rewarder-0", "rewarder-1"):
            self._start(name)

    def _start(self, name: str) -> str:
        self.starts[name] = self.starts.get(name, 0) + 1
        identity = f"{name}@{self.starts[name]}"
        if name.startswith("generator"):
            self.generators[identity] = {}
        else:
            self.rewarders[identity] = set()
        return identity

    # ---------------------------------------------------------------------------------------------- work

    @rule(pick=st.integers(0, 1), on_the_wire=st.booleans())
    def issue(self, pick: int, on_the_wire: bool = False) -> None:
        """A task reaches its generator, or is on a connection that breaks."""
        generator = sorted(self.generators)[pick]
        if self.again:
            group, attempt, indices = self.again.pop(0)
        else:
            group, attempt, indices = self.number, 0, list(range(SIZE))
            self.number += 1
        self.log.append((group, attempt, tuple(indices), generator))
        self.custody.issued(group, attempt, indices, generator)
        if on_the_wire:
            self.broken.add(generator)
        else:
            self.generators[generator] |= {(group, i, attempt): "running" for i in indices}

    @precondition(lambda self: any(self.generators.values()))
    @rule(data=st.data())
    def send(self, data: Any) -> None:
        """A sample ends, or waits for a reward actor; it goes to one of them."""
        ready = sorted((g, key) for g, held in self.generators.items() for key, at in held.items() if at in ("running", ""))
        if ready:
            generator, key = data.draw(st.sampled_from(ready))
            rewarder = data.draw(st.sampled_from(sorted(self.rewarders)))
            self.generators[generator][key] = rewarder
            self.inboxes.append((rewarder, key))

    @precondition(lambda self: self.inboxes)
    @rule(data=st.data())
    def receive(self, data: Any) -> None:
        rewarder, key = self.inboxes.pop(data.draw(st.integers(0, len(self.inboxes) - 1)))
        if rewarder in self.rewarders:
            self.rewarders[rewarder].add(key)

    @precondition(lambda self: any(self.rewarders.values()))
    @rule(data=st.data(), told=st.booleans(), acknowledged=st.booleans())
    def deliver(self, data: Any, told: bool, acknowledged: bool) -> None:
        """A trajectory reaches the learner; the news of it, and the acknowledgement, may be lost with a learner that dies."""
        rewarder, key = data.draw(st.sampled_from(sorted((r, k) for r, held in self.rewarders.items() for k in held)))
        message = trajectory(key[0], key[1], 1.0, attempt=key[2])
        if not self.assembler.holds(message):
            self.journal.append(message)
            if told:
                self.custody.journaled([key])
        self.assembler.add(message)
        if acknowledged:
            self._acknowledge(rewarder, key)

    def _acknowledge(self, rewarder: str, key: tuple[int, int, int]) -> None:
        self.rewarders[rewarder].discard(key)
        for held in self.generators.values():
            if held.get(key) == rewarder:
                del held[key]

    # ---------------------------------------------------------------------------------------------- connections that break

    @rule(pick=st.integers(0, 1))
    def hello_again(self, pick: int) -> None:
        """A generator's connection to the dispatcher was made anew."""
        generator = sorted(self.generators)[pick]
        self.broken.discard(generator)
        self.custody.claimed(generator, self.generators[generator])

    @precondition(lambda self: self.inboxes)
    @rule(data=st.data())
    def lose_a_completion(self, data: Any) -> None:
        """It was on the connection to a reward actor when that broke: its generator sends what is unacknowledged again, to anybody."""
        lost = data.draw(st.sampled_from(sorted(self.inboxes)))
        self.inboxes.remove(lost)
        for held in self.generators.values():
            if held.get(lost[1]) == lost[0]:
                held[lost[1]] = ""

    # ---------------------------------------------------------------------------------------------- deaths

    @rule(pick=st.integers(0, 1))
    def kill_generator(self, pick: int) -> None:
        dead = sorted(self.generators)[pick]
        del self.generators[dead]
        self.custody.died(dead)
        self._start(dead.partition("@")[0])

    @rule(pick=st.integers(0, 1))
    def kill_rewarder(self, pick: int) -> None:
        dead = sorted(self.rewarders)[pick]
        del self.rewarders[dead]
        for held in self.generators.values():
            held.update({key: "" for key, at in held.items() if at == dead})
        self.inboxes = [(to, key) for to, key in self.inboxes if to != dead]
        self.custody.died(dead)
        self._start(dead.partition("@")[0])

    @rule()
    def kill_learner(self) -> None:
        self.assembler = Assembler(SIZE, SIZE)
        for known in self.journal:
            self.assembler.add(known)
        self.custody.journaled([(t.group_id, t.index, t.attempt) for t in self.journal])

    @rule()
    def kill_dispatcher(self) -> None:
        """The next one knows the issue log; it hears what is journaled and what generators hold before it asks anybody."""
        self.custody, self.again = Custody(), []
        for group, attempt, indices, _ in self.log:
            self.custody.issued(group, attempt, indices, "")
        self.custody.doubt()
        self.custody.journaled([(t.group_id, t.index, t.attempt) for t in self.journal])
        for generator, held in self.generators.items():
            self.custody.claimed(generator, held)

    # ---------------------------------------------------------------------------------------------- taking stock

    @precondition(lambda self: self.custody.due)
    @rule()
    def ask(self) -> None:
        self.custody.ask([*self.generators, *self.rewarders])

    @precondition(lambda self: self.custody.asking)
    @rule(data=st.data())
    def answer(self, data: Any) -> None:
        who = data.draw(st.sampled_from(sorted(self.custody.asking)))
        self._answer(who)

    def _answer(self, who: str) -> None:
        arrived = {key for to, key in self.inboxes if to == who}  # a reward actor reads its socket before it answers
        if who in self.rewarders:
            self.inboxes = [(to, key) for to, key in self.inboxes if to != who]
            self.rewarders[who] |= arrived
        held = self.generators.get(who, self.rewarders.get(who, set()))
        self.custody.answer(who, self.custody.number, list(held))

    @rule()
    def settle(self) -> None:
        lost = self.custody.settle()
        for group, indices in (lost or {}).items():
            living = {key[:2] for held in (*self.generators.values(), *self.rewarders.values()) for key in held}
            assert not living & {(group, i) for i in indices}, "a sample is drawn again although a living process has it"
            self.again.append((group, self.custody.attempt(group), indices))

    @invariant()
    def attempts_are_unique(self) -> None:
        keys = [(group, attempt) for group, attempt, *_ in getattr(self, "log", ())]
        assert len(keys) == len(set(keys))

    def teardown(self) -> None:
        """No more deaths: everything that was issued is on record in the end, once."""
        for generator in self.broken & self.generators.keys():
            self.hello_again(sorted(self.generators).index(generator))
        for _ in range(20):
            if self.custody.due:
                self.custody.ask([*self.generators, *self.rewarders])
            for who in list(self.custody.asking):
                self._answer(who)
            self.settle()
            while self.again:
                self.issue(0)
            for held in self.generators.values():
                for key, at in held.items():
                    if at in ("running", ""):
                        held[key] = min(self.rewarders)
                        self.rewarders[min(self.rewarders)].add(key)
            for to, key in self.inboxes:
                self.rewarders[to].add(key)
            self.inboxes = []
            for rewarder, keys in self.rewarders.items():
                for key in list(keys):
                    message = trajectory(key[0], key[1], 1.0, attempt=key[2])
                    if not self.assembler.holds(message):
                        self.journal.append(message)
                        self.custody.journaled([key])
                    self.assembler.add(message)
                    self._acknowledge(rewarder, key)
        on_record = [(t.group_id, t.index) for t in self.journal]
        assert len(on_record) == len(set(on_record)), "a sample is on record twice"
        assert sorted(on_record) == [(group, index) for group in range(self.number) for index in range(SIZE)], "a sample was lost"


TestRing = Ring.TestCase
TestRing.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
