"""Training again from the journal: the recorded batches in their order, without generators, reward actors or dispatcher.

    journal --trajectories--> groups --recorded batch k--> [ batcher.build -> step ] --> numbers of iteration k

The same step, number of ranks and threads give the same bits on a CPU. Changed settings answer "what if" on recorded data.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgpack

from learner.batcher import Batch, Batcher, Group
from learner.checkpoint import load
from learner.checkpoint_files import verify
from learner.line import BatchRule
from learner.parallel import Group as Ranks
from learner.parallel import SingleProcess, connect_store, join, open_store
from learner.recovery import BATCH, TRAJECTORY, VOID
from learner.settings import LearnerSettings
from learner.stages import StageClock, StageRule
from learner.step import pick_device
from learner.steps import TrainStep, build_step
from learner.trainer import over_parts, pack_batch, unpack_batch
from protocol.codec import decode
from protocol.errors import ConfigError, DataError, WireError
from protocol.journal import Damage, read_records, segments
from protocol.ledger import Checkpoint
from protocol.messages import GroupOutcome, Trajectory

log = logging.getLogger("rlsys.learner")

RANKS_S = 300.0
"""Longest wait for another rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayJob:
    """What to train again, and how."""

    run_dir: Path
    run_id: int
    iterations: int
    """Of the run: learning rates may depend on it."""
    batches: BatchRule
    stages: tuple[StageRule, ...]
    group_size: int
    model_dir: Path
    settings: LearnerSettings


def starting_point(run_dir: Path, checkpoints: list[Checkpoint], first: int | None) -> Checkpoint | None:
    """The oldest checkpoint from which the journal is complete, or with `first` the newest that is not beyond it; None is the base model.

    A damaged one is passed over, and a warning says so. Raises ConfigError when the journal no longer reaches back that far.
    """
    oldest = min(segments(run_dir / "journal"), default=0)
    if first is None and oldest == 0:
        return None
    usable = sorted((c for c in checkpoints if c.first_segment >= oldest), key=lambda c: c.number)
    if first is not None:
        usable = [c for c in reversed(usable) if c.number <= first]
        if not usable and oldest == 0:
            return None
    for checkpoint in usable:
        try:
            verify(run_dir / checkpoint.directory)
        except DataError as error:
            log.warning("checkpoint v%d is not used: %s", checkpoint.number, error)
            continue
        return checkpoint
    if usable and first is not None and oldest == 0:
        return None
    wanted = "the start" if first is None else f"iteration {first}"
    raise ConfigError(
        f"{run_dir}: cannot replay from {wanted}: older parts of the journal were removed (journal.keep) and no checkpoint fits"
    )


def recorded_batches(job: ReplayJob, first_segment: int, start: int, until: int) -> Iterator[Batch]:
    """Every batch of iterations start..until-1 in order, each built again from its trajectories.

    Raises DataError, before the first is built, when one of them or its trajectories are not on record.
    """
    journal = job.run_dir / "journal"
    final: dict[tuple[int, int], tuple[int, int]] = {}
    lacks: dict[tuple[int, int], int] = {}
    members: Counter[int] = Counter()
    seen: set[tuple[int, int]] = set()
    damaged: list[Damage] = []
    for record in read_records(journal, first_segment, damaged.append):
        kind, *frames = record.frames
        if kind == TRAJECTORY:
            message = _trajectory(frames, job.run_id)
            if message is not None and (message.group_id, message.index) not in seen:
                seen.add((message.group_id, message.index))
                members[message.group_id] += 1
        elif kind == BATCH:
            content = msgpack.unpackb(frames[0])
            place = (record.segment, record.end)
            final[content["iteration"], content.get("part", 0)] = place
            lost = [number for number in content["groups"] if members[number] < job.group_size]
            if lost:
                lacks[place] = lost[0]
        elif kind == VOID:
            void = msgpack.unpackb(frames[0])["from"]
            final = {key: place for key, place in final.items() if key[0] < void}
    places = {place: key for key, place in final.items() if start <= key[0] < until}
    missing = {k: f"iteration {k} is not on record" for k in set(range(start, until)) - {k for k, _ in final}}
    for place in lacks.keys() & places.keys():
        iteration = places[place][0]
        missing[iteration] = f"samples of group {lacks[place]}, which batch {iteration} was made of, are not on record"
    if missing:
        raise DataError(f"{journal}: {missing[min(missing)]}{_why(journal, damaged)}{_instead(start, min(missing))}")
    return _built(job, first_segment, places)


def _why(journal: Path, damaged: Sequence[Damage]) -> str:
    if not segments(journal):
        return ": the journal is missing"
    first = f", the first bytes {damaged[0].start} to {damaged[0].end} of {damaged[0].path.name}" if damaged else ""
    return f" ({len(damaged)} damaged places{first})" if damaged else ""


def _instead(start: int, missing: int) -> str:
    before = f"--until {missing} replays what is before it, " if missing > start else ""
    return f"; {before}--from K what is behind a later checkpoint"


