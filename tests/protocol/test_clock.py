"""The offset between two clocks is found within half of the shortest round trip, whatever the queues."""

from hypothesis import given
from hypothesis import strategies as st

from protocol.clock import Alignment, now_s


@given(
    st.floats(-5000, 5000),
    st.lists(st.tuples(st.floats(0, 2), st.floats(0, 1), st.floats(0, 2)), min_size=1, max_size=20),
)
def test_the_truth_lies_within_the_stated_error(ahead: float, exchanges: list[tuple[float, float, float]]) -> None:
    """`ahead`: what the supervisor's clock shows more. Each exchange: way there, time at the supervisor, way back."""
    alignment = Alignment()
    now = 1e6
    for there, stay, back in exchanges:
        alignment.observe(now, now + there + ahead, now + there + stay + ahead, now + there + stay + back)
        now += 0.5
    shortest = min(there + back for there, _, back in exchanges)
    assert abs(alignment.error_s - shortest / 2) < 1e-6
    assert abs(alignment.offset_s - ahead) <= 2 * alignment.error_s + 1e-6, "twice, because what may be 0 is taken for 0"


def test_clocks_that_agree_within_the_error_are_left_alone() -> None:
    alignment = Alignment()
    assert alignment.offset_s == 0.0
    alignment.observe(10.0, 10.3, 10.3, 10.4)
    assert alignment.error_s > 0.1
    assert alignment.offset_s == 0.0


def test_only_the_last_minute_counts() -> None:
    alignment = Alignment()
    alignment.observe(0.0, 1000.0, 1000.0, 0.0)
    for i in range(120):
        alignment.observe(float(i), i + 2000.05, i + 2000.05, i + 0.1)
    assert abs(alignment.offset_s - 2000) < 1e-6


def test_this_process_never_goes_back() -> None:
    times = [now_s() for _ in range(1000)]
    assert times == sorted(times)
