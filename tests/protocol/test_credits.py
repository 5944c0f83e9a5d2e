"""No producer sends more than was granted, and no consumer holds more than its window, whatever the order of events."""

from hypothesis import given
from hypothesis import strategies as st

from protocol.credits import Incoming, Outgoing


def test_the_peer_with_most_credit_is_next() -> None:
    credits = Outgoing()
    for peer, total in (("a", 2), ("b", 5), ("c", 0)):
        credits.add_peer(peer)
        credits.granted(peer, total)
    order = []
    while (peer := credits.best()) is not None:
        credits.sent(peer)
        order.append(peer)
    assert order == ["b", "b", "b", "a", "b", "a", "b"]


def test_late_and_repeated_credits_change_nothing() -> None:
    credits = Outgoing()
    credits.add_peer("a")
    credits.granted("a", 5)
    credits.granted("a", 3)
    credits.granted("a", 5)
    assert credits.left("a") == 5
    credits.granted("stranger", 9)
    assert credits.left("stranger") == 0


@given(window=st.integers(1, 20), events=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=200))
def test_a_window_is_never_exceeded_and_never_starves(window: int, events: list[tuple[int, int]]) -> None:
    """Three producers send whenever they may; the consumer works off messages in any order."""
    incoming, producers = Incoming(window), [Outgoing() for _ in range(3)]
    held = [0, 0, 0]
    for i, producer in enumerate(producers):
        incoming.add_peer(f"p{i}")
        producer.add_peer("consumer")
    for who, kind in events:
        if kind == 0 and producers[who].left("consumer") > 0:
            producers[who].sent("consumer")
            held[who] += 1
        elif kind == 1 and held[who]:
            held[who] -= 1
            incoming.done(f"p{who}")
        elif kind == 2:
            for peer, total in incoming.grants():
                producers[int(peer[1])].granted("consumer", total)
        assert sum(held) <= max(window, 3)
    for i in range(3):
        for _ in range(held[i]):
            incoming.done(f"p{i}")
    for peer, total in incoming.grants():
        producers[int(peer[1])].granted("consumer", total)
    assert all(producer.left("consumer") > 0 for producer in producers)


def test_free_places_are_told_in_quarters_of_the_window() -> None:
    incoming = Incoming(window=64)
    incoming.add_peer("a")
    told = incoming.grants()
    for _ in range(160):
        incoming.done("a")
        told += incoming.grants()
    assert told == [("a", total) for total in range(64, 64 + 161, 16)]
