"""Waiting for what several jobs and cells have to say. `select.select` knows no descriptor above 1023; an owner of hundreds of cells has those."""

from __future__ import annotations

import math
import select
from collections.abc import Sequence
from typing import Protocol, TypeVar


class HasDescriptor(Protocol):
    def fileno(self) -> int: ...


File = TypeVar("File", bound=HasDescriptor)


def readable(files: Sequence[File], timeout_s: float) -> list[File]:
    """Those of `files` that can be read, or whose other end is gone, after waiting at most `timeout_s` for one."""
    poll = select.poll()
    for file in files:
        poll.register(file, select.POLLIN)
    ready = {number for number, _ in poll.poll(math.ceil(1000 * max(0.0, timeout_s)))}
    return [file for file in files if file.fileno() in ready]
