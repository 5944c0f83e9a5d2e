"""The samples of a run, read from its journal: for `rlsys samples`, the report, the timeline and TensorBoard. Text only where it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from protocol.codec import HEADER, decode
from protocol.errors import DataError, WireError
from protocol.journal import read_records, segments
from protocol.messages import Trajectory


def read_trajectories(run_dir: Path, *, newest_segments: int | None = None) -> Iterator[Trajectory]:
    """Every journaled trajectory, oldest first, also of a run that goes on; the first one of each (group, index) counts, as in the learner.

    `newest_segments` bounds the work on a large journal. Raises DataError when there is no journal, or another protocol version wrote it.
    """
    journal = run_dir / "journal"
    numbers = segments(journal) if journal.is_dir() else []
    if not numbers:
        raise DataError(f"{run_dir}: holds no journal")
    first = numbers[0] if newest_segments is None else numbers[-newest_segments:][0]
    seen: set[tuple[int, int]] = set()
    for record in read_records(journal, first, lambda damage: None):
        kind, *frames = record.frames
        if kind != b"trajectory":
            continue
        try:
            message = decode(frames, HEADER.unpack_from(frames[0])[2])
        except WireError as error:
            raise DataError(f"{journal}: {error}") from None
        assert isinstance(message, Trajectory)
        key = (message.group_id, message.index)
        if key not in seen:
            seen.add(key)
            yield message


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which samples to show. None and empty let everything through."""

    iteration: tuple[int, int] | None = None
    """First and last."""
    reward: tuple[float, float] | None = None
    verdicts: tuple[str, ...] = ()
    tokens: tuple[int, int] | None = None
    problem: str = ""
    """A part of the problem's id."""
    purpose: str = ""

    def admits(self, t: Trajectory) -> bool:
        """Whether a sample is shown."""
        return (
            (self.iteration is None or self.iteration[0] <= t.iteration <= self.iteration[1])
            and (self.reward is None or (t.score is not None and self.reward[0] <= t.score <= self.reward[1]))
            and (not self.verdicts or t.status in self.verdicts)
            and (self.tokens is None or self.tokens[0] <= len(t.token_ids) <= self.tokens[1])
            and self.problem in t.problem_id
            and self.purpose in ("", t.purpose)
        )


def record_of(t: Trajectory, text: Callable[[object], str]) -> dict[str, object]:
    """A sample as plain data with its prompt and completion as text."""
    return {
        "group_id": t.group_id,
        "index": t.index,
        "iteration": t.iteration,
        "purpose": t.purpose,
        "problem_id": t.problem_id,
        "score": t.score,
        "passed": t.passed,
        "verdict": t.status,
        "detail": t.detail,
        "finish_reason": t.finish_reason,
        "tokens": len(t.token_ids),
        "versions": [int(t.spans[0, 0]), int(t.spans[-1, 0])] if len(t.spans) else [],
        "generator": t.generator,
        "rewarder": t.rewarder,
        "sampling_s": round(t.finished_s - t.started_s, 3),
        "scoring_s": round(t.scoring_s, 4),
        "prompt": text(t.prompt_ids),
        "completion": text(t.token_ids),
    }
