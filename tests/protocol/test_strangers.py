"""Refused peers are counted, and named by address now and then."""

from protocol.strangers import EVERY_S, MANY, UNKNOWN, Patience, Strangers, closed_here

TABLE = """
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0
   1: 0100007F:1F90 0700000A:C001 06 00000000:00000000 03:00000000 00000000     0        0 0 3 0
   2: 0100007F:1F90 0800000A:C002 01 00000000:00000000 00:00000000 00000000     0        0 2 1 0
   3: 0100007F:1F91 0900000A:C003 06 00000000:00000000 03:00000000 00000000     0        0 0 3 0
   4: 00000000000000000000000001000000:1F90 000080FE00000000000000000A000000:C004 05 00000000:00000000 00:00000000 00000000 0 0 3 1 0
   5: 0100007F:1F90 0A00000A:C005 08 00000000:00000000 00:00000000 00000000     0        0 2 1 0
""".strip("\n").splitlines()


def test_the_kernel_tells_whose_connection_this_end_closed() -> None:
    assert closed_here(8080, TABLE) == {("10.0.0.7", 0xC001), ("fe80::a", 0xC004)}
    assert closed_here(1, TABLE) == set()


def test_each_connection_counts_once_and_each_address_has_a_line_every_ten_seconds() -> None:
    strangers = Strangers()
    closed = {("10.0.0.7", 1), ("10.0.0.7", 2)}
    assert strangers.lines(2, closed, 100.0) == ["2 connections from 10.0.0.7 (2 so far from everywhere)"]
    assert strangers.lines(0, closed, 101.0) == []
    closed = {("10.0.0.7", port) for port in range(2, 50)} | {("10.0.0.8", 1)}
    assert strangers.lines(1, closed, 102.0) == ["1 connections from 10.0.0.8 (50 so far from everywhere)"]
    assert strangers.unsaid
    assert strangers.lines(0, closed, 100.0 + EVERY_S) == ["47 connections from 10.0.0.7 (50 so far from everywhere)"]
    assert not strangers.unsaid


def test_a_failure_whose_connection_is_gone_is_counted_too() -> None:
    assert Strangers().lines(3, set(), 0.0) == [f"3 connections from {UNKNOWN} (3 so far from everywhere)"]


def test_no_number_of_addresses_makes_it_grow() -> None:
    strangers = Strangers()
    for number in range(3 * MANY):
        strangers.lines(1, {(f"a{number}", 1)}, float(number))
    assert len(strangers._said_s) <= MANY + 1


def test_a_few_refusals_cost_no_pause_and_a_flood_is_worked_off_at_a_steady_rate() -> None:
    patience = Patience()
    assert not any(patience.refuse(10.0 + i) for i in range(100))
    now_s, refused = 200.0, 0
    while now_s < 205.0:  # as fast as it may, as a reader that takes no time
        refused += 1
        now_s = patience.refuse(now_s) or now_s
    assert 0.9 * Patience.PER_S * 5 <= refused <= 1.1 * Patience.PER_S * 5
    assert patience.refuse(300.0) == 0.0
