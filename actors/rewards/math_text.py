"""The text side of mathematics: which answer a completion gives, and its usual spellings made one. Pure; no computer algebra.

Only presentation is removed here (spacing, `\\left`, `\\dfrac`, currency, units, thousands separators), so two texts with equal
`key` are equal answers. A unit is dropped, not converted: "5 m" and "5 cm" are the same number.
"""

from __future__ import annotations

import re

_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
_BARE = re.compile(r"[^\s{}$]+")
_HASHES = re.compile(r"^[ \t]*####[ \t]*(\S[^\n]*)", re.MULTILINE)

_SYMBOLS = {
    "\u2212": "-", "\u2013": "-", "\u00d7": r"\times ", "\u00f7": r"\div ", "\u00b7": r"\cdot ", "\u03c0": r"\pi ", "\u221e": r"\infty ",
    "\u222a": r"\cup ", "\u2229": r"\cap ", "\u2208": r"\in ", "\u2264": r"\le ", "\u2265": r"\ge ", "\u00b1": r"\pm ", "\u00b0": r"^\circ ",
    "\u221a": r"\sqrt", "\u00b2": "^2", "\u00b3": "^3", "\u00a0": " ", "\u2009": " ", "\u202f": " ",
}  # fmt: skip
_SYMBOL_TABLE = str.maketrans(_SYMBOLS)

_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r",\s*\\!\s*|\{\s*,\s*\}(?=\d{3})", "\x1f"),  # a thousands separator
        (r"\\[$]|[$\u20ac\u00a3\u00a5]", ""),
        (r"\\(?:left|right)\s*(?=[()\[\]|.])|\\(?:left|right)\s*(?=\\[{}|])", ""),
        (r"\\[bB]igg?[lr]?(?![a-zA-Z])", ""),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:displaystyle|textstyle|limits)(?![a-zA-Z])", ""),
        (r"\\(?:quad|qquad|enspace)(?![a-zA-Z])|\\[,;: ]|~", " "),
        (r"\\!", ""),
        (r"\\(?:mbox|textrm|textbf|textit|textnormal|mathrm|operatorname)\s*\{", r"\\text{"),
        (r"\\mathbf\s*\{([^{}]*)\}", r"\1"),
        (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))|\\degree(?![a-zA-Z])", ""),
        (r"\\(?:le|leqslant)(?![a-zA-Z])", r"\\leq"),
        (r"\\(?:ge|geqslant)(?![a-zA-Z])", r"\\geq"),
        (r"\\text\s*\{\s*percent\s*\}|(?<=[\d}])\s*percent$|(?<!\\)%", r"\\%"),
        (r"\\text\s*\{\s*(and|or)\s*\}", r" \1 "),
        (r"\\begin\{[bB]?matrix\}", r"\\begin{pmatrix}"),
        (r"\\end\{[bB]?matrix\}", r"\\end{pmatrix}"),
        (r"^\s*\\approx(?![a-zA-Z])", ""),
        (r"^\s*(?i:the\s+)?(?i:final\s+)?(?i:answer)\s*(?:is|:)\s*", ""),
    )
]
_TEXT_UNIT = re.compile(
    r"\\text\s*\{(?!\s*(?:[ap]\.?\s*m\b|hundred|thousand|million|billion|dozen|and\b|or\b))[^{}]*\}\s*(?:\^\s*(?:\{\s*\d\s*\}|\d))?\s*$"
)
_UNITS = (
    r"degrees?|radians?|dollars?|cents?|feet|foot|ft|inch|inches|cm|mm|km|kg|mg|meters?|metres?|kilometers?|centimeters?|millimeters?|"
    r"miles?|mph|yards?|hours?|hrs?|minutes?|mins?|seconds?|secs?|days?|weeks?|months?|years?|grams?|kilograms?|pounds?|lbs?|ounces?|"
    r"oz|liters?|litres?|gallons?|cups?|points?|people|students?|apples?|eggs?|books?|units?|ways"
)
_WORD_UNIT = re.compile(rf"(?<=[\d}}])\s*(?:sq(?:uare|\.)?|cubic)?\s*(?:{_UNITS})\s*(?:\^\s*(?:\{{\s*\d\s*\}}|\d))?\s*$", re.IGNORECASE)
_WHOLE_NUMBER = re.compile(r"[-+]?\s*\d{1,3}(?:,\d{3})+(?:\.\d+)?(?:\s*\\%)?")
_SPACED_THOUSANDS = re.compile(r"(?<=\d) (?=\d{3}(?!\d))")
_MIXED_NUMBER = re.compile(r"^([-+]?\d+) (\d+)/(\d+)$")
_POINT_ZERO = re.compile(r"^([-+]?[0-9]+)\.0+$")
_INTEGER = re.compile(r"[-+]?[0-9]{1,300}")
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_CHOICES = re.compile(r"\(?[A-Z]\)?(?:\s*,\s*\(?[A-Z]\)?)*")
_LETTERS = re.compile(r"[A-Za-z][A-Za-z\s'.,()-]*")


