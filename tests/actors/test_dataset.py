"""Datasets: what is read, what is refused with file and line, and the order of training."""

from __future__ import annotations

import json
from pathlib import Path

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.dataset import Order, read_problems
from protocol.errors import DataError
from tests.directories import dataset, problems


def written(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_lines_are_read_whole_and_travel_as_they_stand(tmp_path: Path) -> None:
    line = {"id": "a", "prompt": "text", "tests": [{"stdin": "1\n", "stdout": "2\n"}], "limit": 2.5, "big": 2**63}
    [problem] = read_problems(dataset(tmp_path / "d.jsonl", [line]))
    assert (problem.problem_id, problem.prompt) == ("a", "text")
    assert msgpack.unpackb(problem.payload) == line


def test_blank_lines_do_not_count_and_a_limit_ends_early(tmp_path: Path) -> None:
    path = written(tmp_path / "d.jsonl", "", json.dumps({"id": "a", "prompt": "x"}), "  ", json.dumps({"id": "b", "prompt": "y"}), "{")
    assert [p.problem_id for p in read_problems(path, 2)] == ["a", "b"]
    with pytest.raises(DataError, match=r"d\.jsonl, line 5: not JSON"):
        read_problems(path)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_a_text_may_hold_line_separators_of_unicode(tmp_path: Path, separator: str) -> None:
    """JSON allows them unescaped inside a string; only a newline ends a line."""
    line = json.dumps({"id": "a", "prompt": f"one{separator}two"}, ensure_ascii=False)
    assert read_problems(written(tmp_path / "d.jsonl", line))[0].prompt == f"one{separator}two"


def test_lines_may_end_as_windows_ends_them(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"id": "a", "prompt": "x"}\r\n{"id": "b", "prompt": "y"}\r\n')
    assert [p.problem_id for p in read_problems(path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"id": "b", "prompt": "x"', r"not JSON \(.*at column 26\)"),
        ('["b", "x"]', "a JSON list, expected an object with id and prompt"),
        ('{"id": 7, "prompt": "x"}', "field 'id' is 7, expected a text that is not empty"),
        ('{"id": "b"}', "field 'prompt' is None, expected a text that is not empty"),
        ('{"id": "b", "prompt": ""}', "field 'prompt' is '', expected a text that is not empty"),
        ('{"id": "a", "prompt": "x"}', "id 'a' stands in line 1 already"),
        ('{"id": "b", "prompt": "x", "answer": 18446744073709551616}', "cannot travel .*integers beyond 64 bits"),
        ('{"id": "b", "prompt": "\\ud800"}', "cannot travel .*half surrogate pairs"),
        ('{"id": "b", "prompt": "x", "answer": ' + "9" * 5000 + "}", "cannot be read .*4300 digits"),
        ('{"id": "b", "prompt": "x", "a": ' + "[" * 100_000 + "}", "cannot be read .*recursion"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, line: str, sentence: str) -> None:
    path = written(tmp_path / "d.jsonl", json.dumps({"id": "a", "prompt": "x"}), line)
    with pytest.raises(DataError, match=rf"^{path}, line 2: {sentence}"):
        read_problems(path)


def test_files_that_hold_nothing_or_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read .*No such file"):
        read_problems(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="holds no problem"):
        read_problems(written(tmp_path / "empty.jsonl", "", " "))
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "a", "prompt": "\xe9"}\n')
    with pytest.raises(DataError, match=r"latin\.jsonl: cannot be read .*utf-8"):
        read_problems(tmp_path / "latin.jsonl")


@given(st.integers(1, 12), st.integers(0, 3), st.booleans())
def test_every_epoch_holds_every_problem_once(count: int, seed: int, shuffle: bool) -> None:
    order = Order(count, seed, shuffle)
    places = [order[n] for n in range(3 * count)]
    for epoch in range(3):
        assert sorted(places[epoch * count : (epoch + 1) * count]) == list(range(count))
    again = Order(count, seed, shuffle)
    backwards = [again[n] for n in reversed(range(3 * count))]
    assert backwards == places[::-1], "a position means the same problem whatever was asked before"
    if not shuffle:
        assert places[:count] == list(range(count))


def test_epochs_and_seeds_differ_in_order(tmp_path: Path) -> None:
    count = len(read_problems(dataset(tmp_path / "d.jsonl", problems(50))))
    order, other = Order(count, 0, True), Order(count, 1, True)
    first = [order[n] for n in range(count)]
    assert first != [order[n] for n in range(count, 2 * count)]
    assert first != [other[n] for n in range(count)]
