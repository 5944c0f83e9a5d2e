"""The process of the sandbox service.

    HTTP clients --program or completion, problem--> [ queue | threads -> cells of the sandbox ] --verdict--> HTTP clients

At most `cells` requests are judged at once and `queue` wait; whoever comes then is told when to come again. It waits for: requests, cells.
A fault of ours is an answer of 5xx, never a verdict. SIGTERM and SIGINT let what is being judged end, for `grace_s`; then the cells are ended.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import signal
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from pydantic import ValidationError

from actors.rewards import Sample, Score
from actors.rewards.judging import Bench
from actors.rewards.unit_tests import UnitTests
from protocol.errors import DataError, DeadlineExceeded, InfrastructureFault
from rlsys import __version__
from rlsys.sandbox_service.api import ExecuteRequest, Fault, GradeRequest, Health, Refusal, Verdict, openapi

log = logging.getLogger("rlsys.sandbox_service")


def _no_http(record: logging.LogRecord) -> bool:
    """What a stranger sends that is no HTTP is told in one line: aiohttp would write where in its parser it was, each time."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, HttpProcessingError | web.RequestPayloadError):
        reason = " ".join(str(error).split())
        record.msg, record.args, record.exc_info = "no HTTP that can be read: %s", (reason[:120],), None
        record.levelno, record.levelname = logging.WARNING, "WARNING"
    return True


logging.getLogger("aiohttp.server").addFilter(_no_http)

TRIES = 3
"""How often a program is judged when the sandbox breaks under it."""
BODY_S = 30.0
"""How long a request's body may take to arrive: it holds a place in the queue."""
ANSWER_S = 10.0
"""After the cells were ended: how long it may take until every client has been told."""
KINDS_KEPT = 32
"""Sets of options whose parsed problems are kept."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """How the service is run."""

    host: str
    port: int
    """0: any that is free."""
    token: str
    cells: int
    queue: int
    deadline_s: float
    """Longest time from a request's arrival to its answer, and most processor seconds that one program may ask for."""
    body_bytes: int
    memory_bytes: int
    """Most memory that one program may ask for."""
    grace_s: float
    tls: ssl.SSLContext | None = None


class _Refused(Exception):
    """There is no verdict: status code and why."""

    def __init__(self, status: int, code: str, message: str, where: str, retry_after_s: int = 0) -> None:
        super().__init__(message)
        self.status, self.retry_after_s = status, retry_after_s
        self.fault = Fault.model_validate({"code": code, "message": message, "where": where})


