"""The reward actor's real loop between a hand-driven generator and learner."""

from __future__ import annotations

import logging
import signal
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from actors.rewarder import QUEUED_PER_THREAD, Rewarder
from actors.rewards import Sample, Score
from actors.rewards.answers import sound
from actors.text import Text
from protocol.errors import ConfigError, DataError, InfrastructureFault, UserError
from protocol.messages import Ack, Completion, Credit, Finished, Hello, Message, Register, Trajectory, key_of, pack_spans
from protocol.node import Node
from rlsys.config import dump_config, parse_config
from rlsys.launchers.local import Child
from tests.configuration import minimal
from tests.directories import WORDS, tokenizer_directory
from tests.ring import Peer, Ring, Running


class WordReward:
    """w1 is right; w5 meets a fault of the machinery once, w6 each time; w7 waits until the test lets it go; w9 finds a
    problem that cannot be judged; the rest is wrong."""

    def __init__(self) -> None:
        self.seen: list[Sample] = []
        self.tries: Counter[str] = Counter()
        self.gate = threading.Event()

    def score(self, sample: Sample) -> Score:
        self.seen.append(sample)
        word = sample.completion.split()[0]
        self.tries[word] += 1
        if word == "w6" or (word == "w5" and self.tries[word] == 1):
            raise InfrastructureFault(f"the cell of {word} broke")
        if word == "w9":
            raise DataError("problem 'p0', field 'tests': no tests")
        if word == "w7":
            assert self.gate.wait(600.0)
        if word == "w8":
            return Score(value=float("nan"), status="accepted")
        right = word == "w1"
        return Score(value=float(right), status="accepted" if right else "wrong_answer", passed=right, detail="d" * 900)

    def close(self) -> None:
        """Nothing to end."""


def completion(word: str, group: int = 7, index: int = 0, attempt: int = 0) -> Completion:
    tokens = np.array([WORDS.index(word), WORDS.index("<eos>")], np.int32)
    return Completion(
        group_id=group, index=index, attempt=attempt, iteration=1, purpose="train", problem_id="p0", generator="generator-0@1",
        prompt_ids=np.array([4, 5], np.int32), token_ids=tokens, behaviour_logprobs=np.array([-0.5, -1.5], np.float32),
        spans=pack_spans([]) if not len(tokens) else np.array([[0, 0, 1], [1, 0, 2]], np.int32), finish_reason="stop",
        temperature=0.7, max_tokens=9, stage=2, started_s=1.0, finished_s=2.0, payload=msgpack.packb({"id": "p0", "answer": 3}),
    )  # fmt: skip


def hello(identity: str) -> Hello:
    role, _, index = identity.partition("@")[0].rpartition("-")
    return Hello(role=role, index=int(index), identity=identity, epoch=1)


class Scene:
    """A reward actor with one generator and, once `learner` is called, a learner."""

    def __init__(self, ring: Ring, tmp_path: Path, *, concurrency: int = 1, retries: int = 2, max_not_finite: int = 20) -> None:
        self.ring, self.reward = ring, WordReward()
        self.nodes: list[Node] = []
        text = Text(tokenizer_directory(tmp_path / "model"))
        self.role: Running = ring.run(
            "rewarder",
            lambda node: (
                self.nodes.append(node)
                or Rewarder(
                    node, self.reward, text, reward_name="words", concurrency=concurrency, retries=retries, max_not_finite=max_not_finite
                ).run()
            ),
        )
        self.generator = self.join("generator-0@1")

    def join(self, identity: str) -> Peer:
        peer = self.ring.link(identity, "completions", self.role.identity)
        peer.tell(hello(identity))
        self.ring.until(lambda: peer.of(Credit), "credit for a generator")
        return peer

    def learner(self, credit: int, identity: str = "learner-0@1") -> Peer:
        learner = self.ring.serve(identity, "trajectories")
        self.ring.until(lambda: learner.of(Hello), "the reward actor greets the learner")
        self.tell(learner, Credit(total=credit))
        return learner

    def tell(self, learner: Peer, message: Message) -> None:
        learner.tell(message, to=self.role.identity)

    def gauges(self) -> Mapping[str, float]:
        return self.nodes[0].gauges()

    def beats(self) -> int:
        return self.ring.heartbeats(self.role.identity)

    def trajectories(self, learner: Peer, count: int) -> list[Trajectory]:
        self.ring.until(lambda: len(learner.of(Trajectory)) >= count, f"{count} trajectories")
        return learner.of(Trajectory)


def acknowledgement(*trajectories: Trajectory) -> Ack:
    return Ack(keys=np.array([key_of(t) for t in trajectories], np.int64))


