"""Groups are dealt evenly although generators load a new version one after the other."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from actors.allotment import FIRST_GRACE_S, Allotment


class Fleet:
    """Generators with credits, and what each was given."""

    def __init__(self, credits: dict[str, int], version: int = 0) -> None:
        self.allotment = Allotment()
        self.credits = dict(credits)
        self.given = dict.fromkeys(credits, 0)
        self.allotment.published(version, 0.0)
        for peer in credits:
            self.allotment.loaded(peer, version, 0.0)

    def deal(self, room: int, min_version: int, now_s: float) -> int:
        """Give out up to `room` groups; returns how many."""
        deal, count = self.allotment.deal(room, now_s), 0
        while count < room and (peer := deal.pick(self.credits.__getitem__, min_version)) is not None:
            self.credits[peer] -= 1
            self.given[peer] += 1
            count += 1
        return count


def test_the_first_to_load_does_not_get_everything() -> None:
    fleet = Fleet({"a": 8, "b": 8, "c": 8})
    fleet.allotment.published(1, 10.0)
    fleet.allotment.loaded("a", 1, 10.1)
    assert fleet.deal(12, 1, 10.1) == 4
    fleet.allotment.loaded("b", 1, 10.2)
    assert fleet.deal(8, 1, 10.2) == 4
    fleet.allotment.loaded("c", 1, 10.3)
    assert fleet.deal(4, 1, 10.3) == 4
    assert fleet.given == {"a": 4, "b": 4, "c": 4}


def test_what_was_kept_goes_to_the_others_when_a_load_takes_too_long() -> None:
    fleet = Fleet({"a": 8, "b": 8})
    fleet.allotment.published(1, 10.0)
    fleet.allotment.loaded("a", 1, 10.1)
    assert fleet.deal(6, 1, 10.1) == 3
    assert fleet.deal(3, 1, 10.0 + FIRST_GRACE_S) == 0
    assert fleet.deal(3, 1, 10.01 + FIRST_GRACE_S) == 3
    assert fleet.given == {"a": 6, "b": 0}


def test_the_time_follows_the_slowest_load_seen() -> None:
    fleet = Fleet({"a": 8, "b": 8})
    fleet.allotment.published(1, 10.0)
    for peer, at in (("a", 11.0), ("b", 30.0)):
        fleet.allotment.loaded(peer, 1, at)
    fleet.allotment.published(2, 100.0)
    fleet.allotment.loaded("a", 2, 101.0)
    assert fleet.deal(6, 2, 139.9) == 3
    assert fleet.deal(3, 2, 140.1) == 3


def test_nothing_is_kept_for_those_without_places_without_weights_or_gone() -> None:
    fleet = Fleet({"a": 8, "b": 0, "c": 8, "d": 8})
    fleet.allotment.loaded("c", -1, 0.0)
    fleet.allotment.drop("d")
    fleet.allotment.published(1, 10.0)
    fleet.allotment.loaded("a", 1, 10.0)
    assert fleet.deal(8, 1, 10.0) == 8


@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.integers(0, 30), st.data())
def test_everyone_loaded_deals_all_that_credits_allow_and_levels_them(credits: list[int], room: int, data: st.DataObject) -> None:
    fleet = Fleet({f"g{i}": credit for i, credit in enumerate(credits)})
    fleet.allotment.published(1, 1.0)
    order = data.draw(st.permutations(sorted(fleet.credits)))
    left = room
    for at, peer in enumerate(order):
        fleet.allotment.loaded(peer, 1, 1.0 + at / 100)
        left -= fleet.deal(left, 1, 1.0 + at / 100)
    assert sum(fleet.given.values()) == min(room, sum(credits))
    given_to = [peer for peer, count in fleet.given.items() if count]
    assert all(fleet.credits[peer] >= max(fleet.credits.values()) - 1 for peer in given_to), (
        "who was given any has no fewer places left than others"
    )