class Service:
    """One server. `run` returns when it was told to end and everything is gone."""

    def __init__(self, serving: Serving) -> None:
        """Starts the sandbox. Raises InfrastructureFault where no isolation can be had."""
        self._serving = serving
        self._token = sha256(serving.token.encode()).digest()
        self._bench = Bench(serving.cells, own_code=False)
        self._threads = ThreadPoolExecutor(serving.cells, thread_name_prefix="judge")
        self._scorers: dict[str, UnitTests] = {}
        self._taken = self._running = self._judged = 0
        self._mean_s = 1.0
        self._lock = threading.Lock()
        self._closed = False
        """The cells are being ended: what ends now did not end by itself."""
        self._ending = asyncio.Event()
        self._document = json.dumps(openapi()).encode()

    async def run(self, say: Callable[[str], object]) -> None:
        """Serve until SIGTERM or SIGINT. `say` is called with the address once it listens."""
        serving = self._serving
        app = web.Application(client_max_size=serving.body_bytes, middlewares=[self._guard])
        app.router.add_post("/v1/execute", self._execute)
        app.router.add_post("/v1/grade", self._grade)
        app.router.add_get("/healthz", self._health)
        app.router.add_get("/openapi.json", self._openapi)
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._ending.set)
        try:
            site = web.TCPSite(runner, serving.host, serving.port, ssl_context=serving.tls)
            await site.start()
            host, port = runner.addresses[0][:2]
            say(f"{'https' if serving.tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}")
            await self._ending.wait()
            log.info("ends: %d requests are under way", self._taken)
            end = time.monotonic() + serving.grace_s
            while self._taken and time.monotonic() < end:
                await asyncio.sleep(0.05)
        finally:
            self._closed = True
            await asyncio.to_thread(self._bench.sandbox.close)  # what is still judged ends as a fault, which its client is told
            end = time.monotonic() + ANSWER_S
            while self._taken and time.monotonic() < end:
                await asyncio.sleep(0.05)
            await runner.cleanup()
            self._threads.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------------------------------------------ answers

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Token first, before a byte of the body is read; every refusal has one shape."""
        try:
            if request.path.startswith("/v1/") and not self._admitted(request):
                raise _Refused(
                    401,
                    "unauthorized",
                    "expected the header 'Authorization: Bearer TOKEN' with this server's token",
                    "header Authorization",
                )
            return await handler(request)
        except _Refused as refused:
            return self._refuse(refused)
        except web.HTTPRequestEntityTooLarge:
            most = f"at most {self._serving.body_bytes} bytes are taken (--body-mb)"
            return self._refuse(_Refused(413, "too_large", f"the body is too large, {most}", "body"))
        except web.HTTPException as error:
            message = f"{request.method} {request.path}: expected POST /v1/execute, POST /v1/grade, GET /healthz or GET /openapi.json"
            return self._refuse(_Refused(error.status, "not_found", message, "path"))
        except Exception as error:  # a bug of ours: known about the program is nothing, and the client is told so in the same shape
            log.exception("no verdict")
            return self._refuse(_Refused(500, "infrastructure_fault", f"{type(error).__name__}: {error}", "server"))

    def _admitted(self, request: web.Request) -> bool:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        given = sha256(token.strip().encode(errors="surrogateescape")).digest()
        return hmac.compare_digest(given, self._token) and scheme.lower() == "bearer"

    def _refuse(self, refused: _Refused) -> web.Response:
        headers = {"WWW-Authenticate": "Bearer"} if refused.status == 401 else {}
        if refused.retry_after_s:
            headers["Retry-After"] = str(refused.retry_after_s)
        return web.json_response(Refusal(error=refused.fault).model_dump(), status=refused.status, headers=headers)

    async def _health(self, request: web.Request) -> web.Response:
        waiting = max(0, self._taken - self._running)
        health = Health(
            status="ending" if self._ending.is_set() else "ok",
            version=__version__,
            cells=self._serving.cells,
            queue=self._serving.queue,
            running=self._running,
            waiting=waiting,
            judged=self._judged,
            cells_replaced=self._bench.sandbox.pool.cells_replaced,
        )
        return web.json_response(health.model_dump())

    async def _openapi(self, request: web.Request) -> web.Response:
        return web.Response(body=self._document, content_type="application/json")

    async def _execute(self, request: web.Request) -> web.Response:
        return await self._judge(request, ExecuteRequest)

    async def _grade(self, request: web.Request) -> web.Response:
        return await self._judge(request, GradeRequest)

    # ------------------------------------------------------------------------------------------------ judging

    async def _judge(self, request: web.Request, model: type[ExecuteRequest] | type[GradeRequest]) -> web.Response:
        arrived = time.monotonic()
        if self._ending.is_set():
            raise _Refused(503, "ending", "this server is about to end", "server", retry_after_s=5)
        serving = self._serving
        if self._taken >= serving.cells + serving.queue:
            again = min(60, max(1, round(self._taken * self._mean_s / serving.cells / 2)))
            message = f"{self._taken} requests are under way, {serving.cells} are judged at once and {serving.queue} may wait"
            raise _Refused(503, "busy", message, "server", retry_after_s=again)
        self._taken += 1  # its place in the queue, from before its body is read until it is judged, whatever becomes of the client
        future: Future[Verdict] | None = None
        try:
            asked = await self._read(request, model)
            deadline_s = min(asked.deadline_s or serving.deadline_s, serving.deadline_s)
            left = deadline_s - (time.monotonic() - arrived)
            future = self._threads.submit(self._work, asked, arrived)
            try:
                verdict = await asyncio.wait_for(asyncio.wrap_future(future), max(0.0, left))
            except TimeoutError:
                raise _Refused(
                    504, "deadline", f"no verdict within {deadline_s:g} s; {self._taken} requests are under way", "deadline_s"
                ) from None
            except (InfrastructureFault, DeadlineExceeded, RuntimeError) as fault:
                if self._ending.is_set():  # RuntimeError: no cell is started any more
                    raise _Refused(503, "ending", "this server has ended before it was judged", "server", retry_after_s=5) from None
                log.warning("no verdict: %s", fault)
                raise _Refused(500, "infrastructure_fault", str(fault), "sandbox") from None
            except DataError as error:
                raise _Refused(400, "bad_problem", str(error), "problem") from None
            if self._closed:
                raise _Refused(503, "ending", "this server has ended before it was judged", "server", retry_after_s=5)
            self._judged += 1
            self._mean_s += 0.1 * (verdict.judged_s - self._mean_s)
            return web.json_response(verdict.model_dump())
        finally:
            if future is None or future.done():
                self._taken -= 1
            else:
                loop = asyncio.get_running_loop()
                future.add_done_callback(lambda _: loop.is_closed() or loop.call_soon_threadsafe(self._leave))

    def _leave(self) -> None:
        self._taken -= 1

    async def _read(self, request: web.Request, model: type[ExecuteRequest] | type[GradeRequest]) -> ExecuteRequest | GradeRequest:
        try:
            body = await asyncio.wait_for(request.read(), BODY_S)
        except TimeoutError:
            raise _Refused(408, "too_slow", f"the body did not arrive within {BODY_S:g} s", "body") from None
        except web.RequestPayloadError as error:
            reason = " ".join(str(error).split()).removeprefix("400, message: ")
            raise _Refused(400, "bad_request", f"the body cannot be read ({reason})", "body") from None
        try:
            content = await asyncio.to_thread(json.loads, body)
        except (ValueError, RecursionError) as error:
            raise _Refused(400, "bad_request", f"not JSON ({error})", "body") from None
        if not isinstance(content, dict):
            raise _Refused(400, "bad_request", f"JSON {type(content).__name__}, expected an object", "body")
        try:
            asked = model.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "body"
            found = "" if first["type"] in ("missing", "extra_forbidden") else f"{_short(first['input'])}: "
            raise _Refused(400, "bad_request", found + first["msg"].removeprefix("Value error, "), where) from None
        return self._within_limits(asked)

    def _within_limits(self, asked: ExecuteRequest | GradeRequest) -> ExecuteRequest | GradeRequest:
        """What one program may use is the server's to say: who asks for more is refused, who asks for nothing gets at most that."""
        options, serving = asked.options, self._serving
        most: dict[str, float] = dict.fromkeys(("min_time_limit_s", "max_time_limit_s", "problem_budget_s"), serving.deadline_s)
        most["memory_limit_bytes"] = serving.memory_bytes
        lower = {}
        for name, limit in most.items():
            value = getattr(options, name)
            if value > limit and name in options.model_fields_set:
                raise _Refused(400, "bad_request", f"{value:g}, this server allows at most {limit:g}", f"options.{name}")
            lower[name] = min(value, limit)
        own = asked.problem.get("memory_limit_bytes")
        if isinstance(own, int | float) and own > serving.memory_bytes:
            raise _Refused(400, "bad_request", f"{own}, this server allows at most {serving.memory_bytes}", "problem.memory_limit_bytes")
        return asked.model_copy(update={"options": options.model_copy(update=lower)})

    def _work(self, asked: ExecuteRequest | GradeRequest, arrived: float) -> Verdict:
        """In a thread: judge, again if the sandbox broke. Raises DataError, InfrastructureFault, DeadlineExceeded."""
        started = time.monotonic()
        with self._lock:
            self._running += 1
        try:
            score = self._score(asked)
        finally:
            with self._lock:
                self._running -= 1
        if score.value is None:
            raise InfrastructureFault(f"no score: {score.status} {score.detail}")
        return Verdict(
            value=score.value,
            passed=score.passed,
            status=score.status,
            detail=score.detail,
            metrics=dict(score.metrics),
            queued_s=started - arrived,
            judged_s=time.monotonic() - started,
        )

    def _score(self, asked: ExecuteRequest | GradeRequest) -> Score:
        scorer = self._scorer(asked.options.model_dump())
        for attempt in range(TRIES):
            try:
                if isinstance(asked, ExecuteRequest):
                    return scorer.score_program(asked.program, asked.problem)
                return scorer.score(Sample(problem=asked.problem, completion=asked.completion, truncated=False))
            except InfrastructureFault:
                if attempt + 1 == TRIES or self._ending.is_set():
                    raise
        raise AssertionError("unreachable")

    def _scorer(self, options: Mapping[str, Any]) -> UnitTests:
        key = json.dumps(options, sort_keys=True)
        with self._lock:
            scorer = self._scorers.get(key)
            if scorer is None:
                scorer = self._scorers[key] = UnitTests(options, self._bench)
                while len(self._scorers) > KINDS_KEPT:
                    del self._scorers[next(iter(self._scorers))]
            return scorer


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
