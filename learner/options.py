"""Options of advantage functions and objectives are their keyword-only arguments, so that a plug-in is one plain function.

    def grpo(scores_N, group_ids_N, *, divide_by_std: bool = True): ...

Types and bounds come from the annotations (`Annotated[float, Field(ge=0)]`), which pydantic checks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ConfigDict, ValidationError, create_model

from protocol.errors import UnknownName
from protocol.registry import resolve


def keyword_options(name: str, table: Mapping[str, str], given: Mapping[str, Any], what: str) -> dict[str, Any]:
    """All options of the function called `name`, with `given` checked and the others at their defaults.

    Raises ValueError (so that a settings validator may call it) that names the function, the option and what it takes.
    """
    try:
        function = resolve(name, table, what)
    except UnknownName as error:
        raise ValueError(str(error)) from None
    takes = [p for p in inspect.signature(function).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    fields: dict[str, Any] = {p.name: (p.annotation, ... if p.default is p.empty else p.default) for p in takes}
    model = create_model(
        f"{name} options", __config__=ConfigDict(extra="forbid", allow_inf_nan=False), __module__=function.__module__, **fields
    )
    try:
        checked = model.model_validate(dict(given))
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError(f"options of {what} {name!r}: {found}. It takes: {', '.join(fields) or 'none'}.") from None
    return {field: getattr(checked, field) for field in fields}


def bind(name: str, table: Mapping[str, str], given: Mapping[str, Any], what: str) -> Callable[..., Any]:
    """The function called `name` with its options filled in."""
    function, options = resolve(name, table, what), keyword_options(name, table, given, what)

    def bound(*args: Any) -> Any:
        return function(*args, **options)

    return bound
