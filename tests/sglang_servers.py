"""Real SGLang servers for tests."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any

from actors.engines import EngineOptions
from actors.engines.sglang_options import Options
from actors.engines.sglang_server import Server
from protocol.errors import InfrastructureFault
from tests.actors.processes import alive, born, wait_until

START_S = 400.0
"""Three processes import SGLang; on a busy machine with two cores that took over a minute."""


def ask(url: str) -> dict[str, Any]:
    """A GET request; raises InfrastructureFault while there is no answer."""
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            content: dict[str, Any] = json.load(answer)
            return content
    except (OSError, HTTPException, ValueError) as error:  # the last two from whatever else has its port
        raise InfrastructureFault(str(error)) from None


@contextmanager
def running_server(model: Path, log_dir: Path, **engine: Any) -> Iterator[Server]:
    """A server with the architecture of `model`, without its weights, that answers. Nothing of it is left afterwards."""
    settings = {"max_context": 64, "slots": 4, **engine}
    server = Server(
        EngineOptions(model_path=model, log_dir=log_dir, name="shared", **settings), Options(stream_interval=1, start_s=START_S)
    )
    try:
        try:
            server.begin()
            server.wait_ready(lambda path: ask(server.url + path), lambda: False)
        except InfrastructureFault:  # once more, as an engine does it: another program may have taken its port
            server.end()
            server.begin()
            server.wait_ready(lambda path: ask(server.url + path), lambda: False)
        yield server
        assert not server.fault(), f"{server.fault()}; {server.tail()}"
    finally:
        processes = born(server.processes)
        server.close()
    wait_until(lambda: not alive(processes), "nothing of the server is left")
