"""Join tokens: one string that lets a process on another host find a run, know it again, and be let in.

    rlsys1.<base64 of msgpack [run id, address, server's public key, secret, rlsys version]>

Whoever holds it may add actors to the run, which see its problems and completions: hand it on as you would a password. It ends with the run,
with the next `rlsys token RUN --rotate`, and, made with --once, with its first use. The server's key is in it, so that nobody else can pass
for the run, and nobody without it can even shake hands.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import astuple, dataclass

import msgpack

from protocol.addresses import split
from protocol.errors import UserError

PREFIX = "rlsys1."


@dataclass(frozen=True, slots=True)
class Token:
    """What a token says."""

    run_id: str
    address: str
    """Of the supervisor's door, such as tcp://10.0.0.1:4711."""
    server_key: str
    """CURVE, in Z85."""
    secret: str
    version: str
    """Of rlsys in the run."""

    def text(self) -> str:
        """The string that `rlsys join` takes."""
        data: bytes = msgpack.packb(astuple(self))
        return PREFIX + base64.urlsafe_b64encode(data).decode().rstrip("=")


def parse(text: str, version: str) -> Token:
    """The token in a string, for a host that has rlsys `version`. Raises UserError in one sentence."""
    text = text.strip()
    if not text.startswith(PREFIX):
        raise UserError(f"{shortened(text)!r} is no join token: expected {PREFIX}..., as `rlsys token RUN` prints it")
    data = text.removeprefix(PREFIX)
    try:
        fields = msgpack.unpackb(base64.b64decode(data + "=" * (-len(data) % 4), altchars=b"-_", validate=True))
        if type(fields) is not list or len(fields) != 5 or not all(isinstance(field, str) for field in fields):
            raise ValueError("not five strings")
        token = Token(*fields)
        split(token.address)
        if len(token.server_key) != 40 or len(bytes.fromhex(token.run_id)) != 8:
            raise ValueError("a key or a run of a wrong length")
    except (ValueError, binascii.Error, msgpack.UnpackException, UnicodeDecodeError):
        raise UserError(f"{shortened(text)!r} is a damaged join token: copy all of what `rlsys token RUN` prints") from None
    if token.version != version:
        raise UserError(f"the run has rlsys {token.version}, this host has rlsys {version}: install the run's version here")
    return token


def shortened(text: str) -> str:
    """So much of a token as may be shown."""
    return text if len(text) <= 24 else f"{text[:16]}..."
