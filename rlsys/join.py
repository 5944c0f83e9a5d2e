"""`rlsys join TOKEN` on another host, and `rlsys token RUN` on the run's own."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from actors.settings import MOST_ACTORS
from protocol.errors import DataError, UserError
from rlsys import __version__
from rlsys.launchers.agent import Agent, leave_on_signals
from rlsys.orders import ask
from rlsys.token import parse

DEVICES = re.compile(r"(\d+|(GPU|MIG)-[0-9a-fA-F/-]+)(,(\d+|(GPU|MIG)-[0-9a-fA-F/-]+))*")
"""What CUDA_VISIBLE_DEVICES takes: numbers, or names of whole or shared devices. It takes anything else for "none", and says nothing."""


def token(run: Path, *, rotate: bool, once: bool) -> int:
    """Print the token, a new one if that is asked."""
    print(ask(run, "token", {"rotate": rotate, "once": once})["token"])
    return 0


def given(text: str) -> str:
    """The token that is meant: `-` is a line of standard input, `@FILE` the content of a file, anything else itself."""
    if text == "-":
        return sys.stdin.readline()
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{text[1:]}: the token cannot be read ({getattr(error, 'strerror', None) or error})") from None


def join(
    text: str,
    *,
    role: str,
    count: int,
    host: str = "",
    name: str = "",
    model: Path | None = None,
    weights: Path | None = None,
    directory: Path | None = None,
    devices: str = "",
) -> int:
    """Be a host of a run until it ends, or this is told to leave (SIGTERM, Ctrl-C); a second time: at once."""
    if not 1 <= count <= MOST_ACTORS:
        raise UserError(f"--count {count}: at least one actor is added, and at most {MOST_ACTORS}")
    if devices:
        if not DEVICES.fullmatch(devices):
            raise UserError(f"--devices {devices}: expected CUDA devices with commas between them, such as 0,1,2,3 or GPU-6a1b...,GPU-...")
        os.environ["CUDA_VISIBLE_DEVICES"] = devices
    found = parse(given(text), __version__)
    agent = Agent(
        found,
        name=name,
        role=role,
        count=count,
        host=host,
        directory=None if directory is None else directory.resolve(),
        model=model,
        weights=None if weights is None else weights.resolve(),
        say=lambda line: print(line, flush=True),
    )
    leave_on_signals(agent)
    code, why = agent.run()
    print(f"rlsys: {why}", file=sys.stderr if code else sys.stdout)
    return code
