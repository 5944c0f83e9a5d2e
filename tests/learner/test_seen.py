"""The set of group numbers is a set, and does not grow with the run."""

from __future__ import annotations

import random
import sys

import pytest

from learner.seen import Seen


def test_it_holds_what_a_set_holds() -> None:
    rng = random.Random(3)
    numbers = [rng.choice((0, 1 << 40)) + rng.randrange(20_000) for _ in range(15_000)]
    seen, expected = Seen(numbers[:5_000]), set(numbers)
    for number in numbers:
        seen.add(number)
    for number in [*numbers, *(n + d for n in numbers[:2_000] for d in (-1, 1, 4096)), 0, 1 << 60]:
        assert (number in seen) == (number in expected), number
    with pytest.raises(ValueError, match="expected 0 or more"):
        seen.add(-1)


def test_half_a_million_groups_that_end_out_of_order_are_a_few_blocks() -> None:
    order, rng = list(range(500_000)), random.Random(4)
    for start in range(0, len(order), 300):
        part = order[start : start + 300]
        rng.shuffle(part)
        order[start : start + 300] = part
    seen = Seen(order)
    blocks = seen._blocks
    assert len(blocks) == 123 and len({id(bits) for bits in blocks.values()}) == 2, "all full blocks are one object"
    assert sum(map(sys.getsizeof, blocks.values())) < 123 * 600
