"""`rlsys sandbox serve` as its clients see it: the real server, the real sandbox, real HTTP."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import jsonschema
import pytest

from actors.rewards import Sample
from actors.rewards.sandbox_service import SandboxService
from protocol.errors import ConfigError, DataError, InfrastructureFault
from protocol.intervals import Recorder, record_here
from rlsys.sandbox_service.api import openapi
from tests.actors.processes import alive, born, descendants, wait_until
from tests.sandbox_servers import Served, served

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "sandbox_service.openapi.json"
ADD = "a, b = map(int, input().split())\nprint(a + b)"
PROBLEM = {"id": "add", "tests": [{"input": "1 2\n", "output": "3\n"}, {"input": "5 6\n", "output": "11\n"}]}
LIMITS = {"min_time_limit_s": 1, "max_time_limit_s": 1}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("service"), "--cells", "4", "--body-mb", "1", "--memory-mb", "2048") as service:
        yield service


def ask(
    server: Served, path: str, body: Any = None, *, token: str | None = None, raw: bytes | None = None
) -> tuple[int, Any, dict[str, str]]:
    """One request; the answer is checked against the OpenAPI document."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=600)
    try:
        headers = {"Authorization": f"Bearer {server.token if token is None else token}"} if token != "" else {}
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        connection.request("POST" if data is not None else "GET", path, data, headers)
        response = connection.getresponse()
        answer = json.loads(response.read())
        check(path, "post" if data is not None else "get", response.status, answer)
        return response.status, answer, dict(response.headers)
    finally:
        connection.close()


def check(path: str, method: str, status: int, answer: Any) -> None:
    document = openapi()
    operation = document["paths"].get(path, {}).get(method)
    if operation is None:
        reference = {"$ref": "#/components/schemas/Refusal"}
    else:
        assert str(status) in operation["responses"], f"{path} answers {status}, which its document does not say"
        reference = operation["responses"][str(status)]["content"]["application/json"]["schema"]
    jsonschema.validate(answer, {**reference, "components": document["components"]}, cls=jsonschema.Draft202012Validator)


def test_the_document_is_the_one_in_docs_and_the_one_served(server: Served) -> None:
    """`python -m rlsys.sandbox_service > docs/sandbox_service.openapi.json` writes it."""
    assert json.loads(DOCUMENT.read_text()) == openapi()
    assert ask(server, "/openapi.json", token="")[1] == openapi()
    for schema in openapi()["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize(
    ("program", "status", "value"),
    [(ADD, "accepted", 1.0), ("print(3)", "wrong_answer", 0.5), ("1/0", "runtime_error", 0.0), ("while 1: pass", "time_limit", 0.0)],
)
def test_a_program_gets_its_verdict(server: Served, program: str, status: str, value: float) -> None:
    body = {"program": program, "problem": PROBLEM, "options": {**LIMITS, "score": "soft"}}
    code, answer, _ = ask(server, "/v1/execute", body)
    assert (code, answer["status"], answer["value"], answer["passed"]) == (200, status, value, value == 1.0), answer


def test_a_completion_is_graded_as_in_training(server: Served) -> None:
    body = {"completion": f"So:\n```python\n{ADD}\n```", "problem": PROBLEM}
    assert ask(server, "/v1/grade", body)[1]["status"] == "accepted"
    assert ask(server, "/v1/grade", {**body, "completion": "no program \ud800"})[1]["status"] == "unparseable"


