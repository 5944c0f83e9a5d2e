"""Busy, idle and their causes sum to the wall time, whatever was recorded; devices and reading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.lines import BoundedLines
from rlsys.usage import UNRECORDED, Row, causes, device_usage, length, read_rows, tracks, usage

names = st.sampled_from(["train", "decode", "waiting:tasks", "waiting:ranks", "publish"])
any_rows = st.lists(st.builds(lambda n, a, d: Row(n, a, a + d), names, st.floats(-50, 150), st.floats(0, 40)), max_size=30)


@given(any_rows, st.floats(0, 50), st.floats(0, 50))
def test_causes_sum_to_the_wall_time(rows: list[Row], start: float, more: float) -> None:
    """Also when rows overlap, leave gaps, or lie outside."""
    seconds = causes(rows, start, start + more)
    assert sum(seconds.values()) == pytest.approx(more, abs=1e-6)
    assert all(value >= 0 for value in seconds.values())
    one = usage(rows, start, start + more)
    assert one.busy_s + sum(one.idle_s.values()) == pytest.approx(one.wall_s, abs=1e-6)


@given(st.lists(any_rows, min_size=1, max_size=4), st.floats(1, 50))
def test_a_device_is_busy_while_anyone_on_it_is(processes: list[list[Row]], wall: float) -> None:
    shared = device_usage(processes, 0.0, wall)
    assert shared.busy_s + sum(shared.idle_s.values()) == pytest.approx(wall, abs=1e-6)
    everyone = [(max(0.0, r.start_s), min(wall, r.end_s)) for rows in processes for r in rows if not r.name.startswith("waiting")]
    assert shared.busy_s == pytest.approx(length(everyone), abs=1e-6)


def test_by_hand() -> None:
    """generator-0 decodes [0,4], waits [4,10]; generator-1 waits for credit [0,3], decodes [3,6], then ends. Together busy [0,6]."""
    first = [Row("decode", 0, 4), Row("waiting:tasks", 4, 10)]
    second = [Row("waiting:reward credit", 0, 3), Row("decode", 3, 6)]
    assert usage(first, 0, 10).busy_share == pytest.approx(0.4)
    assert usage(second, 0, 10).idle_s == {"waiting:reward credit": 3, UNRECORDED: 4}
    both = device_usage([first, second], 0, 10)
    assert both.busy_s == 6
    assert both.idle_s == {"waiting:tasks": 2, UNRECORDED: 2}, "the 4 idle seconds are halved between the two"
    assert both.work_s == {"decode": 7}


def test_tracks_are_read_in_order_over_files_that_were_moved_aside(tmp_path: Path) -> None:
    events = tmp_path / "events"
    events.mkdir()
    record = {"offset_s": 100.0, "names": ["decode"]}
    lines = [json.dumps({**record, "rows": [[0, i * 10**6, (i + 1) * 10**6, 3, -1]]}) for i in range(10)]
    file = BoundedLines(events / "generator-0.jsonl", most_bytes=3 * len(lines[0]))
    for line in lines:
        file.write(line)
    file.close()
    BoundedLines(events / "generator-0+more.jsonl", 100).close()
    assert tracks(tmp_path) == ["generator-0", "generator-0+more"]
    assert tracks(tmp_path, main_only=True) == ["generator-0"]
    kept = sum(path.stat().st_size for path in events.rglob("generator-0.jsonl"))
    assert kept <= 6 * (len(lines[0]) + 1), "bounded: the file and the one before"
    [row] = read_rows(tmp_path, "generator-0")
    assert (row.name, row.end_s, row.iteration) == ("decode", 110.0, 3), "the newest is kept, and equal neighbours are one row"
