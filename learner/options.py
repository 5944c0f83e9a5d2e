"""Plug-ins of the learner are plain functions; their options are their keyword-only arguments.

    def grpo(scores_N, group_ids_N, *, divide_by_std: bool = True): ...

Types and bounds come from the annotations (`Annotated[float, Field(ge=0)]`), which pydantic checks; one without an annotation takes anything.
What a function of a user's own does wrong is said in one sentence that names it: here where it can be seen, else when it is first called.
"""

from __future__ import annotations

import difflib
import inspect
import logging
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, ValidationError, create_model
from pydantic.errors import PydanticUserError

from protocol.errors import ConfigError, RlsysError, UnknownName
from protocol.registry import resolve

log = logging.getLogger("rlsys.learner")

CALLS = {
    "advantage": (("scores_N", "group_ids_N"), ("passed_N",)),
    "objective": (("tokens",), ()),
    "optimizer": (("trained", "settings"), ()),
}
"""What each kind of function is called with, and what it may take beyond, by that very name."""


def keyword_options(name: str, table: Mapping[str, str], given: Mapping[str, Any], what: str) -> dict[str, Any]:
    """All options of the function called `name`, with `given` checked and the others at their defaults.

    Raises ValueError (so that a settings validator may call it) that names the function, the option and what it takes.
    """
    try:
        function = resolve(name, table, what)
    except UnknownName as error:
        raise ValueError(str(error)) from None
    num_positional(function, name, what)
    takes = [p for p in inspect.signature(function).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    fields: dict[str, Any] = {
        p.name: (Any if p.annotation is p.empty else p.annotation, ... if p.default is p.empty else p.default) for p in takes
    }
    settings = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())
    try:
        model = create_model(f"{name} options", __config__=settings, __module__=function.__module__, **fields)
        checked = model.model_validate(dict(given))
    except ValidationError as error:
        found = "; ".join(_sentence(fault, list(fields)) for fault in error.errors())
        raise ValueError(f"options of {what} {name!r}: {found} (it takes: {', '.join(fields) or 'none'})") from None
    except (PydanticUserError, NameError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{what} {name!r}: the annotations of its options ({', '.join(fields)}) cannot be checked: {reason}") from None
    return {field: getattr(checked, field) for field in fields}


def _sentence(fault: Any, known: list[str]) -> str:
    where = ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(where, known, n=1)
        return f"{where} is none of them" + (f"; did you mean {near[0]}?" if near else "")
    return f"{where} is missing" if fault["type"] == "missing" else f"{where}: {fault['msg']}"


def num_positional(function: Any, name: str, what: str) -> int:
    """How many positional arguments to call it with. Raises ValueError for what cannot be called as a `what`."""
    takes, beyond = CALLS[what]
    wanted = f"expected a function of ({', '.join(takes)}{''.join(f'[, {one}]' for one in beyond)}, *, options)"
    if isinstance(function, type) or not callable(function):
        raise ValueError(f"{what} {name!r} is a {'class' if isinstance(function, type) else type(function).__name__}, {wanted}")
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (ValueError, TypeError):
        raise ValueError(f"{what} {name!r} does not say what it takes, {wanted}") from None
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    known = len(takes) + sum(1 for p, one in zip(places[len(takes) :], beyond, strict=False) if p.name == one)
    needed = sum(p.default is p.empty for p in places)
    if needed > known or (len(places) < len(takes) and not variadic):
        raise ValueError(f"{what} {name!r} takes ({', '.join(p.name for p in parameters)}), {wanted}")
    return known


def bind(name: str, table: Mapping[str, str], given: Mapping[str, Any], what: str) -> Callable[..., Any]:
    """The function called `name` with its options filled in; it is given as many of the arguments as it takes.

    What a function of a user's own raises becomes a ConfigError that says where; its traceback goes to the log.
    """
    function, options = resolve(name, table, what), keyword_options(name, table, given, what)
    count = num_positional(function, name, what)

    def bound(*args: Any) -> Any:
        return function(*args[:count], **options)

    return bound if name in table else guarded(bound, name, what)


def guarded(function: Callable[..., Any], name: str, what: str) -> Callable[..., Any]:
    """The same function; what it raises names it. Too little memory stays what it is: a restart may mend that."""

    def call(*args: Any) -> Any:
        try:
            return function(*args)
        except (RlsysError, MemoryError):
            raise
        except Exception as error:  # a user's code may raise anything
            if type(error).__name__ == "OutOfMemoryError":
                raise
            last = traceback.extract_tb(error.__traceback__)[-1]
            log.error("%s %r failed", what, name, exc_info=True)
            raise ConfigError(
                f"{what} {name!r} failed with {type(error).__name__}: {error} ({Path(last.filename).name}, line {last.lineno})"
            ) from error

    return call
