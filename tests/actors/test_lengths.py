"""Simulated lengths: the mean is the one that was asked for, the cap holds, and a seed fixes a length."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from actors.engines.lengths import LengthOptions, Lengths, capped_mean, location
from protocol.errors import DataError


def drawn(lengths: Lengths, count: int = 20_000) -> list[int]:
    return [lengths(seed * 7919) for seed in range(count)]


@pytest.mark.parametrize(("mean", "sigma", "cap"), [(6000, 0.9, 16_000), (8000, 0.9, 32_000), (300, 0.3, None), (50, 0.0, None)])
def test_the_mean_after_the_cap_is_the_one_asked_for(mean: float, sigma: float, cap: int | None) -> None:
    lengths = Lengths(LengthOptions(mean=mean, sigma=sigma, cap=cap))
    found = drawn(lengths)
    assert np.mean(found) == pytest.approx(mean, rel=0.02)
    assert lengths.mean == mean
    assert max(found) <= (cap or np.inf) and min(found) >= 1
    assert capped_mean(location(mean, sigma, cap), sigma, cap) == pytest.approx(mean)


def test_the_spread_is_sigma_where_the_cap_does_not_cut() -> None:
    found = np.log(drawn(Lengths(LengthOptions(mean=5000, sigma=0.7))))
    assert found.std() == pytest.approx(0.7, rel=0.03)


def test_a_seed_fixes_a_length() -> None:
    first, second = (Lengths(LengthOptions(mean=6000, cap=16_000)) for _ in range(2))
    assert drawn(first, 50) == drawn(second, 50)
    assert len(set(drawn(first, 50))) > 40


def test_stragglers_have_their_share_and_length() -> None:
    lengths = Lengths(LengthOptions(mean=600, cap=1600, straggler_share=1 / 200, straggler_tokens=60_000))
    found = drawn(lengths, 40_000)
    assert found.count(60_000) / 40_000 == pytest.approx(1 / 200, rel=0.15)
    assert [lengths.is_straggler(seed * 7919) for seed in range(40_000)] == [tokens == 60_000 for tokens in found]
    assert lengths.mean == pytest.approx(600 * 199 / 200 + 300)


@pytest.mark.parametrize("text", ["[3, 5, 9]", "9\n3\n5\n"])
def test_recorded_lengths_are_drawn_alike(text: str, tmp_path: Path) -> None:
    (tmp_path / "lengths").write_text(text)
    lengths = Lengths(LengthOptions(file=tmp_path / "lengths"))
    counts = np.unique(drawn(lengths, 3000), return_counts=True)
    assert list(counts[0]) == [3, 5, 9] and min(counts[1]) > 900
    assert lengths.mean == pytest.approx(17 / 3)
    written_out = Lengths(LengthOptions(values=(9, 3, 5)))
    assert drawn(written_out, 100) == drawn(lengths, 100)


@pytest.mark.parametrize("text", ["", "[]", "[1, 0]", "[1.5]", "a\nb", '["a"]', "[true]"])
def test_a_file_without_lengths_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "lengths").write_text(text)
    with pytest.raises(DataError, match="lengths"):
        Lengths(LengthOptions(file=tmp_path / "lengths"))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "either mean"),
        ({"mean": 5, "file": "x"}, "either mean"),
        ({"values": [5], "file": "x"}, "either mean"),
        ({"values": []}, "at least 1"),
        ({"mean": 500, "cap": 500}, "below cap"),
        ({"mean": 5, "straggler_share": 0.1}, "belong together"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, object], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        LengthOptions.model_validate(options)
