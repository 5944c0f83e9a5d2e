"""Commands that read a run's ledger, on one that is torn, empty, of another version, or no ledger at all: one sentence and exit code 2."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import rlsys.audit as audit_module
from protocol.journal import Journal, Record, read_records
from protocol.ledger import Ledger
from rlsys.audit import read_books
from rlsys.cli import main
from tests.configuration import empty_run
from tests.disks import read_only
from tests.learner.test_commits import outcome


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a ledger of many pages."""
    directory = empty_run(tmp_path)
    ledger = Ledger(directory / "ledger.sqlite")
    ledger.put("run_id", "5")
    ledger.next_start("learner", 0, 1)
    ledger.ended([outcome(group, 0) for group in range(2000)])
    ledger.close()
    return directory


def refused(capsys: pytest.CaptureFixture[str], run: Path, *commands: str) -> str:
    """What the commands say, each in one line."""
    said = []
    for command in commands:
        arguments = [command, "--resume", str(run), "--plain"] if command == "up" else [command, str(run)]
        assert main(arguments) == 2, command
        printed = capsys.readouterr()
        assert (printed.out, printed.err.count("\n")) == ("", 1), printed
        assert printed.err.startswith(f"rlsys: {run / 'ledger.sqlite'}: "), printed.err
        said.append(printed.err)
    return said[0]


@pytest.mark.parametrize("content", [b"", b"iterations: [1, 2", b"\xff\xfe\x00", b"- a list", b"iterations: 5\nunheard_of: 1\n"])
def test_a_torn_configuration(run: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    (run / "config.yaml").write_bytes(content)
    for arguments in (["audit", str(run)], ["replay", str(run)], ["up", "--resume", str(run)]):
        assert main(arguments) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert all(f"{run / 'config.yaml'}: " in line for line in printed.err.splitlines()), printed.err


def change(run: Path, script: str) -> None:
    db = sqlite3.connect(run / "ledger.sqlite")
    db.executescript(script)
    db.close()


@pytest.mark.parametrize("share", [0.5, 0.9, 0.02])
def test_a_torn_ledger(run: Path, capsys: pytest.CaptureFixture[str], share: float) -> None:
    path = run / "ledger.sqlite"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert "the ledger is damaged" in refused(capsys, run, "audit", "replay", "up")


def test_a_ledger_with_a_page_of_something_else(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "ledger.sqlite"
    data = bytearray(path.read_bytes())
    for start in range(8192, len(data), 4096):
        data[start : start + 64] = b"\xab" * 64
    path.write_bytes(bytes(data))
    assert "the ledger is damaged" in refused(capsys, run, "audit", "replay", "up")


def test_text_in_its_place(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "ledger.sqlite").write_text("this is no database\n" * 100)
    assert "file is not a database" in refused(capsys, run, "audit", "replay", "up")


def test_an_empty_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "ledger.sqlite").write_bytes(b"")
    assert "no table run" in refused(capsys, run, "audit", "replay", "up")


@pytest.mark.parametrize(
    ("script", "lacks"),
    [
        ("ALTER TABLE ended DROP COLUMN num_truncated", "no column num_truncated of table ended"),
        ("DROP TABLE issued", "no table issued"),
        ("ALTER TABLE issued RENAME COLUMN requeues TO tries", "no column requeues of table issued"),
    ],
)
def test_a_ledger_of_another_version(run: Path, capsys: pytest.CaptureFixture[str], script: str, lacks: str) -> None:
    change(run, script)
    said = refused(capsys, run, "audit", "replay", "up")
    assert "this is no ledger of this version of rlsys" in said
    assert lacks in said


def test_a_run_in_a_directory_that_may_not_be_written(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An archive is audited; it does not go on."""
    with read_only(run):
        assert main(["audit", str(run)]) == 1, "these groups were never issued"
        assert "2000 doubled" in capsys.readouterr().out
        assert main(["up", "--resume", str(run), "--plain"]) == 2
        printed = capsys.readouterr()
        assert (printed.out, printed.err.count("\n")) == ("", 1), printed
        assert "Permission denied" in printed.err
    assert not (run / "ledger.sqlite-wal").exists()


def test_an_older_run_without_a_newer_table_is_read(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(run, "DROP TABLE stages")
    assert main(["audit", str(run)]) == 1
    assert "2000 doubled" in capsys.readouterr().out


def test_fewer_iterations_than_were_trained_are_refused_also_without_an_exit_record(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A killed supervisor writes no exit.json: the ledger knows."""
    ledger = Ledger(run / "ledger.sqlite")
    for number in range(3):
        ledger.publish(number, 0, "ab", lambda: None)
    ledger.close()
    assert main(["up", "--resume", str(run), "--plain", "--set", "iterations=1"]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "rlsys: --set iterations=1: 2 iterations are done already\n")


def test_what_stands_at_the_place_for_a_replayed_model_is_left_alone(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    thesis = tmp_path / "mine" / "thesis.txt"
    thesis.write_text("chapter 1")
    for out in (tmp_path / "mine", thesis):
        assert main(["replay", str(run), "--out", str(out)]) == 2
        assert capsys.readouterr().err == f"rlsys: {out}: exists already; name a new directory, or remove it first\n"
    assert thesis.read_text() == "chapter 1"


def test_a_record_that_is_being_written_is_no_damage(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a live run the last record may be half there; one that is still so when it is read again is damaged, as in a run that is over."""
    journal = Journal(run / "journal")
    journal.append([b"first"])
    journal.append([b"second"])
    journal.close()
    path = run / "journal" / "000000.journal"
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    assert read_books(run).damaged == 1

    lock = os.open(run / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.write(lock, str(os.getpid()).encode())
        assert read_books(run).damaged == 1, "nobody finishes it"

        def then_it_is_whole(*arguments: Any) -> Iterator[Record]:
            yield from read_records(*arguments)
            path.write_bytes(whole)

        monkeypatch.setattr(audit_module, "read_records", then_it_is_whole)
        assert read_books(run).damaged == 0
    finally:
        os.close(lock)