def test_a_completion_becomes_a_trajectory(ring: Ring, tmp_path: Path) -> None:
    scene = Scene(ring, tmp_path)
    learner = scene.learner(10)
    sent = completion("w1")
    scene.generator.tell(sent)
    [got] = scene.trajectories(learner, 1)
    assert (got.score, got.passed, got.status, got.parts, got.rewarder) == (1.0, True, "accepted", {"words": 1.0}, "rewarder-0@1")
    names = "group_id index attempt iteration purpose problem_id generator finish_reason started_s stage temperature max_tokens"
    for name in names.split():
        assert getattr(got, name) == getattr(sent, name)
    for name in ("prompt_ids", "token_ids", "behaviour_logprobs", "spans"):
        assert np.array_equal(getattr(got, name), getattr(sent, name))
    assert got.loss_mask.all()
    assert len(got.detail) == 500, "one line for people is kept short"
    [sample] = scene.reward.seen
    assert (sample.completion, sample.truncated, sample.problem) == ("w1", False, {"id": "p0", "answer": 3})


def test_the_generator_hears_only_after_the_learner_has_journaled(ring: Ring, tmp_path: Path) -> None:
    scene = Scene(ring, tmp_path)
    learner = scene.learner(10)
    scene.generator.tell(completion("w1"))
    scene.generator.tell(completion("w2", index=1))
    first, second = scene.trajectories(learner, 2)
    beats = scene.beats()
    ring.never(lambda: scene.generator.of(Ack), "an acknowledgement without the learner's", lambda: scene.beats() > beats + 1)
    scene.tell(learner, acknowledgement(first))
    ring.until(lambda: scene.generator.of(Ack), "the acknowledgement is passed on")
    scene.tell(learner, acknowledgement(second))
    ring.until(lambda: len(scene.generator.of(Ack)) == 2, "the second one")
    assert [ack.keys.tolist() for ack in scene.generator.of(Ack)] == [[list(key_of(first))], [list(key_of(second))]]


def test_credits_bound_what_is_in_flight_on_both_sides(ring: Ring, tmp_path: Path) -> None:
    scene = Scene(ring, tmp_path)
    assert [c.total for c in scene.generator.of(Credit)] == [QUEUED_PER_THREAD]
    learner = scene.learner(credit=2)
    scene.generator.tell(completion("w7"))
    for index in range(1, QUEUED_PER_THREAD):
        scene.generator.tell(completion("w2", index=index))
    ring.until(lambda: scene.reward.tries["w7"], "the first sample is being scored")
    beats = scene.beats()
    ring.never(lambda: len(scene.generator.of(Credit)) > 1, "credit for places that are taken", lambda: scene.beats() > beats + 1)
    scene.reward.gate.set()
    ring.until(lambda: scene.generator.of(Credit)[-1].total == 2 * QUEUED_PER_THREAD, "credit for places that are free again")
    ring.never(lambda: len(learner.of(Trajectory)) > 2, "more trajectories than the learner granted", lambda: scene.beats() > beats + 4)
    scene.trajectories(learner, 2)
    scene.tell(learner, Credit(total=4))
    assert len(scene.trajectories(learner, 4)) == 4
    [other] = scene.join("generator-1@1").of(Credit)
    assert other.total == QUEUED_PER_THREAD // 2, "two generators share the window"


def test_the_same_sample_twice_is_scored_once_and_acknowledged_to_its_last_sender(ring: Ring, tmp_path: Path) -> None:
    scene = Scene(ring, tmp_path)
    learner = scene.learner(10)
    scene.generator.tell(completion("w1"))
    [got] = scene.trajectories(learner, 1)
    ring.leave(scene.generator, "generator-0@1")
    again = scene.join("generator-0@2")
    again.tell(completion("w1"))
    again.tell(completion("w2", index=1))
    scene.trajectories(learner, 2)
    assert scene.reward.tries["w1"] == 1
    scene.tell(learner, acknowledgement(got))
    ring.until(lambda: again.of(Ack), "the generator that came back hears it")
    assert [tuple(key) for ack in again.of(Ack) for key in ack.keys.tolist()] == [key_of(got)]
    assert [t.index for t in learner.of(Trajectory)] == [0, 1]
    last = again.of(Credit)[-1].total
    again.tell(completion("w1", index=1))
    ring.until(lambda: again.of(Credit)[-1].total > last, "a copy frees its place at once")


def test_a_fault_of_the_machinery_is_tried_again_and_never_a_score(ring: Ring, tmp_path: Path) -> None:
    scene = Scene(ring, tmp_path, retries=2)
    learner = scene.learner(10)
    scene.generator.tell(completion("w5"))
    scene.generator.tell(completion("w6", index=1))
    once, always = scene.trajectories(learner, 2)
    assert (once.score, once.status) == (0.0, "wrong_answer")
    assert (always.score, always.passed, always.status, always.parts) == (None, False, "failed", {})
    assert always.detail == "the cell of w6 broke"
    assert scene.reward.tries == {"w5": 2, "w6": 3}


def test_a_problem_that_cannot_be_judged_is_a_missing_score_and_the_run_goes_on(ring: Ring, tmp_path: Path) -> None:
    scene = Scene(ring, tmp_path)
    learner = scene.learner(10)
    scene.generator.tell(completion("w9"))
    scene.generator.tell(completion("w1", index=1))
    bad, right = sorted(scene.trajectories(learner, 2), key=lambda trajectory: trajectory.index)
    assert bad.status == "bad_problem" and bad.score is None and "field 'tests'" in bad.detail
    assert right.status == "accepted" and scene.reward.tries == {"w9": 1, "w1": 1}


