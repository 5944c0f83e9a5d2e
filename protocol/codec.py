"""Bytes <-> messages: `[header][msgpack map][raw little-endian arrays...]`.

The header is b"RL", the protocol version (1 byte), the run (8 bytes, little-endian) and the tag in ASCII. The map holds every field that
is no array, and for each array its shape; the arrays follow in the order of the fields. Nothing is pickled, nothing is evaluated, and
every field is checked on arrival: a message of another version, run, tag, type or length raises WireError.
"""

from __future__ import annotations

import struct
import types
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import msgpack
import numpy as np

from protocol.errors import WireError
from protocol.messages import MESSAGES, PROTOCOL_VERSION, Message

HEADER = struct.Struct("<2sBQ")
MAGIC = b"RL"
MAX_MAP_BYTES = 64 << 20
"""Largest msgpack map: problems with large tests travel in it. Arrays are bounded by their own frames."""

Check = Callable[[Any], bool]
_EXACT = (int, float, str, bool, bytes)


class _Plan(NamedTuple):
    """What decoding one message type needs, worked out once."""

    cls: type[Message]
    plain: tuple[tuple[str, type | None, Check, str], ...]
    """Name; the type that needs no further look, where there is one; the whole check; the hint in words."""
    arrays: tuple[tuple[str, np.dtype[Any]], ...]
    names: frozenset[str]
    tuples: tuple[str, ...]
    """msgpack knows only lists: these become tuples again."""


