"""What the settings of all parts have in common. Needs nothing but pydantic."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator


class Settings(BaseModel):
    """Unknown keys, infinite numbers and NaN are refused; values are not changed after the check."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _off_is_a_word(cls, content: Any) -> Any:
        """YAML 1.1 reads a bare `off` as False; where `off` is one of the choices, that is what was meant."""
        if not isinstance(content, dict):
            return content
        meant = [name for name, value in content.items() if value is False and name in cls.model_fields]
        words = {name: "off" for name in meant if "off" in _choices(cls.model_fields[name].annotation)}
        return {**content, **words} if words else content


def _choices(annotation: Any) -> list[Any]:
    """Every value of the Literals in an annotation; none where False itself is allowed."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    parts = [part for part in get_args(annotation) if part is not type(None)]
    return [] if bool in parts else [value for part in parts for value in _choices(part)]
