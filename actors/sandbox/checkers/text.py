"""Comparison of text. Lines count, blanks between words and at the ends do not; everything else is exact.

Trailing blanks, trailing empty lines and CRLF are forgiven; a missing or extra word or line is not, YES is not NO, and 1.0 is not 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from decimal import Decimal

FLOAT_TOLERANCE = 1e-6
"""Absolute or relative, whichever is met: what most problem statements ask for."""

_DECIMAL = re.compile(rb"[+-]?(\d+\.\d*|\.\d+|\d+)([eE][+-]?\d+)?")
_INTEGER = re.compile(rb"[+-]?\d+")

_FIRST_INEXACT = 2.0**53

Lines = list[list[bytes]]


def _lines(text: bytes) -> Lines:
    """Words of each line, without empty lines at the end."""
    lines = [line.split() for line in text.split(b"\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _show(words: list[bytes]) -> str:
    text = b" ".join(words).decode(errors="replace")
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _difference(found: Lines, wanted: Lines, same: Callable[[bytes, bytes], bool]) -> str:
    for number, (left, right) in enumerate(zip(found, wanted, strict=False), 1):
        if len(left) != len(right) or not all(a == b or same(a, b) for a, b in zip(left, right, strict=True)):
            return f"line {number} is {_show(left)}, expected {_show(right)}"
    if len(found) != len(wanted):
        return f"{len(found)} lines, expected {len(wanted)}"
    return ""


def _never(found: bytes, wanted: bytes) -> bool:
    return False


def exact(output: bytes, expected: bytes) -> str:
    """The default."""
    if output == expected:
        return ""
    return _difference(_lines(output), _lines(expected), _never)


def _close(found: bytes, wanted: bytes) -> bool:
    """Whether two words are the same number within the tolerance; no NaN, no inf.

    Two integers must be equal, and so must anything be that is compared with an integer too large for a float: 10**17 is not 10**17 + 1.
    """
    if not (_DECIMAL.fullmatch(found) and _DECIMAL.fullmatch(wanted)):
        return False
    left, right = float(found), float(wanted)
    if _INTEGER.fullmatch(wanted) and (_INTEGER.fullmatch(found) or abs(right) >= _FIRST_INEXACT):
        return math.isfinite(left) and Decimal(found.decode()) == Decimal(wanted.decode())
    return math.isfinite(left) and math.isfinite(right) and abs(left - right) <= FLOAT_TOLERANCE * max(1.0, abs(right))


def float_tolerant(output: bytes, expected: bytes) -> str:
    """Words that are decimal numbers may differ by FLOAT_TOLERANCE; all others are exact."""
    return _difference(_lines(output), _lines(expected), _close)


def unordered_lines(output: bytes, expected: bytes) -> str:
    """The same lines in any order, each as often."""
    return _difference(sorted(_lines(output)), sorted(_lines(expected)), _never)


def case_insensitive(output: bytes, expected: bytes) -> str:
    """ASCII letters compare without case."""
    return exact(output.lower(), expected.lower())
