"""Join tokens say all that a host needs, and nothing else is taken for one."""

from __future__ import annotations

import io
import random
import sys
from pathlib import Path

import pytest

from protocol.errors import UserError
from rlsys.cli import main
from rlsys.join import given
from rlsys.token import Token, parse

TOKEN = Token("0123456789abcdef", "tcp://[fe80::1]:4711", "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7", "5e" * 24, "0.1.0")


def test_a_token_survives_its_text() -> None:
    text = TOKEN.text()
    assert parse(f"  {text}\n", "0.1.0") == TOKEN
    assert text.split() == [text] and text.replace(".", "").replace("-", "").replace("_", "").isalnum(), "it can be pasted anywhere"


def test_a_token_comes_from_a_file_or_standard_input_so_that_no_command_line_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "token"
    path.write_text(f"{TOKEN.text()}\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{TOKEN.text()}\n"))
    assert [parse(given(text), "0.1.0") for text in (f"@{path}", "-", TOKEN.text())] == [TOKEN] * 3
    assert main(["join", f"@{tmp_path / 'none'}", "--role", "rewarder"]) == 2
    assert capsys.readouterr().err == f"rlsys: {tmp_path / 'none'}: the token cannot be read (No such file or directory)\n"


def test_another_version_is_named() -> None:
    with pytest.raises(UserError, match=r"the run has rlsys 0\.1\.0, this host has rlsys 0\.2\.0"):
        parse(TOKEN.text(), "0.2.0")


def test_whatever_is_no_token_is_refused_in_a_sentence_without_showing_a_secret() -> None:
    text, rng = TOKEN.text(), random.Random(0)
    damaged = [text[: rng.randrange(len(text))] for _ in range(50)] + [
        "",
        "rlsys1.",
        "hello",
        "rlsys1.????",
        "rlsys1." + "A" * 40,
        text + "AAAA",
    ]
    damaged += [Token("xyz", *list(vars_of(TOKEN))[1:]).text(), Token(TOKEN.run_id, "nowhere", *list(vars_of(TOKEN))[2:]).text()]
    for wrong in damaged:
        with pytest.raises(UserError, match="join token") as refused:
            parse(wrong, "0.1.0")
        assert "\n" not in str(refused.value)
        assert text[20:] not in str(refused.value)


def vars_of(token: Token) -> tuple[str, str, str, str, str]:
    return (token.run_id, token.address, token.server_key, token.secret, token.version)
