"""The audit of a whole run, and of one whose journal lost something: what is legitimate stays sound, all else is a finding."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgpack
import pytest

from learner.recovery import BATCH, TRAJECTORY
from protocol.codec import encode
from protocol.journal import Damage, Journal
from protocol.ledger import Checkpoint, Issue, Ledger
from rlsys.audit import audit_run, journal_faults
from rlsys.cli import main
from tests.configuration import empty_run
from tests.learner.test_commits import RUN, outcome
from tests.learner.trajectories import trajectory

ITERATIONS = 3


def commit(number: int, end: tuple[int, int], first: int = 0) -> Checkpoint:
    return Checkpoint(
        number=number, incarnation=0, directory=f"checkpoints/{number}", sha256="ab", journal_segment=end[0], journal_end=end[1],
        first_segment=first, committed_s=1.0,
    )  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of three iterations of two groups (a trained and a filtered one), one journal segment and one commit for each."""
    directory = empty_run(tmp_path)
    ledger = Ledger(directory / "ledger.sqlite")
    ledger.put("run_id", f"{RUN:x}")
    for iteration in range(ITERATIONS):
        groups = [2 * iteration, 2 * iteration + 1]
        journal = Journal(directory / "journal")
        for group in groups:
            ledger.issued(
                [
                    Issue(
                        group_id=group, attempt=0, iteration=iteration, purpose="train", problem_id=f"p{group}", generator="g", issued_s=1.0
                    )
                ]
            )
            for index in range(2):
                journal.append([TRAJECTORY, *encode(trajectory(group, index, 1.0, iteration=iteration), RUN)])
        journal.append([BATCH, msgpack.packb({"iteration": iteration, "part": 0, "groups": groups})])
        ended = [outcome(groups[0], iteration), outcome(groups[1], iteration, "filtered")]
        ledger.commit(commit(iteration + 1, journal.position, iteration), [replace(o, num_samples=2) for o in ended])
        journal.close()
    ledger.close()
    (directory / "exit.json").write_text(json.dumps({"outcome": "done", "iterations_done": ITERATIONS}))
    return directory


def segment(run: Path, number: int) -> Path:
    return run / "journal" / f"{number:06d}.journal"


def flip(run: Path, number: int, byte: int) -> None:
    data = bytearray(segment(run, number).read_bytes())
    data[byte] ^= 1
    segment(run, number).write_bytes(bytes(data))


def keep_newest(run: Path, checkpoints: int) -> None:
    """As the learner does: old checkpoints go, then the segments that nothing needs."""
    ledger = Ledger(run / "ledger.sqlite")
    ledger.forget_checkpoints(range(1, ITERATIONS + 1 - checkpoints))
    oldest = min(c.first_segment for c in ledger.checkpoints())
    ledger.close()
    journal = Journal(run / "journal")
    journal.trim(oldest, 0)
    journal.close()


def torn(run: Path) -> None:
    """What a killed learner leaves behind the last commit."""
    with segment(run, ITERATIONS - 1).open("ab") as file:
        file.write(segment(run, 0).read_bytes()[:50])


@pytest.mark.parametrize("change", [lambda run: None, torn, lambda run: keep_newest(run, 1), lambda run: keep_newest(run, 2)])
def test_what_is_legitimate_is_sound(run: Path, change: Callable[[Path], None], capsys: pytest.CaptureFixture[str]) -> None:
    change(run)
    found = audit_run(run)
    assert found["sound"], found["findings"]
    assert found["damaged_records"] == (change is torn)
    assert main(["audit", str(run)]) == 0
    assert "0 lost, 0 doubled, 0 too stale, 0 damaged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda run: shutil.rmtree(run / "journal"), "the journal is missing, and 6 groups ended in a batch"),
        (lambda run: [segment(run, n).write_bytes(b"") for n in range(3)], "the journal is empty, and 6 groups ended in a batch"),
        (lambda run: segment(run, 1).unlink(), "segment 1 of the journal is missing"),
        (lambda run: segment(run, 2).unlink(), "segment 2 of the journal is missing"),
        (lambda run: segment(run, 0).unlink(), "segment 0 of the journal is missing"),
        (lambda run: segment(run, 2).write_bytes(segment(run, 2).read_bytes()[:-9]), "segment 2 of the journal ends at byte"),
        (lambda run: flip(run, 1, 30), "segment 1 of the journal: bytes 0 to"),
        (lambda run: flip(run, 2, -1), "segment 2 of the journal: bytes"),
        (lambda run: flip(run, 0, 5), "segment 0 of the journal: bytes 0 to"),
    ],
)
def test_a_journal_that_lost_something_is_not_sound(
    run: Path, damage: Callable[[Path], object], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(run)
    found = audit_run(run)
    assert not found["sound"]
    assert any(sentence.startswith(said) for sentence in found["findings"]["damaged"]), found["findings"]
    if found["journal_complete"]:
        assert found["lost"] > 0, "the groups or samples that it held"
    assert main(["audit", str(run)]) == 1
    assert said in capsys.readouterr().out


def test_a_group_that_ended_in_a_batch_which_nobody_recorded(run: Path) -> None:
    ledger = Ledger(run / "ledger.sqlite")
    ledger.issued([Issue(group_id=9, attempt=0, iteration=2, purpose="train", problem_id="p", generator="g", issued_s=1.0)])
    ledger.ended([replace(outcome(9, 2), num_samples=0)])
    ledger.close()
    assert audit_run(run)["findings"]["lost"] == ["group 9: ended trained@2, and no batch on record holds it"]


def test_samples_of_an_evaluated_group_must_be_on_record(run: Path) -> None:
    ledger = Ledger(run / "ledger.sqlite")
    ledger.issued([Issue(group_id=9, attempt=0, iteration=2, purpose="eval", problem_id="p", generator="g", issued_s=1.0)])
    ledger.ended([replace(outcome(9, 2, "evaluated", in_batch=False), purpose="eval", num_samples=2)])
    ledger.close()
    assert audit_run(run)["findings"]["lost"] == ["group 9: ended evaluated with 2 samples, 0 are on record"]


def test_a_torn_end_that_no_commit_stands_for_is_no_fault() -> None:
    end = Damage(Path("000003.journal"), 50, 70)
    assert journal_faults({3: 70}, [end], [commit(5, (3, 50), 3)], 4) == []
    assert journal_faults({3: 70}, [end], [commit(5, (3, 51), 3)], 4) == ["segment 3 of the journal: bytes 50 to 70 are damaged"]
    assert journal_faults({3: 90}, [end], [commit(5, (3, 50), 3)], 4) == ["segment 3 of the journal: bytes 50 to 70 are damaged"]
    assert journal_faults({3: 70, 4: 0}, [end], [commit(5, (3, 50), 3)], 4) == ["segment 3 of the journal: bytes 50 to 70 are damaged"]
    assert journal_faults({}, [], [], 0) == [], "a run that has just begun"
