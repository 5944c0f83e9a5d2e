"""The command line of `rlsys sandbox serve`."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import ssl
import sys
from pathlib import Path

from protocol.errors import ConfigError, InfrastructureFault
from rlsys.rundir import write_privately
from rlsys.sandbox_service.server import Service, Serving

SHORTEST = 16
"""Characters of a token: fewer could be guessed."""


def serve(
    listen: str,
    token_file: Path,
    *,
    cells: int | None,
    queue: int,
    deadline_s: float,
    body_mb: float,
    memory_mb: float,
    grace_s: float,
    certificate: Path | None,
    key: Path | None,
    as_json: bool,
) -> int:
    """Serve until SIGTERM or SIGINT; exit code 0 then. Raises ConfigError for what cannot be served."""
    host, port = parse_listen(listen)
    token, made = read_token(token_file)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    serving = Serving(
        host=host,
        port=port,
        token=token,
        cells=cells or os.cpu_count() or 1,
        queue=queue,
        deadline_s=deadline_s,
        body_bytes=round(body_mb * 1e6),
        memory_bytes=round(memory_mb * 1e6),
        grace_s=grace_s,
        tls=_tls(certificate, key),
    )

    def say(address: str) -> None:
        if as_json:
            print(
                json.dumps({"address": address, "pid": os.getpid(), "cells": serving.cells, "queue": queue, "token_file": str(token_file)}),
                flush=True,
            )
            return
        print(f"the sandbox is served at {address}: {serving.cells} programs at once, {queue} may wait; token in {token_file}", flush=True)

    if made:
        print(f"{token_file} did not exist: a token was made", file=sys.stderr)
    try:
        asyncio.run(_run(serving, say))
    except InfrastructureFault as fault:
        raise ConfigError(f"this machine cannot run model-written programs: {fault}") from None
    except OSError as error:
        raise ConfigError(f"--listen {listen}: cannot be listened on ({error.strerror or error})") from None
    return 0


async def _run(serving: Serving, say: object) -> None:
    assert callable(say)
    await Service(serving).run(say)


def parse_listen(text: str) -> tuple[str, int]:
    """Host and port. Raises ConfigError."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"--listen {text}: expected HOST:PORT, such as 127.0.0.1:8390 or [::1]:0 (0: any port that is free)")
    return host.removeprefix("[").removesuffix("]"), int(port)


def read_token(path: Path) -> tuple[str, bool]:
    """The token in a file, and whether the file was made now. Raises ConfigError for a file that others may read, or a short token."""
    try:
        if not path.exists():
            write_privately(path, secrets.token_hex(24) + "\n")
            return path.read_text().strip(), True
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"--token-file {path}: others than its owner may read it; chmod 600 {path}")
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token-file {path}: cannot be read or made ({error})") from None
    if len(token) < SHORTEST or not token.isascii() or len(token.split()) != 1:
        raise ConfigError(f"--token-file {path}: holds {len(token)} characters, expected one word of at least {SHORTEST} ASCII characters")
    return token, False


def _tls(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    if certificate is None:
        if key is not None:
            raise ConfigError("--key without --certificate")
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"--certificate {certificate}: no certificate and key that can be used ({error})") from None
    return context
