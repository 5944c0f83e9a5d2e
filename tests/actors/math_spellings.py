"""Other spellings of a reference answer, and near misses of it, made from its text."""

from __future__ import annotations

import json
import random
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).resolve().parents[3] / "shared/data"
_FRACTION = re.compile(r"(-?)\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_INTEGER = re.compile(r"-?\d+")
_DECIMAL = re.compile(r"-?\d+\.\d+")
_THOUSANDS = re.compile(r"[\\$ ]*-?\d{1,3}(,(\\!)? ?\d{3})+(\.\d+)?")
_BRACKETED = re.compile(r"([(\[])([^()\[\]]+)([)\]])")


def lines(name: str) -> list[dict[str, Any]]:
    """The problems of a public set that have an answer; skips the test where the set is not here."""
    path = DATA / name
    if not path.exists():
        pytest.skip(f"no {path}: the public sets are not part of the repository")
    text = path.read_text()
    found = json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]
    return [line for line in found if line["answer"] not in (None, "")]


def spellings(reference: str) -> list[str]:
    """Texts that a reader takes for the same answer."""
    found = [reference, f" {reference}. ", f"${reference}$", f"\\displaystyle {reference}"]
    found.append(re.sub(r"\\[dt]?frac(?![a-zA-Z])", r"\\dfrac", reference))
    if "\\," not in reference and "\\!" not in reference and not _THOUSANDS.fullmatch(reference):
        found.append(re.sub(r"([=+,])", r" \1\\; ", reference))
    if _BRACKETED.fullmatch(reference):
        found.append(f"\\left{reference[:-1]}\\right{reference[-1]}")
        found.append(reference.replace(",", ", \\,"))
    if match := _FRACTION.fullmatch(reference):
        found += _of_fraction(match)
    if _INTEGER.fullmatch(reference):
        found += _of_integer(reference)
    if _DECIMAL.fullmatch(reference):
        value = Fraction(reference)
        found += [f"{value.numerator}/{value.denominator}", f"{reference}0", f"\\${reference}"]
    parts = _listed(reference)
    if len(parts) > 1:
        found.append(", ".join(reversed(parts)))
        found.append("\\{" + ",".join(parts[1:] + parts[:1]) + "\\}")
    if "\\text" in reference and not re.search(r"\d", reference):
        found.append(reference.replace("\\text", "\\mbox"))
        found.append(re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", reference))
    return found


def _of_fraction(match: re.Match[str]) -> list[str]:
    sign, top, bottom = match.groups()
    found = [f"{sign}{top}/{bottom}", f"{sign}\\tfrac{{{2 * int(top)}}}{{{2 * int(bottom)}}}"]
    value = Fraction(int(top), int(bottom))
    if 10**6 % value.denominator == 0:
        found.append(f"{sign}{int(top) / int(bottom)}")
    if len(top) == len(bottom) == 1:
        found.append(f"{sign}\\frac{top}{bottom}")
    return found


def _of_integer(reference: str) -> list[str]:
    value = int(reference)
    found = [f"{value}.0", f"x = {value}", f"{value}\\text{{ units}}", f"{value} cm^2", f"{value}^\\circ", f"{value}\\%", f"{3 * value}/3"]
    if abs(value) >= 1000:
        found += [f"{value:,}", f"{value:,}".replace(",", "{,}"), f"{value:,}".replace(",", ",\\!"), f"\\${value:,}.00"]
    return found


def _listed(reference: str) -> list[str]:
    """The parts of a plain list of answers, in which order does not count."""
    if any(mark in reference for mark in "()[]{") and not re.fullmatch(r"(?:[^()\[\]{}]|\\sqrt\{\d+\}|\\frac\{\d+\}\{\d+\})*", reference):
        return []
    return (
        []
        if _THOUSANDS.fullmatch(reference) or "\\," in reference or "text" in reference or "=" in reference
        else [part.strip() for part in reference.split(",")]
    )


def near_misses(reference: str) -> list[str]:
    """Answers of the same form that are not the reference: sign, off by one, swapped coordinates, missing root, other bracket."""
    found = []
    if _INTEGER.fullmatch(reference):
        value = int(reference)
        found = [str(value + 1), str(value - 1), f"{value}.5", *([str(-value)] if value else [])]
    elif match := _FRACTION.fullmatch(reference):
        sign, top, bottom = match.groups()
        found = [f"{sign}\\frac{{{int(top) + 1}}}{{{bottom}}}", f"{'' if sign else '-'}{top}/{bottom}"]
        found += [f"{sign}\\frac{{{bottom}}}{{{top}}}"] if top != bottom else []
    elif match := _BRACKETED.fullmatch(reference.replace("\\left", "").replace("\\right", "").replace(" ", "")):
        opening, inner, closing = match.groups()
        parts = inner.split(",")
        if len(set(parts)) == len(parts) > 1:
            found.append(f"{opening}{','.join(parts[::-1])}{closing}")
            found.append(f"{opening}{','.join(parts[:-1])},{parts[-1]}+1{closing}" if "infty" not in parts[-1] else f"[0,{parts[-1]})")
        if len(parts) == 2 and "infty" not in parts[0]:
            found.append(f"[{inner}{closing}" if opening == "(" else f"({inner}{closing}")
    elif len(parts := _listed(reference)) > 1:
        found = [",".join(parts[:-1]), ",".join(parts[1:]), f"{','.join(parts)},1001"]
    elif match := re.search(r"\\sqrt\{(\d+)\}", reference):
        place = slice(*match.span(1))
        found = [
            reference[: place.start] + str(int(match[1]) + 1) + reference[place.stop :],
            *([] if "," in reference or "pm" in reference else [f"-({reference})"]),
        ]
    elif re.fullmatch(r"[-+\w^{} ]*[a-z][-+\w^{} ]*", reference) and "+" in reference:
        found = [reference.replace("+", "-", 1), f"{reference}+1"]
    return found


def sample_of(found: list[str], number: int, seed: int) -> list[str]:
    """`number` of the distinct texts, the same ones each time."""
    distinct = sorted(set(found))
    return random.Random(seed).sample(distinct, min(number, len(distinct)))
