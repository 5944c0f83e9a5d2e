"""Comparison of outputs: what must be forgiven and what must not."""

from __future__ import annotations

import pytest

from actors.sandbox.checkers.text import case_insensitive, exact, float_tolerant, unordered_lines

FORGIVEN = [("1 2\n3\n", "1 2\n3"), ("1 2 \r\n3\r\n\n\n", "1 2\n3\n"), ("1  2", "1 2"), ("", "\n"), (" a", "a")]
WRONG = [
    ("YES", "NO"), ("yes", "YES"), ("1.0", "1"), ("1 2", "1\n2"), ("1\n2", "1 2"), ("1\n2\n", "1\n"), ("1\n", "1\n2\n"), ("", "0"),
    ("1\n\n2", "1\n2"), ("2 1", "1 2"), ("01", "1"), ("10000000000000001", "10000000000000000"), ("NO YES", "NO"), ("[1, 2]", "[1,2]"),
]  # fmt: skip


@pytest.mark.parametrize(("output", "expected"), FORGIVEN)
def test_layout_at_the_ends_is_forgiven(output: str, expected: str) -> None:
    for checker in (exact, float_tolerant, unordered_lines, case_insensitive):
        assert checker(output.encode(), expected.encode()) == ""


@pytest.mark.parametrize(("output", "expected"), WRONG)
def test_everything_else_is_exact(output: str, expected: str) -> None:
    assert exact(output.encode(), expected.encode())


@pytest.mark.parametrize(
    ("output", "expected", "right"),
    [
        ("0.3333333", "0.333333333333", True),
        ("1.0", "1", True),
        ("1e3", "1000.0", True),
        ("1000000.5", "1000000.0", True),
        ("0.333", "0.333333333", False),
        ("100000000000000001", "100000000000000000", False),
        ("100000000000000000.0", "100000000000000001", False),
        ("1e17", "100000000000000000", True),
        ("2", "1", False),
        ("nan", "nan", True),
        ("nan", "1.0", False),
        ("inf", "1e308", False),
        ("1e999", "1e999999", False),
        ("0x10", "16", False),
        ("1_0", "10", False),
        ("NO", "YES", False),
        ("1.0 2.0", "1.0", False),
        ("1.0\n2.0", "1.0 2.0", False),
        ("9" * 5000, "9" * 4999 + "8", False),
    ],
)
def test_float_tolerance(output: str, expected: str, right: bool) -> None:
    assert (float_tolerant(output.encode(), expected.encode()) == "") is right


def test_unordered_lines_count_each_line() -> None:
    assert unordered_lines(b"b\na\na\n", b"a\nb\na") == ""
    assert unordered_lines(b"b\na\n", b"a\nb\na")
    assert unordered_lines(b"a\nb\nb\n", b"a\nb\na")


def test_case_insensitive() -> None:
    assert case_insensitive(b"Yes\n", b"YES") == ""
    assert case_insensitive(b"Yes\n", b"NO")


def test_the_difference_is_told() -> None:
    assert exact(b"1 2\n4\n", b"1 2\n3\n") == "line 2 is '4', expected '3'"
    assert exact(b"1\n", b"1\n2\n") == "1 lines, expected 2"