def _check_for(hint: Any) -> Check:
    """A predicate for one field's type hint; exact types, so that True is no int and 1 is no float field's bool."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return lambda value: True
    if origin is Literal:
        allowed = frozenset(arguments)
        return lambda value: isinstance(value, str) and value in allowed
    if origin in (Union, types.UnionType):
        checks = [_check_for(argument) for argument in arguments]
        return lambda value: any(check(value) for check in checks)
    if hint is type(None):
        return lambda value: value is None
    if hint is float:
        return lambda value: type(value) in (float, int)
    if origin is tuple:
        parts = [_check_for(argument) for argument in arguments]
        return lambda value: (
            type(value) in (tuple, list) and len(value) == len(parts) and all(c(v) for c, v in zip(parts, value, strict=True))
        )
    if origin is list:
        item = _check_for(arguments[0])
        return lambda value: type(value) is list and all(item(v) for v in value)
    if origin is dict:
        key, item = _check_for(arguments[0]), _check_for(arguments[1])
        return lambda value: type(value) is dict and all(key(k) and item(v) for k, v in value.items())
    return lambda value: type(value) is hint


@cache
def _plan(tag: str) -> _Plan:
    cls = MESSAGES[tag]
    hints = get_type_hints(cls, include_extras=True)
    plain, arrays = [], []
    tuples = tuple(spec.name for spec in fields(cls) if get_origin(hints[spec.name]) is tuple)
    for spec in fields(cls):
        hint = hints[spec.name]
        if get_origin(hint) is Annotated:
            arrays.append((spec.name, np.dtype("<" + get_args(hint)[1]) if get_args(hint)[1] != "b1" else np.dtype(np.bool_)))
        else:
            plain.append((spec.name, hint if hint in _EXACT else None, _check_for(hint), str(hint)))
    return _Plan(cls, tuple(plain), tuple(arrays), frozenset(spec.name for spec in fields(cls)), tuples)


def array_fields(tag: str) -> dict[str, np.dtype[Any]]:
    """The fields of a message type that travel as raw buffers, with their dtypes."""
    return dict(_plan(tag).arrays)


@cache
def _header(tag: str, run: int) -> bytes:
    return HEADER.pack(MAGIC, PROTOCOL_VERSION, run) + tag.encode()


@cache
def _plans(run: int) -> dict[bytes, _Plan]:
    """The headers that a process of this run accepts."""
    return {_header(tag, run): _plan(tag) for tag in MESSAGES}


def encode(message: Message, run: int) -> list[bytes | memoryview]:
    """The frames of a message of run `run` (64 bits)."""
    tag = type(message).__name__
    plan = _plan(tag)
    values: dict[str, Any] = {field[0]: getattr(message, field[0]) for field in plan.plain}
    buffers: list[bytes | memoryview] = []
    for name, dtype in plan.arrays:
        array = np.ascontiguousarray(getattr(message, name), dtype=dtype)
        values[name] = array.shape
        buffers.append(array.data.cast("B") if array.size else b"")  # a view: the socket makes the only copy
    return [_header(tag, run), msgpack.packb(values, buf_size=1024), *buffers]


def decode(frames: Sequence[bytes | memoryview], run: int, peer: str = "a peer") -> Message:
    """The message in `frames`. `peer` names the sender in errors. Raises WireError; never anything else, whatever the bytes."""
    plan = _plans(run).get(bytes(frames[0])) if frames else None
    if plan is None:
        raise _bad_header(frames, run, peer)
    tag = plan.cls.__name__
    if len(frames) != 2 + len(plan.arrays):
        raise WireError(f"{tag} from {peer}: {len(frames)} frames, expected {2 + len(plan.arrays)}")
    if len(frames[1]) > MAX_MAP_BYTES:
        raise WireError(f"{tag} from {peer}: a map of {len(frames[1])} bytes, at most {MAX_MAP_BYTES} are read")
    try:
        values = msgpack.unpackb(frames[1], strict_map_key=False)
    except Exception as error:  # whatever a stranger's bytes make the unpacker raise is the stranger's fault
        raise WireError(f"{tag} from {peer}: the map does not unpack ({type(error).__name__})") from None
    if type(values) is not dict or not plan.names.issuperset(values) or len(values) != len(plan.names):
        found = sorted(map(str, values)) if type(values) is dict else type(values).__name__
        raise WireError(f"{tag} from {peer}: fields {found}, expected {sorted(plan.names)}")
    for name, exact, check, expected in plan.plain:
        value = values[name]
        if type(value) is not exact and not check(value):
            raise WireError(f"{tag} from {peer}: {name} is {_short(value)}, expected {expected}")
    for place, (name, dtype) in enumerate(plan.arrays, 2):
        try:
            values[name] = _array(frames[place], values[name], dtype)
        except WireError as error:
            raise WireError(f"{tag} from {peer}: {name}: {error}") from None
    for name in plan.tuples:
        values[name] = tuple(values[name])
    message = plan.cls(**values)
    fault = message.fault()
    if fault:
        raise WireError(f"{tag} from {peer}: {fault}")
    return message


def _bad_header(frames: Sequence[bytes | memoryview], run: int, peer: str) -> WireError:
    """Why the first frame is no header of this run."""
    if len(frames) < 2 or len(frames[0]) < HEADER.size or len(frames[0]) > HEADER.size + 40:
        return WireError(f"message from {peer}: no header of {HEADER.size} bytes and a tag")
    magic, version, its_run = HEADER.unpack_from(frames[0])
    if magic != MAGIC:
        return WireError(f"message from {peer}: starts with {bytes(magic)!r}, expected {MAGIC!r}")
    if version != PROTOCOL_VERSION:
        return WireError(f"message from {peer}: protocol version {version}, this process speaks {PROTOCOL_VERSION}")
    tag = bytes(frames[0][HEADER.size :]).decode("ascii", "replace")
    if tag not in MESSAGES:
        return WireError(f"message from {peer}: unknown tag {tag!r}")
    return WireError(f"{tag} from {peer}: of run {its_run:016x}, this is run {run:016x}")


def _array(frame: bytes | memoryview, shape: Any, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    if type(shape) is not list or not 1 <= len(shape) <= 2 or not all(map(_is_size, shape)):
        raise WireError(f"shape {_short(shape)}, expected one or two sizes")
    expected = dtype.itemsize * (shape[0] if len(shape) == 1 else shape[0] * shape[1])
    if len(frame) != expected:
        raise WireError(f"{len(frame)} bytes for shape {shape} of {dtype}, expected {expected}")
    array = np.frombuffer(frame, dtype)
    return array if len(shape) == 1 else array.reshape(shape)


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
