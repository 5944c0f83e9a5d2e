"""The draw: its distribution, its filters, and random numbers that depend on (seed, position) alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.engines.sampling import draw, uniforms

LOGITS = torch.tensor([2.0, -1.0, 0.5, 0.5, -3.0, 1.0, -torch.inf, 0.0])


def splitmix64(state: int, count: int) -> list[int]:
    """The generator as its authors write it, one number at a time."""
    words, mask = [], (1 << 64) - 1
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        words.append(z ^ (z >> 31))
    return words


def many(count: int, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """`count` draws from LOGITS, row i with seed i % 100 at position i // 100."""
    rows = np.arange(count)
    return draw(
        LOGITS.repeat(count, 1),
        uniforms((rows % 100).astype(np.uint64), rows // 100),
        np.full(count, temperature, np.float32),
        np.full(count, top_p, np.float32),
        np.full(count, top_k),
    )


@given(st.integers(0, 2**64 - 1), st.integers(0, 50))
def test_uniforms_are_splitmix64_of_the_hashed_seed(seed: int, position: int) -> None:
    expected = (splitmix64(splitmix64(seed, 1)[0], position + 1)[-1] >> 11) * 2.0**-53
    assert uniforms(np.array([seed], np.uint64), np.array([position]))[0] == expected


def test_the_published_output_of_splitmix64() -> None:
    """First outputs for seed 1234567, as listed with the reference implementation."""
    assert splitmix64(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    """Chi-squared with 6 degrees of freedom; 22.5 is exceeded once in 1000 by chance, and the seeds are fixed."""
    ids, logprobs = many(20_000, temperature)
    expected = (LOGITS / temperature).softmax(-1).double().numpy()
    counts = np.bincount(ids, minlength=len(expected))
    assert counts[6] == 0  # probability 0 is never drawn
    possible = expected > 0
    assert ((counts - 20_000 * expected)[possible] ** 2 / (20_000 * expected[possible])).sum() < 22.5
    np.testing.assert_allclose(logprobs, np.log(expected[ids]), atol=1e-6)


def test_draws_at_one_position_of_neighbouring_seeds_are_independent() -> None:
    grid = uniforms(np.repeat(np.arange(300, dtype=np.uint64), 300), np.tile(np.arange(300), 300)).reshape(300, 300)
    for a, b in ((grid[:-1], grid[1:]), (grid[:, :-1], grid[:, 1:]), (grid[:-1, 1:], grid[1:, :-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / 300  # four standard errors of 300 x 300 pairs
    assert abs(grid.mean() - 0.5) < 4 * (1 / 12) ** 0.5 / 300


@pytest.mark.parametrize(
    ("top_p", "top_k", "support"),
    [
        (1.0, 1, {0}),
        (1.0, 2, {0, 5}),
        (1.0, 4, {0, 5, 2, 3}),
        (1.0, 100, {0, 1, 2, 3, 4, 5, 7}),
        (0.01, 0, {0}),
        (0.49, 0, {0}),  # shares 0.4985, 0.1834, 0.1112, 0.1112, 0.0675, 0.0248, 0.0034
        (0.6, 0, {0, 5}),
        (0.75, 0, {0, 5, 2}),  # of two equal tokens, the first
        (0.9, 0, {0, 5, 2, 3}),
        (0.9, 2, {0, 5}),
        (0.7, 2, {0}),  # of the two that top-k leaves, the first has 0.73
        (0.75, 2, {0, 5}),
    ],
)
def test_filters_leave_exactly_their_support(top_p: float, top_k: int, support: set[int]) -> None:
    ids, logprobs = many(20_000, 1.0, top_p, top_k)
    assert set(ids.tolist()) == support
    probabilities = LOGITS.softmax(-1).double().numpy()
    np.testing.assert_allclose(logprobs, np.log(probabilities[ids]), atol=1e-6)  # not renormalised
    kept = sorted(support)
    shares = probabilities[kept] / probabilities[kept].sum()
    np.testing.assert_allclose(np.bincount(ids, minlength=8)[kept] / 20_000, shares, atol=0.015)  # four standard errors


def test_each_row_has_its_own_settings() -> None:
    count = 3000
    kinds = np.arange(count) % 3  # greedy, top-k 2, free
    ids, logprobs = draw(
        LOGITS.repeat(count, 1),
        uniforms(np.arange(count, dtype=np.uint64), np.zeros(count, np.int64)),
        np.where(kinds == 0, 0.0, 2.0).astype(np.float32),
        np.ones(count, np.float32),
        np.where(kinds == 1, 2, 0),
    )
    assert set(ids[kinds == 0]) == {0} and set(ids[kinds == 1]) == {0, 5} and set(ids[kinds == 2]) == {0, 1, 2, 3, 4, 5, 7}
    np.testing.assert_allclose(logprobs[kinds == 0], LOGITS.log_softmax(-1)[0], atol=1e-6)
    np.testing.assert_allclose(logprobs[kinds != 0], (LOGITS / 2).log_softmax(-1)[ids[kinds != 0]], atol=1e-6)


@pytest.mark.parametrize("u", [0.0, 1.0 - 2.0**-53])
def test_the_ends_of_the_unit_interval_draw_tokens_that_can_be_drawn(u: float) -> None:
    logits = torch.full((1, 1000), -torch.inf)
    logits[0, 300:700] = torch.randn(400, generator=torch.Generator().manual_seed(0))
    for top_p in (1.0, 0.9):
        ids, logprobs = draw(logits, np.array([u]), np.ones(1, np.float32), np.array([top_p], np.float32), np.zeros(1, np.int64))
        assert 300 <= ids[0] < 700 and np.isfinite(logprobs[0])


def test_a_tiny_temperature_is_nearly_greedy() -> None:
    ids, logprobs = many(200, 1e-38)
    assert set(ids) == {0}
    np.testing.assert_array_equal(logprobs, 0.0)


def test_logits_that_are_not_numbers_show_in_the_logprob() -> None:
    logits = torch.zeros(2, 5)
    logits[1, 2] = torch.nan
    _, logprobs = draw(logits, np.full(2, 0.5), np.ones(2, np.float32), np.ones(2, np.float32), np.zeros(2, np.int64))
    assert np.isfinite(logprobs[0]) and np.isnan(logprobs[1])
