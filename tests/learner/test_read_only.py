"""A directory that may no longer be written: what was committed there stands and is read, and what cannot be written is said in a sentence."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

import protocol.journal as journal_module
from learner.publisher import Publisher, export_model
from learner.recovery import newest_good
from protocol.errors import DataError, UserError
from protocol.journal import Journal, read_journal
from protocol.ledger import Issue, Ledger
from protocol.manifest import verify
from protocol.messages import Version
from tests.disks import read_only
from tests.learner.test_commits import Scene, outcome

ISSUE = Issue(group_id=1, attempt=0, iteration=0, purpose="train", problem_id="p", generator="g", issued_s=0.0)


def test_the_directory_really_cannot_be_written(tmp_path: Path) -> None:
    """Else the tests below show nothing."""
    (tmp_path / "file").write_text("before")
    with read_only(tmp_path):
        for change in ((tmp_path / "new").touch, lambda: (tmp_path / "file").write_text("after"), (tmp_path / "file").unlink):
            with pytest.raises(PermissionError):
                change()
        assert (tmp_path / "file").read_text() == "before"
    (tmp_path / "file").write_text("after")


def test_a_commit_is_put_off_and_the_last_good_checkpoint_stands(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene(tmp_path)
    scene.commit(1, [1])
    with read_only(tmp_path / "checkpoints"), caplog.at_level(logging.WARNING):
        scene.commit(2, [2])
    assert "the checkpoint of iteration 2 cannot be written ([Errno 13] Permission denied" in caplog.text
    assert "the last good checkpoint is v1" in caplog.text
    found = newest_good(scene.ledger, tmp_path)
    assert found is not None
    assert (found.number, scene.ledger.ended_groups()) == (1, {1})
    scene.commit(3, [2, 3])
    assert [c.number for c in scene.ledger.checkpoints()] == [3, 1]
    assert scene.ledger.ended_groups() == {1, 2, 3}
    with read_only(tmp_path / "checkpoints"), pytest.raises(UserError, match="cannot be written"):
        for number in range(4, 10):
            scene.commit(number, [number])
    scene.ledger.close()


def test_the_journal_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "SEGMENT_BYTES", 100)
    directory = tmp_path / "journal"
    journal = Journal(directory)
    journal.append([b"first" * 10])
    with read_only(directory):
        with pytest.raises(DataError, match=r"journal: the journal cannot be written \(Permission denied\); \d+ MB are free"):
            journal.append([b"second" * 10])  # needs a new segment
        with pytest.raises(DataError, match="the journal cannot be written"):
            Journal(directory)
        assert list(read_journal(directory, strict=True)) == [[b"first" * 10]]
    journal.append([b"third" * 10])
    journal.close()
    assert list(read_journal(directory, strict=True)) == [[b"first" * 10], [b"third" * 10]]
    with read_only(tmp_path), pytest.raises(DataError, match="the journal cannot be written"):
        Journal(tmp_path / "other")


def test_the_ledger_keeps_what_it_has_and_is_read(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    ledger = Ledger(directory / "ledger.sqlite")
    ledger.ended([outcome(1, 0)])
    ledger.close()
    with read_only(directory):
        with pytest.raises(DataError, match=r"ledger\.sqlite: the ledger cannot be opened"):
            Ledger(directory / "ledger.sqlite")
        reader = Ledger(directory / "ledger.sqlite", read_only=True)
        assert reader.ended_groups() == {1}
        with pytest.raises(DataError, match="the ledger cannot be written"):
            reader.issued([ISSUE])
        reader.close()
    again = Ledger(directory / "ledger.sqlite")
    again.check()
    again.issued([ISSUE])
    assert (again.ended_groups(), again.issues()) == ({1}, [ISSUE])
    again.close()


def test_what_was_published_stays_whole(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    model, root = tmp_path / "model", tmp_path / "weights"
    model.mkdir()
    publisher = Publisher(root, model, "float32", ledger)
    ready = publisher.publish(Version(0, 0), [("w", torch.zeros(4))])
    with read_only(root), pytest.raises(UserError, match=r"weights: version v1\S* cannot be written .*Permission denied"):
        publisher.publish(Version(1, 0), [("w", torch.ones(4))])
    assert [path.name for path in root.iterdir()] == [Path(ready.directory).name], "nothing half-written is left"
    verify(Path(ready.directory), ready.manifest_sha256)
    assert ledger.versions() == [(0, 0)], "and what is not there is not on record"
    with read_only(tmp_path), pytest.raises(UserError, match="the model cannot be written"):
        export_model(model, tmp_path / "final_model", [("w", torch.ones(4))], torch.float32)
    publisher.publish(Version(1, 0), [("w", torch.ones(4))])
    assert ledger.versions() == [(0, 0), (1, 0)]
    ledger.close()
