"""The learner's ear, with hand-driven reward actors, generators and a dispatcher; the test's own thread is the trainer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from learner.batcher import Assembler, Batch, Batcher
from learner.intake import Intake
from learner.line import BatchRule
from learner.settings import LearnerSettings
from protocol.errors import RunEnded
from protocol.journal import Journal, read_journal
from protocol.ledger import Ledger
from protocol.messages import Ack, Credit, Event, GroupOutcome, Hello, Journaled, Metrics, WeightsLoaded, WeightsReady, key_of
from protocol.node import Node
from tests.learner.trajectories import trajectory
from tests.ring import Peer, Ring

LEARNER = "learner-0@1"
WINDOW = 8
"""Small, so that free places are told after two messages."""


class Scene:
    """A learner's intake and its node."""

    def __init__(self, ring: Ring, directory: Path) -> None:
        self.ring, self.directory = ring, directory
        self.node = Node(ring.spec("learner"))
        self.journal, self.ledger = Journal(directory / "journal"), Ledger(directory / "ledger.sqlite")
        batcher = Batcher(LearnerSettings(), BatchRule(iterations=9, groups_per_iteration=1, max_staleness=1), 2)
        self.intake = Intake(self.node, Assembler(2, 1), batcher, self.journal, self.ledger)
        self.intake.start()
        ring.until(lambda: ring.heartbeats(LEARNER), "the learner registers")

    def rewarder(self, identity: str = "rewarder-0@1") -> Peer:
        peer = self.ring.link(identity, "trajectories", LEARNER)
        peer.tell(Hello(role="rewarder", index=0, identity=identity, epoch=1))
        self.ring.until(lambda: peer.of(Credit), "credit")
        return peer

    def journaled(self) -> int:
        return len(list(read_journal(self.directory / "journal", strict=True)))

    def close(self) -> None:
        self.intake.close()
        self.node.close()
        self.journal.close()
        self.ledger.close()


