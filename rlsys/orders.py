"""Commands that change a live run: the supervisor's end, and the end of the command that a user types.

    rlsys scale RUN ... --Order--> [ supervisor ]      (a socket that only whoever may read the run directory can find or speak on)
            ^------------Answer----------/

Over `ipc` the socket is a file in the run's private directory, over `tcp` it takes the run's own key, which `keys.json` holds.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from protocol.channels import Endpoint, Link, Poller, Transport
from protocol.errors import ConfigError, UserError
from protocol.ledger import Ledger
from protocol.messages import Answer, Order, Refused
from protocol.node import ProcessSpec
from rlsys.rundir import holder

ANSWER_S = 30.0
"""How long a command waits for the supervisor, which looks at its sockets ten times a second."""
ADDRESS = "orders"
"""Key of the ledger's `run` table."""

Handler = Callable[[Mapping[str, Any]], dict[str, Any]]
"""Does what is asked and says what was done. A UserError is the answer that it was refused."""


class Orders:
    """The supervisor's end. `handlers` by the order's name."""

    def __init__(self, transport: Transport) -> None:
        self.end = Endpoint(transport, "orders", "orders")
        self.handlers: dict[str, Handler] = {}

    def turn(self) -> None:
        """Answer what has arrived."""
        for peer, message in self.end.receive():
            if isinstance(message, Order):
                self.end.send(peer, self._answer(message))

    def _answer(self, order: Order) -> Answer:
        handler = self.handlers.get(order.name)
        if handler is None:
            return Answer(number=order.number, refused=f"this run's supervisor knows no order {order.name!r}", data={})
        try:
            return Answer(number=order.number, refused="", data=handler(order.data))
        except UserError as error:
            return Answer(number=order.number, refused=str(error), data={})


def ask(run: Path, name: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """Give the supervisor of a live run an order. Raises ConfigError, in a sentence, when there is none or it refuses."""
    if not (run / "ledger.sqlite").exists():
        raise ConfigError(f"{run}: holds no run")
    if holder(run) is None:
        raise ConfigError(f"{run}: is not running")
    ledger = Ledger(run / "ledger.sqlite", read_only=True)
    try:
        address, run_id, scratch, epoch = (ledger.get(key) for key in (ADDRESS, "run_id", "scratch", "epoch"))
    finally:
        ledger.close()
    if not address:
        raise ConfigError(f"{run}: is only starting; try again in a moment")
    number = secrets.randbits(31)
    spec = ProcessSpec(
        run_id=run_id,
        epoch=int(epoch),
        role="client",
        index=os.getpid(),
        start=number,
        run_dir=str(run),
        control=address,
        socket_dir="" if address.startswith("tcp") else scratch,
    )
    transport = spec.transport()
    try:
        link = Link(transport, "orders", spec.identity, address, "supervisor")
        link.send(Order(number=number, name=name, data=dict(data)))
        poller, deadline = Poller(), time.monotonic() + ANSWER_S
        poller.add(link)
        while time.monotonic() < deadline:
            poller.wait(0.2)
            for message in link.receive():
                if isinstance(message, Answer) and message.number == number:
                    if message.refused:
                        raise ConfigError(message.refused)
                    return message.data
                if isinstance(message, Refused):
                    raise ConfigError(message.reason)
        raise ConfigError(f"{run}: its supervisor did not answer at {address} within {ANSWER_S:g} s")
    finally:
        transport.close()
