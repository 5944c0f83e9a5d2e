"""Overlap from recorded intervals: by hand, and against a count of unit cells."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.overlap import Interval, idle_share, intersection, length, overlap, read_intervals, union

spans = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 6)).map(lambda t: (float(t[0]), float(t[0] + t[1]))), max_size=8)


def cells(intervals: list[Interval]) -> set[int]:
    """Unit cells that intervals with whole ends cover."""
    return {cell for start, end in intervals for cell in range(int(start), int(end))}


@given(spans, spans)
def test_lengths_are_those_of_counting_cells(a: list[Interval], b: list[Interval]) -> None:
    assert length(a) == len(cells(a))
    assert cells(union(a)) == cells(a)
    assert all(end < start for (_, end), (start, _) in zip(union(a), union(a)[1:], strict=False)), "disjoint and in order"
    common = intersection(a, b)
    assert cells(common) == cells(a) & cells(b)
    assert length(common) == sum(end - start for start, end in common) == len(cells(a) & cells(b))


def record(run_dir: Path, name: str, *rows: tuple[str, float, float], offset: float = 100.0) -> None:
    names = sorted({activity for activity, *_ in rows})
    table = [[names.index(activity), round(start * 1e6), round(end * 1e6)] for activity, start, end in rows]
    (run_dir / "events").mkdir(exist_ok=True)
    with (run_dir / "events" / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps({"offset_s": offset, "names": names, "rows": table}) + "\n")


def test_the_share_of_busy_time_in_which_anyone_decodes(tmp_path: Path) -> None:
    """Busy from the first training on: [10,14] [14,15] [20,24] = 9 s. Decoding: [0,11] or [9,12], and [22,30]: 2 + 2 s of these."""
    record(tmp_path, "learner-0", ("publish", 0, 1), ("waiting:trajectories", 1, 10), ("train", 10, 14), ("publish", 14, 15))
    record(tmp_path, "learner-0", ("waiting:trajectories", -5, 0), ("train", 0, 4), offset=120.0)
    record(tmp_path, "generator-0", ("decode", 0, 11), ("waiting:tasks", 11, 22), ("decode", 22, 30))
    record(tmp_path, "generator-1", ("decode", 9, 12), ("waiting:tasks", 12, 40))
    assert overlap(tmp_path) == pytest.approx(4 / 9)
    assert idle_share(tmp_path, "generator-0") == pytest.approx(11 / 30)
    assert read_intervals(tmp_path, "learner-0")[-1] == ("train", 120.0, 124.0)


def test_without_training_or_records_nothing_is_claimed(tmp_path: Path) -> None:
    assert overlap(tmp_path) is None
    assert idle_share(tmp_path, "generator-0") is None
    record(tmp_path, "learner-0", ("publish", 0, 1))
    assert overlap(tmp_path) is None
    record(tmp_path, "learner-0", ("train", 3, 3))
    assert overlap(tmp_path) is None, "no busy time to have a share of"


def test_a_last_line_that_its_writer_did_not_finish_is_left_out(tmp_path: Path) -> None:
    record(tmp_path, "learner-0", ("train", 0, 4))
    with (tmp_path / "events" / "learner-0.jsonl").open("a") as file:
        file.write('{"offset_s": 1.0, "names": ["tra')
    assert read_intervals(tmp_path, "learner-0") == [("train", 100.0, 104.0)]
