"""Which answer a completion gives, and which spellings are one, without computer algebra."""

from __future__ import annotations

import pytest

from actors.rewards.math_text import final_answer, has_think_block, is_words, key, readings, tidy


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("It is \\boxed{5}.", "5"),
        ("\\boxed{1} no, \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{x = \\boxed{5}}", "5"),
        ("\\fbox{7}", "7"),
        ("\\boxed 7 is it", "7"),
        ("\\boxed{ 7 }", "7"),
        ("#### 18", "18"),
        ("so\n#### 1,234\n", "1,234"),
        ("#### 1\n#### 2", "2"),
        ("#### 1 and \\boxed{2}", "2"),
        ("<think>\\boxed{1}</think> \\boxed{2}", "2"),
        ("<think>\\boxed{1}</think> it is 2", None),
        ("\\boxed{5", None),
        ("\\boxed{}", None),
        ("\\boxed", None),
        ("\\boxedly 5", None),
        ("####", None),
        ("5", None),
        ("", None),
        ("\\boxed{" + "1" * 101 + "}", None),
        ("\\boxed{" * 10_000, None),
        ("#### " + "1" * 101, None),
    ],
)
def test_final_answer(completion: str, answer: str | None) -> None:
    assert final_answer(completion, "any", 100) == answer


def test_forms() -> None:
    both = "\\boxed{1}\n#### 2"
    assert final_answer(both, "boxed", 100) == "1"
    assert final_answer(both, "hashes", 100) == "2"
    assert final_answer("#### 2", "boxed", 100) is None
    assert final_answer("\\boxed{1}", "hashes", 100) is None


@pytest.mark.parametrize(
    ("completion", "written", "opened_by_prompt"),
    [
        ("<think>a</think>b", True, True),
        ("\n<think>\na\n</think>\nb", True, True),
        ("a</think>b", False, True),
        ("<think>a</think>", False, False),
        ("<think></think>b", False, False),
        ("<think>a", False, False),
        ("b", False, False),
        ("b<think>a</think>b", False, False),
        ("<think>a<think>a</think>b", False, False),
        ("<think>a</think>b</think>c", False, False),
        ("<think>a</think><think>b</think>c", False, False),
    ],
)
def test_think_block(completion: str, written: bool, opened_by_prompt: bool) -> None:
    assert has_think_block(completion, opened_by_prompt=False) is written
    assert has_think_block(completion, opened_by_prompt=True) is opened_by_prompt


SAME = [
    ("\\frac{1}{2}", "\\dfrac12", "\\tfrac{1}{2}", "$\\frac{1}{2}$", "\\frac 1 2"),
    (
        "1234",
        "1,234",
        "1{,}234",
        "1,\\!234",
        "\\$1,234",
        "1 234",
        "$1234",
        "1234.",
        "1234 dollars",
        "1234\\text{ cm}^2",
        "1234^\\circ",
        "1234°",
    ),
    ("(1,2)", "\\left( 1, 2 \\right)", "\\bigl(1,\\,2\\bigr)"),
    ("\\text{Evelyn}", "Evelyn", "evelyn", "\\mathrm{Evelyn}", "\\text{ Evelyn }"),
    ("\\text{(C)}", "C", "(C)", "\\textbf{C}"),
    ("\\text{A, B}", "A,B", "\\text{A}, \\text{B}", "B, A", "\\{B, A\\}"),
    ("0.5", ".5"),
    ("3\\sqrt{2}", "3\\sqrt2", "3√2"),
    ("50\\%", "50%", "50 \\%", "50\\text{ percent}", "50 percent"),
    ("3\\frac{1}{2}", "3 1/2"),
    ("x \\leq 2", "x \\le 2", "x ≤ 2"),
]
DIFFERENT = [
    ("12", "1 2"),
    ("3t", "3"),
    ("3t", "3s"),
    ("5", "5\\text{ million}"),
    ("6\\text{ a.m.}", "6\\text{ p.m.}"),
    ("2x", "2X"),
    ("(1,2)", "[1,2]"),
    ("100,\\!20", "10020"),
    ("1234", "12,34"),
    ("\\text{A}", "\\text{AB}"),
    ("-5", "5"),
    ("(A,B)", "(B,A)"),
]


@pytest.mark.parametrize("spellings", SAME, ids=[same[0] for same in SAME])
def test_usual_spellings_are_one(spellings: tuple[str, ...]) -> None:
    assert len({key(tidy(spelling)) for spelling in spellings}) == 1, {spelling: key(tidy(spelling)) for spelling in spellings}


@pytest.mark.parametrize(("left", "right"), DIFFERENT)
def test_presentation_hides_no_difference(left: str, right: str) -> None:
    assert key(tidy(left)) != key(tidy(right))


def test_words_are_told_from_products() -> None:
    assert all(is_words(tidy(text)) for text in ("\\text{odd}", "odd", "\\text{(B)}", "B", "no solution", "\\text{A, B}"))
    assert not any(is_words(tidy(text)) for text in ("x", "ab", "2x", "\\pi", "\\sin x", "x+yz", "5\\text{ cm}", "i"))


def test_percent_may_be_read_as_the_bare_number() -> None:
    assert readings("5\\%", "5") == ["5\\%", "5"] and readings("5\\%", "6\\%") == ["5\\%"] and readings("5", "5\\%") == ["5"]
