"""What is on record stays on record."""

import logging
import sqlite3
import threading
from pathlib import Path

import pytest

import protocol.journal as journal_module
from protocol.errors import DataError, Fenced, JournalError
from protocol.journal import Damage, Journal, cut_torn_tail, read_journal, read_records, segments
from protocol.ledger import Checkpoint, Issue, Ledger, Writer
from protocol.messages import GroupOutcome
from tests.disks import largest_file
from tests.protocol.examples import example


def test_records_come_back_in_order(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    records = [[b"trajectory", bytes([i]) * i] for i in range(50)]
    for record in records:
        journal.append(record)
    journal.close()
    assert list(read_journal(tmp_path)) == records


def test_a_new_journal_never_appends_to_an_old_segment(tmp_path: Path) -> None:
    for i in range(3):
        journal = Journal(tmp_path)
        journal.append([bytes([i])])
        journal.close()
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["000000.journal", "000001.journal", "000002.journal"]
    assert list(read_journal(tmp_path)) == [[b"\0"], [b"\1"], [b"\2"]]


def test_segments_are_cut_by_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "SEGMENT_BYTES", 100)
    journal = Journal(tmp_path)
    for i in range(10):
        journal.append([bytes([i]) * 40])
    journal.close()
    assert len(list(tmp_path.iterdir())) == 10, "two records of 65 bytes do not fit into 100"
    assert [record[0][0] for record in read_journal(tmp_path)] == list(range(10))


@pytest.mark.parametrize("cut", [1, 5, 11, 13, 20])
def test_a_torn_tail_ends_reading_at_the_last_good_record(tmp_path: Path, cut: int) -> None:
    journal = Journal(tmp_path)
    journal.append([b"first"])
    journal.append([b"second, longer"])
    journal.close()
    path = tmp_path / "000000.journal"
    path.write_bytes(path.read_bytes()[:-cut])
    assert list(read_journal(tmp_path)) == [[b"first"]]
    with pytest.raises(JournalError, match=r"000000\.journal: damaged record"):
        list(read_journal(tmp_path, strict=True))


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append([b"first"])
    journal.close()
    path = tmp_path / "000000.journal"
    data = bytearray(path.read_bytes())
    data[-2] ^= 4
    path.write_bytes(bytes(data))
    assert list(read_journal(tmp_path)) == []


def test_a_torn_tail_is_cut_when_the_journal_is_opened_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(tmp_path)
    journal.append([b"first"])
    journal.append([b"second"])
    journal.close()
    path = tmp_path / "000000.journal"
    path.write_bytes(path.read_bytes()[:-2])
    with caplog.at_level(logging.WARNING):
        again = Journal(tmp_path)
    assert "the last 27 bytes were not completely written; the journal ends at byte 28" in caplog.text
    again.append([b"third"])
    again.close()
    assert list(read_journal(tmp_path, strict=True)) == [[b"first"], [b"third"]]


