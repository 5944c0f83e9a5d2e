"""Checkers: whether an output answers a test. This file is the interface and the table.

To add one: a function in a file beside this one and a line in CHECKERS.
"""

from __future__ import annotations

from typing import Protocol

CHECKERS = {
    "exact": "actors.sandbox.checkers.text:exact",
    "float": "actors.sandbox.checkers.text:float_tolerant",
    "unordered_lines": "actors.sandbox.checkers.text:unordered_lines",
    "case_insensitive": "actors.sandbox.checkers.text:case_insensitive",
}
"""Name in problems -> function."""


class Checker(Protocol):
    """Pure comparison of bytes."""

    def __call__(self, output: bytes, expected: bytes) -> str:
        """Empty when `output` is right, else the difference in one line for people."""