def test_a_learner_that_comes_back_is_told_everything_unacknowledged(ring: Ring, tmp_path: Path) -> None:
    scene = Scene(ring, tmp_path)
    learner = scene.learner(1)
    for index in range(3):
        scene.generator.tell(completion("w2", index=index))
    [first] = scene.trajectories(learner, 1)
    scene.tell(learner, Credit(total=2))
    scene.trajectories(learner, 2)
    scene.tell(learner, acknowledgement(first))
    ring.until(lambda: scene.generator.of(Ack), "one is journaled")
    ring.leave(learner, "learner-0@1")
    successor = scene.learner(10, "learner-0@2")
    assert [t.index for t in scene.trajectories(successor, 2)] == [1, 2]
    assert {tuple(key) for key in successor.of(Hello)[0].holds.tolist()} >= {(7, 1, 0), (7, 2, 0)}


def test_several_threads_score_side_by_side(ring: Ring, tmp_path: Path) -> None:
    scene = Scene(ring, tmp_path, concurrency=2)
    learner = scene.learner(10)
    scene.generator.tell(completion("w7"))
    ring.until(lambda: scene.reward.tries["w7"], "one thread is busy")
    scene.generator.tell(completion("w1", index=1))
    assert [t.index for t in scene.trajectories(learner, 1)] == [1], "the other went on"
    scene.reward.gate.set()
    assert [t.index for t in scene.trajectories(learner, 2)] == [1, 0]


def test_a_score_that_is_no_number_is_missing_named_and_counted(ring: Ring, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene(ring, tmp_path)
    learner = scene.learner(10)
    with caplog.at_level(logging.WARNING):
        scene.generator.tell(completion("w8", index=3))
        scene.generator.tell(completion("w1", index=1))
        broken, right = scene.trajectories(learner, 2)
    assert (broken.score, broken.passed, broken.status, broken.parts) == (None, False, "not_finite", {}), "missing, never a 0"
    assert (right.score, right.passed) == (1.0, True)
    assert "sample 7/3: the value of its score is nan: it is left without a score" in caplog.text
    assert scene.gauges()["verdict/not_finite"] == 1.0, "and counted"


def test_a_reward_that_gives_no_number_again_and_again_ends_the_run(ring: Ring, tmp_path: Path) -> None:
    scene = Scene(ring, tmp_path, max_not_finite=3)
    scene.role.expected = UserError
    scene.learner(10)
    for index, word in enumerate(("w8", "w8", "w1", "w8", "w8", "w8")):  # w1 between them: the count begins anew
        scene.generator.tell(completion(word, index=index))
    ring.until(lambda: scene.role.error is not None, "the actor ends")
    with pytest.raises(UserError, match=r"reward 'words' gave no finite score for 3 samples in a row \(the last is sample 7/5: .* is nan"):
        raise scene.role.error or AssertionError


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (0.5, r"reward 'words': score\(\) returned a float, expected a Score"),
        (Score(value="1", status="ok"), "reward 'words': the value of its Score is a str, expected a number"),  # type: ignore[arg-type]
        (Score(value=1.0, status="ok", parts={"a": None}), "the part 'a' of its Score is a NoneType"),  # type: ignore[dict-item]
    ],
)
def test_what_is_no_score_is_named(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sound(given, "words")


def test_a_part_that_is_not_finite_leaves_the_sample_without_a_score() -> None:
    found = sound(Score(value=1.0, status="accepted", passed=True, parts={"a": 1.0, "b": float("inf")}), "words")
    assert (found.value, found.passed, found.status, found.detail) == (None, False, "not_finite", "the part 'b' of its score is inf")


def test_a_bug_of_a_reward_ends_the_process_with_its_traceback(ring: Ring, tmp_path: Path) -> None:
    content = {**minimal(tmp_path), "rewarders": {"reward": "tests.actors.broken_reward:Broken"}}
    (tmp_path / "config.yaml").write_text(dump_config(parse_config(content, "test")))
    child = Child(ring.spec("rewarder"), tmp_path / "rewarder.log", {"PYTHONPATH": str(Path(__file__).parents[2])})
    try:
        ring.until(lambda: any(m.pid == child.pid for m in ring.control.of(Register)), "the process registers")
        generator = ring.link("generator-0@1", "completions", "rewarder-0@1")
        generator.tell(hello("generator-0@1"))
        generator.tell(completion("w1"))
        ring.until(lambda: child.exit_code() is not None, "the process ends")
    finally:
        child.signal_group(signal.SIGKILL)
    assert child.exit_code() == 1
    ring.until(lambda: ring.control.of(Finished), "it says why")
    assert ring.control.of(Finished)[0].error == "KeyError: 'a field that no problem has'"
    log = "\n".join(child.tail())
    assert "Traceback (most recent call last)" in log
    assert "broken_reward.py" in log
