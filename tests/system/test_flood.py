"""Strangers at every socket of a run over tcp: garbage, no key, a wrong key; and with the key: wrong roles, torn and oversized messages."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq

from protocol.channels import Keys
from protocol.codec import decode, encode
from protocol.ledger import Ledger
from protocol.messages import JoinRequest, Message, Order, Piece, PieceRequest, Refused
from rlsys import __version__
from rlsys.audit import audit_run
from rlsys.orders import ADDRESS
from rlsys.token import parse
from tests.protocol.examples import example
from tests.system.conftest import Run
from tests.system.test_join import over_tcp, there
from tests.system.test_scale import ended
from tests.system.test_simulated import simulated  # noqa: F401  (a fixture)

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


class Knock:
    """A peer that asks for everything that is to be had at an address, again and again, and keeps the answers."""

    def __init__(self, address: str, run_id: int, own: Keys | None, server: bytes, identity: str, asks: list[Message]) -> None:
        self._run_id, self.asks = run_id, asks
        self.context: zmq.Context[Any] = zmq.Context()
        self.link = dealer(self.context, address, identity, own, server if own is not None else None)
        self.answers: list[Message] = []

    def turn(self) -> None:
        for ask in self.asks:
            try:
                self.link.send_multipart(encode(ask, self._run_id), zmq.NOBLOCK)
            except zmq.Again:
                pass
        try:
            while True:
                self.answers.append(decode(self.link.recv_multipart(zmq.NOBLOCK), self._run_id))
        except zmq.Again:
            pass


@contextmanager
def knocking(knocks: list[Knock]) -> Iterator[None]:
    """All of them, from one thread, until the end."""
    stop = threading.Event()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            while not stop.is_set():
                for knock in knocks:
                    knock.turn()
                stop.wait(0.02)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=10)
        for knock in knocks:
            knock.context.destroy(linger=0)
    assert not errors, errors


def everything(newest: int, run_id: str) -> list[Message]:
    """What feeds the sockets of weights, hosts and orders, and what asks them for something."""
    ask = PieceRequest(number=newest, incarnation=0, file="manifest.json", start=0, end=1 << 20)
    join = JoinRequest(secret="0" * 48, run_id=run_id, version=__version__, name="a guest", role="generator", count=4)
    ends = [join, Order(number=1, name="scale", data={"generators": 9}), Order(number=2, name="token", data={"rotate": True})]
    return [ask, *ends, *(example(tag) for tag in ("Piece", "JoinRequest", "HostReport", "Joined", "HostOrders", "Peers", "Order"))]


@pytest.mark.faults
def test_without_the_key_nobody_gets_weights_or_orders_or_comes_in_by_the_door(
    simulated: dict[str, Any],  # noqa: F811
    start: Callable[..., Run],
    tmp_path: Path,
) -> None:
    config = over_tcp(simulated)
    config["generators"]["count"] = 2
    config["weights"] = {"transfer": "network", "cache": str(tmp_path)}
    run = start(config)
    run.until(there(run, "generator-0", "generator-1"), "work of generators that fetch their weights")
    status = run.until(lambda status: status if status.get("iteration", 0) >= 2 else None, "two iterations")
    run_id, newest = int(status["run_id"], 16), status["iteration"]
    content = json.loads((run.path / "keys.json").read_text())
    keys = Keys(content["public"].encode(), content["secret"].encode())
    at = {name: {p["addresses"][name] for p in status["processes"] if name in p["addresses"]} for name in ("pieces", "passing", "weights")}
    ledger = Ledger(run.path / "ledger.sqlite", read_only=True)
    at["orders"] = {ledger.get(ADDRESS)}
    ledger.close()
    assert {name: len(found) for name, found in at.items()} == {"pieces": 1, "passing": 2, "weights": 1, "orders": 1}
    door = parse((run.path / "join_token").read_text(), __version__)
    knocks: dict[str, list[Knock]] = {"no key": [], "wrong key": [], "nobody": [], "guest": [], "owner": []}
    for address in {address for found in at.values() for address in found}:
        for who, own, identity in (
            ("no key", None, "generator-7@1"), ("wrong key", Keys.make(), "generator-8@1"), ("nobody", keys, "nobody-0@1"),
        ):  # fmt: skip
            knocks[who].append(Knock(address, run_id, own, keys.public, identity, everything(newest, status["run_id"])))
    for who, own, server in (("no key", None, b""), ("wrong key", keys, keys.public), ("guest", Keys.make(), door.server_key.encode())):
        knocks[who].append(Knock(door.address, 0, own, server, "host-77@1", everything(newest, status["run_id"])))
    [pieces] = at["pieces"]
    knocks["owner"].append(Knock(pieces, run_id, keys, keys.public, "generator-9@1", everything(newest, status["run_id"])[:1]))
    threads = threading.Event()
    garbage = [
        threading.Thread(target=flood, args=(address, run_id, keys, threads), daemon=True)
        for address in (*at["pieces"], *at["passing"], door.address)
    ]
    for thread in garbage:
        thread.start()
    try:
        with knocking([knock for some in knocks.values() for knock in some]):
            run.until(lambda status: status.get("iteration", 0) >= newest + 10, "ten iterations during the flood", 200)
    finally:
        threads.set()
        for thread in garbage:
            thread.join(timeout=10)
    heard = {who: [answer for knock in some for answer in knock.answers] for who, some in knocks.items()}
    assert heard["no key"] == heard["wrong key"] == [], "no handshake, no answer"
    assert heard["nobody"] == [], "of no role that has any business there"
    assert heard["guest"] and all(isinstance(answer, Refused) for answer in heard["guest"]), "let in is who has the token's secret"
    assert any(isinstance(answer, Piece) for answer in heard["owner"]), "the key is what was missing: with it and a role there are weights"
    after = run.status()
    assert {p["name"] for p in after["processes"]} == {p["name"] for p in status["processes"]}, "nobody joined, nothing was scaled"
    assert (run.path / "join_token").read_text().strip() == door.text(), "no other token was made"
    assert after["restarts"] == []
    ended(run)
    log = "".join(path.read_text() for path in sorted((run.path / "logs").glob("*.log")))
    assert "refused on pieces" in log and "refused on passing" in log
    events = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines() if '"event"' in line]
    assert not [event for event in events if event["event"] in ("weights refused", "host joined", "scale")]
