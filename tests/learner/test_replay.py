"""What a replay says of a journal that lost something, before it trains anything."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from learner.line import BatchRule
from learner.replay import ReplayJob, recorded_batches, starting_point
from learner.settings import LearnerSettings
from protocol.errors import DataError
from protocol.journal import Journal
from tests.learner.test_commits import RUN, Scene, batch, record


@pytest.fixture
def job(tmp_path: Path) -> ReplayJob:
    """Three recorded iterations of one group of two samples."""
    journal = Journal(tmp_path / "journal")
    for iteration in range(3):
        record(journal, iteration, iteration)
        batch(journal, iteration, [iteration])
    journal.close()
    return ReplayJob(
        run_dir=tmp_path, run_id=RUN, iterations=3, batches=BatchRule(iterations=3, groups_per_iteration=1, max_staleness=1), stages=(), group_size=2,
        model_dir=tmp_path, settings=LearnerSettings(step="simulated", zero_variance="keep"),
    )  # fmt: skip


def damage(job: ReplayJob, byte: int) -> None:
    path = job.run_dir / "journal" / "000000.journal"
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(bytes(data))


def test_batches_come_back_as_they_were_recorded(job: ReplayJob) -> None:
    assert [(b.iteration, [o.group_id for o in b.outcomes]) for b in recorded_batches(job, 0, 0, 3)] == [(0, [0]), (1, [1]), (2, [2])]


def test_a_damaged_sample_is_a_sentence_before_the_first_batch(job: ReplayJob) -> None:
    size = (job.run_dir / "journal" / "000000.journal").stat().st_size
    damage(job, size // 2)
    said = r"samples of group 1, which batch 1 was made of, are not on record \(1 damaged places.*--until 1 replays what is before it"
    with pytest.raises(DataError, match=said):
        recorded_batches(job, 0, 0, 3)
    assert [b.iteration for b in recorded_batches(job, 0, 0, 1)] == [0]
    assert [b.iteration for b in recorded_batches(job, 0, 2, 3)] == [2], "behind the damage"


def test_a_damaged_batch_record(job: ReplayJob) -> None:
    damage(job, -1)
    with pytest.raises(DataError, match=r"iteration 2 is not on record \(1 damaged places.*--until 2"):
        recorded_batches(job, 0, 0, 3)


def test_a_journal_that_is_gone(job: ReplayJob) -> None:
    shutil.rmtree(job.run_dir / "journal")
    with pytest.raises(DataError, match="iteration 0 is not on record: the journal is missing"):
        recorded_batches(job, 0, 0, 3)


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.commit(1, [1])
    scene.commit(2, [2])
    next((tmp_path / "checkpoints" / "00000002").glob("*.safetensors")).write_bytes(b"")
    start = starting_point(tmp_path, scene.ledger.checkpoints(), 2)
    assert start is not None
    assert start.number == 1
    next((tmp_path / "checkpoints" / "00000001").glob("*.safetensors")).unlink()
    assert starting_point(tmp_path, scene.ledger.checkpoints(), 2) is None, "from the start"
    scene.ledger.close()
