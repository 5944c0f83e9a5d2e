"""Commits: when to take the learner's state, and how it gets to disk while training goes on.

    trainer's thread: due? -> snapshot (copies to host memory) --> writer thread: write, sync, rename --> ledger.commit (one transaction)

A commit holds the checkpoint's hash and the terminal states since the last one. What is not committed is trained again after a death, from
the recorded batches, so commits may be as rare as they are dear.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from learner.checkpoint import Snapshot, snapshot, write
from learner.checkpoint_files import directory_name, keep, remove
from learner.settings import CheckpointSettings
from learner.steps import TrainStep
from protocol.errors import DeadlineExceeded, UserError
from protocol.ledger import Checkpoint, Ledger
from protocol.messages import GroupOutcome

log = logging.getLogger("rlsys.learner")

SHARE = 0.02
"""Of the time, what commits may cost with commit_every `auto`."""
LONGEST_S = 3600.0
"""Longest wait for a checkpoint to be written: a large state on a slow shared disk, not one that hangs."""
FAILURES = 3
"""Commits in a row that may fail (a full disk) before the run ends."""


class CommitPolicy:
    """When the next commit is due. Pure: the caller tells the time."""

    def __init__(self, every: int | Literal["auto"], keep_every: int | None = None) -> None:
        """`keep_every`: checkpoints of these iterations stay for good, so they are written whatever `every` says."""
        self._every, self._keep_every = every, keep_every
        self._last_number, self._last_s = 0, float("-inf")
        self.cost_s = 0.0
        """Of the last commit: what the trainer stood still for, and what the writer computed."""

    def due(self, number: int, now_s: float, *, last: bool) -> bool:
        """Whether version `number` shall be committed. The last one always is, unless commits are off."""
        if self._every == 0:
            return False
        if last or self.stays(number):
            return True
        if self._every == "auto":
            return now_s - self._last_s >= self.cost_s / SHARE
        return number - self._last_number >= self._every

    def stays(self, number: int) -> bool:
        """Whether a checkpoint of this version is never removed."""
        return self._keep_every is not None and number > 0 and number % self._keep_every == 0

    def taken(self, number: int, now_s: float) -> None:
        """A commit of `number` has begun."""
        self._last_number, self._last_s = number, now_s


@dataclass(frozen=True, slots=True)
class Pending:
    """What the commit's transaction says beside the checkpoint's hash."""

    incarnation: int
    outcomes: tuple[GroupOutcome, ...]
    journal_end: tuple[int, int]
    first_segment: int


class Committer:
    """Writes one checkpoint at a time, in a thread. Every rank has one; only rank 0's has a ledger."""

    def __init__(
        self,
        directory: Path,
        policy: CommitPolicy,
        *,
        checkpoints: CheckpointSettings,
        ledger: Ledger | None = None,
        on_commit: Callable[[Pending, int], object] = lambda pending, oldest: None,
        longest_s: float = LONGEST_S,
    ) -> None:
        """`longest_s`: longest wait for the commit before, and of its writer for the other ranks' parts."""
        self._longest_s = longest_s
        self._directory, self._keep, self._ledger, self._on_commit = directory, checkpoints, ledger, on_commit
        self.policy = policy
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._failures = 0
        self.committed = 0
        """Number of the newest committed version in this process."""
        self.seconds = 0.0
        """What commits have cost so far."""

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def due(self, number: int, *, last: bool) -> bool:
        """Whether to commit after the iteration that makes version `number`. Raises what went wrong in the background."""
        self._raise()
        waits = last or self.policy.stays(number)  # for the checkpoint that is being written; any other is left out then
        return (waits or not self.busy) and self.policy.due(number, time.monotonic(), last=last)

    def begin(self, step: TrainStep, number: int, pending: Pending | None) -> None:
        """Take the state and write it in the background. A collective call; `pending` on rank 0."""
        self.wait()
        started = time.monotonic()
        self.policy.taken(number, started)
        taken = snapshot(step, number)
        stood_s = time.monotonic() - started
        self._thread = threading.Thread(target=self._write, args=(taken, pending, stood_s), name="commit", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written. Raises what went wrong, and DeadlineExceeded when it takes too long."""
        if self._thread is not None:
            self._thread.join(self._longest_s)
            if self._thread.is_alive():
                raise DeadlineExceeded(
                    f"{self._directory}: the learner waited {self._longest_s:g} s for its checkpoint to be written; is the disk still there?"
                )
            self._thread = None
        self._raise()

    def _write(self, taken: Snapshot, pending: Pending | None, stood_s: float) -> None:
        try:
            done = write(taken, self._directory, timeout_s=self._longest_s)
            if done is not None and pending is not None and self._ledger is not None:
                checkpoint = Checkpoint(
                    number=taken.iteration,
                    incarnation=pending.incarnation,
                    directory=f"{self._directory.name}/{directory_name(taken.iteration)}",
                    sha256=done.manifest_sha256,
                    journal_segment=pending.journal_end[0],
                    journal_end=pending.journal_end[1],
                    first_segment=pending.first_segment,
                    committed_s=time.time(),
                )
                self._ledger.commit(checkpoint, pending.outcomes)
                self.committed = taken.iteration
                self._on_commit(pending, self._prune(self._ledger))
            self._failures = 0
            self.policy.cost_s = stood_s + time.thread_time()
            self.seconds += self.policy.cost_s
        except UserError as error:  # a full disk: what was committed before stands, and the next commit carries these states too
            self._failures += 1
            log.warning("%s; the last good checkpoint is v%d", error, self.committed)
            if self._failures >= FAILURES:
                self._error = error
        except BaseException as error:  # carried to the trainer's thread
            self._error = error

    def _prune(self, ledger: Ledger) -> int:
        """Remove old checkpoints, rows first. Returns the oldest journal segment that those that stay need."""
        rows = {checkpoint.number: checkpoint for checkpoint in ledger.checkpoints()}
        stay = keep(list(rows), self._keep.keep_last, self._keep.keep_every)
        ledger.forget_checkpoints(set(rows) - stay)
        for number in sorted(set(rows) - stay):
            path = self._directory / directory_name(number)
            if path.exists():
                remove(path)
        return min(rows[number].first_segment for number in stay)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
