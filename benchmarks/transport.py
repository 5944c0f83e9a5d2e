"""Completions of 2,048 tokens through a generator -> reward -> learner chain: three processes, the real channels, no model.

    generator --Completion--> rewarder --Trajectory--> learner [journal]
        ^--Credit, Ack--/         ^--Credit, Ack--/

Everything that a run does to a sample on its way is done: it is encoded, checked on arrival, passed on under credits, journaled (or not:
a row each), acknowledged by the learner, and forgotten by the generator only then. No reward is computed. A repeat ends when the generator
has heard every acknowledgement. Each process counts its own CPU time, I/O threads included; figures are medians over the repeats.

A busy machine lowers the rate but hardly the CPU time, so the rate that the CPU times allow on idle cores stands beside the measured one.
It is a bound: the larger of (the busiest process on one core) and (all of them on the cores that there are) takes that long.

    python -m benchmarks.transport [--json] [--samples 20000] [--repeats 5] [--rows tcp curve ipc]
"""

from __future__ import annotations

import argparse
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from protocol.channels import Endpoint, Keys, Link, Poller, Transport
from protocol.codec import encode
from protocol.credits import Incoming, Outgoing
from protocol.journal import Journal
from protocol.messages import Ack, Completion, Credit, Hello, Trajectory, key_of

RUN = 0x7E57
GROUP_SIZE = 8
PROMPT_TOKENS, PAYLOAD_BYTES = 256, 1024
"""Of each sample, besides its 2,048 tokens: the prompt, and the problem that travels to the reward."""
LEARNER_WINDOW = 4096
"""Credits of the learner, as in learner/intake.py."""
REWARDER_WINDOW = 256
"""Credits of the reward actor: 4 per scoring thread in actors/rewarder.py, here for 64 threads."""
ROLES = ("learner", "rewarder", "generator")
ROWS = {"tcp": ("tcp", False), "curve": ("tcp", True), "ipc": ("ipc", False)}
DEADLINE_S = 120.0
"""Longest wait for any answer of a child."""

Key = tuple[int, int, int]


# ---------------------------------------------------------------------------------------------------- the three processes


class Console:
    """A child's end of the pipe to the benchmark: JSON lines, never the channels that are measured."""

    def __init__(self) -> None:
        self._rest = b""
        self.open = True

    def say(self, **answer: Any) -> None:
        """Answer on stdout."""
        print(json.dumps(answer), flush=True)

    def commands(self) -> Iterator[dict[str, Any]]:
        """Commands that have arrived. `cpu` is answered here: seconds of this process so far."""
        while select.select([0], [], [], 0)[0]:
            data = os.read(0, 65536)
            if not data:
                self.open = False
                return
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                command = json.loads(line)
                if command["do"] == "cpu":
                    self.say(cpu_s=time.process_time())
                else:
                    yield command


def hello(role: str) -> Hello:
    return Hello(role=role, index=0, identity=f"{role}-0@1", epoch=1)