def final_answer(completion: str, forms: str, max_chars: int) -> str | None:
    """What stands in the last `\\boxed{}` (after a think block, if there is one), else in the last line `#### answer`.

    `forms` is "any", "boxed" or "hashes". None when there is none, its braces do not close, or it is longer than `max_chars`.
    Time is linear in the text's length: only the last box is looked at, so an outer box of nested ones never counts.
    """
    text = completion.rpartition("</think>")[2]
    if forms != "hashes" and (start := max(text.rfind("\\boxed"), text.rfind("\\fbox"))) >= 0:
        return _box_content(text[start : start + max_chars + 64], max_chars)
    if forms == "boxed" or "####" not in text or not (lines := _HASHES.findall(text)):
        return None
    answer = str(lines[-1]).strip()
    return answer if len(answer) <= max_chars else None


def _box_content(text: str, max_chars: int) -> str | None:
    box = _BOX.match(text)
    if box is None:
        return None
    begin = box.end()
    if text[begin : begin + 1] != "{":
        bare = _BARE.match(text, begin)
        return bare.group() if bare and not bare.group()[0].isalpha() else None
    depth = 0
    for place in range(begin, len(text)):
        if text[place] in "{}" and text[place - 1] != "\\":
            depth += 1 if text[place] == "{" else -1
            if depth == 0:
                content = text[begin + 1 : place].strip()
                return content if content and len(content) <= max_chars else None
    return None


def has_think_block(completion: str, opened_by_prompt: bool) -> bool:
    """Whether the text is one think block, then something else. Its opening tag may stand at the end of the prompt instead."""
    inside, close, rest = completion.partition("</think>")
    body = inside.lstrip()
    opened = body.startswith("<think>")
    body = body.removeprefix("<think>")
    tags_once = "<think>" not in body + rest and "</think>" not in rest
    return bool(close and (opened or opened_by_prompt) and tags_once and body.strip() and rest.strip())


def tidy(answer: str) -> str:
    """The answer without presentation, still LaTeX: what the parser reads."""
    text = answer.translate(_SYMBOL_TABLE).strip().strip("$").strip()
    text = text.replace("\\\\", "\x1e")  # the end of a matrix's row is no command
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = text.replace("\x1e", " \\\\ ")
    text = text.replace("\x1f", ",") if _is_list(text) else text.replace("\x1f", "")
    text = " ".join(text.split()).rstrip(".;,: ")
    text = _SPACED_THOUSANDS.sub("", text)
    text = _MIXED_NUMBER.sub(r"\1\\frac{\2}{\3}", text)
    for unit in (_TEXT_UNIT, _WORD_UNIT):
        head = unit.sub("", text).strip()
        if head != text and re.search(r"\d|\\pi|\\sqrt", head):
            text = head
    if _WHOLE_NUMBER.fullmatch(text):
        text = text.replace(",", "")
    return _POINT_ZERO.sub(r"\1", text)


def _is_list(text: str) -> bool:
    """Whether a comma with a negative space stands between something else than groups of three digits."""
    return any(re.match(r"\d{3}(?!\d)", part) is None for part in text.split("\x1f")[1:])


def key(tidied: str) -> str:
    """Equal keys are equal answers. Case counts, except in words."""
    tidied = re.sub(r"\\frac\s*([^{}\\\s])\s*([^{}\\\s])", r"\\frac{\1}{\2}", tidied)
    text = re.sub(r"(?<=\d)\s+(?=\d)", "_", _TEXT.sub(r"\1", tidied))  # "1 2" is not 12
    text = re.sub(r"\s+", "", text)
    text = re.sub(r"\\sqrt([^{}\\\[])", r"\\sqrt{\1}", text)
    if is_words(tidied):
        words = re.sub(r"[().']|\\[{}]", "", text).casefold()
        return words if "(" in text else ",".join(sorted(words.split(",")))  # a list of names, as of roots, has no order
    return re.sub(r"(?<![\d.])\.(?=\d)", "0.", text)


def is_words(tidied: str) -> bool:
    """Whether an answer is words or a choice, which computer algebra would take for a product of letters."""
    plain = _TEXT.sub(r"\1", tidied).strip()
    if _CHOICES.fullmatch(plain.removeprefix("\\{").removesuffix("\\}").strip()):
        return True
    plain = plain.strip("{}")
    if not _LETTERS.fullmatch(plain.lstrip("(")):
        return False
    return plain != tidied.strip() or len(re.sub(r"[^A-Za-z]", "", plain)) >= 3


def are_other_integers(left: str, right: str) -> bool:
    """Whether two tidied texts are plain integers of different values, so that no algebra is needed."""
    return bool(_INTEGER.fullmatch(left) and _INTEGER.fullmatch(right)) and int(left) != int(right)


def readings(tidied: str, other: str) -> list[str]:
    """The numbers that an answer may mean beside `other`: 5 % is 5 where only one of the two has the sign."""
    if tidied.endswith(r"\%") and not other.endswith(r"\%"):
        return [tidied, tidied.removesuffix(r"\%").strip()]
    return [tidied]
