"""Python: the interpreter that runs rlsys, already warm in every cell."""

from __future__ import annotations

from collections.abc import Mapping

from actors.sandbox import wire
from actors.sandbox.execution import Program
from actors.sandbox.languages import NO_FILES
from actors.sandbox.runner import Sandbox


class Python:
    """Source text goes into the cell as it is; a syntax error shows there as a runtime error."""

    fences = ("python", "py", "python3")
    takes_files = False

    def trees(self) -> list[str]:
        """The interpreter is in every cell anyway."""
        return []

    def missing(self) -> str:
        """Never anything."""
        return ""

    def prepare(self, source: str, sandbox: Sandbox, files: Mapping[str, bytes] = NO_FILES) -> Program:
        """Nothing to compile."""
        return Program(kind=wire.PYTHON, content=source.encode(errors="surrogatepass"))
