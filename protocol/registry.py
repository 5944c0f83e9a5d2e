"""Names to objects: `resolve("grpo", table)` or `resolve("my_pkg.mod:Name", table)`.

A table maps a short name to "module:attribute", so that listing it imports nothing.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any

from protocol.errors import UnknownName


def check_name(name: str, table: Mapping[str, str], what: str) -> None:
    """Raise UnknownName unless `name` stands in `table` or looks like a user's own "pkg.mod:Name". Imports nothing."""
    if name in table or (":" in name and all(part.isidentifier() for part in name.replace(":", ".").split("."))):
        return
    near = difflib.get_close_matches(name, table, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise UnknownName(f"{what} {name!r} is not known{hint} Known: {', '.join(sorted(table))}, or your own as 'package.module:Name'.")


def resolve(name: str, table: Mapping[str, str], what: str) -> Any:
    """The object called `name`: an entry of `table`, or a user's own "package.module:Name".

    Raises UnknownName that says which of the two failed and what is known.
    """
    check_name(name, table, what)
    module_name, _, attribute = table.get(name, name).partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UnknownName(f"{what} {name!r}: no module named {error.name!r}; put its directory on PYTHONPATH or install it.") from error
    try:
        return getattr(module, attribute)
    except AttributeError:
        raise UnknownName(f"{what} {name!r}: module {module_name!r} has no {attribute!r}.") from None
