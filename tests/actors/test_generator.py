"""The generator actor's real loop, with a real engine, between a hand-driven dispatcher, learner and reward actors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from actors.engines import Engine, EngineOptions
from actors.engines.embedded import EmbeddedEngine
from actors.engines.simulated import SimulatedEngine
from actors.generator import Generator
from protocol.errors import WeightsError
from protocol.messages import Ack, Completion, Credit, GroupTask, Heartbeat, Hello, Metrics, Version, WeightsLoaded, key_of
from protocol.node import Node
from tests.actors import tiny_models
from tests.actors.test_weights import flip_last_byte, published
from tests.ring import Peer, Ring

SLOTS, GROUP_SIZE = 4, 2


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(tiny_models.build(), tmp_path_factory.mktemp("base"))


class Scene:
    """A generator with a dispatcher and a learner."""

    def __init__(self, ring: Ring, base: Path, weights: Path, engine: Callable[[EngineOptions], Engine] = EmbeddedEngine) -> None:
        self.ring, self.base, self.weights, self.engine = ring, base, weights, engine
        self.dispatcher = ring.serve("dispatcher-0@1", "tasks")
        self.learner = ring.serve("learner-0@1", "weights")
        self.role = ring.run("generator", self._body)
        ring.until(lambda: self.dispatcher.of(Hello) and self.learner.of(Hello), "the generator greets")

    def _body(self, node: Node) -> None:
        engine = self.engine(EngineOptions(model_path=self.base, max_context=tiny_models.CONTEXT, slots=SLOTS))
        try:
            Generator(node, engine, GROUP_SIZE).run()
        finally:
            engine.close()

    def publish(self, number: int, *, damaged: bool = False) -> WeightsLoaded:
        """Announce a version and wait for what the generator makes of it."""
        ready = published(self.weights, self.base, number)
        if damaged:
            flip_last_byte(ready)
        self.learner.tell(ready, to=self.role.identity)
        self.ring.until(lambda: any(m.number == number for m in self.learner.of(WeightsLoaded)), f"v{number} is loaded or refused")
        return self.learner.of(WeightsLoaded)[-1]

    def rewarder(self, identity: str, credit: int) -> Peer:
        peer = self.ring.serve(identity, "completions")
        self.ring.until(lambda: peer.of(Hello), f"the generator greets {identity}")
        peer.tell(Credit(total=credit), to=self.role.identity)
        return peer

    def give(self, *groups: int, indices: tuple[int, ...] = (0, 1), min_version: int = 0) -> None:
        for group in groups:
            self.dispatcher.tell(task(group, indices, min_version), to=self.role.identity)

    def completions(self, peer: Peer, count: int) -> list[Completion]:
        self.ring.until(lambda: len(peer.of(Completion)) >= count, f"{count} completions")
        return peer.of(Completion)


def task(group: int, indices: tuple[int, ...] = (0, 1), min_version: int = 0) -> GroupTask:
    return GroupTask(
        group_id=group, iteration=3, attempt=1, purpose="train", min_version=min_version, problem_id=f"p{group}",
        indices=np.array(indices, np.int32), seeds=np.array([100 * group + i for i in indices], np.int64),
        prompt_ids=tiny_models.prompt(5, group), temperature=1.0, top_p=1.0, top_k=0, max_tokens=6,
        stop_token_ids=np.array([2], np.int32), payload=b"the problem", stage=2,
    )  # fmt: skip


@pytest.fixture
def scene(ring: Ring, base: Path, tmp_path: Path) -> Scene:
    return Scene(ring, base, tmp_path)


def test_nothing_is_asked_for_before_the_first_weights_then_as_many_groups_as_fit(scene: Scene) -> None:
    assert scene.dispatcher.of(Hello)[0].loaded[0] == -1
    assert scene.publish(0).error == ""
    scene.ring.until(lambda: any(c.total for c in scene.dispatcher.of(Credit)), "credit")
    before, after = scene.dispatcher.of(Credit)[:-1], scene.dispatcher.of(Credit)[-1]
    assert all(c.total == 0 and c.loaded[0] == -1 for c in before)
    assert (after.total, tuple(after.loaded)) == (SLOTS // GROUP_SIZE, (0, 0))


def test_every_sample_of_a_task_becomes_one_completion(scene: Scene) -> None:
    scene.publish(0)
    rewarder = scene.rewarder("rewarder-0@1", 10)
    scene.give(4, indices=(0, 3))
    scene.give(5)
    got = {(c.group_id, c.index): c for c in scene.completions(rewarder, 4)}
    assert sorted(got) == [(4, 0), (4, 3), (5, 0), (5, 1)], "members are named as the task names them"
    for (group, index), completion in got.items():
        assert (completion.temperature, completion.max_tokens, completion.stage) == (1.0, 6, 2)
        asked = task(group)
        assert not completion.fault()
        assert (completion.attempt, completion.iteration, completion.purpose, completion.problem_id) == (1, 3, "train", f"p{group}")
        assert (completion.generator, completion.payload) == ("generator-0@1", b"the problem")
        assert np.array_equal(completion.prompt_ids, asked.prompt_ids)
        assert 1 <= len(completion.token_ids) <= 6
        assert completion.finish_reason == ("stop" if completion.token_ids[-1] == 2 else "length")
        assert completion.spans.tolist() == [[0, 0, len(completion.token_ids)]]
        assert completion.started_s <= completion.finished_s
        assert index in (0, 1, 3)
    scene.ring.until(lambda: scene.dispatcher.of(Credit)[-1].total == 2 + SLOTS // GROUP_SIZE, "free slots are offered again")


def test_reward_actors_are_sent_no_more_than_they_ask_for(scene: Scene) -> None:
    scene.publish(0)
    rewarder = scene.rewarder("rewarder-0@1", 1)
    scene.give(1, 2)
    scene.completions(rewarder, 1)
    beats = scene.ring.heartbeats(scene.role.identity)
    scene.ring.never(
        lambda: len(rewarder.of(Completion)) > 1, "more than its credit", lambda: scene.ring.heartbeats(scene.role.identity) > beats + 1
    )
    other = scene.rewarder("rewarder-1@1", 2)
    scene.completions(other, 2)
    rewarder.tell(Credit(total=2), to=scene.role.identity)
    scene.completions(rewarder, 2)
    keys = Counter(key_of(c) for peer in (rewarder, other) for c in peer.of(Completion))
    assert keys == Counter({(g, i, 1): 1 for g in (1, 2) for i in (0, 1)})


def test_what_a_dead_reward_actor_never_acknowledged_goes_to_another(scene: Scene) -> None:
    scene.publish(0)
    first = scene.rewarder("rewarder-0@1", 10)
    scene.give(1, 2)
    sent = {key_of(c): c for c in scene.completions(first, 4)}
    done = (1, 0, 1)
    first.tell(Ack(keys=np.array([done], np.int64)), to=scene.role.identity)
    dashboard = scene.ring.serve("dashboard-0@1", "observe")
    scene.ring.until(
        lambda: [m for m in dashboard.of(Metrics) if m.values["generator/unacknowledged"] == 3], "the acknowledgement is taken"
    )
    scene.ring.leave(first, "rewarder-0@1")
    second = scene.rewarder("rewarder-1@1", 10)
    again = {key_of(c): c for c in scene.completions(second, 3)}
    assert again.keys() == sent.keys() - {done}
    for key, completion in again.items():
        assert np.array_equal(completion.token_ids, sent[key].token_ids), "the same text, not a second draw"
        assert np.array_equal(completion.behaviour_logprobs, sent[key].behaviour_logprobs)


def test_damaged_weights_are_refused_and_the_generator_keeps_serving(scene: Scene) -> None:
    scene.publish(0)
    rewarder = scene.rewarder("rewarder-0@1", 100)
    refused = scene.publish(1, damaged=True)
    assert "model.safetensors: differs from its manifest" in refused.error
    scene.give(1)
    assert all(c.spans[:, 0].tolist() == [0] for c in scene.completions(rewarder, 2))
    assert {tuple(c.loaded) for c in scene.dispatcher.of(Credit) if c.total} == {(0, 0)}, "credits tell what is in memory"
    assert scene.publish(2).error == ""
    scene.ring.until(lambda: scene.dispatcher.of(Credit)[-1].loaded[0] == 2, "the dispatcher hears of v2")
    scene.give(2, min_version=2)
    assert all(c.spans[:, 0].tolist() == [2] for c in scene.completions(rewarder, 4)[2:])


def test_weights_that_fail_twice_in_a_row_end_the_actor(scene: Scene) -> None:
    scene.role.expected = WeightsError
    scene.publish(0, damaged=True)
    scene.publish(1, damaged=True)
    scene.ring.until(lambda: scene.role.error is not None, "the actor ends")
    with pytest.raises(WeightsError, match=r"2 loads in a row failed, the last: .* differs from its manifest"):
        raise scene.role.error or AssertionError


def test_a_task_for_a_version_that_is_not_loaded_is_a_bug_and_ends_the_actor(scene: Scene) -> None:
    scene.publish(0)
    scene.role.expected = AssertionError
    scene.give(1, min_version=1)
    scene.ring.until(lambda: scene.role.error is not None, "the actor ends")
    assert "group 1 needs version 1, v0 is loaded" in str(scene.role.error)


class EndsInASwap(SimulatedEngine):
    """Its clock stands still but for a swap, in which everything that runs comes to its end."""

    def __init__(self, options: EngineOptions) -> None:
        self.now = 0.0
        rates = {"tokens_per_s_sample": 1, "tokens_per_s": 100, "lengths": {"mean": 900, "sigma": 0}}
        super().__init__(replace(options, extra=rates), lambda: self.now)

    def load_weights(self, directory: Path, version: Version) -> float:
        self.now += 1000.0
        return super().load_weights(directory, version)


def test_samples_that_end_while_weights_are_loaded_are_sent(ring: Ring, base: Path, tmp_path: Path) -> None:
    scene = Scene(ring, base, tmp_path, EndsInASwap)
    scene.publish(0)
    rewarder = scene.rewarder("rewarder-0@1", 10)
    scene.give(4, 5)
    ring.until(lambda: any(len(beat.facts["running"]) == 2 for beat in ring.control.of(Heartbeat)), "both groups run")
    scene.publish(1)
    assert len(scene.completions(rewarder, 4)) == 4, "though no task comes that would wake the engine"
