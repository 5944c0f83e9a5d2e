"""What a sample of 512 tokens costs besides sampling, scoring and training it: CPU-microseconds by part, and by process of a whole ring.

    python -m benchmarks.overhead [--tokens 512] [--no-ring] [--json]

Parts, each with the production objects and without anything else in the process:

    transport   encode, send, check and decode, pass on under credits, journal, acknowledge: three real processes over ipc (benchmarks/transport.py)
    pacing      the dispatcher's decision and the task: next_task, deal, issue, encode
    batching    assembler and batcher: add, look whether the batch is complete, take
    ledger      issue log and terminal states in SQLite

The ring (unless --no-ring) is a run of all processes with simulated sampling, rewards and training; the CPU time of each process is divided by the
samples, heartbeats, metrics, loading of weights and the simulation itself included. The goal, at most 300 microseconds, is about the parts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from actors.allotment import Allotment
from actors.dispatcher import Dispatcher, DispatcherJob
from actors.pacing import PacingRule
from actors.settings import DataSettings, EvaluationSettings, SamplingSettings
from actors.stages import StagePlan
from benchmarks.runs import running, status_when
from benchmarks.transport import measure_row
from learner.batcher import Assembler, Batcher
from learner.line import BatchRule
from learner.settings import LearnerSettings
from protocol.codec import encode
from protocol.ledger import Issue, Ledger
from protocol.messages import Trajectory
from rlsys.simulated_model import ensure_simulated

GOAL_US = 300.0
GROUPS, SIZE = 128, 8
ITERATIONS = 6
RING_ITERATIONS = 12
RING_S = 300.0
GENERATORS = 4


def pacing_us() -> float:
    """Of a sample, when groups of 8 are issued to 4 generators."""
    files = ensure_simulated()
    with tempfile.TemporaryDirectory() as directory:
        dispatcher = Dispatcher(
            DispatcherJob(
                seed=0,
                iterations=ITERATIONS,
                pacing=PacingRule(iterations=ITERATIONS, groups_per_iteration=GROUPS, max_staleness=1),
                max_requeues=1,
                stages=(StagePlan(name="0", train=files.train, max_tokens=512, temperature=1.0),),
                model_dir=files.model,
                max_context=4096,
                data=DataSettings(train=files.train),
                sampling=SamplingSettings(groups_per_iteration=GROUPS, group_size=SIZE, max_tokens=512),
                evaluation=EvaluationSettings(),
                ledger=Path(directory) / "ledger.sqlite",
            )
        )
        allotment, count = Allotment(), 0
        peers = [f"generator-{i}@1" for i in range(GENERATORS)]
        started = time.process_time()
        for version in range(ITERATIONS):
            allotment.published(version, float(version))
            dispatcher.on_version(version, version * GROUPS)
            for peer in peers:
                allotment.loaded(peer, version, float(version))
            credits = dict.fromkeys(peers, 2 * GROUPS)
            deal = allotment.deal(dispatcher.room, float(version))
            while (task := dispatcher.next_task()) is not None and (peer := deal.pick(credits.__getitem__, task.min_version)) is not None:
                credits[peer] -= 1
                encode(task, 1)
                dispatcher.issue(task)
                count += 1
        return (time.process_time() - started) / (count * SIZE) * 1e6


def trajectory(tokens: int) -> Trajectory:
    return Trajectory(
        group_id=0,
        index=0,
        attempt=0,
        iteration=0,
        purpose="train",
        problem_id="simulated-00001",
        generator="generator-0@1",
        rewarder="rewarder-0@1",
        prompt_ids=np.zeros(64, np.int32),
        token_ids=np.ones(tokens, np.int32),
        behaviour_logprobs=np.full(tokens, -1.0, np.float32),
        loss_mask=np.ones(tokens, np.bool_),
        spans=np.array([[0, 0, tokens]], np.int32),
        finish_reason="stop",
        temperature=1.0,
        max_tokens=tokens,
        score=0.0,
        passed=False,
        status="ok",
        parts={"simulated": 0.0},
        detail="",
        started_s=0.0,
        finished_s=0.0,
        scored_s=0.0,
        scoring_s=0.0,
    )


def batching_us(tokens: int) -> float:
    """Of a sample, from its arrival to its place in the batch."""
    rule = BatchRule(iterations=ITERATIONS, groups_per_iteration=GROUPS, max_staleness=ITERATIONS)
    batcher, assembler = Batcher(LearnerSettings(zero_variance="keep"), rule, SIZE), Assembler(SIZE, SIZE)
    one = trajectory(tokens)
    arriving = [
        replace(one, group_id=g, index=i, score=float(i % 2), iteration=g // GROUPS, loss_mask=one.loss_mask.copy())
        for g, i in itertools.product(range(ITERATIONS * GROUPS), range(SIZE))
    ]
    started = time.process_time()
    for k in range(ITERATIONS):
        for t in arriving[k * GROUPS * SIZE : (k + 1) * GROUPS * SIZE]:
            if not assembler.holds(t):
                group = assembler.add(t)
                if group is not None:
                    batcher.add(group)
                    batcher.missing(k)
        batcher.take(k, {}, assembler)
    return (time.process_time() - started) / len(arriving) * 1e6


def ledger_us(tokens: int) -> float:
    """Of a sample, when groups are issued one by one and end by the batch."""
    rule = BatchRule(iterations=1, groups_per_iteration=GROUPS, max_staleness=0)
    batcher, one = Batcher(LearnerSettings(zero_variance="keep"), rule, SIZE), trajectory(tokens)
    assembler = Assembler(SIZE, SIZE)
    for g, i in itertools.product(range(GROUPS), range(SIZE)):
        group = assembler.add(replace(one, group_id=g, index=i, score=float(i % 2)))
        if group is not None:
            batcher.add(group)
    outcomes = batcher.take(0).outcomes
    with tempfile.TemporaryDirectory() as directory:
        ledger = Ledger(Path(directory) / "ledger.sqlite")
        started = time.process_time()
        for g in range(GROUPS):
            ledger.issued(
                [
                    Issue(
                        group_id=g,
                        attempt=0,
                        iteration=0,
                        purpose="train",
                        problem_id="p",
                        generator="generator-0@1",
                        issued_s=0.0,
                        requeues=0,
                    )
                ]
            )
        ledger.ended(outcomes)
        seconds = time.process_time() - started
        ledger.close()
    return seconds / (GROUPS * SIZE) * 1e6


def ring_us(tokens: int) -> dict[str, float]:
    """By role, of a run of all processes at about 130 samples a second."""
    speed = 50.0
    engine = {"tokens_per_s_sample": 60, "tokens_per_s": 350, "lengths": {"mean": tokens, "sigma": 0.3, "cap": 4 * tokens}, "speed": speed}
    content = {
        "name": "overhead",
        "iterations": RING_ITERATIONS,
        "model": {"path": "builtin:simulated"},
        "data": {"train": "builtin:simulated"},
        "sampling": {"groups_per_iteration": 32, "group_size": SIZE, "max_tokens": 4 * tokens},
        "evaluation": {"at_start": False, "at_end": False},
        "generators": {"count": GENERATORS, "slots": 32, "engine": "simulated", "options": engine},
        "rewarders": {"reward": "simulated", "concurrency": 4, "options": {"speed": speed}},
        "learner": {
            "step": "simulated",
            "step_options": {"tokens_per_s": 2000, "speed": speed},
            "zero_variance": "keep",
            "overlong": "keep",
        },
    }
    with tempfile.TemporaryDirectory(prefix="rlsys-overhead-") as directory:
        config, run = Path(directory) / "config.yaml", Path(directory) / "run"
        config.write_text(yaml.safe_dump(content))
        marks: list[tuple[int, dict[str, float]]] = []
        with running(config, run) as process:
            for iteration in (2, RING_ITERATIONS - 2):
                status = status_when(run, process, lambda s, goal=iteration: s.get("iteration", 0) >= goal, RING_S)
                marks.append((status["iteration"], {p["name"]: _cpu_s(p["pid"]) for p in status["processes"]}))
    (first, before), (last, after) = marks
    samples = (last - first) * 32 * SIZE
    roles: dict[str, float] = {}
    for name, seconds in after.items():
        role = name.rpartition("-")[0]
        roles[role] = roles.get(role, 0.0) + (seconds - before.get(name, 0.0)) / samples * 1e6
    return roles


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line; returns the figures as well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--samples", type=int, default=10_000, help="through the transport, in each of 3 repeats")
    parser.add_argument("--no-ring", action="store_true", help="only the parts")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    transport = measure_row("ipc", journal=True, samples=options.samples, repeats=3, tokens=options.tokens)["cpu_us_per_sample"]
    parts = {f"transport {role}": float(us) for role, us in transport.items()}
    parts |= {"pacing": pacing_us(), "batching": batching_us(options.tokens), "ledger": ledger_us(options.tokens)}
    figures: dict[str, Any] = {"tokens": options.tokens, "parts_us": parts, "sum_us": sum(parts.values()), "goal_us": GOAL_US}
    if not options.no_ring:
        figures["ring_us"] = ring_us(options.tokens)
    if options.json:
        print(json.dumps(figures))
        return figures
    print(f"CPU-microseconds per sample of {options.tokens} tokens")
    for name, us in parts.items():
        print(f"  {name:<22} {us:7.1f}")
    print(f"  {'sum':<22} {figures['sum_us']:7.1f}   (goal: at most {GOAL_US:g}, {figures['sum_us'] / GOAL_US:.2f} of it)")
    if "ring_us" in figures:
        print("whole processes of a ring, the simulation itself included")
        for role, us in figures["ring_us"].items():
            print(f"  {role:<22} {us:7.1f}")
    return figures


if __name__ == "__main__":
    main()
