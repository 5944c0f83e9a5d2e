"""A file of JSON lines outlives the processes that write it, also those that die in the middle of a line."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rlsys.lines import BoundedLines, open_lines, read_lines
from rlsys.report import read_iterations
from rlsys.story import read_story
from rlsys.timeline import timeline
from rlsys.top import top
from rlsys.usage import read_rows
from tests.observed import make_run


def tear(path: Path) -> str:
    """Cut the last line short, as a killed writer leaves it; what it was."""
    text = path.read_text()
    path.write_text(text[:-20])
    return text.splitlines()[-1]


def test_the_next_writer_ends_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    for number in range(2):
        with open_lines(path) as file:
            file.write(json.dumps({"number": number}) + "\n")
    assert read_lines(path) == [{"number": 0}, {"number": 1}], "nothing is torn, nothing is added"
    path.write_text('{"number": 0}\n{"numb')
    assert read_lines(path) == [{"number": 0}], "the last line may be under way"
    with open_lines(path) as file:
        file.write('{"number": 2}\n')
    assert read_lines(path) == [{"number": 0}, {"number": 2}]
    path.write_text('{"number": 0')
    bounded = BoundedLines(path, 1000)
    bounded.write('{"number": 3}')
    bounded.close()
    assert read_lines(path) == [{"number": 3}]


def test_what_is_no_record_costs_that_record_alone(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": {"a": 2}\n[1]\n\n\xff\xfe\n{"a": 3}\n')
    assert read_lines(path) == [{"a": 1}, {"a": 3}]


def test_a_run_whose_writers_died_is_shown_all_the_same(tmp_path: Path) -> None:
    """The next line is glued to the torn one, as files of older runs have it: two records are lost, and everything still works."""
    run = make_run(tmp_path / "run")
    (run / "status.json").write_text(json.dumps({"state": "running", "time_s": 1.0}))
    rows = len(read_rows(run, "learner-0"))
    for path in (run / "metrics.jsonl", run / "events" / "learner-0.jsonl"):
        whole = path.read_text()
        last = tear(path)
        with path.open("a") as file:
            file.write(last + "\n" + whole.splitlines()[0] + "\n")
    assert top(run, io.StringIO(), once=True) == 0
    assert timeline(run, tmp_path, as_json=True) == 0
    assert read_story(run).iterations
    assert read_iterations(run)
    assert len(read_rows(run, "learner-0")) <= rows
