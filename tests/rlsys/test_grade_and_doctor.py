"""`rlsys grade` and `rlsys doctor` as their users call them, with the real sandbox."""

import gzip
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from actors.rewards import Sample, Score
from rlsys.cli import main

PROBLEMS = [
    {"id": "double", "prompt": "Double it.", "tests": [{"input": "2", "output": "4"}, {"input": "5", "output": "10"}]},
    {"id": "sum", "prompt": "Add them.", "tests": [{"input": "1 2", "output": "3"}]},
    {"id": "odd", "prompt": "No answer key.", "tests": {"inputs": ["1"], "outputs": []}},
]
SUBMISSIONS = [
    {"id": "double", "completion": "print(2 * int(input()))"},
    {"id": "double", "completion": "```python\nprint(4)\n```"},
    {"id": "sum", "completion": "print(sum(map(int, input().split())))"},
    {"id": "sum", "completion": "print(1 / 0)"},
    {"id": "odd", "completion": "print(1)"},
]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    problems, submissions = tmp_path / "problems.jsonl.gz", tmp_path / "submissions.json"
    problems.write_bytes(gzip.compress("\n".join(map(json.dumps, PROBLEMS)).encode()))
    submissions.write_text(json.dumps(SUBMISSIONS))
    return problems, submissions


def test_grading_gives_verdicts_in_the_order_of_submissions(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "verdicts.jsonl"
    code = main(["grade", *map(str, files), "--json", "--out", str(out), "--option", "score=soft"])
    summary = json.loads(capsys.readouterr().out)
    assert [r["status"] for r in summary["results"]] == ["accepted", "wrong_answer", "accepted", "runtime_error", "bad_problem"]
    assert [r["value"] for r in summary["results"]] == [1.0, 0.5, 1.0, 0.0, None]
    assert summary["pass_at_1"] == pytest.approx(0.5)
    assert summary["unscored"] == 1
    assert code == 1, "a score that could not be found is told by the exit code"
    assert [json.loads(line)["status"] for line in out.read_text().splitlines()] == [r["status"] for r in summary["results"]]
    assert "'odd', field 'tests'" in summary["results"][-1]["detail"]


class FirstOnly:
    """Judges one sample at once; the others take until it is closed."""

    begun = 0

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._closed, self._lock = threading.Event(), threading.Lock()

    def score(self, sample: Sample) -> Score:
        with self._lock:
            FirstOnly.begun += 1
            first = FirstOnly.begun == 1
        assert first or self._closed.wait(120.0), "it was waited for"
        return Score(value=1.0, status="accepted", passed=True)

    def close(self) -> None:
        self._closed.set()


def test_an_interrupt_ends_what_is_judged_and_begins_nothing_more(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rlsys.grade._progress", interrupted)
    assert main(["grade", *map(str, files), "--reward", f"{__name__}:FirstOnly", "--jobs", "1"]) == 130
    assert FirstOnly.begun <= 2, "of five: the one that was judged when the interrupt came, and at most its next"


def test_the_table_for_people(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    main(["grade", *map(str, files)])
    text = capsys.readouterr().out
    assert "2  accepted" in text
    assert "0.5000  pass@1" in text
    assert "1  without a score" in text


@pytest.mark.parametrize(
    ("problems", "submissions", "says"),
    [
        ('{"id": "a"}\n{oops}', "{}", "problems.jsonl, line 2: not JSON"),
        ('{"id": "a"}\n{"id": "a"}', "{}", "line 2: id 'a' stands in the file already"),
        ('{"id": "a"}', '{"id": "b", "completion": ""}', "no problem has the id 'b'"),
        ('{"id": "a"}', '{"id": "a"}', "none of the fields completion"),
        ("", "{}", "holds no problem"),
    ],
)
def test_bad_files_are_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], problems: str, submissions: str, says: str
) -> None:
    (tmp_path / "problems.jsonl").write_text(problems)
    (tmp_path / "submissions.jsonl").write_text(submissions)
    assert main(["grade", str(tmp_path / "problems.jsonl"), str(tmp_path / "submissions.jsonl")]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_doctor_names_the_isolation_and_how_it_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--json"])
    findings = {f["name"]: f for f in json.loads(capsys.readouterr().out)}
    assert code == 0
    assert findings["isolation"]["state"] == "ok"
    assert findings["language: python"]["state"] == "ok"
    assert "cores" in findings["machine"]["text"]
