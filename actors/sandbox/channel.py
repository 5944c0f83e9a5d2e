"""Messages between two jobs: length-prefixed JSON on a socket that both inherit. Used inside cells only."""

from __future__ import annotations

import json
import os
import struct
from typing import Any

from actors.sandbox import values

_LENGTH = struct.Struct("=I")
LONGEST_BYTES = 64 << 20


class Channel:
    """One end. `receive` raises EOFError when the other end is gone or does not keep to the format."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def send(self, data: Any) -> None:
        """Blocks until the other end has read enough. Raises OSError."""
        body = values.to_json(data)
        rest = memoryview(_LENGTH.pack(len(body)) + body)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]

    def receive(self) -> Any:
        """The next message."""
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        if length > LONGEST_BYTES:
            raise EOFError(f"a message of {length} bytes, at most {LONGEST_BYTES} are taken")
        try:
            return json.loads(self._exactly(length))
        except (ValueError, RecursionError) as error:
            raise EOFError(f"a message that is not JSON: {error}") from None

    def _exactly(self, size: int) -> bytes:
        parts: list[bytes] = []
        while size:
            try:
                part = os.read(self._descriptor, min(size, 1 << 20))
            except OSError as error:
                raise EOFError(str(error)) from None
            if not part:
                raise EOFError("the other process is gone")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)
