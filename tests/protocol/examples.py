"""The Example of every wire type, read from its own docstring, so that documentation and tests cannot drift apart."""

from __future__ import annotations

import inspect
import textwrap
from dataclasses import fields
from typing import Any

import numpy as np

from protocol.codec import array_fields
from protocol.messages import MESSAGES, Message


def example(tag: str) -> Message:
    """The message that the docstring of type `tag` shows."""
    cls = MESSAGES[tag]
    text = textwrap.dedent(inspect.getdoc(cls) or "").partition("Example:")[2]
    message: Any = eval(" ".join(text.split()), {cls.__name__: cls, "array": np.array})
    dtypes = array_fields(tag)
    values = {spec.name: getattr(message, spec.name) for spec in fields(cls)}
    return cls(**{name: np.asarray(value, dtypes[name]) if name in dtypes else value for name, value in values.items()})


def equal(a: Message, b: Message) -> bool:
    """Field by field, arrays by content and dtype."""
    return type(a) is type(b) and all(_same(getattr(a, spec.name), getattr(b, spec.name)) for spec in fields(a))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
