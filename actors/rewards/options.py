"""Options of a reward, checked at the door."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from protocol.errors import ConfigError

T = TypeVar("T", bound=BaseModel)


def parse_options(model: type[T], reward: str, options: Mapping[str, Any]) -> T:
    """`options` as `model`. Raises ConfigError that names the reward and the first bad option."""
    try:
        return model(**options)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "options"
        if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
            near = difflib.get_close_matches(place, model.model_fields, n=1)
            known = f"did you mean {near[0]}?" if near else f"it has {', '.join(model.model_fields)}"
            raise ConfigError(f"reward {reward} has no option {place!r}; {known}") from None
        raise ConfigError(f"reward {reward}, option {place!r}: {first['msg']}") from None
