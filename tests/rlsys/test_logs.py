"""Log lines say where they come from, stay bounded, and merge by time."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.clock import now_s
from protocol.errors import ConfigError
from protocol.intervals import Recorder, record_here
from protocol.messages import Event
from protocol.node import ProcessSpec
from rlsys.chronicle import chronicle
from rlsys.logs import bound, in_a_line, merged, seconds_of, set_up, show_merged


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "logs").mkdir()
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield tmp_path
    for handler in root.handlers:
        if handler not in before:
            handler.close()
    root.handlers[:] = before
    root.setLevel(level)


def spec(run_dir: Path, role: str) -> ProcessSpec:
    return ProcessSpec(run_id="00000000000000ab", epoch=1, role=role, index=0, start=2, run_dir=str(run_dir), control="")


def write(run_dir: Path, process: str, *records: tuple[float, str, str]) -> None:
    lines = [{"time_s": t, "level": level, "process": process, "message": text} for t, level, text in records]
    with (run_dir / "logs" / f"{process}.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def test_every_line_says_run_process_iteration_and_group(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_up(spec(directory, "learner"), 64.0)
    recorder = Recorder("learner-0@2")
    record_here(recorder)
    recorder.enter("train", iteration=7, group=812)
    logging.getLogger("rlsys.learner").warning("sample %d is odd", 3)
    recorder.enter("publish")
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("rlsys").critical("over", exc_info=True)
    first, second = merged(directory / "logs")
    assert first["run"] == "00000000000000ab"
    assert (first["role"], first["process"], first["start"], first["level"]) == ("learner", "learner-0", 2, "warning")
    assert (first["iteration"], first["group"], first["message"]) == (7, 812, "sample 3 is odd")
    assert (second["iteration"], second["group"]) == (7, None), "the last iteration that the thread was at; every line has both"
    assert "ValueError: broken" in second["traceback"]
    human = capsys.readouterr().err
    assert "WARNING rlsys.learner [iteration 7, group 812]: sample 3 is odd" in human
    assert "ValueError: broken" in human
    assert "[iteration 7, group 812] sample 3 is odd" in in_a_line(first)


def test_machine_logs_are_bounded(directory: Path) -> None:
    set_up(spec(directory, "generator"), 0.002)
    for i in range(100):
        logging.getLogger("rlsys").info("line %d", i)
    files = list((directory / "logs").glob("generator-0.jsonl*"))
    assert len(files) == 2
    assert sum(path.stat().st_size for path in files) <= 4000
    assert [r["message"] for r in merged(directory / "logs")][-1] == "line 99", "the newest are kept, the moved ones read first"


def test_a_file_that_somebody_appends_to_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    assert not bound(path, 10)
    with path.open("ab", buffering=0) as file:
        file.write(b"x" * 100)
        assert bound(path, 50)
        file.write(b"after")
    assert path.read_bytes() == b"after"
    assert (tmp_path / "a.log.1").read_bytes() == b"x" * 100
    assert not bound(path, 50)


def test_merging(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    now = now_s()
    write(directory, "learner-0", (now - 7200, "info", "old"), (now - 20, "info", "b"), (now - 5, "error", "d"))
    write(directory, "generator-0", (now - 30, "warning", "a"), (now - 10, "info", "c"))
    write(directory, "generator-1", (now - 1, "warning", "e"))
    with (directory / "logs" / "generator-1.jsonl").open("a") as file:
        file.write('{"time_s": 1')  # being written

    def messages(**chosen: object) -> list[str]:
        return [r["message"] for r in merged(directory / "logs", **chosen)]  # type: ignore[arg-type]

    assert messages() == ["old", "a", "b", "c", "d", "e"]
    assert messages(since_s=now - 3600) == ["a", "b", "c", "d", "e"]
    assert messages(level="warning") == ["a", "d", "e"]
    assert messages(role="generator") == ["a", "c", "e"]
    assert messages(role="generator-1") == ["e"]
    assert show_merged(directory, None, "1h", "warning", as_json=True) == 0
    assert [json.loads(line)["message"] for line in capsys.readouterr().out.splitlines()] == ["a", "d", "e"]


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("5m", 300), ("1.5h", 5400), ("2d", 172800), ("3s", 3)])
def test_times(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "soon", "-5m", "inf"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a time such as"):
        seconds_of(text)


def test_the_supervisor_has_its_say_in_the_merged_view(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Restarts, stalls and what a run is told of; what others log themselves is not said twice."""
    set_up(spec(directory, "dashboard"), 64.0)
    logging.getLogger("rlsys.dashboard").warning("guard: %s", "entropy collapse at iteration 9", extra={"iteration": 9})
    with chronicle(directory, 64.0, lambda: ("00000000000000cd", 12)) as record:
        logging.getLogger("rlsys.supervisor").warning("learner-0@1 was killed by SIGKILL; it is started again in 1.0 s")
        record(Event(identity="supervisor", time_s=0.0, name="stalled", data={"for_s": 30.0, "why": "generator-0 is stopped"}))
        record(Event(identity="supervisor", time_s=0.0, name="restart", data={"how": "learner-0@1 was killed by SIGKILL"}))
        record(Event(identity="dispatcher-0@1", time_s=0.0, name="training started", data={}))
        record(Event(identity="x", time_s=0.0, name="of no interest", data={}))
    logging.getLogger("rlsys.supervisor").warning("after the end")
    records = [r for r in merged(directory / "logs") if r["process"] == "supervisor"]
    assert [(r["level"], r["message"]) for r in records] == [
        ("warning", "learner-0@1 was killed by SIGKILL; it is started again in 1.0 s"),
        ("warning", "nothing has moved for 30 s: generator-0 is stopped"),
        ("info", "dispatcher-0: training started"),
    ]
    assert {(r["run"], r["role"], r["iteration"], r["group"]) for r in records} == {("00000000000000cd", "supervisor", 12, None)}
    assert [r["iteration"] for r in merged(directory / "logs", "dashboard", level="warning")][:1] == [9]
    assert show_merged(directory, None, None, "warning", as_json=False) == 0
    assert "supervisor    [iteration 12] nothing has moved for 30 s" in capsys.readouterr().out


def test_a_line_that_is_no_record_is_left_out(directory: Path) -> None:
    write(directory, "learner-0", (1.0, "info", "a"))
    with (directory / "logs" / "learner-0.jsonl").open("a") as file:
        file.write('{}\n[]\n{"time_s": "x", "level": "info"}\n{"time_s": 2.0, "level": "unheard of"}\n')
    assert [r["message"] for r in merged(directory / "logs")] == ["a"]
