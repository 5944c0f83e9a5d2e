"""The learner group: takes batch k at version k, trains on it, publishes version k + 1. Read `train` top to bottom.

    reward actors --Trajectory--> [ intake | batcher -> step -> publisher ] --WeightsReady--> generators, dispatcher
                                            \\--batch--> ranks 1..K-1 (torch.distributed), which hold the same model

It waits for: trajectories (reward actors), the other ranks. It wakes: generators and dispatcher, by publishing.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from learner.batcher import Assembler, Batch, Batcher, check_staleness
from learner.checkpoint import load
from learner.checkpoint_files import clean
from learner.commits import CommitPolicy, Committer, Pending
from learner.intake import Intake
from learner.line import BatchRule
from learner.packing import TrainSample
from learner.parallel import Group, SingleProcess, connect_store, join, open_store
from learner.publisher import DTYPES, Publisher, next_incarnation
from learner.recovery import BATCH, VOID, Part, newest_good, sort_out
from learner.settings import LearnerSettings
from learner.showing import RATIO_EDGES, Counts, distributions, spreads, to_read
from learner.stages import StageClock, StageRule
from learner.step import StepMetrics, pick_device
from learner.steps import build_step
from protocol.errors import RunEnded
from protocol.intervals import Recorder
from protocol.journal import Journal, read_records
from protocol.ledger import Ledger, Writer
from protocol.messages import Version
from protocol.node import Node
from protocol.shelf import Shelf

log = logging.getLogger("rlsys.learner")

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerJob:
    """What every rank of the learner group is started with."""

    iterations: int
    batches: BatchRule
    stages: tuple[StageRule, ...]
    group_size: int
    eval_samples: int
    model_dir: Path
    run_dir: Path
    weights_dir: Path
    publish_dtype: str
    host: str
    settings: LearnerSettings
    serve_weights: bool = False
    """Whether generators may ask for versions over the network."""
    histograms: bool = True
    samples_every: int = 10
    """Iterations between samples that are shown as text; 0 never."""
    samples: int = 4
    journal_keep_bytes: int | None = None
    """Older segments go beyond this, once no checkpoint needs them; None keeps all."""


def run_learner(node: Node, job: LearnerJob) -> None:
    """The body of one learner process: rank 0 leads, the others follow."""
    if node.spec.index == 0:
        Leader(node, job).run()
    else:
        follow(node, job)


# ---------------------------------------------------------------------------------------------------- rank 0


class Leader:
    """Rank 0: the only rank with sockets, the journal and the ledger."""

    def __init__(self, node: Node, job: LearnerJob) -> None:
        self._node, self._job = node, job
        self._recorder: Recorder = node.recorder
        batcher = Batcher(job.settings, job.batches, job.group_size)
        self._stages = StageClock(job.stages, iterations=job.iterations, max_staleness=job.batches.max_staleness)
        spec = node.spec
        self._ledger = Ledger(job.run_dir / "ledger.sqlite", Writer(spec.role, spec.index, spec.start))
        self._journal = Journal(job.run_dir / "journal", self._ledger.journal_end())
        self._checkpoint = newest_good(self._ledger, job.run_dir)
        versions, ended = self._ledger.versions(), self._ledger.ended_groups()
        self._incarnation = next_incarnation(job.weights_dir, versions)
        assembler = Assembler(job.group_size, job.eval_samples, ended)
        self._batcher = batcher
        self._intake = Intake(node, assembler, batcher, self._journal, self._ledger)
        self._committer = Committer(
            job.run_dir / CHECKPOINTS,
            CommitPolicy(job.settings.commit_every, job.settings.checkpoints.keep_every),
            checkpoints=job.settings.checkpoints,
            ledger=self._ledger,
            on_commit=self._committed,
        )
        self._shelf: Shelf | None = None
        self._tokens = 0.0
        self._failed = False
        self._iterations_done = 0
        node.gauges = self._gauges
        node.progress = lambda: self._intake.received + self._iterations_done
        node.facts = lambda: {**self._intake.facts(), "device": str(pick_device(job.settings.device, 0))}
        try:
            self._batches = self._recover(ended)
            lora = job.settings.lora
            alone = lora if lora is not None and lora.publish == "adapter" else None
            self._publisher = Publisher(job.weights_dir, job.model_dir, job.publish_dtype, self._ledger, adapters=alone)
            if job.serve_weights:
                self._shelf = Shelf(node.transport, "pieces", f"{spec.name}.{spec.start}.pieces", job.weights_dir)
                node.publish_address("pieces", self._shelf.address)
                self._shelf.start()
            self._group = self._gather(job)
            self._step = build_step(job.settings, job.model_dir, self._group)
        except BaseException:
            self._close()  # the sockets belong to the intake's thread: it must have ended before the node is closed
            raise

    def _recover(self, ended: set[int]) -> list[Part]:
        """Take what an earlier learner of this run put on record. Returns the batches to train again."""
        job, checkpoint = self._job, self._checkpoint
        first = checkpoint.first_segment if checkpoint else 0
        records = read_records(job.run_dir / "journal", first)
        found = sort_out(records, self._node.transport.run, ended, self._version, job.group_size, job.batches.parts)
        if found.void_from is not None:
            log.warning("batches recorded from iteration %d on are damaged: they are formed anew", found.void_from)
            self._journal.append([VOID, msgpack.packb({"from": found.void_from})])
        outcomes = [o for o in self._ledger.outcomes() if o.purpose == "train"]
        self._batcher.restore(self._version, [o.group_id for o in outcomes], sum(o.in_batch for o in outcomes))
        for iteration in range(self._version):
            self._stages.close(iteration, [o for o in outcomes if o.in_batch and o.iteration == iteration])
        self._intake.restore(found.trajectories)
        if not found.batches:
            self._intake.caught_up()
        if self._incarnation:
            log.info(
                "going on at v%d, incarnation %d: %d journaled samples of groups that are open, %d recorded batches to train again",
                self._version, self._incarnation, len(found.trajectories), len(found.batches),
            )  # fmt: skip
            self._node.event("learner resumed", version=self._version, incarnation=self._incarnation, batches=len(found.batches))
        clean(job.run_dir / CHECKPOINTS)
        return found.batches

    @property
    def _version(self) -> int:
        """Where the state of the last commit stands."""
        return self._checkpoint.number if self._checkpoint else 0

    def _gather(self, job: LearnerJob) -> Group:
        if job.settings.ranks == 1:
            self._intake.start()
            return SingleProcess()
        timeout = job.settings.collective_timeout_s
        store = open_store(job.host, job.settings.ranks, timeout)
        self._node.publish_address("rendezvous", f"{job.host}:{store.port}")
        self._intake.start()
        self._recorder.enter("waiting:ranks", "learner", f"{job.settings.ranks - 1} other ranks")
        return join(store, 0, job.settings.ranks, device=pick_device(job.settings.device, 0), timeout_s=timeout)

    def run(self) -> None:
        """Train all iterations, save the final model, and serve until the run stops."""
        guard = threading.Thread(target=self._end_when_stopped, name="guard", daemon=True)
        guard.start()
        try:
            self.train()
            self._recorder.enter("save")
            self._group.broadcast_bytes(b"")
            self._publisher.export(self._job.run_dir / "final_model", self._step.published_tensors(self._publisher.dtype))
            self._node.event("training ended", iterations=self._job.iterations)
            self._node.finished()
            self._intake.wait_end(self._recorder)
        except BaseException as error:
            self._failed = not isinstance(error, RunEnded)
            raise
        finally:
            self._close()
            self._group.close()

    def _close(self) -> None:
        """End the intake first: what arrives until then is still journaled."""
        if self._shelf is not None:
            self._shelf.close()
        self._intake.close()
        self._journal.close()
        self._ledger.close()

    def train(self) -> None:
        """The loop of the whole system."""
        recorder, job, leave = self._recorder, self._job, False
        self._load()
        self._publish(self._version)
        self._publisher.remove_older_incarnations(self._incarnation)
        for iteration in range(self._version, job.iterations):
            parts: list[tuple[Batch, StepMetrics]] = []
            train_s = 0.0
            commit = False
            while not parts or not parts[-1][0].last:
                batch = self._next_batch(iteration)
                check_staleness(batch, job.batches.max_staleness)

                started = time.monotonic()
                leave = bool(self._node.leaving)
                commit = batch.last and (leave or self._committer.due(iteration + 1, last=iteration + 1 == job.iterations))
                with recorder.during("train", iteration=iteration):
                    if self._group.size > 1:
                        with recorder.during("waiting:ranks", "learner", "the batch's broadcast"):
                            data = pack_batch(batch.samples, iteration, self._stages.lr(iteration), last=batch.last, commit=commit)
                            self._group.broadcast_bytes(data)
                    self._step.peak_lr = self._stages.lr(iteration)
                    metrics = self._step.train(batch.samples, iteration, job.iterations)
                train_s += time.monotonic() - started
                parts.append((batch, metrics))

            self._stages.close(iteration, [outcome for batch, _ in parts for outcome in batch.outcomes])
            publish_s = self._publish(iteration + 1)
            self._intake.end_groups([outcome for batch, _ in parts for outcome in batch.outcomes])
            if commit:
                self._commit(iteration + 1)
            self._report(parts[-1][0], over_parts([metrics.values for _, metrics in parts]), train_s, publish_s)
            self._show(parts[-1][0], [metrics.ratio_counts for _, metrics in parts])
            self._iterations_done += 1
            if commit and leave and iteration + 1 < job.iterations:
                self._leave(iteration + 1)
        with recorder.during("commit"):
            self._committer.wait()

    def _leave(self, number: int) -> None:
        """Told to leave: end with this commit, so that a group of another size goes on from it. If it fails, the next one is tried."""
        with self._recorder.during("commit"):
            self._committer.wait()
        if self._committer.committed == number:
            raise RunEnded(f"the state is committed at v{number}, and it was told to leave: {self._node.leaving}")

    def _load(self) -> None:
        """Every rank takes the state of the checkpoint."""
        path = str(self._job.run_dir / self._checkpoint.directory) if self._checkpoint else ""
        if self._group.size > 1:
            self._group.broadcast_bytes(path.encode())
        if path:
            load(Path(path), self._step, verified=True)

    def _next_batch(self, iteration: int) -> Batch:
        """The batch as it was recorded before a restart, or the next to be complete, which is recorded before anything is computed."""
        if self._batches:
            batch = self._intake.retake(iteration, self._batches.pop(0).groups)
            if not self._batches:
                self._intake.caught_up()
            return batch
        batch = self._intake.wait_batch(iteration, self._recorder)
        with self._recorder.during("journal batch", iteration=iteration):
            record = {"iteration": iteration, "part": batch.part, "groups": [o.group_id for o in batch.outcomes]}
            self._journal.append([BATCH, msgpack.packb(record)])
            self._journal.sync()
        return batch

    def _commit(self, number: int) -> None:
        with self._recorder.during("snapshot"):
            self._committer.wait()  # else what that commit writes would be written twice
            outcomes, first = self._intake.to_commit()
            pending = Pending(self._incarnation, outcomes, self._journal.position, first)
            self._committer.begin(self._step, number, pending)

    def _committed(self, pending: Pending, oldest_segment: int) -> None:
        """In the writer's thread: a commit stands."""
        self._intake.committed(pending.outcomes)
        self._journal.trim(oldest_segment, self._job.journal_keep_bytes)

    def _publish(self, number: int) -> float:
        started = time.monotonic()
        with self._recorder.during("publish", iteration=number):
            canary = self._step.canary()
            version = Version(number, self._incarnation)
            ready = self._publisher.publish(version, self._step.version_tensors(self._publisher.dtype), canary)
            self._intake.announce(replace(ready, groups_taken=self._intake.groups_taken, stage_starts=list(self._stages.starts)))
        return time.monotonic() - started

    def _report(self, batch: Batch, values: dict[str, float], train_s: float, publish_s: float) -> None:
        tokens = values["num_tokens"]
        self._tokens += tokens
        step = {f"train/{name}": value for name, value in values.items()}
        self._intake.report(
            batch.iteration,
            {
                **batch.metrics,
                **step,
                "train/stage": float(self._stages.stage_of(batch.iteration)),
                "train/seconds": train_s,
                "train/publish_s": publish_s,
                "train/tokens_per_s": tokens / train_s,
            },
        )

    def _show(self, batch: Batch, ratio_counts: Sequence[tuple[int, ...]]) -> None:
        """Histograms of the iteration and, every so often, a few samples to read."""
        job, found = self._job, dict[str, Counts]()
        if job.histograms:
            found = spreads(batch.groups, batch.iteration)
            counts = np.array([c for c in ratio_counts if c], np.int64)
            if len(counts):
                found["train/ratios"] = (RATIO_EDGES, counts.sum(axis=0))
        samples = to_read(batch.groups, job.samples) if job.samples_every and batch.iteration % job.samples_every == 0 else ()
        self._intake.show([*distributions(self._node.identity, batch.iteration, time.time(), found), *samples])

    def _gauges(self) -> dict[str, float]:
        """With each heartbeat. Raises what ended the thread that serves versions: hosts would wait for them in vain."""
        if self._shelf is not None:
            self._shelf.check()
        return {
            "learner/received": float(self._intake.received),
            "learner/tokens": self._tokens,
            "learner/commit_s": self._committer.seconds,
            "learner/committed_version": float(self._committer.committed),
            **({"weights/sent_bytes_total": float(self._shelf.sent_bytes)} if self._shelf else {}),
        }

    def _end_when_stopped(self) -> None:
        """A stop during a long step or collective: give it a moment to end in order, then leave."""
        while not self._node.stopping:
            time.sleep(0.2)
        time.sleep(STOP_GRACE_S)
        if self._failed:
            time.sleep(TELL_S)
        log.info("%s leaves in the middle of a step: the run was stopped", self._node.identity)
        os._exit(1 if self._failed else 0)


