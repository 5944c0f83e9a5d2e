"""What a reward gave back, before it is believed."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

from actors.rewards import Score
from protocol.errors import ConfigError
from protocol.messages import NOT_FINITE


def sound(score: Any, reward: str) -> Score:
    """The score, with a value and parts that are finite numbers; else without them, and with the status `not_finite`.

    NaN and infinity are no verdict about the sample, so its score is missing, never 0. Raises ConfigError that names the reward for what is
    no Score.
    """
    if not isinstance(score, Score):
        raise ConfigError(f"reward {reward!r}: score() returned a {type(score).__name__}, expected a Score")
    if not isinstance(score.parts, Mapping) or not isinstance(score.status, str):
        raise ConfigError(f"reward {reward!r}: score() returned {score!r}, expected a status of text and parts by name")
    found: tuple[tuple[str, Any], ...] = (("value", score.value), *((f"part {name!r}", value) for name, value in score.parts.items()))
    for name, value in found:
        if value is None and name == "value":
            continue
        if not isinstance(value, numbers.Real):
            raise ConfigError(f"reward {reward!r}: the {name} of its Score is a {type(value).__name__}, expected a number")
        if not math.isfinite(value):
            return Score(value=None, status=NOT_FINITE, detail=f"the {name} of its score is {float(value)}")
    return score
