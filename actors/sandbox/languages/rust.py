"""Rust 2021, by the rustc of the caller's path."""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from actors.sandbox.execution import Program
from actors.sandbox.languages import NO_FILES
from actors.sandbox.languages.compiled import Compiler
from actors.sandbox.runner import Sandbox

_FLAGS = ("--edition=2021", "-Copt-level=2", "-Ccodegen-units=1", "--crate-name=solution", "-Awarnings", "-", "-o", "OUT")
_DEADLINE_S = 20.0


@functools.cache
def toolchain() -> Path | None:
    """The directory that `rustc --print sysroot` names; None where there is no rustc that answers."""
    rustc = shutil.which("rustc")
    if rustc is None:
        return None
    try:
        answer = subprocess.run([rustc, "--print", "sysroot"], capture_output=True, text=True, timeout=_DEADLINE_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    root = Path(answer.stdout.strip())
    return root if (root / "bin/rustc").exists() else None


class Rust:
    """One crate from standard input, linked by the C compiler."""

    fences = ("rust", "rs")
    takes_files = False

    def __init__(self) -> None:
        root = toolchain()
        # without /proc the loader does not find libraries beside the program
        command = ["/usr/bin/env", f"LD_LIBRARY_PATH={root}/lib", f"{root}/bin/rustc"] if root else ["/usr/bin/rustc"]
        # /usr/bin/cc may be a link through /etc, which cells do not have
        self._compiler = Compiler([*command, f"-Clinker={Path('/usr/bin/cc').resolve()}", *_FLAGS])

    def trees(self) -> list[str]:
        """The tool chain, unless it lies under /usr."""
        root = toolchain()
        return [] if root is None or root.is_relative_to("/usr") else [str(root)]

    def missing(self) -> str:
        """A sentence where there is no compiler."""
        if toolchain() is None:
            return "Rust needs rustc on the path (https://rustup.rs)"
        return "" if Path("/usr/bin/cc").exists() else "Rust needs a linker at /usr/bin/cc (Debian, Ubuntu: apt-get install gcc)"

    def prepare(self, source: str, sandbox: Sandbox, files: Mapping[str, bytes] = NO_FILES) -> Program:
        """Compile, or take the program of the same source."""
        return self._compiler.compile(source, sandbox, files)