def _built(job: ReplayJob, first_segment: int, places: Mapping[tuple[int, int], tuple[int, int]]) -> Iterator[Batch]:
    """The batches whose records stand at these places."""
    journal = job.run_dir / "journal"
    batcher = Batcher(job.settings, job.batches, job.group_size)
    groups: dict[int, Group] = {}
    for record in read_records(journal, first_segment, lambda damage: None):
        kind, *frames = record.frames
        if kind == TRAJECTORY:
            message = _trajectory(frames, job.run_id)
            if message is not None:
                members = groups.setdefault(message.group_id, Group(message.group_id, job.group_size)).members
                members.setdefault(message.index, message)
        elif kind == BATCH and (record.segment, record.end) in places:
            content = msgpack.unpackb(frames[0])
            yield batcher.build([groups.pop(number) for number in content["groups"]], content["iteration"])


def _trajectory(frames: list[bytes], run_id: int) -> Trajectory | None:
    """A trajectory to train on; None for any other, and for one that cannot be decoded."""
    try:
        message = decode(frames, run_id, "the journal")
    except WireError as error:
        log.warning("a journaled trajectory is left out: %s", error)
        return None
    return message if isinstance(message, Trajectory) and message.purpose == "train" else None


def replay(
    job: ReplayJob,
    start: Checkpoint | None,
    until: int,
    outcomes: Sequence[GroupOutcome],
    on_iteration: Callable[[int, dict[str, float], float], object],
) -> tuple[TrainStep, Ranks, list[subprocess.Popen[bytes]]]:
    """Train iterations again up to `until`, exclusive; `on_iteration(k, numbers, busy seconds)` hears of each. Returns the step and its ranks.

    `outcomes` are the terminal states of the run: those before `start` say in which stage it was.
    Other ranks are processes of their own; `finish` lets them go.
    """
    first, segment = (start.number, start.first_segment) if start else (0, 0)
    batches = recorded_batches(job, segment, first, until)
    ranks, helpers = _gather(job)
    step = build_step(job.settings, job.model_dir, ranks)
    path = str(job.run_dir / start.directory) if start else ""
    if ranks.size > 1:
        ranks.broadcast_bytes(path.encode())
    if path:
        load(Path(path), step, verified=True)
    clock = StageClock(job.stages, iterations=job.iterations, max_staleness=job.batches.max_staleness)
    for iteration in range(first):
        clock.close(iteration, [o for o in outcomes if o.in_batch and o.iteration == iteration])
    numbers: list[dict[str, float]] = []
    ended: list[GroupOutcome] = []
    busy_s = 0.0
    for batch in batches:
        started = time.monotonic()
        step.peak_lr = clock.lr(batch.iteration)
        if ranks.size > 1:
            ranks.broadcast_bytes(pack_batch(batch.samples, batch.iteration, step.peak_lr))
        numbers.append(step.train(batch.samples, batch.iteration, job.iterations).values)
        busy_s += time.monotonic() - started
        ended += batch.outcomes
        if len(numbers) == job.batches.parts:
            on_iteration(batch.iteration, over_parts(numbers), busy_s)
            clock.close(batch.iteration, ended)
            numbers, ended, busy_s = [], [], 0.0
    return step, ranks, helpers


def finish(ranks: Ranks, helpers: list[subprocess.Popen[bytes]]) -> None:
    """End the other ranks, after `published_tensors` was gone through."""
    ranks.close()
    for helper in helpers:
        try:
            helper.wait(timeout=10)
        except subprocess.TimeoutExpired:
            helper.kill()
            helper.wait()


def _gather(job: ReplayJob) -> tuple[Ranks, list[subprocess.Popen[bytes]]]:
    size = job.settings.ranks
    if size == 1:
        return SingleProcess(), []
    store = open_store("127.0.0.1", size, RANKS_S)
    content = json.dumps(
        {"settings": job.settings.model_dump(mode="json"), "model": str(job.model_dir), "port": store.port, "iterations": job.iterations}
    )
    command = [sys.executable, "-P", "-m", "rlsys", "replay-rank", content]
    helpers = [subprocess.Popen([*command, str(rank)], stdin=subprocess.DEVNULL) for rank in range(1, size)]
    try:
        return join(store, 0, size, device=pick_device(job.settings.device, 0), timeout_s=RANKS_S), helpers
    except BaseException:
        for helper in helpers:
            helper.kill()
            helper.wait()
        raise


def replay_rank(content_json: str, rank: int) -> int:
    """Be another rank of a replay."""
    content = json.loads(content_json)
    settings = LearnerSettings.model_validate(content["settings"])
    store = connect_store("127.0.0.1", content["port"], settings.ranks, RANKS_S)
    ranks = join(store, rank, settings.ranks, device=pick_device(settings.device, rank), timeout_s=RANKS_S)
    step = build_step(settings, Path(content["model"]), ranks)
    path = ranks.broadcast_bytes(None).decode()
    if path:
        load(Path(path), step, verified=True)
    while data := ranks.broadcast_bytes(None):
        samples, iteration, step.peak_lr, _, _ = unpack_batch(data)
        step.train(samples, iteration, content["iterations"])
    step.help_publishing(None)
    ranks.close()
    return 0
