"""Busy and waiting seconds sum to the wall time, whatever happens."""

import re
import threading
from collections.abc import Iterator
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from protocol.intervals import ACTIVITIES, Recorder, here, phase, record_here


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@given(st.lists(st.tuples(st.sampled_from(["train", "waiting:x", "decode", "drain"]), st.floats(0, 5)), max_size=60))
def test_totals_and_rows_sum_to_the_wall_time(steps: list[tuple[str, float]]) -> None:
    clock = Clock()
    recorder = Recorder("p", clock=clock)
    drained: list[tuple[str, float]] = []

    def take() -> Iterator[tuple[str, float]]:
        message = recorder.drain()
        for name, start, end, _, _ in message.rows:
            yield message.names[name], (end - start) / 1e6

    for name, seconds in steps:
        if name == "drain":
            drained += take()
        else:
            recorder.enter(name)
        clock.now += seconds
    drained += take()
    wall = clock.now - 100.0
    assert abs(sum(recorder.totals().values()) - wall) < 1e-6
    assert abs(sum(seconds for _, seconds in drained) - wall) < 1e-5 * (len(drained) + 1)


def test_equal_neighbours_are_one_interval_and_keep_their_start() -> None:
    clock = Clock()
    recorder = Recorder("p", clock=clock)
    recorder.enter("waiting:tasks", "dispatcher")
    clock.now += 1
    recorder.enter("waiting:tasks", "dispatcher", "news")
    clock.now += 1
    assert recorder.activity.since_s == 100.0
    assert recorder.activity.detail == "news"
    assert recorder.totals()["waiting:tasks"] == 2.0


def test_during_goes_back_to_what_was() -> None:
    clock = Clock()
    recorder = Recorder("p", clock=clock)
    recorder.enter("train")
    with recorder.during("publish"):
        clock.now += 3
    assert recorder.activity.name == "train"
    assert recorder.totals()["publish"] == 3.0


def test_rows_are_bounded_and_losses_counted() -> None:
    clock = Clock()
    recorder = Recorder("p", clock=clock, max_rows=10)
    for i in range(50):
        recorder.enter(f"step {i}")
        clock.now += 1
    assert recorder.rows_lost > 30
    assert len(recorder.drain().rows) <= 10
    assert abs(sum(recorder.totals().values()) - 50) < 1e-9


def test_a_phase_goes_to_the_recorder_of_its_thread_and_keeps_the_iteration() -> None:
    clock = Clock()
    recorder = Recorder("p", clock=clock)

    def work() -> None:
        record_here(recorder)
        recorder.enter("train", iteration=7)
        with phase("optimizer"):
            clock.now += 2
        clock.now += 1

    def unrecorded() -> None:
        with phase("nobody records this"):
            seen.append(here())

    seen: list[object] = []
    for body in (work, unrecorded):
        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
    assert seen == [(-1, -1)]
    message = recorder.drain()
    rows = [(message.names[n], b - a, k) for n, a, b, k, _ in message.rows.tolist()]
    assert rows == [("optimizer", 2_000_000, 7), ("train", 1_000_000, 7)]


def test_without_keeping_there_are_totals_and_no_rows() -> None:
    clock = Clock()
    recorder = Recorder("p", clock=clock, keep=False)
    recorder.enter("train")
    clock.now += 5
    assert recorder.totals()["train"] == 5
    assert len(recorder.drain().rows) == 0


def test_the_documentation_lists_every_activity() -> None:
    text = (Path(__file__).parents[2] / "docs" / "observe.md").read_text()
    rows = dict(re.findall(r"^\| `([a-z0-9: -]+)` \| (.*) \|$", text, flags=re.M))
    assert {name: rows.get(name) for name in ACTIVITIES} == ACTIVITIES
