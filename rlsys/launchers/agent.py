"""A host's end of a run: asks to be let in, and runs what the supervisor wants to run here. Behind `rlsys join` and each Ray actor.

    supervisor --Joined, HostOrders--> [ agent ] --starts, watches, ends--> processes of the run, children of this one
         ^--JoinRequest, HostReport (exit codes, logs)--/

Only this goes through the agent: its processes register with the supervisor and talk to their peers themselves. It waits for: orders. When
the supervisor falls silent it ends what it runs; when it dies itself, the kernel ends its children and the supervisor misses its reports.
"""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from protocol.addresses import numeric, split, towards
from protocol.channels import Keys, Link, Poller, Transport
from protocol.errors import UserError
from protocol.holds import Hold, sweep
from protocol.messages import HostOrders, HostReport, Joined, JoinRequest, Refused
from protocol.node import ProcessSpec
from rlsys import __version__
from rlsys.hosts import describe_keys, fresh_identity
from rlsys.launchers.local import Child
from rlsys.rundir import WEIGHTS_DIR, make_scratch_dir, sees_weights, write_privately
from rlsys.token import Token

REPORT_S = 0.5
ANSWER_S = 30.0
"""How long the run's door may take to answer; a request that was lost is repeated twice a second."""
LOG_BYTES = 128 << 10
"""Of a process's log that one report carries: at twice a second more than any process prints for long. What is beyond is left out."""


