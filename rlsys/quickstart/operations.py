"""The vocabulary of the quickstart's task: 24 transforms of a list of integers and 14 ways to print the outcome.

Each operation has phrasings for the prompt, correct ways to write it, plausible mistakes for the noisy corpus, and its meaning in
Python for the reference answers. In the templates {v} is the list's variable and {k} the operand. No two operations share a phrasing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise


@dataclass(frozen=True, slots=True)
class Operation:
    """What transforms and results have in common."""

    name: str
    phrasings: tuple[str, ...]
    correct: tuple[str, ...]
    mistakes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Transform(Operation):
    """An expression that makes a new list. `operands` are the values that {k} takes; empty where the operation has none."""

    meaning: Callable[[list[int], int], list[int]]
    operands: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Result(Operation):
    """A statement that prints. `meaning` returns what is printed and raises as the program would: ValueError, IndexError, ZeroDivisionError."""

    meaning: Callable[[list[int]], object]


ANY = tuple(range(2, 10))
COUNTS = (2, 3, 4)
"""Operands that count positions: lists hold at least 5 numbers, so that something is left after one such transform."""

TRANSFORMS: tuple[Transform, ...] = (
    # filters
    Transform(
        "evens",
        ("keep the even numbers", "discard all odd numbers", "pick out the even values"),
        ("[x for x in {v} if x % 2 == 0]", "[x for x in {v} if not x % 2]"),
        ("[x for x in {v} if x % 2]", "[x for x in {v} if x % 2 == 1]", "[x for x in {v} if x // 2 == 0]"),
        lambda values, k: [x for x in values if x % 2 == 0],
    ),
    Transform(
        "odds",
        ("keep the odd numbers", "discard all even numbers", "pick out the odd values"),
        ("[x for x in {v} if x % 2]", "[x for x in {v} if x % 2 == 1]"),
        ("[x for x in {v} if not x % 2]", "[x for x in {v} if x % 2 == 0]"),
        lambda values, k: [x for x in values if x % 2 == 1],
    ),
    Transform(
        "positives",
        ("keep the positive numbers", "discard zero and everything below it", "pick out the values above zero"),
        ("[x for x in {v} if x > 0]",),
        ("[x for x in {v} if x >= 0]", "[x for x in {v} if x < 0]"),
        lambda values, k: [x for x in values if x > 0],
    ),
    Transform(
        "negatives",
        ("keep the negative numbers", "discard zero and everything over it", "pick out the values under zero"),
        ("[x for x in {v} if x < 0]",),
        ("[x for x in {v} if x <= 0]", "[x for x in {v} if x > 0]"),
        lambda values, k: [x for x in values if x < 0],
    ),
    Transform(
        "above",
        ("keep the numbers greater than {k}", "discard everything up to {k}", "pick out the values above {k}"),
        ("[x for x in {v} if x > {k}]",),
        ("[x for x in {v} if x >= {k}]", "[x for x in {v} if x < {k}]"),
        lambda values, k: [x for x in values if x > k],
        ANY,
    ),
    Transform(
        "below",
        ("keep the numbers less than {k}", "discard everything from {k} up", "pick out the values under {k}"),
        ("[x for x in {v} if x < {k}]",),
        ("[x for x in {v} if x <= {k}]", "[x for x in {v} if x > {k}]"),
        lambda values, k: [x for x in values if x < k],
        ANY,
    ),
    Transform(
        "multiples",
        ("keep the multiples of {k}", "discard what {k} does not divide", "pick out the values divisible by {k}"),
        ("[x for x in {v} if x % {k} == 0]", "[x for x in {v} if not x % {k}]"),
        ("[x for x in {v} if x % {k}]", "[x for x in {v} if x // {k} == 0]"),
        lambda values, k: [x for x in values if x % k == 0],
        ANY,
    ),
    # order
    Transform(
        "reverse",
        ("reverse the list", "turn the order around", "go through them from back to front"),
        ("{v}[::-1]", "list(reversed({v}))"),
        ("{v}[:-1]", "sorted({v}, reverse=True)", "{v}.reverse()"),
        lambda values, k: values[::-1],
    ),
    Transform(
        "ascending",
        ("sort the numbers", "sort in ascending order", "arrange them from small to large"),
        ("sorted({v})",),
        ("sorted({v}, reverse=True)", "{v}.sort()", "{v}[::-1]"),
        lambda values, k: sorted(values),
    ),
    Transform(
        "descending",
        ("sort in descending order", "sort with the largest number in front", "arrange them from large to small"),
        ("sorted({v}, reverse=True)", "sorted({v})[::-1]"),
        ("sorted({v})", "{v}[::-1]"),
        lambda values, k: sorted(values, reverse=True),
    ),
    Transform(
        "unique",
        ("remove duplicates", "keep each number only where it first occurs", "discard repeated values"),
        ("list(dict.fromkeys({v}))",),
        ("list(set({v}))", "sorted(set({v}))", "set({v})"),
        lambda values, k: list(dict.fromkeys(values)),
    ),
    # arithmetic
    Transform(
        "square",
        ("square every number", "multiply each number by itself"),
        ("[x * x for x in {v}]", "[x ** 2 for x in {v}]"),
        ("[x * 2 for x in {v}]", "[x ^ 2 for x in {v}]"),
        lambda values, k: [x * x for x in values],
    ),
    Transform(
        "add",
        ("add {k} to every number", "raise each number by {k}"),
        ("[x + {k} for x in {v}]",),
        ("[x - {k} for x in {v}]", "{v} + {k}", "{v} + [{k}]"),
        lambda values, k: [x + k for x in values],
        ANY,
    ),
    Transform(
        "subtract",
        ("subtract {k} from every number", "lower each number by {k}"),
        ("[x - {k} for x in {v}]",),
        ("[x + {k} for x in {v}]", "[{k} - x for x in {v}]"),
        lambda values, k: [x - k for x in values],
        ANY,
    ),
    Transform(
        "scale",
        ("multiply every number by {k}", "make each number {k} times as large"),
        ("[x * {k} for x in {v}]",),
        ("{v} * {k}", "[x + {k} for x in {v}]", "[x ** {k} for x in {v}]"),
        lambda values, k: [x * k for x in values],
        ANY,
    ),
    Transform(
        "negate",
        ("negate every number", "change the sign of each number"),
        ("[-x for x in {v}]",),
        ("[abs(x) for x in {v}]", "-{v}", "[~x for x in {v}]"),
        lambda values, k: [-x for x in values],
    ),
    Transform(
        "absolute",
        ("take the absolute values", "drop the sign of each number"),
        ("[abs(x) for x in {v}]",),
        ("abs({v})", "[-x for x in {v}]"),
        lambda values, k: [abs(x) for x in values],
    ),
    # positions
    Transform(
        "head",
        ("take the first {k} numbers", "keep only the leading {k} numbers"),
        ("{v}[:{k}]",),
        ("{v}[:{k} - 1]", "{v}[{k}:]", "{v}[1:{k}]"),
        lambda values, k: values[:k],
        COUNTS,
    ),
    Transform(
        "tail",
        ("take the last {k} numbers", "keep only the final {k} numbers"),
        ("{v}[-{k}:]",),
        ("{v}[{k}:]", "{v}[:-{k}]", "{v}[-{k}]"),
        lambda values, k: values[-k:],
        COUNTS,
    ),
    Transform(
        "skip",
        ("skip the first {k} numbers", "cut away the leading {k} numbers"),
        ("{v}[{k}:]",),
        ("{v}[{k} - 1:]", "{v}[:{k}]", "{v}[{k} + 1:]"),
        lambda values, k: values[k:],
        COUNTS,
    ),
    Transform(
        "trim",
        ("skip the last {k} numbers", "cut away the final {k} numbers"),
        ("{v}[:-{k}]",),
        ("{v}[-{k}:]", "{v}[:{k}]"),
        lambda values, k: values[:-k],
        COUNTS,
    ),
    Transform(
        "alternate",
        ("take every other number beginning with the first", "keep the numbers at even positions"),
        ("{v}[::2]",),
        ("{v}[1::2]", "{v}[:2]"),
        lambda values, k: values[::2],
    ),
    # neighbours
    Transform(
        "running",
        ("compute the running totals", "replace each number by the sum up to it"),
        ("[sum({v}[:i + 1]) for i in range(len({v}))]",),
        ("[sum({v}[:i]) for i in range(len({v}))]", "[sum({v}[i:]) for i in range(len({v}))]"),
        lambda values, k: list(accumulate(values)),
    ),
    Transform(
        "gaps",
        ("take the differences of neighbours", "subtract each number from its successor"),
        ("[b - a for a, b in zip({v}, {v}[1:])]",),
        ("[a - b for a, b in zip({v}, {v}[1:])]", "[a + b for a, b in zip({v}, {v}[1:])]"),
        lambda values, k: [after - before for before, after in pairwise(values)],
    ),
)

RESULTS: tuple[Result, ...] = (
    Result(
        "sum",
        ("print the sum", "print the total", "show what they add up to"),
        ("print(sum({v}))",),
        ("print(len({v}))", "print({v})", "sum({v})"),
        sum,
    ),
    Result(
        "maximum",
        ("print the maximum", "print the largest number", "show the biggest value"),
        ("print(max({v}))", "print(sorted({v})[-1])"),
        ("print(min({v}))", "print({v}[-1])"),
        max,
    ),
    Result(
        "minimum",
        ("print the minimum", "print the smallest number", "show the lowest value"),
        ("print(min({v}))", "print(sorted({v})[0])"),
        ("print(max({v}))", "print({v}[0])"),
        min,
    ),
    Result(
        "count",
        ("print how many remain", "print the count", "show how many numbers there are"),
        ("print(len({v}))",),
        ("print(sum({v}))", "print(len({v}) - 1)"),
        len,
    ),
    Result(
        "spread",
        ("print by how much the largest exceeds the smallest", "print the range"),
        ("print(max({v}) - min({v}))",),
        ("print(min({v}) - max({v}))", "print({v}[-1] - {v}[0])", "print(range({v}))"),
        lambda values: max(values) - min(values),
    ),
    Result(
        "distinct",
        ("print how many distinct values occur", "show the number of different values"),
        ("print(len(set({v})))",),
        ("print(len({v}))", "print(set({v}))"),
        lambda values: len(set(values)),
    ),
    Result(
        "line",
        ("print them on one line", "print the list separated by spaces", "show the numbers"),
        ("print(*{v})", "print(' '.join(map(str, {v})))"),
        ("print({v})", "print(''.join(map(str, {v})))"),
        lambda values: " ".join(map(str, values)),
    ),
    Result(
        "column",
        ("print one number per line", "show each on its own line"),
        ("for x in {v}: print(x)", "print(*{v}, sep='\\n')"),
        ("print(*{v})", "print({v})"),
        lambda values: "\n".join(map(str, values)),
    ),
    Result(
        "mean",
        ("print the average rounded down", "show the floor of the mean"),
        ("print(sum({v}) // len({v}))",),
        ("print(sum({v}) / len({v}))", "print(int(sum({v}) / len({v})))"),
        lambda values: sum(values) // len(values),
    ),
    Result(
        "first",
        ("print the first one", "show the first number"),
        ("print({v}[0])",),
        ("print({v}[1])", "print({v}[:1])"),
        lambda values: values[0],
    ),
    Result(
        "last",
        ("print the last one", "show the last number"),
        ("print({v}[-1])",),
        ("print({v}[1])", "print({v}[-1:])", "print({v}[len({v})])"),
        lambda values: values[-1],
    ),
    Result(
        "argmax",
        ("print the index of the largest", "show where the maximum first stands counting from zero"),
        ("print({v}.index(max({v})))",),
        ("print(max({v}))", "print({v}.index(min({v})))", "print({v}.find(max({v})))"),
        lambda values: values.index(max(values)),
    ),
    Result(
        "second",
        ("print the second largest number", "show the runner up"),
        ("print(sorted({v})[-2])",),
        ("print(sorted({v})[2])", "print(sorted({v})[1])", "print(max({v}) - 1)"),
        lambda values: sorted(values)[-2],
    ),
    Result(
        "zeros",
        ("print how many zeros there are", "show the count of zeros"),
        ("print({v}.count(0))",),
        ("print(len({v}))", "print({v}.index(0))"),
        lambda values: values.count(0),
    ),
)
