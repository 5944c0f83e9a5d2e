"""A reward that a random model can earn, so that groups differ and there is a gradient to publish."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlsys.plugins import Sample, Score


class Evenness:
    """The share of even characters: no sense in it, but no two samples agree."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        pass

    def score(self, sample: Sample) -> Score:
        """Between 0 and 1."""
        text = sample.completion
        value = sum(ord(letter) % 2 == 0 for letter in text) / max(1, len(text))
        return Score(value=value, status="accepted", passed=value > 0.5)

    def close(self) -> None:
        """Nothing was opened."""