@pytest.mark.parametrize(
    ("body", "code", "where", "sentence"),
    [
        ({"problem": PROBLEM}, "bad_request", "program", "Field required"),
        ({"program": 5, "problem": PROBLEM}, "bad_request", "program", "5: expected text"),
        ({"program": ADD, "problem": PROBLEM, "tests": []}, "bad_request", "tests", "Extra inputs are not permitted"),
        ({"program": ADD, "problem": PROBLEM, "options": {"score": "x"}}, "bad_request", "options.score", "'sparse' or 'soft'"),
        (
            {"program": ADD, "problem": PROBLEM, "options": {"problem_budget_s": 1e6}},
            "bad_request",
            "options.problem_budget_s",
            "at most 120",
        ),
        ({"program": ADD, "problem": {**PROBLEM, "memory_limit_bytes": 1 << 40}}, "bad_request", "problem.memory_limit_bytes", "at most"),
        ({"program": ADD, "problem": {"id": "x"}}, "bad_problem", "problem", "problem 'x'"),
        ({"program": ADD, "problem": {**PROBLEM, "language": "cobol"}}, "bad_problem", "problem", "cobol"),
        ([], "bad_request", "body", "JSON list, expected an object"),
    ],
)
def test_bad_requests_are_told_what_where_and_what_was_expected(server: Served, body: Any, code: str, where: str, sentence: str) -> None:
    status, answer, _ = ask(server, "/v1/execute", body)
    error = answer["error"]
    assert (status, error["code"], error["where"]) == (400, code, where), error
    assert sentence in error["message"]


def test_what_is_no_json_or_too_large_or_elsewhere(server: Served) -> None:
    for raw in (b"{", b"\xff\xfe", b"[" * 100_000):
        assert ask(server, "/v1/execute", raw=raw)[1]["error"]["code"] == "bad_request"
    assert ask(server, "/v1/execute", raw=b" " * 1_100_000)[0] == 413
    status, answer, _ = ask(server, "/v2/execute", {})
    assert (status, answer["error"]["code"]) == (404, "not_found")


def test_a_body_that_cannot_be_unpacked_is_the_clients_fault(server: Served) -> None:
    headers = {"Authorization": f"Bearer {server.token}", "Content-Encoding": "gzip"}
    with closing(http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=600)) as connection:
        connection.request("POST", "/v1/execute", b"no gzip", headers)
        response = connection.getresponse()
        answer = json.loads(response.read())
    check("/v1/execute", "post", response.status, answer)
    assert (response.status, answer["error"]["code"], answer["error"]["where"]) == (400, "bad_request", "body"), answer
    assert "gzip" in answer["error"]["message"] and "\n" not in answer["error"]["message"]


def test_what_is_no_http_is_one_line_in_the_log(server: Served) -> None:
    with closing(http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=600)) as connection:
        connection.request("GET", "/" + "a" * 9_000)
        assert connection.getresponse().status == 400
    wait_until(lambda: "no HTTP" in server.errors.read_text(), "it is told")
    assert "Traceback" not in server.errors.read_text()


@pytest.mark.parametrize("token", ["", "wrong", "\u00e9"])
def test_without_the_token_nothing_is_judged(server: Served, token: str) -> None:
    before = ask(server, "/healthz", token="")[1]["judged"]
    status, answer, headers = ask(server, "/v1/execute", {"program": ADD, "problem": PROBLEM}, token=token)
    assert (status, answer["error"]["code"], headers["WWW-Authenticate"]) == (401, "unauthorized", "Bearer")
    assert ask(server, "/healthz", token="")[1]["judged"] == before


async def many(server: Served, bodies: list[dict[str, Any]]) -> list[tuple[int, Any, str | None]]:
    headers = {"Authorization": f"Bearer {server.token}"}
    async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def one(body: dict[str, Any]) -> tuple[int, Any, str | None]:
            async with session.post(f"{server.url}/v1/execute", json=body) as response:
                return response.status, await response.json(), response.headers.get("Retry-After")

        return await asyncio.gather(*map(one, bodies))


def test_a_hundred_at_once_each_get_their_own_verdict(server: Served) -> None:
    bodies = [
        {"program": f"{ADD}\n# {i}" if i % 3 else f"print({i})", "problem": {**PROBLEM, "id": str(i)}, "options": LIMITS}
        for i in range(120)
    ]
    answers = asyncio.run(many(server, bodies))
    assert [(code, answer["passed"]) for code, answer, _ in answers] == [(200, i % 3 != 0) for i in range(120)]
    health = ask(server, "/healthz", token="")[1]
    assert (health["running"], health["waiting"], health["status"]) == (0, 0, "ok")


