"""The door of a run: real sockets and keys on both ends, an agent in a thread, and no process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from protocol.channels import Endpoint, Keys, Link, Poller, Transport
from protocol.errors import UserError, WireError
from protocol.messages import Heartbeat, HostReport, Joined, JoinRequest, Message, Refused
from protocol.node import ProcessSpec
from rlsys import __version__
from rlsys.config import dump_config, parse_config
from rlsys.hosts import TOKEN_FILE, Door, Grant, Host, fresh_identity
from rlsys.launchers.agent import Agent, log_files
from rlsys.rundir import WEIGHTS_PROBE
from rlsys.token import Token, parse
from tests.configuration import minimal

RUN_ID = "00000000000000ab"
DEADLINE_S = 120.0


class Opened:
    """A door with what lies behind it; `events` are what it told the supervisor."""

    def __init__(self, tmp_path: Path) -> None:
        self.run_dir, self.weights = tmp_path / "run", tmp_path / "weights"
        for directory in (self.run_dir / "logs", self.weights):
            directory.mkdir(parents=True)
        (self.weights / WEIGHTS_PROBE).write_text(RUN_ID)
        config = dump_config(parse_config(minimal(tmp_path), "test"))
        self.keys = Keys.make()
        grant = Grant(
            epoch=1, control="tcp://127.0.0.1:9", keys=self.keys, config=lambda: config, run_dir=self.run_dir,
            weights_dir=self.weights, silent_s=10 * DEADLINE_S,
        )  # fmt: skip
        self.door = Door(RUN_ID, "127.0.0.1", grant)
        self.events: list[tuple[str, Host]] = []
        self.door.on_join = lambda host: self.events.append(("join", host))
        self.door.on_leave = lambda host: self.events.append(("leave", host))
        self.door.on_gone = lambda host: self.events.append(("gone", host))

    @property
    def told(self) -> list[str]:
        return [name for name, _ in self.events]

    def lose_patience(self) -> None:
        """From now on a host that says nothing for half a second is silent."""
        self.door._grant = replace(self.door._grant, silent_s=0.5)

    def until(self, condition: Callable[[], object], what: str) -> None:
        end = time.monotonic() + DEADLINE_S
        poller = Poller()
        poller.add(self.door.end)
        while not condition():
            assert time.monotonic() < end, f"{what}; so far {self.told}"
            poller.wait(0.05)
            self.door.turn()

    def token(self) -> Token:
        return parse(self.door.token, __version__)


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Opened]:
    monkeypatch.setattr("rlsys.launchers.agent.ANSWER_S", DEADLINE_S)
    made = Opened(tmp_path)
    yield made
    made.door.close("the test is over")


class Visitor(threading.Thread):
    """An agent in a thread."""

    def __init__(self, token: Token, **options: object) -> None:
        super().__init__(daemon=True)
        self.agent = Agent(token, name="visitor", **options)  # type: ignore[arg-type]
        self.code, self.said = -1, ""
        self.start()

    def run(self) -> None:
        try:
            self.code, self.said = self.agent.run()
        except UserError as error:
            self.code, self.said = 2, str(error)


def test_only_the_present_token_opens_the_door(opened: Opened) -> None:
    first = opened.token()
    opened.door.rotate()
    present = opened.token()
    assert (opened.run_dir / TOKEN_FILE).read_text().strip() == present.text()
    assert (opened.run_dir / TOKEN_FILE).stat().st_mode & 0o777 == 0o600
    cases = {
        "the token is an old one": first,
        "the token is wrong": replace(present, secret="0" * 48),
        "the token is for run 0000000000000001, this is run 00000000000000ab": replace(present, run_id="0" * 15 + "1"),
    }
    visitors = {sentence: Visitor(token, role="generator", count=1) for sentence, token in cases.items()}
    many = Visitor(present, role="learner", count=1)
    for sentence, visitor in visitors.items():
        opened.until(lambda v=visitor: not v.is_alive(), sentence)  # type: ignore[misc]
        assert (visitor.code, sentence in visitor.said) == (2, True), visitor.said
    opened.until(lambda: not many.is_alive(), "the end of one with a role that nobody may add")
    assert "hosts can add generators and rewarders" in many.said
    assert opened.events == []


def test_the_logs_of_both_kinds_are_sent_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    for name in ("generator-4.log", "generator-4.jsonl", "generator-4.jsonl.1", "server.txt"):
        (tmp_path / "logs" / name).write_text("x")
    assert [path.name for path in log_files(tmp_path)] == ["generator-4.jsonl", "generator-4.log"]


def test_a_token_for_one_use_ends_with_it(opened: Opened) -> None:
    standing = opened.token()
    token = parse(opened.door.once(), __version__)
    assert opened.token() == standing != token, "the standing token stays, and is not given out as one for a single use"
    visitor = Visitor(token, role="rewarder", count=2)
    opened.until(lambda: opened.told == ["join"], "it is let in")
    assert opened.events[0][1].place == "visitor"
    second = Visitor(token, role="rewarder", count=2)
    opened.until(lambda: not second.is_alive(), "the second use")
    assert (second.code, "used up or replaced" in second.said) == (2, True)
    unused = parse(opened.door.once(), __version__)
    opened.door.rotate()
    third = Visitor(unused, role="rewarder", count=1)
    opened.until(lambda: not third.is_alive(), "one that was never used, after all were replaced")
    assert (third.code, "used up or replaced" in third.said) == (2, True)
    visitor.agent.leave()
    opened.until(lambda: not visitor.is_alive(), "the first leaves")
    assert (visitor.code, opened.told) == (0, ["join", "leave", "gone"])
    assert [(host.role, host.count, host.gone) for name, host in opened.events if name == "gone"] == [
        ("rewarder", 2, "host visitor left in order")
    ]


def test_a_host_that_is_expected_again_comes_in_with_the_new_token_alone(opened: Opened) -> None:
    host, first = opened.door.expect("generator-0")
    second = opened.door.expect_again(host)
    late = Visitor(parse(first, __version__))
    opened.until(lambda: not late.is_alive(), "the end of one with the token before")
    assert (late.code, "used up or replaced" in late.said, opened.told, host.identity) == (2, True, [], "")
    visitor = Visitor(parse(second, __version__))
    opened.until(lambda: opened.events == [("join", host)], "the same host comes in")
    visitor.agent.leave()
    opened.until(lambda: not visitor.is_alive(), "it leaves")


@pytest.mark.parametrize(
    ("option", "sentence"),
    [("weights", "does not see the run's weights directory"), ("model", "this host has no model at")],
)
def test_what_a_host_lacks_is_said_before_anything_starts(opened: Opened, tmp_path: Path, option: str, sentence: str) -> None:
    visitor = Visitor(opened.token(), role="generator", count=1, **{option: tmp_path / "elsewhere"})
    opened.until(lambda: not visitor.is_alive(), "its end")
    assert (visitor.code, sentence in visitor.said and str(tmp_path / "elsewhere") in visitor.said) == (2, True), visitor.said
    assert "join" not in opened.told
    assert not list(Path(opened.run_dir / "logs").iterdir())


def test_what_a_killed_agent_leaves_goes_with_the_next_start_and_what_a_living_one_has_stays(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "tmp"  # where no other run of this machine sweeps
    here.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(here))
    killed = subprocess.Popen(
        [sys.executable, "-P", "-m", "rlsys", "join", "-", "--role", "rewarder"],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env={**os.environ, "TMPDIR": str(here)},
    )  # fmt: skip
    try:
        assert killed.stdin is not None
        with killed.stdin as line:
            line.write(opened.door.token.encode() + b"\n")
        opened.until(lambda: list(here.glob("rlsys-*/keys.json")), "a directory with keys of the first host")
        [left] = here.iterdir()
        second = Visitor(opened.token(), role="rewarder", count=1)
        opened.until(lambda: len(list(here.glob("rlsys-*/keys.json"))) == 2, "one of the second")
        assert left.exists(), "its agent lives"
    finally:
        killed.kill()
        killed.wait(DEADLINE_S)
    named = tmp_path / "named"
    third = Visitor(opened.token(), role="rewarder", count=1, directory=named)
    opened.until(lambda: not left.exists(), "the third removes what the first left")
    opened.until((named / "keys.json").exists, "keys of the third")
    for visitor in (second, third):
        visitor.agent.leave()
        opened.until(lambda v=visitor: not v.is_alive(), "it leaves")  # type: ignore[misc]
        assert visitor.code == 0, visitor.said
    assert list(here.iterdir()) == []
    assert (named / "config.yaml").exists(), "what was named stays"


def test_another_version_is_refused_by_the_door_itself(opened: Opened) -> None:
    token = opened.token()
    request = JoinRequest(secret=token.secret, run_id=RUN_ID, version="0.0.1", name="old", role="generator", count=1)
    assert answer(opened, token.server_key, request) == Refused(
        reason=f"the run has rlsys {__version__}, this host has rlsys 0.0.1: install the run's version there"
    )


def test_who_was_not_let_in_is_told_nothing_and_who_lacks_the_key_hears_nothing(opened: Opened) -> None:
    token = opened.token()
    report = HostReport(processes=[["generator-0@1", 1, 0]], logs={"../../x.log": b"x"}, leaving=False, lacks="")
    refused = answer(opened, token.server_key, report)
    assert isinstance(refused, Refused) and "does not know this host" in refused.reason
    right = JoinRequest(secret=token.secret, run_id=RUN_ID, version=__version__, name="x", role="generator", count=1)
    assert answer(opened, Keys.make().public.decode(), right, wait_s=0.7) is None, "another server's key shakes no hands"
    joined = answer(opened, token.server_key, right)
    assert isinstance(joined, Joined) and joined.public == opened.keys.public.decode()


def answer(opened: Opened, server_key: str, message: Message, wait_s: float = DEADLINE_S) -> Message | None:
    """What the door says to it; None when it says nothing in time."""
    transport = Transport(0, None, "127.0.0.1", Keys.make(), server_key=server_key.encode())
    try:
        link = Link(transport, "hosts", fresh_identity(), opened.door.end.address, "supervisor")
        link.send(message)
        end = time.monotonic() + wait_s
        poller = Poller()
        poller.add(link)
        while time.monotonic() < end:
            opened.door.turn()
            poller.wait(0.02)
            for found in link.receive():
                return found
        return None
    finally:
        transport.close()


def test_a_host_that_falls_silent_is_gone_with_all_that_ran_there(opened: Opened) -> None:
    token = opened.token()
    transport = Transport(0, None, "127.0.0.1", Keys.make(), server_key=token.server_key.encode())
    try:
        link = Link(transport, "hosts", fresh_identity(), opened.door.end.address, "supervisor")
        link.send(JoinRequest(secret=token.secret, run_id=RUN_ID, version=__version__, name="mute", role="generator", count=1))
        link.send(HostReport(processes=[], logs={}, leaving=False, lacks=""))
        opened.until(lambda: opened.told == ["join"], "it is let in")
        host = opened.events[0][1]
        spec = ProcessSpec(run_id=RUN_ID, epoch=1, role="generator", index=4, start=1, run_dir="", control="")
        child = host.start(spec, opened.run_dir / "logs" / "generator-4.log", {"OMP_NUM_THREADS": "1", "TMPDIR": "/nowhere"})
        assert (child.exit_code(), child.host) == (None, "mute")
        assert [row["environment"] for row in host.orders().wanted] == [{"OMP_NUM_THREADS": "1"}], "a temporary directory is the host's own"
        link.send(
            HostReport(
                processes=[["generator-4@1", 77, None]],
                logs={"generator-4.log": b"hello\n", "generator-4.jsonl": b"{}\n", "x.log": b"no"},
                leaving=False,
                lacks="",
            )
        )
        opened.until(lambda: child.pid == 77, "its process is known")
        logs = opened.run_dir / "logs"
        assert child.tail() == ["hello"] and sorted(p.name for p in logs.iterdir()) == ["generator-4.jsonl", "generator-4.log"]
        opened.lose_patience()
        opened.until(lambda: opened.told == ["join", "gone"], "its silence is noticed")
        assert child.exit_code() == -9 and "host mute has been silent for" in child.how()
    finally:
        transport.close()


def test_the_runs_other_sockets_take_nobody_whom_the_door_did_not_let_in(opened: Opened) -> None:
    ours, stranger = Transport(0xAB, None, "127.0.0.1", opened.keys), Transport(0xAB, None, "127.0.0.1", Keys.make())
    stranger = replace(stranger, server_key=opened.keys.public)
    beat = Heartbeat(identity="learner-0@1", doing="x", peer="", since_s=0.0, detail="", progress=0)
    try:
        control = Endpoint(ours, "control", "control")
        with suppress(WireError):  # turned away already: such a socket takes nothing any more
            Link(stranger, "control", "learner-0@1", control.address, "supervisor").send(beat)
        Link(ours, "control", "learner-1@1", control.address, "supervisor").send(replace(beat, identity="learner-1@1"))
        poller = Poller()
        poller.add(control)
        assert poller.wait(DEADLINE_S)
        assert [peer for peer, _ in control.receive()] == ["learner-1@1"]
        assert not poller.wait(0.5), "the stranger is not heard later either"
    finally:
        stranger.close()
        ours.close()