_COUNTS = ("num_tokens", "num_samples", "tokens_trained", "updates", "updates_skipped", "skipped")


def over_parts(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The numbers of an iteration from those of its parts: counts are summed, extremes stay extremes, all others are means over the parts."""
    merged = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        values = [part[name] for part in parts if name in part]
        if name in _COUNTS:
            merged[name] = sum(values)
        elif name.endswith("_max"):
            merged[name] = max(values)
        elif name.endswith("_min"):
            merged[name] = min(values)
        else:
            merged[name] = sum(values) / len(values)
    return merged


STOP_GRACE_S = 3.0
"""How long a rank may take to leave a step after the run was stopped. What it computes then is not used."""
TELL_S = 30.0
"""How much longer one may take that broke: a busy disk holds up the end of journal and ledger, and only then it says why."""


# ---------------------------------------------------------------------------------------------------- ranks 1..K-1


def follow(node: Node, job: LearnerJob) -> None:
    """Train on what rank 0 broadcasts, until it broadcasts nothing; then stay until the run stops."""
    settings = job.settings
    device = str(pick_device(settings.device, node.spec.index))
    node.facts = lambda: {"device": device}
    node.start()
    node.recorder.enter("waiting:rank 0", "learner", "its address")
    address = ""
    while not address:
        node.poll(1.0)
        address = node.addresses_of("rendezvous").get("learner-0", "")
    host, _, port = address.rpartition(":")
    with polled(node):
        store = connect_store(host, int(port), settings.ranks, settings.collective_timeout_s)
        rank = node.spec.index
        group = join(store, rank, settings.ranks, device=pick_device(settings.device, rank), timeout_s=settings.collective_timeout_s)
        step = build_step(settings, job.model_dir, group)
        path = group.broadcast_bytes(None).decode()
        if path:
            load(Path(path), step, verified=True)
        committer = Committer(job.run_dir / CHECKPOINTS, CommitPolicy(settings.commit_every), checkpoints=settings.checkpoints)
        dtype = DTYPES[job.publish_dtype]
        iteration, last, commit = 0, True, False
        while True:
            if last:
                node.recorder.enter("publish")
                step.canary()  # a sharded model computes it on all ranks
                step.help_publishing(dtype, version=True)  # the version that training starts from, then that of each iteration
            if commit:
                committer.begin(step, iteration + 1, None)
            node.recorder.enter("waiting:batch", "learner", "rank 0's broadcast")
            data = group.broadcast_bytes(None)
            if not data:
                break
            samples, iteration, step.peak_lr, last, commit = unpack_batch(data)
            node.recorder.enter("train", iteration=iteration)
            step.train(samples, iteration, job.iterations)
        node.recorder.enter("publish")
        step.help_publishing(dtype)  # the final model
        node.recorder.enter("waiting:end of run", "learner", "")


@contextmanager
def polled(node: Node) -> Iterator[None]:
    """Heartbeats from a thread of their own while the block computes. The node is this thread's again when the block has raised, to close it."""
    broke = threading.Event()
    poller = threading.Thread(target=_poll_until_stopped, args=(node, broke), name="poll", daemon=True)
    poller.start()
    try:
        yield
    except BaseException:
        broke.set()
        node.wake()
        poller.join()
        raise
    poller.join()


def _poll_until_stopped(node: Node, broke: threading.Event) -> None:
    """Until `broke`. Leaves the process when the run stops, because a collective cannot be interrupted."""
    try:
        while not broke.is_set():
            node.poll(1.0)
    except RunEnded as end:
        log.info("%s ends: %s", node.identity, end)
        node.close()
        os._exit(0)


def pack_batch(samples: Sequence[TrainSample], iteration: int, peak_lr: float, *, last: bool = True, commit: bool = False) -> bytes:
    """A batch as msgpack with raw little-endian arrays: nothing is pickled between ranks either.

    `last`: a version is published after it; `commit`: the state is taken then.
    """

    def plain(value: Any) -> Any:
        return value.tobytes() if isinstance(value, np.ndarray) else value

    rows = [{name: plain(value) for name, value in asdict(sample).items()} for sample in samples]
    data: bytes = msgpack.packb({"iteration": iteration, "peak_lr": peak_lr, "last": last, "commit": commit, "samples": rows})
    return data


_ARRAYS = {"prompt_ids": np.int32, "token_ids": np.int32, "behaviour_logprobs": np.float32, "loss_mask": np.bool_}


def unpack_batch(data: bytes) -> tuple[list[TrainSample], int, float, bool, bool]:
    """The inverse of `pack_batch`."""
    content = msgpack.unpackb(data)
    samples = [
        TrainSample(**{name: np.frombuffer(value, _ARRAYS[name]) if name in _ARRAYS else value for name, value in row.items()})
        for row in content["samples"]
    ]
    return samples, content["iteration"], content["peak_lr"], content["last"], content["commit"]