def test_a_damaged_record_is_left_out_and_said_and_what_follows_is_read(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    ends = [journal.append([word])[1] for word in (b"first", b"second", b"third")]
    journal.close()
    path = tmp_path / "000000.journal"
    data = bytearray(path.read_bytes())
    data[ends[1] - 1] ^= 1
    path.write_bytes(bytes(data))
    damaged: list[int] = []
    found = [record.frames for record in read_records(tmp_path, 0, lambda damage: damaged.append(damage.end))]
    assert found == [[b"first"], [b"third"]]
    assert damaged == [ends[1]]


def test_after_a_damaged_length_reading_goes_on_at_the_next_good_record(tmp_path: Path) -> None:
    """Whichever bit of a head is flipped, that record alone is lost, and opening the journal again cuts nothing."""
    journal = Journal(tmp_path)
    ends = [journal.append([word, b"x" * 30])[1] for word in (b"first", b"second", b"third", b"fourth")]
    journal.close()
    path = tmp_path / "000000.journal"
    whole = path.read_bytes()
    for byte in range(ends[0], ends[0] + 20):
        for bit in range(8):
            data = bytearray(whole)
            data[byte] ^= 1 << bit
            path.write_bytes(bytes(data))
            damaged: list[Damage] = []
            found = [record.frames[0] for record in read_records(tmp_path, 0, damaged.append)]
            assert (found, damaged) == ([b"first", b"third", b"fourth"], [Damage(path, ends[0], ends[1])]), (byte, bit)
            assert cut_torn_tail(tmp_path) == 0


def test_bytes_that_are_gone_from_the_middle_cost_only_their_records(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    ends = [journal.append([bytes([i]) * 50])[1] for i in range(6)]
    journal.close()
    path = tmp_path / "000000.journal"
    data = path.read_bytes()
    path.write_bytes(data[: ends[1] + 7] + data[ends[2] + 9 :])
    assert [frames[0][0] for frames in read_journal(tmp_path)] == [0, 1, 4, 5]
    assert cut_torn_tail(tmp_path) == 0


def test_what_a_commit_stands_for_is_never_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(tmp_path)
    ends = [journal.append([word])[1] for word in (b"first", b"second", b"third")]
    journal.close()
    path = tmp_path / "000000.journal"
    data = bytearray(path.read_bytes())
    data[ends[0] + 4] ^= 8
    data[ends[1] + 4] ^= 8
    path.write_bytes(bytes(data))
    with caplog.at_level(logging.WARNING):
        Journal(tmp_path, (0, ends[1])).close()
    assert path.read_bytes() == bytes(data[: ends[1]]), "the last record is no commit's"
    assert f"bytes {ends[0]} to {ends[1]} are damaged, although they were committed" in caplog.text
    assert "000000.journal: the last 28 bytes were not completely written" in caplog.text


def test_the_newest_commit_says_how_far_the_journal_must_reach(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    assert ledger.journal_end() == (-1, 0)
    for number, end in ((1, (0, 900)), (2, (1, 20))):
        ledger.commit(
            Checkpoint(
                number=number, incarnation=0, directory="c", sha256="ab", journal_segment=end[0], journal_end=end[1], first_segment=0, committed_s=1.0
            ),
            [],
        )  # fmt: skip
    assert ledger.journal_end() == (1, 20)
    ledger.close()


def test_a_full_disk_leaves_no_half_record(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    _, end = journal.append([b"first"])
    with largest_file(end + 40), pytest.raises(DataError, match="the journal cannot be written"):
        journal.append([b"x" * 100])
    journal.append([b"second"])
    journal.close()
    assert list(read_journal(tmp_path, strict=True)) == [[b"first"], [b"second"]]


def test_old_segments_go_only_beyond_what_is_kept_and_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "SEGMENT_BYTES", 100)
    journal = Journal(tmp_path)
    for i in range(6):
        journal.append([bytes([i]) * 60])
    assert journal.trim(3, None) == []
    assert journal.trim(3, 10_000) == []
    assert journal.trim(3, 0) == [0, 1, 2], "the third is still needed"
    assert segments(tmp_path) == [3, 4, 5]
    journal.close()


def test_a_replaced_writer_is_fenced(tmp_path: Path) -> None:
    supervisor = Ledger(tmp_path / "ledger.sqlite")
    assert [supervisor.next_start("dispatcher", 0, 1) for _ in range(2)] == [1, 2]
    old = Ledger(tmp_path / "ledger.sqlite", Writer("dispatcher", 0, 1))
    new = Ledger(tmp_path / "ledger.sqlite", Writer("dispatcher", 0, 2))
    issue = Issue(group_id=1, attempt=0, iteration=0, purpose="train", problem_id="p", generator="g", issued_s=0.0)
    with pytest.raises(Fenced, match=r"dispatcher-0@1 has been replaced by dispatcher-0@2"):
        old.issued([issue])
    new.issued([issue])
    assert supervisor.issues() == [issue]
    supervisor.started("dispatcher", 0, 2, 4711, 99)
    supervisor.stopped("dispatcher", 0, 1, "was killed by SIGKILL")
    assert [(s.start, s.pid, s.ticks, s.how) for s in supervisor.starts()] == [(1, 0, 0, "was killed by SIGKILL"), (2, 4711, 99, "")]
    for ledger in (supervisor, old, new):
        ledger.close()


def test_a_version_appears_with_its_row_or_not_at_all(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")

    def broken() -> None:
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        ledger.publish(1, 0, "ab", broken)
    assert ledger.versions() == []
    ledger.publish(1, 0, "ab", lambda: None)
    assert ledger.versions() == [(1, 0)]
    ledger.close()


def test_a_damaged_ledger_is_said_to_be(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"SQLite format 3\0" + b"\xff" * 5000)
    with pytest.raises(DataError, match=r"ledger\.sqlite: the ledger is damaged"):
        Ledger(path).check()
    assert str(path) not in {str(fd.readlink()) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()}, "it is closed again"


def outcome(group_id: int) -> GroupOutcome:
    message = example("GroupOutcome")
    assert isinstance(message, GroupOutcome)
    return GroupOutcome(**{**{name: getattr(message, name) for name in message.__dataclass_fields__}, "group_id": group_id})


def test_a_group_has_one_terminal_state(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.ended([outcome(1), outcome(2)])
    with pytest.raises(sqlite3.IntegrityError):
        ledger.ended([outcome(3), outcome(2)])
    assert [o.group_id for o in ledger.outcomes()] == [1, 2], "a refused transaction leaves no row"
    assert ledger.outcomes()[0] == outcome(1)
    assert ledger.counts() == {"trained": 2}
    ledger.close()


def test_two_threads_and_two_connections_write_at_once(tmp_path: Path) -> None:
    learner, dispatcher = Ledger(tmp_path / "ledger.sqlite"), Ledger(tmp_path / "ledger.sqlite")
    errors: list[BaseException] = []

    def write(first: int) -> None:
        try:
            for i in range(50):
                learner.ended([outcome(first + i)])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(start,)) for start in (0, 1000)]
    for thread in threads:
        thread.start()
    for i in range(50):
        issue = Issue(group_id=i, attempt=0, iteration=0, purpose="train", problem_id="p", generator="g", issued_s=0.0)
        dispatcher.issued([issue])
    for thread in threads:
        thread.join(timeout=600)
    assert not errors
    assert len(dispatcher.outcomes()) == 100
    learner.close()
    dispatcher.close()