@contextmanager
def held(server: Served) -> Iterator[None]:
    """Its cells stand still, so that what is judged stays so until the end of the block (not longer than a cell may be silent, 20 s)."""
    cells = descendants(server.process.pid)
    for pid in cells:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in cells:
            os.kill(pid, signal.SIGCONT)


def test_a_full_queue_says_when_to_come_again_and_a_late_verdict_is_none(tmp_path: Path) -> None:
    program = {"program": ADD, "problem": PROBLEM, "options": LIMITS}
    sample = Sample(problem=PROBLEM, completion=f"```python\n{ADD}\n```", truncated=False)
    recorder = Recorder("test")

    def scored() -> bool:
        record_here(recorder)
        return reward.score(sample).passed

    with served(tmp_path, "--cells", "1", "--queue", "3") as small, ThreadPoolExecutor(2) as threads:
        reward = SandboxService({"url": small.url, "token_file": small.token_file, "options": LIMITS})
        with held(small):
            full = threads.submit(asyncio.run, many(small, [program] * 4))
            wait_until(lambda: [ask(small, "/healthz", token="")[1][what] for what in ("running", "waiting")] == [1, 3], "a full queue")
            for code, answer, again in asyncio.run(many(small, [program] * 8)):
                assert (code, answer["error"]["code"]) == (503, "busy") and int(again or 0) >= 1, answer
            passed = threads.submit(scored)
            wait_until(lambda: "waiting:sandbox" in recorder.totals(), "the reward was told to come again")
        assert [code for code, _, _ in full.result()] == [200] * 4
        with closing(reward):
            assert passed.result(), "it waits until there is room"
        with held(small):
            first = threads.submit(asyncio.run, many(small, [program]))
            wait_until(lambda: ask(small, "/healthz", token="")[1]["running"] == 1, "it is being judged")
            assert [code for code, _, _ in asyncio.run(many(small, [{**program, "deadline_s": 0.2}]))] == [504]
        assert [code for code, _, _ in first.result()] == [200]


@pytest.mark.parametrize(
    ("field", "beside"),
    [
        ("checker", {}),
        ("language", {}),
        ("checker_language", {"checker": "testlib", "checker_source": "int main() {}"}),
        ("interactor_language", {"interactor_source": "print(1)"}),
    ],
)
def test_a_client_names_no_code_of_the_server(server: Served, field: str, beside: dict[str, str]) -> None:
    """A checker is called with what a program printed: with a name such as this one that would be done outside of the sandbox."""
    asked = {"program": ADD, "problem": {**PROBLEM, **beside, field: "shutil:copy"}, "options": LIMITS}
    [(code, answer, _)] = asyncio.run(many(server, [asked]))
    assert (code, answer["error"]["code"]) == (400, "bad_problem")
    assert "'shutil:copy' is not known here" in answer["error"]["message"]


def test_sigterm_ends_it_and_its_cells_in_the_middle_of_a_program(tmp_path: Path) -> None:
    with served(tmp_path, "--cells", "2", "--grace", "0.2", "--deadline", "600") as server:
        found: list[tuple[int, Any, str | None]] = []
        forever = {
            "program": "import time\ntime.sleep(3600)",
            "problem": PROBLEM,
            "options": {"min_time_limit_s": 60, "max_time_limit_s": 60},
        }
        client = threading.Thread(target=lambda: found.extend(asyncio.run(many(server, [forever]))))
        client.start()
        wait_until(lambda: ask(server, "/healthz", token="")[1]["running"] == 1, "it is being judged")
        below = born(descendants(server.process.pid))
        assert below
        assert server.end() == 0, server.errors.read_text()
        client.join(120)
        assert [(code, answer["error"]["code"]) for code, answer, _ in found] == [(503, "ending")], "no verdict, and the client knows"
        wait_until(lambda: not alive(below), "its cells are gone")


