"""When a commit is due, what a restarted learner finds in ledger and journal, and which checkpoint it trusts."""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch

from learner.commits import CommitPolicy, Committer, Pending
from learner.parallel import SingleProcess
from learner.recovery import BATCH, TRAJECTORY, VOID, newest_good, sort_out
from learner.settings import CheckpointSettings, LearnerSettings
from learner.simulated_step import SimulatedStep
from protocol.codec import encode
from protocol.errors import DataError, DeadlineExceeded, Fenced, UserError
from protocol.journal import Journal, read_records
from protocol.ledger import Ledger, Writer
from protocol.messages import GroupOutcome
from tests.disks import largest_file
from tests.learner.trajectories import trajectory
from tests.protocol.examples import example

RUN = 5


def outcome(group: int, iteration: int, state: str = "trained", *, in_batch: bool = True) -> GroupOutcome:
    message = example("GroupOutcome")
    values = {name: getattr(message, name) for name in message.__dataclass_fields__}
    own = {"group_id": group, "iteration": iteration, "purpose": "train", "state": state, "in_batch": in_batch}
    return GroupOutcome(**{**values, **own})


def test_auto_spaces_commits_so_that_they_cost_two_percent() -> None:
    policy = CommitPolicy("auto")
    assert policy.due(1, 0.0, last=False), "what a commit costs is found out first"
    policy.taken(1, 0.0)
    policy.cost_s = 0.05
    assert [policy.due(2, t, last=False) for t in (0.0, 2.4, 2.5)] == [False, False, True]
    assert policy.due(2, 0.1, last=True), "the end is always committed"


def test_a_fixed_interval_and_none() -> None:
    policy = CommitPolicy(3)
    assert [n for n in range(1, 8) if policy.due(n, 0.0, last=False) and not policy.taken(n, 0.0)] == [3, 6]
    assert not CommitPolicy(0).due(5, 0.0, last=True)


def test_what_stays_for_good_is_committed_in_any_case() -> None:
    policy = CommitPolicy("auto", keep_every=3)
    policy.taken(1, 0.0)
    policy.cost_s = 1e6
    assert [n for n in range(2, 10) if policy.due(n, 1.0, last=False)] == [3, 6, 9]
    assert not CommitPolicy(0, keep_every=3).due(3, 0.0, last=False)


def record(journal: Journal, group: int, iteration: int = 0, members: int = 2) -> None:
    for index in range(members):
        journal.append([TRAJECTORY, *encode(trajectory(group, index, 1.0, iteration=iteration), RUN)])


def batch(journal: Journal, iteration: int, groups: list[int], part: int = 0) -> None:
    journal.append([BATCH, msgpack.packb({"iteration": iteration, "part": part, "groups": groups})])


