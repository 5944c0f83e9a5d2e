"""Scores before they become advantages: several rewards made one, and DAPO's penalty for length. Pure, without torch."""

from __future__ import annotations

from collections.abc import Mapping


def weighted_score(parts: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Sum of weight * part. Raises ValueError when a weighted part is missing or a part has no weight."""
    if parts.keys() != weights.keys():
        raise ValueError(f"reward weights name {sorted(weights)} but the trajectory has the parts {sorted(parts)}")
    return sum(weights[name] * parts[name] for name in sorted(parts))


def overlong_penalty(num_tokens: int, max_tokens: int, cache_tokens: int) -> float:
    """0 up to `max_tokens` - `cache_tokens`, from there down in a line to -1 at `max_tokens`, -1 beyond.

    Added to the score. Source: DAPO, eq. 13; `cache_tokens` is its L_cache.
    """
    over = num_tokens - (max_tokens - cache_tokens)
    return -min(max(over, 0) / cache_tokens, 1.0)


def shaped_score(
    score: float,
    parts: Mapping[str, float],
    num_tokens: int,
    *,
    max_tokens: int,
    weights: Mapping[str, float] | None,
    penalty_tokens: int | None,
) -> float:
    """The score that advantages are made of: weighted if `weights` are given, less the penalty for length if `penalty_tokens` is."""
    value = score if weights is None else weighted_score(parts, weights)
    return value if penalty_tokens is None else value + overlong_penalty(num_tokens, max_tokens, penalty_tokens)
