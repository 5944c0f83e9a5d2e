"""Strangers at every socket of a run over tcp: garbage, no key, a wrong key; and with the key: wrong roles, torn and oversized messages."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import zmq

from protocol.channels import Keys
from protocol.codec import encode
from protocol.messages import Message
from rlsys.audit import audit_run
from tests.protocol.examples import example
from tests.system.conftest import Run

FORGED = ("Trajectory", "Completion", "GroupOutcome", "GroupTask", "WeightsReady", "Hello", "Credit", "Stop", "Finished", "Register")


def messages() -> list[Message]:
    return [example(tag) for tag in FORGED]


def dealer(context: zmq.Context[Any], address: str, identity: str, own: Keys | None, server: bytes | None) -> zmq.Socket[Any]:
    link = context.socket(zmq.DEALER)
    link.linger, link.sndhwm, link.routing_id = 0, 100, identity.encode()
    if own is not None and server is not None:
        link.curve_publickey, link.curve_secretkey, link.curve_serverkey = own.public, own.secret, server
    link.connect(address)
    return link


def flood(address: str, run_id: int, keys: Keys, stop: threading.Event) -> None:
    """All kinds of nonsense to one address, as fast as one thread can."""
    host, _, port = address.removeprefix("tcp://").partition(":")
    other = Keys.make()
    context: zmq.Context[Any] = zmq.Context()
    strangers = [dealer(context, address, "rewarder-7@1", None, None), dealer(context, address, "rewarder-8@1", other, keys.public)]
    insider = dealer(context, address, "nobody-0@1", keys, keys.public)
    whole = [[bytes(frame) for frame in encode(message, run_id)] for message in messages()]
    torn = [frames[:-1] if len(frames) > 2 else [frames[0], frames[1][:-3]] for frames in whole]
    foreign = [[bytes(frame) for frame in encode(message, run_id + 1)] for message in messages()]
    try:
        while not stop.is_set():
            try:
                with socket.create_connection((host, int(port)), timeout=1.0) as raw:
                    raw.sendall(b"\xff" * 4096 + b"GET / HTTP/1.1\r\n\r\n")
            except OSError:
                pass
            for frames in [*whole, *torn, *foreign, [b"x" * 100_000], [b""]]:
                for link in (*strangers, insider):
                    try:
                        link.send_multipart(frames, zmq.NOBLOCK)
                    except zmq.Again:
                        pass
            stop.wait(0.01)
    finally:
        context.destroy(linger=0)


@contextmanager
def flooded(run: Run, status: dict[str, Any]) -> Iterator[int]:
    content = json.loads((run.path / "keys.json").read_text())
    keys = Keys(content["public"].encode(), content["secret"].encode())
    addresses = {a for p in status["processes"] for a in p["addresses"].values() if a.startswith("tcp://")}
    stop = threading.Event()
    threads = [threading.Thread(target=flood, args=(a, int(status["run_id"], 16), keys, stop), daemon=True) for a in sorted(addresses)]
    for thread in threads:
        thread.start()
    try:
        yield len(addresses)
    finally:
        stop.set()
        for thread in threads:
            thread.join(timeout=10)
        assert not any(thread.is_alive() for thread in threads)


@pytest.mark.faults
def test_strangers_cannot_stop_or_feed_a_run(config: dict[str, Any], start: Callable[..., Run]) -> None:
    config["transport"] = {"kind": "tcp"}
    config["iterations"] = 60
    run = start(config)
    status = run.until(lambda status: status if status.get("iteration", 0) >= 1 else None, "first iteration")
    mode = (run.path / "keys.json").stat().st_mode & 0o777
    assert mode == 0o600
    before = status["iteration"]
    with flooded(run, status) as sockets:
        assert sockets >= 6
        run.until(lambda status: status.get("iteration", 0) >= before + 10, "ten iterations during the flood", 200)
    assert run.wait(200) == 0, run.err
    result = audit_run(run.path)
    assert (result["lost"], result["doubled"], result["too_stale"]) == (0, 0, 0), result["findings"]
    log = "".join(path.read_text() for path in sorted((run.path / "logs").glob("*.log")))
    assert "refused on trajectories" in log
    assert "nobody-0@1" in log
    assert "rewarder-8@1" not in log, "a wrong key gets no further than the handshake"
