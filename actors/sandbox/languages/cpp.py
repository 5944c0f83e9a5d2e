"""C++17, by the g++ under /usr."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from actors.sandbox.execution import Program
from actors.sandbox.languages import NO_FILES
from actors.sandbox.languages.compiled import Compiler
from actors.sandbox.runner import Sandbox

FIFOS = {"rlsys_fifos.cpp": Path(__file__).with_name("fifos.cpp").read_bytes()}
"""Compiled with a program, lets it open the paths /dev/fd/N."""
_FLAGS = ("-std=c++17", "-O2", "-pipe", "-w", "-fmax-errors=3", "-fdiagnostics-color=never", "-x", "c++", "-", "-o", "OUT")


class Cpp:
    """Compiled as contest judges do, without warnings."""

    fences = ("cpp", "c++", "cc", "cxx", "cpp17", "c++17")
    takes_files = True

    def __init__(self) -> None:
        # /usr/bin/g++ may be a link through /etc, which cells do not have
        self._compiler = Compiler([str(Path("/usr/bin/g++").resolve()), *_FLAGS])

    def trees(self) -> list[str]:
        """All under /usr."""
        return []

    def missing(self) -> str:
        """A sentence where there is no compiler."""
        return "" if Path("/usr/bin/g++").exists() else "C++ needs g++ at /usr/bin/g++ (Debian, Ubuntu: apt-get install g++)"

    def prepare(self, source: str, sandbox: Sandbox, files: Mapping[str, bytes] = NO_FILES) -> Program:
        """Compile, or take the program of the same source."""
        return self._compiler.compile(source, sandbox, files)