@pytest.fixture
def scene(ring: Ring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    monkeypatch.setattr("learner.intake.CREDIT_WINDOW", WINDOW)
    scene = Scene(ring, tmp_path)
    yield scene
    scene.close()


def acknowledged(peer: Peer) -> list[tuple[int, ...]]:
    return [tuple(key) for ack in peer.of(Ack) for key in ack.keys.tolist()]


def test_what_is_acknowledged_stands_in_the_journal(scene: Scene) -> None:
    rewarder = scene.rewarder()
    assert rewarder.of(Credit)[0].total == WINDOW
    first, copy = trajectory(0, 0, 1.0), trajectory(0, 0, 0.0, attempt=1)
    rewarder.tell(first)
    scene.ring.until(lambda: acknowledged(rewarder), "the acknowledgement")
    assert scene.journaled() == 1
    rewarder.tell(copy)
    scene.ring.until(lambda: acknowledged(rewarder) == [key_of(first), key_of(copy)], "a copy is acknowledged, so that it is forgotten")
    assert scene.journaled() == 1, "but not journaled"
    scene.ring.until(lambda: rewarder.of(Credit)[-1].total == WINDOW + 2, "both places are free again")


def test_the_trainer_waits_for_its_batch_and_no_longer(scene: Scene) -> None:
    got: list[Batch] = []
    recorder = scene.node.recorder
    trainer = threading.Thread(target=lambda: got.append(scene.intake.wait_batch(0, recorder)), daemon=True)
    trainer.start()
    rewarder = scene.rewarder()
    rewarder.tell(trajectory(0, 0, 1.0))
    scene.ring.until(lambda: "group 0 lacks 1 samples" in recorder.activity.detail, "the wait says what is missing")
    assert (recorder.activity.name, recorder.activity.peer) == ("waiting:trajectories", "rewarder")
    for index in range(2):
        rewarder.tell(trajectory(1, index, float(index), iteration=1))
    scene.ring.until(lambda: scene.intake.facts()["complete"] == [1], "a group behind it is complete, which `rlsys why` has to know")
    assert (scene.intake.facts()["wanted"], scene.intake.facts()["missing"]) == (0, [(0, 1)])
    rewarder.tell(trajectory(0, 1, 0.0))
    scene.ring.until(lambda: got, "the batch")
    assert [(s.group_id, s.index) for s in got[0].samples] == [(0, 0), (0, 1)]
    trainer.join(5.0)


def test_terminal_states_reach_ledger_and_dispatcher_also_one_that_comes_later(scene: Scene) -> None:
    rewarder = scene.rewarder()
    early = scene.ring.serve("dispatcher-0@1", "outcomes")
    scene.ring.until(lambda: early.of(Hello), "the dispatcher is greeted")
    rewarder.tell(trajectory(1 << 40, 0, None, purpose="eval"))
    scene.ring.until(lambda: early.of(GroupOutcome), "an evaluation group ends without the trainer")
    assert [key for told in early.of(Journaled) for key in told.keys.tolist()] == [[1 << 40, 0, 0]]
    [outcome] = early.of(GroupOutcome)
    assert (outcome.state, outcome.reason, outcome.mean_score) == ("failed", "no sample has a score", None)
    for index in range(2):
        rewarder.tell(trajectory(0, index, float(index)))
    scene.intake.end_groups(scene.intake.wait_batch(0, scene.node.recorder).outcomes)
    scene.ring.until(lambda: len(early.of(GroupOutcome)) == 2, "the group of the batch ends")
    assert scene.ledger.counts() == {"failed": 1}, "what an update depends on is written with the commit"
    late = scene.ring.serve("dispatcher-0@2", "outcomes")
    scene.ring.until(lambda: late.of(GroupOutcome), "the dispatcher that comes later hears what is not in the ledger yet")
    assert [o.group_id for o in late.of(GroupOutcome)] == [0]
    assert [key[:2] for key in late.of(Hello)[0].holds.tolist()] == [[0, 0], [0, 1]], "and which samples nobody needs to draw again"
    outcomes, _ = scene.intake.to_commit()
    scene.ledger.ended(outcomes)
    scene.intake.committed(outcomes)
    last = scene.ring.serve("dispatcher-0@3", "outcomes")
    scene.ring.until(lambda: last.of(Hello), "the last dispatcher is greeted")
    assert last.of(Hello)[0].holds.tolist() == []


def test_versions_are_announced_at_once_and_on_hello(scene: Scene) -> None:
    first, late = (scene.ring.link(f"generator-{i}@1", "weights", LEARNER) for i in range(2))
    first.tell(Hello(role="generator", index=0, identity="generator-0@1", epoch=1))
    ready = WeightsReady(number=4, incarnation=0, directory="/d", manifest_sha256="0" * 64, num_bytes=1, published_s=0.0)
    scene.intake.announce(ready)
    scene.ring.until(lambda: first.of(WeightsReady) == [ready] or len(first.of(WeightsReady)) > 1, "the announcement")
    late.tell(Hello(role="generator", index=1, identity="generator-1@1", epoch=1))
    scene.ring.until(lambda: late.of(WeightsReady) == [ready], "the newest version on Hello")
    refusal = WeightsLoaded(
        generator="generator-0@1", number=4, incarnation=0, load_s=0.0, pause_s=0.0, error="differs", canary_error=float("nan")
    )
    first.tell(refusal)
    scene.ring.until(lambda: [e for e in scene.ring.control.of(Event) if e.name == "weights refused"], "a refusal is told")
    [event] = [e for e in scene.ring.control.of(Event) if e.name == "weights refused"]
    assert event.data == {"generator": "generator-0@1", "version": 4, "error": "differs"}


def test_the_numbers_of_iterations_before_the_first_dashboard_reach_it(scene: Scene) -> None:
    """One that is slow to start must not miss the beginning of a run."""
    rewarder = scene.rewarder()
    scene.intake.report(0, {"reward/mean": 0.5})
    rewarder.tell(trajectory(0, 0, 1.0))
    scene.ring.until(lambda: acknowledged(rewarder), "a turn of the intake")
    dashboard = scene.ring.serve("dashboard-0@1", "observe")
    scene.intake.report(1, {"reward/mean": 0.75})

    def told() -> list[tuple[int, float]]:
        return [(m.iteration, m.values["reward/mean"]) for m in dashboard.of(Metrics) if m.iteration >= 0]

    scene.ring.until(lambda: len(told()) == 2, "the numbers of both iterations")
    assert told() == [(0, 0.5), (1, 0.75)]


def test_a_stop_ends_the_trainers_wait(scene: Scene) -> None:
    scene.ring.stop(LEARNER)
    with pytest.raises(RunEnded, match="the test is over"):
        scene.intake.wait_batch(0, scene.node.recorder)
    with pytest.raises(RunEnded):
        scene.intake.wait_end(scene.node.recorder)


def test_a_fault_of_the_thread_ends_the_trainers_wait(scene: Scene) -> None:
    """A journal that cannot be written: nothing is acknowledged, and the trainer hears of it."""
    rewarder = scene.rewarder()
    scene.journal.close()
    rewarder.tell(trajectory(0, 0, 1.0))
    with pytest.raises(OSError, match="Bad file descriptor"):
        scene.intake.wait_batch(0, scene.node.recorder)
    assert acknowledged(rewarder) == []


def test_an_intake_that_never_started_can_be_closed(ring: Ring, tmp_path: Path) -> None:
    scene = Scene.__new__(Scene)
    scene.node, scene.journal, scene.ledger = Node(ring.spec("learner")), Journal(tmp_path / "j"), Ledger(tmp_path / "l.sqlite")
    batcher = Batcher(LearnerSettings(), BatchRule(iterations=9, groups_per_iteration=1, max_staleness=1), 2)
    scene.intake = Intake(scene.node, Assembler(2, 1), batcher, scene.journal, scene.ledger)
    scene.close()
