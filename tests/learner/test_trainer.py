"""The learner process: two iterations driven by hand over real sockets, and what goes between ranks."""

from __future__ import annotations

import json
import signal
import sqlite3
import threading
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from learner.trainer import pack_batch, polled, unpack_batch
from protocol.codec import decode
from protocol.errors import DeadlineExceeded
from protocol.journal import read_journal
from protocol.manifest import verify
from protocol.messages import (
    Ack,
    Credit,
    Event,
    Finished,
    GroupOutcome,
    Hello,
    Metrics,
    Register,
    Trajectory,
    WeightsReady,
    key_of,
)  # fmt: skip
from protocol.node import Node
from rlsys.config import dump_config, parse_config
from rlsys.launchers.local import Child
from tests.configuration import minimal
from tests.directories import tokenizer_directory
from tests.learner.conftest import save_model
from tests.learner.samples import random_samples
from tests.learner.trajectories import trajectory
from tests.ring import RUN_ID, Ring

START_S = 120.0
"""Importing torch and transformers takes a busy machine long."""


@pytest.mark.parametrize("count", [0, 1, 9])
def test_what_is_packed_for_the_other_ranks_comes_out_equal(count: int) -> None:
    samples = random_samples(count)
    unpacked, iteration, lr, last, commit = unpack_batch(pack_batch(samples, 41, 1e-6, commit=count == 1))
    assert (iteration, lr, last, commit) == (41, 1e-6, True, count == 1)
    assert len(unpacked) == count
    for a, b in zip(samples, unpacked, strict=True):
        for name in a.__slots__:
            x, y = getattr(a, name), getattr(b, name)
            assert type(x) is type(y)
            if isinstance(x, np.ndarray):
                assert x.dtype == y.dtype
                assert np.array_equal(x, y)
            else:
                assert x == y


def start_learner(ring: Ring, tmp_path: Path, model: Path) -> Child:
    """A learner process as the supervisor starts it."""
    content = minimal(tmp_path)
    content |= {"iterations": 2, "model": {"path": str(model)}, "learner": {"optimizer": {"lr": 0.01}, "device": "cpu", "dtype": "float32"}}
    content["evaluation"] = {"samples": 1}
    (tmp_path / "config.yaml").write_text(dump_config(parse_config(content, "test")))
    (tmp_path / "weights_dir").write_text(str(tmp_path / "weights"))
    return Child(ring.spec("learner"), tmp_path / "learner.log", {"OMP_NUM_THREADS": "1"})


def test_the_leader_trains_publishes_and_accounts_for_every_group(ring: Ring, tmp_path: Path) -> None:
    model = tokenizer_directory(save_model(tmp_path / "base"))
    child = start_learner(ring, tmp_path, model)
    try:
        _drive(ring, tmp_path, child)
    except BaseException:
        print("\n".join(child.tail(60)))
        raise
    finally:
        child.signal_group(signal.SIGKILL)


