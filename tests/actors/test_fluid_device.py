"""The fluid model of a sampling device against a slow version that takes small steps of time, and by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.engines.fluid import FluidDevice


def device(slots: int = 100, sample_rate: float = 110.0, total_rate: float = 7000.0) -> FluidDevice[str]:
    return FluidDevice(sample_rate=sample_rate, total_rate=total_rate, slots=slots)


def test_a_lone_sequence_runs_at_its_own_rate() -> None:
    lone = device()
    lone.advance(5.0)
    lone.submit("a", 1100)
    assert lone.next_event() == pytest.approx(15.0)
    assert lone.advance(14.9) == []
    assert lone.sampled("a") == pytest.approx(1089.0)
    ((at, key),) = lone.advance(100.0)
    assert (at, key) == (pytest.approx(15.0), "a")
    assert lone.now == 100.0 and lone.tokens == pytest.approx(1100) and lone.busy_s == pytest.approx(10.0)
    assert lone.next_event() is None


def test_many_share_the_device_and_speed_up_as_others_end() -> None:
    """70 of 100 tokens and 70 of 200 at 7,000 per second: 50 each per second; then 70 remain at 100 per second."""
    many = device(slots=140)
    for i in range(140):
        many.submit(f"{i}", 100 if i % 2 else 200)
    ended = many.advance(10.0)
    assert [at for at, _ in ended[:70]] == pytest.approx([2.0] * 70)
    assert [at for at, _ in ended[70:]] == pytest.approx([3.0] * 70)
    assert many.tokens == pytest.approx(70 * 300)


def test_what_ended_counts_exactly_however_many_steps_it_took() -> None:
    often = device(slots=3)
    for i in range(50):
        often.submit(f"{i}", 7)
    while often.running:
        often.advance(often.now + 0.0013)
    assert often.tokens == 350
    often.submit("a", 1100)
    often.advance(often.now + 1.0)
    assert often.tokens == pytest.approx(460)
    often.cancel("a")
    assert often.tokens == pytest.approx(460)


def test_an_additive_device_does_one_after_the_other() -> None:
    """A step of 10 ms and 10 ms for each further sample: 50 samples take half a second for a token of each."""
    slow: FluidDevice[int] = FluidDevice(sample_rate=100.0, total_rate=100.0, slots=50, additive=True)
    for i in range(50):
        slow.submit(i, 4)
    assert slow.advance(1.99) == []
    assert [at for at, _ in slow.advance(3.0)] == pytest.approx([2.0] * 50)


def test_a_freed_slot_is_taken_at_that_instant() -> None:
    narrow = device(slots=1)
    narrow.submit("a", 110)
    narrow.submit("b", 220)
    assert (narrow.running, narrow.waiting) == (1, 1)
    assert narrow.advance(10.0) == [(pytest.approx(1.0), "a"), (pytest.approx(3.0), "b")]


def test_stalls_and_prefills_hold_everything_up() -> None:
    stalled = device()
    stalled.submit("a", 110)
    stalled.advance(0.5)
    stalled.stall(2.0)
    stalled.submit("b", 110, prefill_s=1.0)
    assert stalled.sampled("a") == pytest.approx(55.0)
    stalled.advance(3.0)
    assert stalled.sampled("a") == pytest.approx(55.0)
    assert stalled.advance(10.0) == [(pytest.approx(4.0), "a"), (pytest.approx(4.5), "b")]


def test_cancelled_sequences_leave_their_share_and_their_slot() -> None:
    shared = device(slots=2, sample_rate=100.0, total_rate=100.0)
    for name in "abc":
        shared.submit(name, 100)
    shared.advance(1.0)
    assert shared.cancel("a") == pytest.approx(50.0)
    assert (shared.running, shared.waiting) == (2, 0)
    assert shared.cancel("never heard of") is None
    assert shared.advance(9.0) == [(pytest.approx(2.0), "b"), (pytest.approx(2.5), "c")]


@pytest.mark.parametrize("change", [{"slots": 0}, {"sample_rate": 0.0}, {"total_rate": -1.0}])
def test_a_device_that_cannot_work_is_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="above 0"):
        device(**change)  # type: ignore[arg-type]


def by_small_steps(jobs: list[tuple[float, float]], slots: int, sample_rate: float, total_rate: float, dt: float) -> list[float]:
    """When each (arrival, tokens) ends, advancing everything by `dt` at a time."""
    left = [tokens for _, tokens in jobs]
    ends = [0.0] * len(jobs)
    running: list[int] = []
    waiting: list[int] = []
    arrived, now = 0, 0.0
    while arrived < len(jobs) or running or waiting:
        while arrived < len(jobs) and jobs[arrived][0] <= now:
            waiting.append(arrived)
            arrived += 1
        while waiting and len(running) < slots:
            running.append(waiting.pop(0))
        now += dt
        for i in running:
            left[i] -= dt * min(sample_rate, total_rate / len(running))
        for i in [i for i in running if left[i] <= 0]:
            running.remove(i)
            ends[i] = now
    return ends


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 3), st.floats(1, 60)), min_size=1, max_size=8), st.integers(1, 5), st.floats(5, 40), st.floats(10, 80)
)
def test_it_agrees_with_small_steps_of_time(jobs: list[tuple[float, float]], slots: int, sample_rate: float, total_rate: float) -> None:
    jobs = sorted(jobs)
    exact: FluidDevice[int] = FluidDevice(sample_rate=sample_rate, total_rate=total_rate, slots=slots)
    ends: dict[int, float] = {}
    for i, (arrival, tokens) in enumerate(jobs):
        ends |= {key: at for at, key in exact.advance(arrival)}
        exact.submit(i, tokens)
    ends |= {key: at for at, key in exact.advance(1000.0)}
    slow = by_small_steps(jobs, slots, sample_rate, total_rate, 0.002)
    assert [ends[i] for i in range(len(jobs))] == pytest.approx(slow, abs=0.08)
    assert exact.tokens == pytest.approx(sum(tokens for _, tokens in jobs))