def test_recorded_batches_come_back_in_order_and_open_samples_with_them(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for group in range(3):
        record(journal, group)
    batch(journal, 0, [0])
    batch(journal, 1, [1, 2])
    record(journal, 3, members=1)
    journal.append([TRAJECTORY, *encode(trajectory(3, 0, 0.0, attempt=1), RUN)])
    found = sort_out(read_records(tmp_path), RUN, {0}, version=1, group_size=2, parts=1)
    assert [(b.iteration, b.groups) for b in found.batches] == [(1, [1, 2])]
    assert [(f.trajectory.group_id, f.trajectory.index, f.trajectory.attempt) for f in found.trajectories] == [
        (1, 0, 0), (1, 1, 0), (2, 0, 0), (2, 1, 0), (3, 0, 0),
    ]  # fmt: skip
    assert found.void_from is None
    journal.close()


def test_a_batch_whose_samples_are_damaged_is_void_with_all_that_follow(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    record(journal, 0, members=1)
    batch(journal, 0, [0])
    record(journal, 1)
    batch(journal, 1, [1])
    found = sort_out(read_records(tmp_path), RUN, set(), version=0, group_size=2, parts=1)
    assert (found.batches, found.void_from) == ([], 0)
    journal.append([VOID, msgpack.packb({"from": 0})])
    journal.append([TRAJECTORY, *encode(trajectory(0, 1, 1.0), RUN)])
    batch(journal, 0, [0])
    found = sort_out(read_records(tmp_path), RUN, set(), version=0, group_size=2, parts=1)
    assert ([b.groups for b in found.batches], found.void_from) == ([[0]], None)
    journal.close()


def test_parts_of_an_iteration(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for group in range(3):
        record(journal, group)
    batch(journal, 0, [0], part=0)
    batch(journal, 0, [2], part=1)
    batch(journal, 1, [1], part=0)
    found = sort_out(read_records(tmp_path), RUN, set(), version=0, group_size=2, parts=2)
    assert [(b.iteration, b.part) for b in found.batches] == [(0, 0), (0, 1), (1, 0)]
    journal.close()


class Scene:
    """A run directory with a simulated step whose state is committed."""

    def __init__(self, directory: Path, start: int = 1, weight_bytes: int = 64, kept: CheckpointSettings | None = None) -> None:
        self.directory = directory
        self.ledger = Ledger(directory / "ledger.sqlite", Writer("learner", 0, start))
        settings = LearnerSettings(step="simulated", step_options={"weight_bytes": weight_bytes, "tokens_per_s": 1e9})
        self.step = SimulatedStep(settings, directory, SingleProcess())
        self.committer = Committer(directory / "checkpoints", CommitPolicy(1), checkpoints=kept or CheckpointSettings(), ledger=self.ledger)

    def commit(self, number: int, groups: list[int]) -> None:
        self.step.live_state()["simulated.weights"][0] = number
        outcomes = tuple(outcome(group, number - 1) for group in groups)
        self.committer.begin(self.step, number, Pending(0, outcomes, (0, 0), 0))
        self.committer.wait()


def test_a_commit_is_a_checkpoint_and_the_states_that_it_stands_for(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    for number in (1, 2, 3):
        scene.commit(number, [number])
    assert [c.number for c in scene.ledger.checkpoints()] == [3, 2], "the newest two stay"
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["00000002", "00000003"]
    assert scene.ledger.ended_groups() == {1, 2, 3}
    found = newest_good(scene.ledger, tmp_path)
    assert found is not None
    assert found.number == 3
    scene.ledger.close()


def test_the_newest_and_every_so_many_stay(tmp_path: Path) -> None:
    scene = Scene(tmp_path, kept=CheckpointSettings(keep_last=1, keep_every=2))
    for number in range(1, 6):
        scene.commit(number, [number])
    assert [c.number for c in scene.ledger.checkpoints()] == [5, 4, 2]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["00000002", "00000004", "00000005"]
    scene.ledger.close()


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_the_last_good_checkpoint_is_used_and_said(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene(tmp_path)
    scene.commit(1, [1])
    scene.commit(2, [2])
    file = next((tmp_path / "checkpoints" / "00000002").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        file.write_bytes(bytes(data))
    elif damage == "cut":
        file.write_bytes(bytes(data[:-3]))
    else:
        file.unlink()
    with caplog.at_level(logging.WARNING):
        found = newest_good(scene.ledger, tmp_path)
    assert found is not None
    assert found.number == 1
    assert "checkpoint v2 is not used" in caplog.text
    assert "going back to the last good checkpoint, v1" in caplog.text
    assert scene.ledger.ended_groups() == {1}, "what the damaged one had committed is open again"
    scene.ledger.close()


def test_recorded_batches_with_groups_that_were_not_trained_are_trained_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Back to v1: the batches of iterations 1 and 2 hold a filtered, a failed and a rejected group, all committed; what ended early stays so."""
    scene = Scene(tmp_path)
    scene.commit(1, [0])
    journal = Journal(tmp_path / "journal")
    for group in range(8):
        record(journal, group, iteration=group // 3)
    for iteration, groups in enumerate(([0], [1, 2, 3], [4, 5])):
        batch(journal, iteration, groups)
    journal.close()
    rest = [
        outcome(group, iteration, state, in_batch=in_batch)
        for group, iteration, state, in_batch in (
            (1, 1, "trained", True), (2, 1, "filtered", True), (3, 1, "failed", True), (4, 2, "rejected", True), (5, 2, "trained", True),
            (6, 1, "filtered", False), (7, 2, "superseded", False),
        )
    ]  # fmt: skip
    scene.committer.begin(scene.step, 3, Pending(0, tuple(rest), (0, 0), 0))
    scene.committer.wait()
    next((tmp_path / "checkpoints" / "00000003").glob("*.safetensors")).unlink()
    found = newest_good(scene.ledger, tmp_path)
    assert found is not None
    assert found.number == 1
    ended = scene.ledger.ended_groups()
    assert ended == {0, 6, 7}, "what had a place in a batch of a rolled back iteration is open again"
    recovered = sort_out(read_records(tmp_path / "journal"), RUN, ended, version=1, group_size=2, parts=1)
    assert [(b.iteration, b.groups) for b in recovered.batches] == [(1, [1, 2, 3]), (2, [4, 5])]
    assert recovered.void_from is None
    scene.ledger.close()


def test_a_full_disk_costs_a_commit_and_no_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene(tmp_path, weight_bytes=4 << 20)
    scene.commit(1, [1])
    with largest_file(1 << 20), caplog.at_level(logging.WARNING):
        scene.commit(2, [2])
    assert "the checkpoint of iteration 2 cannot be written" in caplog.text
    assert "the last good checkpoint is v1" in caplog.text
    assert [c.number for c in scene.ledger.checkpoints()] == [1]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000001"], "nothing half-written is left"
    assert scene.ledger.ended_groups() == {1}
    scene.commit(3, [2, 3])
    found = newest_good(scene.ledger, tmp_path)
    assert found is not None
    assert found.number == 3, "with room again the next commit carries what the failed one could not"
    assert scene.ledger.ended_groups() == {1, 2, 3}
    with largest_file(1 << 20), pytest.raises(UserError, match="cannot be written"):
        for number in range(4, 10):
            scene.commit(number, [number])
    scene.ledger.close()


def test_a_commit_that_never_ends_is_a_named_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene, free = Scene(tmp_path), threading.Event()
    committer = Committer(tmp_path / "checkpoints", CommitPolicy(1), checkpoints=CheckpointSettings(), ledger=scene.ledger, longest_s=0.1)
    commit = scene.ledger.commit

    def stuck(*arguments: Any) -> None:
        free.wait(30)
        commit(*arguments)

    monkeypatch.setattr(scene.ledger, "commit", stuck)
    committer.begin(scene.step, 1, Pending(0, (), (0, 0), 0))
    with pytest.raises(DeadlineExceeded, match=r"checkpoints: the learner waited 0\.1 s for its checkpoint to be written"):
        committer.wait()
    free.set()
    while committer.busy:
        with suppress(DeadlineExceeded):
            committer.wait()
    scene.ledger.close()


def test_no_good_checkpoint_needs_the_whole_journal(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.commit(1, [1])
    for path in (tmp_path / "checkpoints" / "00000001").iterdir():
        path.write_bytes(b"")
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal" / "000003.journal").touch()
    with pytest.raises(DataError, match="the start of the journal has been removed"):
        newest_good(scene.ledger, tmp_path)
    (tmp_path / "journal" / "000000.journal").touch()
    assert newest_good(scene.ledger, tmp_path) is None
    scene.ledger.close()


def test_a_learner_that_wakes_up_beside_its_replacement_commits_and_publishes_nothing(tmp_path: Path) -> None:
    with_fence = Ledger(tmp_path / "ledger.sqlite")
    assert with_fence.next_start("learner", 0, 1) == 1
    old = Scene(tmp_path, start=1)
    old.commit(1, [1])
    assert with_fence.next_start("learner", 0, 1) == 2
    with pytest.raises(Fenced, match=r"learner-0@1 has been replaced by learner-0@2"):
        old.commit(2, [2])
    seen: list[str] = []
    with pytest.raises(Fenced):
        old.ledger.publish(2, 0, "ab", lambda: seen.append("visible"))
    assert seen == []
    assert [c.number for c in with_fence.checkpoints()] == [1]
    assert with_fence.ended_groups() == {1}
    new = Scene(tmp_path, start=2)
    new.commit(2, [2])
    assert torch.equal(new.step.live_state()["simulated.weights"][:1], torch.tensor([2], dtype=torch.uint8))
    for ledger in (with_fence, old.ledger, new.ledger):
        ledger.close()
