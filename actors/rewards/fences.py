"""The program inside what a model wrote: the last fenced block of the language that was asked for."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Literal

Fence = Literal["required", "optional"]

_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})[ \t]*([^\s`]*)[^`\n]*$")


def fenced_blocks(text: str) -> list[tuple[str, str]]:
    """(info word in lower case, content) of every closed fenced block. Source: CommonMark 0.31, section 4.5."""
    blocks: list[tuple[str, str]] = []
    fence = info = ""
    content: list[str] = []
    for line in text.split("\n"):
        match = _FENCE.match(line.rstrip("\r"))
        if not fence:
            if match:
                fence, info, content = match[1], match[2].lower(), []
        elif match and match[1].startswith(fence) and not match[2]:
            blocks.append((info, "\n".join(content) + "\n"))
            fence = ""
        else:
            content.append(line)
    return blocks


def extract_program(text: str, languages: Collection[str], fence: Fence) -> str | None:
    """The last block marked with one of `languages`, else the last unmarked one; None when there is none.

    `fence` "optional" takes the whole text where it has no fence at all: for models that write bare programs.
    """
    blocks = fenced_blocks(text)
    for wanted in (languages, ("",)):
        for info, content in reversed(blocks):
            if info in wanted and content.strip():
                return content
    bare = fence == "optional" and not blocks and "```" not in text and text.strip()
    return text if bare else None
