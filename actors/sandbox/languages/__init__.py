"""Languages: how source text becomes a program that a cell runs. This file is the interface and the table.

To add one: a new file beside this one and a line in LANGUAGES. `tests/contracts/test_languages.py` then tests it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from actors.sandbox import Execution

if TYPE_CHECKING:
    from actors.sandbox.execution import Program
    from actors.sandbox.runner import Sandbox

LANGUAGES = {
    "python": "actors.sandbox.languages.python:Python",
    "cpp": "actors.sandbox.languages.cpp:Cpp",
    "rust": "actors.sandbox.languages.rust:Rust",
}
"""Name in problems and configurations -> class. The class is built as `Class()`."""


NO_FILES: Mapping[str, bytes] = MappingProxyType({})


class CompileError(Exception):
    """The source text is not a program of the language; `execution` is the compiler's run. A verdict, not a fault."""

    def __init__(self, execution: Execution) -> None:
        super().__init__(execution.stderr.decode(errors="replace"))
        self.execution = execution


class Language(Protocol):
    """One language."""

    fences: tuple[str, ...]
    """Info strings of fenced blocks that hold it, in lower case."""
    takes_files: bool
    """Whether further files can be compiled together with a source."""

    def trees(self) -> list[str]:
        """Directories outside /usr that its tools need in a cell."""

    def missing(self) -> str:
        """Why this machine cannot run the language, in one sentence; empty when it can."""

    def prepare(self, source: str, sandbox: Sandbox, files: Mapping[str, bytes] = NO_FILES) -> Program:
        """A program that runs `source`, with `files` by name beside it.

        Raises CompileError, and InfrastructureFault when the compiler could not be run.
        """
