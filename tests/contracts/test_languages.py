"""Every language of the table: it answers, fails, loops, floods, forks and compiles for ever, each with the expected verdict."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from actors.sandbox import MIB, Execution, Limits
from actors.sandbox.languages import LANGUAGES, CompileError, Language
from actors.sandbox.runner import Sandbox
from protocol.registry import resolve

LIMITS = Limits(cpu_s=1, wall_s=60, memory_bytes=128 * MIB, output_bytes=4 * MIB)


@dataclass(frozen=True)
class Programs:
    """One program for each clause of the contract."""

    add: str
    crash: str
    loop: str
    flood: str
    hoard: str
    fork: str
    connect: str
    host_file: str
    broken: str
    endless_compile: str


PROGRAMS = {
    "python": Programs(
        add="a, b = map(int, input().split())\nprint(a + b)",
        crash="raise SystemExit(3)",
        loop="while True: pass",
        flood="while True: print('x' * 1000)",
        hoard="x = []\nwhile True: x.append(bytearray(1 << 20))",
        fork="import os\ntry: os.fork(); print('forked')\nexcept OSError: print('no')",
        connect="import socket\ntry: socket.socket(); print('socket')\nexcept OSError: print('no')",
        host_file="try: open('/etc/passwd'); print('read')\nexcept OSError: print('no')",
        broken="print(",
        endless_compile="x = ((1 << 1000000) ** 1000000)",
    ),
    "cpp": Programs(
        add="#include <iostream>\nint main() { long a, b; std::cin >> a >> b; std::cout << a + b << std::endl; }",
        crash="int main() { return 3; }",
        loop="int main() { for (volatile long i = 0;; i = i + 1) {} }",
        flood='#include <cstdio>\nint main() { for (;;) puts("xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"); }',
        hoard="#include <vector>\nint main() { std::vector<std::vector<char>> v; for (;;) v.emplace_back(1 << 20, 'x'); }",
        fork='#include <cstdio>\n#include <unistd.h>\nint main() { puts(fork() < 0 ? "no" : "forked"); }',
        connect='#include <cstdio>\n#include <sys/socket.h>\nint main() { puts(socket(AF_INET, SOCK_STREAM, 0) < 0 ? "no" : "socket"); }',
        host_file='#include <cstdio>\nint main() { puts(fopen("/etc/passwd", "r") ? "read" : "no"); }',
        broken="int main() { return x; }",
        endless_compile=(
            "template <int N> struct F { static constexpr long v = F<N - 1>::v + F<N - 2>::v * 0 + N; };\n"
            "constexpr long f(long n) { long s = 0; for (long i = 0; i < n; ++i) s += i; return s; }\n"
            "template <long N> struct G { static constexpr long v = f(200000 + N) + G<N - 1>::v; };\n"
            "template <> struct G<0> { static constexpr long v = 0; };\nint main() { return G<800>::v; }"
        ),
    ),
    "rust": Programs(
        add="use std::io::*;\nfn main() { let mut s = String::new(); stdin().read_to_string(&mut s).unwrap();\n"
        'println!("{}", s.split_whitespace().map(|x| x.parse::<i64>().unwrap()).sum::<i64>()); }',
        crash="fn main() { std::process::exit(3) }",
        loop="fn main() { let mut i = 0u64; loop { i = std::hint::black_box(i + 1); } }",
        flood='fn main() { loop { println!("{}", "x".repeat(1000)); } }',
        hoard="fn main() { let mut v = vec![]; loop { v.push(vec![1u8; 1 << 20]); } }",
        fork='fn main() { println!("{}", if std::process::Command::new("/usr/bin/env").spawn().is_ok() { "forked" } else { "no" }); }',
        connect='fn main() { println!("{}", if std::net::UdpSocket::bind("127.0.0.1:0").is_ok() { "socket" } else { "no" }); }',
        host_file='fn main() { println!("{}", if std::fs::read("/etc/passwd").is_ok() { "read" } else { "no" }); }',
        broken="fn main() { x }",
        endless_compile=(
            "#[allow(long_running_const_eval)]\nconst fn f() -> u64 { let mut i = 0u64; while i < u64::MAX { i += 1; } i }\n"
            "#[allow(long_running_const_eval)]\nconst X: u64 = f();\n"
            'fn main() { println!("{}", X); }'
        ),
    ),
}


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    languages = [resolve(name, LANGUAGES, "language")() for name in LANGUAGES]
    with Sandbox(2, trees=[tree for language in languages if not language.missing() for tree in language.trees()]) as sandbox:
        yield sandbox


@pytest.fixture(scope="module", params=sorted(LANGUAGES))
def language(request: pytest.FixtureRequest) -> Language:
    language: Language = resolve(request.param, LANGUAGES, "language")()
    if missing := language.missing():
        pytest.skip(missing)
    return language


@pytest.fixture
def programs(request: pytest.FixtureRequest, language: Language) -> Programs:
    return PROGRAMS[next(name for name in LANGUAGES if type(language) is resolve(name, LANGUAGES, "language"))]


def execute(language: Language, sandbox: Sandbox, source: str, stdin: bytes = b"") -> Execution:
    return sandbox.run(language.prepare(source, sandbox), stdin, LIMITS)


def test_it_has_fences_and_trees(language: Language) -> None:
    assert language.fences and all(fence == fence.lower() for fence in language.fences)
    assert all(tree.startswith("/") for tree in language.trees())


def test_it_reads_and_writes(language: Language, sandbox: Sandbox, programs: Programs) -> None:
    execution = execute(language, sandbox, programs.add, b"20 22\n")
    assert (execution.outcome, execution.stdout) == ("ok", b"42\n")
    assert 0 < execution.cpu_s < 1 and execution.peak_memory_bytes > MIB


@pytest.mark.parametrize(
    ("clause", "outcome"), [("crash", "runtime_error"), ("loop", "time_limit"), ("flood", "output_limit"), ("hoard", "memory_limit")]
)
def test_how_it_ends(language: Language, sandbox: Sandbox, programs: Programs, clause: str, outcome: str) -> None:
    execution = execute(language, sandbox, getattr(programs, clause))
    assert execution.outcome == outcome, execution


@pytest.mark.parametrize("clause", ["fork", "connect", "host_file"])
def test_what_it_must_not_do(language: Language, sandbox: Sandbox, programs: Programs, clause: str) -> None:
    assert execute(language, sandbox, getattr(programs, clause)).stdout == b"no\n"


def test_a_program_that_is_none(language: Language, sandbox: Sandbox, programs: Programs) -> None:
    try:
        outcome = execute(language, sandbox, programs.broken).outcome
    except CompileError as error:
        outcome = error.execution.outcome
        assert error.execution.stderr
    assert outcome == ("runtime_error" if programs is PROGRAMS["python"] else "compile_error")


@pytest.mark.slow
def test_a_compilation_that_does_not_end(language: Language, sandbox: Sandbox, programs: Programs) -> None:
    try:
        assert execute(language, sandbox, programs.endless_compile).outcome in ("time_limit", "memory_limit")
    except CompileError as error:
        assert b"reached its" in error.execution.stderr
    assert execute(language, sandbox, programs.add, b"1 2").stdout == b"3\n"


def test_a_program_is_compiled_once(language: Language, sandbox: Sandbox, programs: Programs) -> None:
    assert language.prepare(programs.add, sandbox).content == language.prepare(programs.add, sandbox).content