def _drive(ring: Ring, tmp_path: Path, child: Child) -> None:
    ring.until(lambda: any(m.pid == child.pid for m in ring.control.of(Register)), "the learner registers", START_S)
    identity = "learner-0@1"
    dispatcher = ring.serve("dispatcher-0@1", "outcomes")
    dashboard = ring.serve("dashboard-0@1", "observe")
    generator = ring.link("generator-0@1", "weights", identity)
    generator.tell(Hello(role="generator", index=0, identity="generator-0@1", epoch=1))
    rewarder = ring.link("rewarder-0@1", "trajectories", identity)
    rewarder.tell(Hello(role="rewarder", index=0, identity="rewarder-0@1", epoch=1))

    def told() -> list[WeightsReady]:
        """Each version once: a generator that greets while one is published hears of it twice."""
        return list({ready.number: ready for ready in generator.of(WeightsReady)}.values())

    ring.until(lambda: rewarder.of(Credit) and told() and dispatcher.of(Hello), "credit, v0 and a greeting", START_S)
    assert [ready.number for ready in told()] == [0]

    sent: list[Trajectory] = []

    def send(*trajectories: Trajectory) -> None:
        for t in trajectories:
            sent.append(t)
            rewarder.tell(t)

    # An evaluation group ends at once; one group of iteration 0 trains, one is filtered, and copies change nothing.
    send(trajectory(1 << 40, 0, 1.0, purpose="eval"))
    ring.until(lambda: dispatcher.of(GroupOutcome), "the evaluation group ends")
    send(trajectory(1, 1, 1.0), trajectory(0, 0, 1.0), trajectory(1, 0, 1.0), trajectory(0, 0, 0.0, attempt=1))
    ring.until(lambda: len({tuple(k) for a in rewarder.of(Ack) for k in a.keys.tolist()}) == len(sent), "everything is acknowledged")
    assert len(told()) == 1, "one sample is missing, so nothing is trained"
    send(trajectory(0, 1, 0.0, tokens=5))
    ring.until(lambda: len(told()) == 2, "v1 is published", START_S)
    first, second = (load_file(Path(r.directory) / "model.safetensors") for r in told())
    assert any(not torch.equal(first[name], second[name]) for name in first), "the step moved the weights"
    verify(Path(told()[1].directory), told()[1].manifest_sha256)

    # Iteration 1 has no trainable token: no optimizer step, and still a version, so that pacing cannot starve.
    send(*(trajectory(g, i, 0.0, iteration=1) for g in (2, 3) for i in (0, 1)))
    ring.until(lambda: len(told()) == 3, "v2 is published", START_S)
    third = load_file(Path(told()[2].directory) / "model.safetensors")
    assert all(torch.equal(second[name], third[name]) for name in second)

    late = ring.link("generator-1@1", "weights", identity)
    late.tell(Hello(role="generator", index=1, identity="generator-1@1", epoch=1))
    ring.until(lambda: late.of(WeightsReady), "who comes late hears of the newest version")
    assert late.of(WeightsReady)[0].number == 2

    ring.until(lambda: ring.control.of(Finished), "the learner has finished", START_S)
    assert ring.control.of(Finished)[0].error == ""
    assert "training ended" in [e.name for e in ring.control.of(Event)]
    ring.until(lambda: len(dispatcher.of(GroupOutcome)) == 5, "every group has ended")
    ring.until(lambda: len([m for m in dashboard.of(Metrics) if m.iteration >= 0]) == 2, "the numbers of two iterations")
    numbers = [m.values for m in dashboard.of(Metrics) if m.iteration >= 0]
    assert (numbers[0]["data/groups_trained"], numbers[0]["data/groups_filtered"], numbers[0]["train/num_tokens"]) == (1, 1, 8)
    assert numbers[1]["train/num_tokens"] == 0

    ring.stop(identity)
    ring.until(lambda: child.exit_code() is not None, "the learner ends", START_S)
    assert child.exit_code() == 0, child.tail()

    states = {o.group_id: (o.state, o.iteration) for o in dispatcher.of(GroupOutcome)}
    assert states == {
        1 << 40: ("evaluated", 0), 0: ("trained", 0), 1: ("filtered", 0), 2: ("filtered", 1), 3: ("filtered", 1),
    }  # fmt: skip
    with sqlite3.connect(tmp_path / "ledger.sqlite") as ledger:
        rows = ledger.execute("SELECT group_id, state, iteration FROM ended").fetchall()
    ledger.close()
    assert {g: (state, k) for g, state, k in rows} == states
    _check_journal(tmp_path / "journal", sent)
    exported = load_file(tmp_path / "final_model" / "model.safetensors")
    assert all(torch.equal(third[name], exported[name]) for name in third)
    assert json.loads((tmp_path / "final_model" / "config.json").read_text())["model_type"] == "qwen3"


def _check_journal(directory: Path, sent: list[Trajectory]) -> None:
    """The first trajectory of every place in the order of arrival, and each batch before the next iteration's."""
    records = list(read_journal(directory, strict=True))
    journaled = [decode(frames, int(RUN_ID, 16), "journal") for kind, *frames in records if kind == b"trajectory"]
    firsts = {(t.group_id, t.index): key_of(t) for t in reversed(sent)}
    assert sorted(key_of(t) for t in journaled if isinstance(t, Trajectory)) == sorted(firsts.values())
    batches = [msgpack.unpackb(frames[0]) for kind, *frames in records if kind == b"batch"]
    assert batches == [{"iteration": 0, "part": 0, "groups": [0, 1]}, {"iteration": 1, "part": 0, "groups": [2, 3]}]


def test_a_model_that_cannot_be_read_ends_the_learner_with_one_sentence(ring: Ring, tmp_path: Path) -> None:
    child = start_learner(ring, tmp_path, tokenizer_directory(tmp_path / "no-model"))
    try:
        ring.until(lambda: child.exit_code() is not None, "the learner ends", START_S)
    finally:
        child.signal_group(signal.SIGKILL)
    assert child.exit_code() == 2, child.tail()
    ring.until(lambda: ring.control.of(Finished), "it says why")
    assert ring.control.of(Finished)[0].error.startswith("user: no causal language model can be read from")
    assert "Traceback" not in "\n".join(child.tail())


def test_a_rank_that_breaks_has_its_sockets_to_itself_when_it_closes_them(ring: Ring) -> None:
    def breaks(node: Node) -> None:
        node.start()
        with polled(node):
            raise DeadlineExceeded("rank 0 is gone")

    rank = ring.run("learner", breaks, index=1)
    rank.expected = DeadlineExceeded
    ring.until(lambda: not rank.thread.is_alive(), "its end")
    assert isinstance(rank.error, DeadlineExceeded)
    assert [thread.name for thread in threading.enumerate() if thread.name == "poll"] == []