def run_generator(transport: Transport, console: Console, tokens: int, rewarder: str) -> None:
    """Sends as credits allow; keeps every completion until it is acknowledged."""
    rng = np.random.default_rng(0)
    prompt_ids = rng.integers(0, 150_000, PROMPT_TOKENS).astype(np.int32)
    token_ids = rng.integers(0, 150_000, tokens).astype(np.int32)
    logprobs = -rng.random(tokens, np.float32)
    spans = np.array([[3, 0, tokens // 2], [4, 0, tokens]], np.int32)
    payload = rng.bytes(PAYLOAD_BYTES)

    def completion(number: int) -> Completion:
        return Completion(
            group_id=number // GROUP_SIZE,
            index=number % GROUP_SIZE,
            attempt=0,
            iteration=4,
            purpose="train",
            problem_id="train-1234",
            generator="generator-0@1",
            prompt_ids=prompt_ids,
            token_ids=token_ids,
            behaviour_logprobs=logprobs,
            spans=spans,
            finish_reason="stop",
            temperature=1.0,
            max_tokens=tokens,
            started_s=time.time(),
            finished_s=time.time(),
            payload=payload,
        )

    link = Link(transport, "completions", "generator-0@1", rewarder, "rewarder-0@1")
    credits = Outgoing()
    credits.add_peer(link.peer)
    link.send(hello("generator"))
    poller = Poller()
    poller.add(link)
    poller.add(0)
    unacknowledged: dict[Key, Completion] = {}
    number = end = 0
    started = 0.0
    console.say(frame_bytes=sum(len(frame) for frame in encode(completion(0), RUN)))
    while console.open:
        poller.wait(1.0)
        for command in console.commands():
            end, started = number + command["samples"], time.monotonic()
        for message in link.receive():
            if isinstance(message, Credit):
                credits.granted(link.peer, message.total)
            elif isinstance(message, Ack):
                for key in map(tuple, message.keys.tolist()):
                    del unacknowledged[key]
        while number < end and credits.left(link.peer) > 0:
            sample = completion(number)
            number += 1
            unacknowledged[key_of(sample)] = sample
            link.send(sample)
            credits.sent(link.peer)
        if started and number == end and not unacknowledged:
            console.say(wall_s=time.monotonic() - started)
            started = 0.0


def run_rewarder(transport: Transport, console: Console, learner: str) -> None:
    """Turns completions into trajectories; acknowledges to the generator what the learner acknowledged."""
    endpoint = Endpoint(transport, "completions", "completions")
    link = Link(transport, "trajectories", "rewarder-0@1", learner, "learner-0@1")
    incoming, credits = Incoming(REWARDER_WINDOW), Outgoing()
    credits.add_peer(link.peer)
    link.send(hello("rewarder"))
    poller = Poller()
    for item in (endpoint, link, 0):
        poller.add(item)
    held: dict[Key, str] = {}
    outbox: deque[Trajectory] = deque()
    console.say(address=endpoint.address)
    while console.open:
        poller.wait(1.0)
        for command in console.commands():
            raise ValueError(f"a rewarder knows no command {command}")
        for peer, message in endpoint.receive():
            if isinstance(message, Hello):
                incoming.add_peer(peer)
            elif isinstance(message, Completion):
                held[key_of(message)] = peer
                outbox.append(scored(message))
                incoming.done(peer)
        back: dict[str, list[Key]] = {}
        for message in link.receive():
            if isinstance(message, Credit):
                credits.granted(link.peer, message.total)
            elif isinstance(message, Ack):
                for key in map(tuple, message.keys.tolist()):
                    back.setdefault(held.pop(key), []).append(key)
        for peer, keys in back.items():
            endpoint.send(peer, Ack(keys=np.array(keys, np.int64)))
        while outbox and credits.left(link.peer) > 0:
            link.send(outbox.popleft())
            credits.sent(link.peer)
        for peer, total in incoming.grants():
            endpoint.send(peer, Credit(total=total))


def scored(c: Completion) -> Trajectory:
    """As actors/rewarder.py makes it, with a score that nobody computed."""
    return Trajectory(
        group_id=c.group_id,
        index=c.index,
        attempt=c.attempt,
        iteration=c.iteration,
        purpose=c.purpose,
        problem_id=c.problem_id,
        generator=c.generator,
        rewarder="rewarder-0@1",
        prompt_ids=c.prompt_ids,
        token_ids=c.token_ids,
        behaviour_logprobs=c.behaviour_logprobs,
        loss_mask=np.ones(len(c.token_ids), np.bool_),
        spans=c.spans,
        finish_reason=c.finish_reason,
        temperature=c.temperature,
        max_tokens=c.max_tokens,
        score=1.0,
        passed=True,
        status="accepted",
        parts={"unit_tests": 1.0},
        detail="",
        started_s=c.started_s,
        finished_s=c.finished_s,
        scored_s=time.time(),
        scoring_s=0.0,
    )


def run_learner(transport: Transport, console: Console, journal_dir: str) -> None:
    """Journals, if it is given a directory, and acknowledges: the order of learner/intake.py."""
    endpoint = Endpoint(transport, "trajectories", "trajectories")
    journal = Journal(Path(journal_dir)) if journal_dir else None
    incoming = Incoming(LEARNER_WINDOW)
    poller = Poller()
    poller.add(endpoint)
    poller.add(0)
    console.say(address=endpoint.address)
    while console.open:
        poller.wait(1.0)
        for command in console.commands():
            raise ValueError(f"a learner knows no command {command}")
        acknowledged: dict[str, list[Key]] = {}
        for peer, message in endpoint.receive():
            if isinstance(message, Hello):
                incoming.add_peer(peer)
            elif isinstance(message, Trajectory):
                incoming.done(peer)
                if journal is not None:
                    journal.append([b"trajectory", *encode(message, RUN)])
                acknowledged.setdefault(peer, []).append(key_of(message))
        for peer, keys in acknowledged.items():
            endpoint.send(peer, Ack(keys=np.array(keys, np.int64)))
        for peer, total in incoming.grants():
            endpoint.send(peer, Credit(total=total))
    if journal is not None:
        journal.close()


def run_role(role: str) -> None:
    """The body of a child: its order is the first line on stdin; it ends when stdin does."""
    with open(0, "rb", buffering=0, closefd=False) as stdin:  # unbuffered: the lines after the first are the Console's
        order = json.loads(stdin.readline())
    keys = Keys(order["public"].encode(), order["secret"].encode()) if order["public"] else None
    transport = Transport(RUN, Path(order["directory"]) if order["directory"] else None, keys=keys)
    try:
        if role == "generator":
            run_generator(transport, Console(), order["tokens"], order["peer"])
        elif role == "rewarder":
            run_rewarder(transport, Console(), order["peer"])
        else:
            run_learner(transport, Console(), order["journal"])
    finally:
        transport.close()


# ---------------------------------------------------------------------------------------------------- the benchmark


class Child:
    """One process of the chain, spoken to in JSON lines."""

    def __init__(self, role: str, order: dict[str, Any]) -> None:
        self.role = role
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.transport", "--role", role],
            cwd=Path(__file__).parent.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self._rest = b""
        self.tell(order)

    def tell(self, command: dict[str, Any]) -> None:
        """Write one line."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")

    def hear(self) -> dict[str, Any]:
        """Read one line. Raises RuntimeError when there is none within DEADLINE_S or the process has ended."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + DEADLINE_S
        while b"\n" not in self._rest:
            if not select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise RuntimeError(f"the {self.role} has said nothing for {DEADLINE_S:g} s")
            data = os.read(self._process.stdout.fileno(), 65536)
            if not data:
                raise RuntimeError(f"the {self.role} ended with exit code {self._process.wait()}; see its output above")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def cpu_s(self) -> float:
        """Its CPU time so far."""
        self.tell({"do": "cpu"})
        seconds: float = self.hear()["cpu_s"]
        return seconds

    def end(self) -> None:
        """Close its stdin; kill it if that does not end it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


@contextmanager
def chain(kind: str, *, keys: Keys | None, tokens: int, journal: str, directory: str) -> Iterator[tuple[dict[str, Child], int]]:
    """Three connected processes by role, and the bytes of one completion on the wire."""
    order: dict[str, Any] = {
        "directory": directory if kind == "ipc" else "",
        "public": keys.public.decode() if keys else "",
        "secret": keys.secret.decode() if keys else "",
        "journal": journal,
        "tokens": tokens,
        "peer": "",
    }
    children: dict[str, Child] = {}
    try:
        for role in ROLES:
            children[role] = Child(role, order)
            answer = children[role].hear()
            order["peer"] = answer.get("address", "")
        yield children, answer["frame_bytes"]
    finally:
        for child in reversed(children.values()):
            child.end()


def measure_row(row: str, *, journal: bool, samples: int, repeats: int, tokens: int) -> dict[str, Any]:
    """One transport with or without the journal: medians over `repeats`, after a repeat that does not count."""
    kind, curve = ROWS[row]
    rates, cpu_us = [], {role: list[float]() for role in ROLES}
    with tempfile.TemporaryDirectory(prefix="rlsys-") as name:
        directory = Path(name)
        journal_dir = str(directory / "journal") if journal else ""
        with chain(kind, keys=Keys.make() if curve else None, tokens=tokens, journal=journal_dir, directory=name) as (children, size):
            for repeat in range(repeats + 1):
                count = samples if repeat else max(1, samples // 10)
                before = {role: child.cpu_s() for role, child in children.items()}
                children["generator"].tell({"do": "go", "samples": count})
                wall_s = children["generator"].hear()["wall_s"]
                if repeat:
                    rates.append(count / wall_s)
                    for role, child in children.items():
                        cpu_us[role].append((child.cpu_s() - before[role]) / count * 1e6)
    by_role = {role: round(statistics.median(cpu_us[role]), 1) for role in reversed(ROLES)}
    rate, cores = statistics.median(rates), len(os.sched_getaffinity(0))
    return {
        "row": row,
        "journal": journal,
        "samples_per_s": round(rate),
        "samples_per_s_of_each_repeat": [round(r) for r in rates],
        "megabytes_per_s": round(rate * size / 1e6, 1),
        "cpu_us_per_sample": by_role,
        "cores": cores,
        "samples_per_s_on_idle_cores": round(1e6 / max(*by_role.values(), sum(by_role.values()) / cores)),
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Command line; returns the figures as well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--samples", type=int, default=20_000, help="in one repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=2048, help="of one completion")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="curve is tcp with encryption")
    parser.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.role:
        run_role(options.role)
        return {}
    say: Callable[[str], None] = (lambda line: None) if options.json else print
    say(f"{options.samples} completions of {options.tokens} tokens in each of {options.repeats} repeats; CPU-us per sample by process")
    rows = []
    for row in options.rows:
        for journal in (False, True):
            found = measure_row(row, journal=journal, samples=options.samples, repeats=options.repeats, tokens=options.tokens)
            rows.append(found)
            cpu = ", ".join(f"{role} {us:.0f}" for role, us in found["cpu_us_per_sample"].items())
            say(
                f"{row:5} journal {'on ' if journal else 'off'}: {found['samples_per_s']:6d} samples/s, {found['megabytes_per_s']:6.1f} MB/s; "
                f"{cpu}; idle cores allow {found['samples_per_s_on_idle_cores']}"
            )
    figures = {"samples": options.samples, "repeats": options.repeats, "tokens": options.tokens, "rows": rows}
    if options.json:
        print(json.dumps(figures))
    return figures


if __name__ == "__main__":
    main()
