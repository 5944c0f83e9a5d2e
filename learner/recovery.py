"""What a restarted learner finds: the newest good checkpoint, and in the journal everything that this does not know yet.

    ledger.checkpoints --newest whose files verify--> state of version c          journal --> trajectories without a terminal state,
                                                                                              batches recorded from iteration c on
The recorded batches are trained again as they were; then the learner waits for the next one like any other. What the journal read here
decides is pure (`sort_out`).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import msgpack

from learner.checkpoint_files import verify
from protocol.codec import decode
from protocol.errors import DataError, WireError
from protocol.journal import Record, segments
from protocol.ledger import Checkpoint, Ledger
from protocol.messages import Trajectory

log = logging.getLogger("rlsys.learner")

TRAJECTORY, BATCH, VOID = b"trajectory", b"batch", b"void"
"""Kinds of journal records: a trajectory as it came, the groups of a batch, and "recorded batches from here on are void"."""


@dataclass(frozen=True, slots=True)
class Journaled:
    """A trajectory on record, and in which segment."""

    segment: int
    trajectory: Trajectory


@dataclass(frozen=True, slots=True)
class Part:
    """A batch on record: one part of an iteration (the whole one, but under `minibatch`)."""

    iteration: int
    part: int
    groups: list[int]


@dataclass(frozen=True, slots=True)
class Recovered:
    """What the journal holds beyond a checkpoint."""

    trajectories: list[Journaled]
    """The first of each (group, index) whose group has no terminal state, in the order of the journal."""
    batches: list[Part]
    """In order and without a gap from the checkpoint's version on; all their trajectories are there."""
    void_from: int | None = None
    """Batches recorded from this iteration on cannot be trained again, because what they are made of is damaged."""


def sort_out(records: Iterable[Record], run: int, ended: Collection[int], version: int, group_size: int, parts: int) -> Recovered:
    """Sort journal records for a learner that goes on at `version`. `ended`: groups with a terminal state."""
    found: dict[tuple[int, int], Journaled] = {}
    recorded: dict[tuple[int, int], Part] = {}
    for record in records:
        kind, *frames = record.frames
        if kind == TRAJECTORY:
            try:
                message = decode(frames, run, "the journal")
            except WireError as error:
                log.warning("a journaled trajectory is left out: %s", error)
                continue
            if isinstance(message, Trajectory) and message.group_id not in ended:
                found.setdefault((message.group_id, message.index), Journaled(record.segment, message))
        elif kind == BATCH:
            content = msgpack.unpackb(frames[0])
            part = Part(content["iteration"], content.get("part", 0), content["groups"])
            recorded[part.iteration, part.part] = part
        elif kind == VOID:
            first = msgpack.unpackb(frames[0])["from"]
            recorded = {key: part for key, part in recorded.items() if key[0] < first}
    batches: list[Part] = []
    expected = (version, 0)
    while expected in recorded and all((group, i) in found for group in recorded[expected].groups for i in range(group_size)):
        batches.append(recorded[expected])
        iteration, part_number = expected
        expected = (iteration, part_number + 1) if part_number + 1 < parts else (iteration + 1, 0)
    beyond = any(key >= expected for key in recorded)
    if beyond:  # an iteration is void as a whole
        batches = [part for part in batches if part.iteration < expected[0]]
    return Recovered(list(found.values()), batches, expected[0] if beyond else None)


def newest_good(ledger: Ledger, run_dir: Path) -> Checkpoint | None:
    """The newest committed checkpoint whose files verify; a warning names each newer one that does not, and the ledger goes back to it.

    None when nothing was committed. Raises DataError when no checkpoint is good and the journal no longer reaches back to the start.
    """
    committed = ledger.checkpoints()
    for checkpoint in committed:
        try:
            found = verify(run_dir / checkpoint.directory)
            if found.manifest_sha256 != checkpoint.sha256:
                raise DataError(f"{run_dir / checkpoint.directory}: is not the checkpoint that was committed")
        except DataError as error:
            log.warning("checkpoint v%d is not used: %s", checkpoint.number, error)
            continue
        if checkpoint is not committed[0]:
            log.warning("going back to the last good checkpoint, v%d", checkpoint.number)
            ledger.roll_back(checkpoint.number)
        return checkpoint
    if committed:
        if min(segments(run_dir / "journal"), default=1) > 0:
            raise DataError(f"{run_dir}: no checkpoint is good, and the start of the journal has been removed (journal.keep)")
        log.warning("no checkpoint is good: training again from the start, from the journal")
        ledger.roll_back(0)
    return None
