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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from learner.batcher import Assembler, Batch, Batcher, check_staleness
from learner.intake import Intake
from learner.line import BatchRule
from learner.packing import TrainSample
from learner.parallel import Group, SingleProcess, connect_store, join, open_store
from learner.publisher import DTYPES, Publisher
from learner.settings import LearnerSettings
from learner.showing import RATIO_EDGES, Counts, distributions, spreads, to_read
from learner.step import StepMetrics, pick_device
from learner.steps import build_step
from protocol.errors import RunEnded
from protocol.intervals import Recorder
from protocol.journal import Journal
from protocol.ledger import Ledger
from protocol.messages import Version
from protocol.node import Node

log = logging.getLogger("rlsys.learner")


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerJob:
    """What every rank of the learner group is started with."""

    iterations: int
    batches: BatchRule
    group_size: int
    eval_samples: int
    model_dir: Path
    run_dir: Path
    weights_dir: Path
    publish_dtype: str
    host: str
    settings: LearnerSettings
    histograms: bool = True
    samples_every: int = 10
    """Iterations between samples that are shown as text; 0 never."""
    samples: int = 4


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
        assembler = Assembler(job.group_size, job.eval_samples)
        self._journal = Journal(job.run_dir / "journal")
        self._ledger = Ledger(job.run_dir / "ledger.sqlite")
        self._intake = Intake(node, assembler, batcher, self._journal, self._ledger)
        self._tokens = 0.0
        self._failed = False
        self._iterations_done = 0
        node.gauges = self._gauges
        node.progress = lambda: self._intake.received + self._iterations_done
        node.facts = lambda: {**self._intake.facts(), "ranks": job.settings.ranks}
        try:
            self._publisher = Publisher(job.weights_dir, job.model_dir, job.publish_dtype)
            self._group = self._gather(job)
            self._step = build_step(job.settings, job.model_dir, self._group)
        except BaseException:
            self._close()  # the sockets belong to the intake's thread: it must have ended before the node is closed
            raise

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
        self._intake.close()
        self._journal.close()
        self._ledger.close()

    def train(self) -> None:
        """The loop of the whole system."""
        recorder, job = self._recorder, self._job
        self._publish(0)
        for iteration in range(job.iterations):
            parts: list[tuple[Batch, StepMetrics]] = []
            train_s = 0.0
            while not parts or not parts[-1][0].last:
                batch = self._intake.wait_batch(iteration, recorder)
                check_staleness(batch, job.batches.max_staleness)

                with recorder.during("journal batch", iteration=iteration):
                    record = {"iteration": iteration, "part": batch.part, "groups": [o.group_id for o in batch.outcomes]}
                    self._journal.append([b"batch", msgpack.packb(record)])
                    self._journal.sync()

                started = time.monotonic()
                with recorder.during("train", iteration=iteration):
                    if self._group.size > 1:
                        with recorder.during("waiting:ranks", "learner", "the batch's broadcast"):
                            self._group.broadcast_bytes(pack_batch(batch.samples, iteration))
                    metrics = self._step.train(batch.samples, iteration, job.iterations)
                train_s += time.monotonic() - started
                parts.append((batch, metrics))

            publish_s = self._publish(iteration + 1)
            self._intake.end_groups(tuple(outcome for batch, _ in parts for outcome in batch.outcomes))
            self._report(parts[-1][0], over_parts([metrics.values for _, metrics in parts]), train_s, publish_s)
            self._show(parts[-1][0], [metrics.ratio_counts for _, metrics in parts])
            self._iterations_done += 1

    def _publish(self, number: int) -> float:
        started = time.monotonic()
        with self._recorder.during("publish", iteration=number):
            ready = self._publisher.publish(Version(number), self._step.published_tensors(self._publisher.dtype))
            self._intake.announce(replace(ready, groups_taken=self._intake.groups_taken))
        return time.monotonic() - started

    def _report(self, batch: Batch, values: dict[str, float], train_s: float, publish_s: float) -> None:
        tokens = values["num_tokens"]
        self._tokens += tokens
        step = {f"train/{name}": value for name, value in values.items()}
        self._intake.report(
            batch.iteration,
            {**batch.metrics, **step, "train/seconds": train_s, "train/publish_s": publish_s, "train/tokens_per_s": tokens / train_s},
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
        return {"learner/received": float(self._intake.received), "learner/tokens": self._tokens}

    def _end_when_stopped(self) -> None:
        """A stop during a long step or collective: give it a moment to end in order, then leave."""
        while not self._node.stopping:
            time.sleep(0.2)
        time.sleep(STOP_GRACE_S)
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


# ---------------------------------------------------------------------------------------------------- ranks 1..K-1


def follow(node: Node, job: LearnerJob) -> None:
    """Train on what rank 0 broadcasts, until it broadcasts nothing; then stay until the run stops."""
    settings = job.settings
    node.start()
    node.recorder.enter("waiting:rank 0", "learner", "its address")
    address = ""
    while not address:
        node.poll(1.0)
        address = node.addresses_of("rendezvous").get("learner-0", "")
    host, _, port = address.rpartition(":")
    poller = threading.Thread(target=_poll_until_stopped, args=(node,), name="poll", daemon=True)
    poller.start()
    store = connect_store(host, int(port), settings.ranks, settings.collective_timeout_s)
    rank = node.spec.index
    group = join(store, rank, settings.ranks, device=pick_device(settings.device, rank), timeout_s=settings.collective_timeout_s)
    step = build_step(settings, job.model_dir, group)
    dtype = DTYPES[job.publish_dtype]
    while True:
        node.recorder.enter("publish")
        step.help_publishing(dtype)  # version 0, then that of each iteration
        node.recorder.enter("waiting:batch", "learner", "rank 0's broadcast")
        data = group.broadcast_bytes(None)
        if not data:
            break
        samples, iteration = unpack_batch(data)
        node.recorder.enter("train", iteration=iteration)
        step.train(samples, iteration, job.iterations)
    step.help_publishing(dtype)  # the final model
    node.recorder.enter("waiting:end of run", "learner", "")
    poller.join()


def _poll_until_stopped(node: Node) -> None:
    """Heartbeats while the main thread computes; leaves the process when the run stops, because a collective cannot be interrupted."""
    try:
        while True:
            node.poll(1.0)
    except RunEnded as end:
        log.info("%s ends: %s", node.identity, end)
        node.close()
        os._exit(0)


def pack_batch(samples: Sequence[TrainSample], iteration: int) -> bytes:
    """A batch as msgpack with raw little-endian arrays: nothing is pickled between ranks either."""

    def plain(value: Any) -> Any:
        return value.tobytes() if isinstance(value, np.ndarray) else value

    rows = [{name: plain(value) for name, value in asdict(sample).items()} for sample in samples]
    data: bytes = msgpack.packb({"iteration": iteration, "samples": rows})
    return data


_ARRAYS = {"prompt_ids": np.int32, "token_ids": np.int32, "behaviour_logprobs": np.float32, "loss_mask": np.bool_}


def unpack_batch(data: bytes) -> tuple[list[TrainSample], int]:
    """The inverse of `pack_batch`."""
    content = msgpack.unpackb(data)
    samples = [
        TrainSample(**{name: np.frombuffer(value, _ARRAYS[name]) if name in _ARRAYS else value for name, value in row.items()})
        for row in content["samples"]
    ]
    return samples, content["iteration"]