class Agent:
    """One host's part in one run. `run` returns an exit code and a sentence; `leave` may be called from a signal handler."""

    def __init__(
        self,
        token: Token,
        *,
        name: str = "",
        role: str = "",
        count: int = 0,
        host: str = "",
        directory: Path | None = None,
        model: Path | None = None,
        weights: Path | None = None,
        in_run_dir: bool = False,
        say: Callable[[str], object] = lambda text: None,
    ) -> None:
        self._token, self._role, self._count, self._say = token, role, count, say
        self._name = name or socket.gethostname()
        self._asked_host, self._directory, self._model, self._weights = host, directory, model, weights
        self._in_run_dir = in_run_dir
        self._identity = fresh_identity()
        self._children: dict[str, Child] = {}
        self._ended: dict[str, int] = {}
        self._offsets: dict[str, int] = {}
        self._leaving = self._hurry = False
        self._stop: str | None = None
        self._lacks = ""
        self._dir = Path()

    def leave(self) -> None:
        """Let everything here finish what it has, and go; asked a second time, go at once."""
        self._hurry, self._leaving = self._leaving, True

    def run(self) -> tuple[int, str]:
        """Be part of the run until it is over, this host is told to go, or the supervisor is gone. Raises UserError when it is not let in."""
        self._host = self._own_address()
        transport = Transport(0, None, self._host, Keys.make(), server_key=self._token.server_key.encode())
        made: Hold | None = None
        weights: Hold | None = None
        try:
            link = Link(transport, "hosts", self._identity, self._token.address, "supervisor")
            joined = self._knock(link)
            if self._in_run_dir:
                self._dir = Path(joined.run_dir)
            else:
                sweep()
                made = None if self._directory else make_scratch_dir(self._token.run_id)
                self._dir = self._directory or (made.directory if made else Path())
            weights = Hold.beside(Path(joined.weights_dir))  # where this is the run's own host
            self._joined = joined
            try:
                self._settle_in(joined)
            except UserError as error:
                self._lacks = str(error)
                link.send(self._report())
                raise
            self._say(f"{self._name} ({self._host}) is part of run {self._token.run_id}")
            return self._serve(link, joined)
        finally:
            for child in self._children.values():
                child.kill()
            transport.close(linger_s=1.0)
            if weights is not None:
                weights.release()
            if made is not None:
                made.remove()
            sweep()

    # ------------------------------------------------------------------------------------------------ coming in

    def _own_address(self) -> str:
        if self._asked_host:
            return numeric(self._asked_host, "--host")
        host, port = split(self._token.address)
        try:
            return towards(host, port)
        except OSError as error:
            raise UserError(f"this host has no route to the run's host {host} ({error.strerror})") from None

    def _knock(self, link: Link) -> Joined:
        request = JoinRequest(
            secret=self._token.secret, run_id=self._token.run_id, version=__version__, name=self._name, role=self._role, count=self._count
        )
        poller, deadline = Poller(), time.monotonic() + ANSWER_S
        poller.add(link)
        while time.monotonic() < deadline and not self._leaving:
            link.send(request)
            poller.wait(REPORT_S)
            for message in link.receive():
                if isinstance(message, Refused):
                    raise UserError(message.reason)
                if isinstance(message, Joined):
                    return message
        raise UserError(
            f"nobody answers to this token at {self._token.address} within {ANSWER_S:g} s: the run has ended or was resumed (it has another "
            "token then), or its host cannot be reached from here"
        )

    def _settle_in(self, joined: Joined) -> None:
        """Put what processes read where they look for it. Raises UserError for what this host lacks."""
        if self._in_run_dir:
            if not (self._dir / "keys.json").exists():
                raise UserError(f"this host does not see the run directory {self._dir}: put it on a file system that both hosts share")
            return
        content = yaml.safe_load(joined.config)
        model = self._model or Path(content["model"]["path"])
        if not (model / "config.json").exists():
            raise UserError(f"this host has no model at {model}: name its place here with --model DIR")
        content["model"]["path"] = str(model.resolve())
        content["generators"]["options"].pop("devices", None)  # those of the run's host
        if self._role in ("", "generator"):
            self._check_weights(joined, content["weights"]["transfer"])
        (self._dir / "logs").mkdir(parents=True, exist_ok=True)
        (self._dir / WEIGHTS_DIR).write_text(joined.weights_dir)
        (self._dir / "config.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        write_privately(self._dir / "keys.json", describe_keys(joined.public, joined.secret))

    def _check_weights(self, joined: Joined, transfer: str) -> None:
        """Generators that do not see the published files have them brought over the network, unless it was said that they see them."""
        weights = self._weights or Path(joined.weights_dir)
        if not sees_weights(weights, self._token.run_id) and (self._weights is not None or transfer == "directory"):
            raise UserError(
                f"this host does not see the run's weights directory {weights}: put it on a file system that both hosts share "
                "(weights.directory in the run's configuration), and name its place here with --weights DIR if it differs; "
                "or let versions come over the network (weights.transfer: auto or network, and no --weights)"
            )

    # ------------------------------------------------------------------------------------------------ being there

    def _serve(self, link: Link, joined: Joined) -> tuple[int, str]:
        poller = Poller()
        poller.add(link)
        heard, next_report = time.monotonic(), 0.0
        while True:
            now = time.monotonic()
            if now >= next_report:
                next_report = now + REPORT_S
                link.send(self._report())
            poller.wait(max(0.0, min(0.2, next_report - now)))
            for message in link.receive():
                heard = time.monotonic()
                if isinstance(message, HostOrders):
                    self._follow(message)
                elif isinstance(message, Refused):
                    return 1, message.reason
            if self._stop:
                return 0, self._stop
            if self._hurry:
                return 1, "told to go at once: what ran here is issued again"
            if time.monotonic() - heard > joined.silent_s:
                return 1, f"the run's supervisor has been silent for {joined.silent_s:g} s: all that ran here is ended"

    def _follow(self, orders: HostOrders) -> None:
        """Start what is wanted and was never here, end what is not wanted. A Joined that comes again is an echo of a repeated request."""
        self._stop = self._stop or orders.stop or None
        wanted = {"{role}-{index}@{start}".format(**order["spec"]): order for order in orders.wanted}
        for identity, child in list(self._children.items()):
            if identity not in wanted or self._stop:
                child.kill()
        if self._stop:
            return
        for identity, order in wanted.items():
            if identity not in self._children and identity not in self._ended:
                spec, environment = self._spec(order["spec"]), order["environment"]
                self._say(f"{identity} starts")
                self._children[identity] = Child(spec, self._dir / "logs" / f"{spec.name}.log", environment)

    def _spec(self, fields: dict[str, Any]) -> ProcessSpec:
        """The process as this host runs it, on the first device that none of its kind has."""
        taken = {child.spec.place for child in self._children.values() if child.spec.role == fields["role"]}
        place = next(place for place in range(len(taken) + 1) if place not in taken)
        return ProcessSpec(
            **fields,
            run_dir=str(self._dir),
            control=self._joined.control,
            host=self._host,
            weights_dir=str(self._weights or ""),
            place=place,
        )

    def _report(self) -> HostReport:
        """Exit codes first, then logs: what a process said last is never later than its end."""
        rows: list[list[Any]] = []
        for identity, child in list(self._children.items()):
            code = child.exit_code()
            rows.append([identity, child.pid, code])
            if code is not None:
                self._say(f"{identity} has ended with exit code {code}")
                self._ended[identity] = code
                del self._children[identity]
        rows += [[identity, 0, code] for identity, code in list(self._ended.items())[-256:] if identity not in {row[0] for row in rows}]
        logs = {} if self._in_run_dir else {path.name: new for path in log_files(self._dir) if (new := self._new(path))}
        return HostReport(processes=rows, logs=logs, leaving=self._leaving, lacks=self._lacks)

    def _new(self, path: Path) -> bytes:
        """What was written to a log since the last look, its end if that is too much."""
        offset = self._offsets.get(path.name, 0)
        size = path.stat().st_size
        if size < offset:
            offset = 0
        with path.open("rb") as file:
            file.seek(max(offset, size - LOG_BYTES))
            data = file.read(LOG_BYTES)
            self._offsets[path.name] = file.tell()
        return data


def log_files(directory: Path) -> list[Path]:
    """What processes write here for people and for machines, and the run is to have."""
    return sorted(path for path in (directory / "logs").glob("*") if path.suffix in (".log", ".jsonl"))


def leave_on_signals(agent: Agent) -> None:
    """SIGTERM, SIGINT and SIGHUP let it leave in order; the second one at once."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: agent.leave())