def test_the_reward_tells_faults_of_the_service_from_verdicts(server: Served, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("wrong")
    with closing(SandboxService({"url": server.url, "token_file": server.token_file})) as reward, pytest.raises(DataError, match="'x'"):
        reward.score(Sample(problem={"id": "x"}, completion="", truncated=False))
    with closing(SandboxService({"url": server.url, "token_file": wrong})) as reward, pytest.raises(ConfigError, match="Bearer TOKEN"):
        reward.score(Sample(problem=PROBLEM, completion="", truncated=False))
    with pytest.raises(InfrastructureFault, match="no verdict from the sandbox service"):
        nobody = SandboxService({"url": "http://127.0.0.1:1", "token_file": wrong, "wait_s": 0.3})
        nobody.score(Sample(problem=PROBLEM, completion="", truncated=False))


def certificate(directory: Path) -> tuple[Path, Path]:
    """One that signed itself, for 127.0.0.1, and its key."""
    made = directory / "certificate.pem", directory / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=test",
         "-addext", "subjectAltName=IP:127.0.0.1", "-out", made[0], "-keyout", made[1]],
        check=True, capture_output=True,
    )  # fmt: skip
    return made


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_over_https_a_score_needs_the_authority_that_signed_the_certificate(tmp_path: Path) -> None:
    ours, key = certificate(tmp_path)
    sample = Sample(problem=PROBLEM, completion=f"```python\n{ADD}\n```", truncated=False)
    with served(tmp_path, "--cells", "1", "--certificate", str(ours), "--key", str(key)) as server:
        assert server.url.startswith("https://")
        options = {"url": server.url, "token_file": server.token_file, "options": LIMITS}
        with closing(SandboxService({**options, "ca_file": ours})) as reward:
            assert reward.score(sample).passed
        with closing(SandboxService(options)) as reward, pytest.raises(ConfigError, match=r"cannot be trusted .* option ca_file"):
            reward.score(sample)


def test_a_reward_that_could_never_ask_is_refused_when_it_is_made(tmp_path: Path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_text("0123456789abcdef\n")
    bad.write_text("two words\nand a line")
    for options, sentence in (
        ({"url": "http://127.0.0.1:99999", "token_file": good}, "option 'url': http://127.0.0.1:99999 is no address"),
        ({"url": "http://[::1", "token_file": good}, r"option 'url': http://\[::1 is no address"),
        ({"url": "http://:8390", "token_file": good}, "option 'url': http://:8390 is no address"),
        ({"url": "http://127.0.0.1:1", "token_file": bad}, "option 'token_file': .* holds no token"),
        ({"url": "https://127.0.0.1:1", "token_file": good, "ca_file": bad}, "option 'ca_file': .* holds no certificate"),
        ({"url": "https://127.0.0.1:1", "token_file": good, "ca_file": tmp_path / "none"}, "option 'ca_file': .* holds no certificate"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            SandboxService(options)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--listen", "8390"], "--listen 8390: expected HOST:PORT"),
        (["--listen", "192.0.2.1:0"], "--listen 192.0.2.1:0: cannot be listened on"),
        (["--token-file", "{short}"], "holds 5 characters, expected one word of at least 16"),
        (["--token-file", "{open}"], "others than its owner may read it"),
        (["--certificate", "{short}"], "no certificate and key that can be used"),
        (["--deadline", "-1"], "'-1' is no positive number"),
    ],
)
def test_bad_command_lines_are_one_sentence(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    (tmp_path / "open").write_text("0123456789abcdef")
    (tmp_path / "short").write_text("short")
    (tmp_path / "short").chmod(0o600)
    given = [a.format(short=tmp_path / "short", open=tmp_path / "open") for a in arguments]
    token = [] if "--token-file" in given else ["--token-file", str(tmp_path / "token")]
    cells = ["--cells", "1"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "rlsys", "sandbox", "serve", *given, *token, *cells],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_killed_server_takes_its_cells_along(tmp_path: Path) -> None:
    with served(tmp_path, "--cells", "2") as server:
        below = born(descendants(server.process.pid))
        assert len(below) >= 2, "two cells run below the server"
        server.process.send_signal(signal.SIGKILL)
        server.process.wait(timeout=120)
        wait_until(lambda: not alive(below), "the kernel ends the cells")
