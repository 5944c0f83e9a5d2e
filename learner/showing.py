"""What the learner shows of an iteration besides numbers: how its samples spread, and a few of them to read. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from learner.batcher import Group
from protocol.messages import Distribution, Trajectory, token_versions

BINS = 30
RATIO_EDGES = np.linspace(0.0, 2.0, 41)
"""Policy probability over behaviour probability; larger ones count in the last bin."""

Counts = tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]


def spreads(groups: Sequence[Group], iteration: int) -> dict[str, Counts]:
    """Edges and counts by name: completion lengths, scores of samples, staleness of tokens. Names without a value are left out."""
    members = [t for group in groups for t in group.trajectories]
    ages = [iteration - token_versions(t.spans) for t in members]
    found = {
        "data/completion_lengths": np.array([len(t.token_ids) for t in members], np.float64),
        "reward/scores": np.array([t.score for t in members if t.score is not None], np.float64),
        "staleness/tokens": np.concatenate(ages).astype(np.float64) if ages else np.zeros(0),
    }
    return {name: _counts(values, whole=name != "reward/scores") for name, values in found.items() if len(values)}


def _counts(values: npt.NDArray[np.float64], *, whole: bool) -> Counts:
    """Whole numbers get bins around them as long as there are few."""
    low, high = float(values.min()), float(values.max())
    few = whole and high - low < BINS
    edges = np.arange(low - 0.5, high + 1.0) if few else np.linspace(low, high if high > low else low + 1e-3, BINS + 1)
    counts, _ = np.histogram(values, edges)
    return edges, counts.astype(np.int64)


def to_read(groups: Sequence[Group], count: int) -> tuple[Trajectory, ...]:
    """`count` samples that tell most: the best and the worst of the first groups in turn."""
    picked: list[Trajectory] = []
    for group in sorted(groups, key=lambda g: g.group_id):
        scored = sorted(group.scored or group.trajectories, key=lambda t: (t.score is None, t.score or 0.0))
        picked += [scored[-1]] if len(scored) < 2 else [scored[-1], scored[0]]
        if len(picked) >= count:
            break
    return tuple(picked[:count])


def distributions(identity: str, iteration: int, time_s: float, found: Mapping[str, Counts]) -> list[Distribution]:
    """As messages to the dashboard."""
    return [
        Distribution(identity=identity, iteration=iteration, time_s=time_s, name=name, edges=edges.astype(np.float32), counts=counts)
        for name, (edges, counts) in found.items()
    ]
