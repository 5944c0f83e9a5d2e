"""Function problems in C++ (the layout of MultiPL-E): tests are a `main` with asserts on `candidate`.

The judged program and the tests become two programs that speak through `call.hpp`, so expected values are never in the judged
process, and neither its macros, its exit nor its operators reach the asserts.
"""

from __future__ import annotations

import re
from pathlib import Path

from actors.sandbox import languages

HEADER = {"call.hpp": Path(languages.__file__).with_name("call.hpp").read_bytes()}
GONE = 99
"""Exit code of the tests when the judged side went away: `rlsys::gone` in call.hpp."""

FAILED = 98
"""Exit code of the tests when they stopped at an assert that failed."""
PASSED, REFUSED = ".", "x"
"""What the tests write to stdout for each assert."""

_ASSERT = re.compile(r"\bassert\s*\(")
_INCLUDES = "#include <assert.h>\n#include <bits/stdc++.h>\n"
_UNION = re.compile(r"union\s+(Union_\w+)\s*\{(.*?)\n\};", re.DOTALL)
_MEMBER = re.compile(r"^\s*([\w:<>, ]+?)\s+f\d+;", re.MULTILINE)
_CANDIDATE = re.compile(r"auto\s+candidate\s*=\s*(\w+)\s*;")


def function_name(tests: str) -> str:
    """The function that the tests call `candidate`; empty when this is not the layout."""
    found = _CANDIDATE.search(tests)
    return found[1] if found and "main()" in tests else ""


def judged_source(prompt: str, source: str, function: str) -> str:
    """The judged program: its own main set aside, and one that answers calls."""
    if not re.search(rf"\b{function}\s*\([^;{{]*\)[^;{{]*\{{", source):
        source = f"{prompt}\n{source}"  # the rest of the prompt's function
    serve = f'#undef main\n#include "call.hpp"\nint main() {{ rlsys::serve(&{function}); }}\n'
    return f"{_INCLUDES}#define main rlsys_own_main\n{_tagged_unions(source)}\n{serve}"


def num_asserts(tests: str) -> int:
    """Asserts in the source of the tests."""
    return len(_ASSERT.findall(tests))


def tests_source(prompt: str, tests: str, stop: bool) -> str:
    """The tests: the prompt as a declaration, a stand-in for the function, and asserts that report and go on, or `stop` if they fail."""
    declaration = prompt.rstrip().removesuffix("{").rstrip() + ";"
    body = _CANDIDATE.sub(r"rlsys::Remote<decltype(&\1)> candidate;", tests.strip().removeprefix("}"))
    report = (
        "#include <unistd.h>\n#undef assert\n"
        f'static void rlsys_report(bool passed) {{ if (write(1, passed ? "{PASSED}" : "{REFUSED}", 1) != 1'
        f"{' || !passed' if stop else ''}) _exit({FAILED}); }}\n"
        "#define assert(...) rlsys_report(static_cast<bool>(__VA_ARGS__))\n"
    )
    return f'{_INCLUDES}{_tagged_unions(declaration)}\n#include "call.hpp"\n{report}{body}\n'


def _tagged_unions(source: str) -> str:
    """The layout's unions do not know which member they hold; the same type with an index can be sent."""
    return _UNION.sub(lambda match: _tagged(match[1], _MEMBER.findall(match[2])), source)


def _tagged(name: str, members: list[str]) -> str:
    constructors = "".join(f" {name}({kind} x) : value(std::in_place_index<{index}>, x) {{}}" for index, kind in enumerate(members))
    equals = "".join(
        f" bool operator==({kind} x) const {{ return value.index() == {index} && std::get<{index}>(value) == x; }}"
        for index, kind in enumerate(members)
    )
    variant = f"std::variant<{', '.join(members)}>"
    return f"struct {name} {{ {variant} value; explicit {name}({variant} v, int = 0) : value(v) {{}}{constructors}{equals} }};"
