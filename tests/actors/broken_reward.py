"""A reward with a bug: what it raises is no fault of the machinery."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from actors.rewards import Sample, Score


class Broken:
    """Raises KeyError for every sample."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        """Takes no options."""

    def score(self, sample: Sample) -> Score:
        """Never comes to a score."""
        raise KeyError("a field that no problem has")

    def close(self) -> None:
        """Nothing to end."""
