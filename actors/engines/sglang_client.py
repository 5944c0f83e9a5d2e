"""Requests to an SGLang server over HTTP: one thread with an event loop carries all streams, the caller's thread never waits for one.

    caller --start, abort--> [ loop: one task per stream, one that watches ] --Ended, Broken, Loaded, Dead--> caller's `take`
                                                                              `--eventfd--> whoever polls `fd`

All answers are checked here: a server that sends something else than SGLang's documented fields is a fault, named with what it sent.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import select
import threading
import time
from collections import deque
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import aiohttp

from actors.engines.concurrency import ServerLoad
from protocol.errors import InfrastructureFault

PROBE_S = 0.5
"""How often the process is looked at; every other look asks for the load (0.9 ms of a server's time)."""
ANSWER_EVERY_S = 5.0
"""How often the scheduler itself must answer. The HTTP process alone answers while its scheduler hangs."""


SIGN_OF_WORK_S = 0.1
"""Processor time of the scheduler that counts as a sign of life while weights are loaded, when it answers nobody."""


class NoAnswer(InfrastructureFault):
    """A request that was not answered in time, or whose server was given up meanwhile."""


@dataclass(slots=True, eq=False)
class Stream:
    """One request as far as it has come. Written by the loop, read by the caller once it is in an `Ended`."""

    key: object
    rid: str
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: dict[str, Any] | None = None
    spans: list[tuple[str, int]] | None = None
    """(version, end) as the server says; None from servers that do not."""
    prefilled: int = 0
    aborting: bool = False


@dataclass(frozen=True, slots=True)
class Ended:
    """The server finished a request."""

    stream: Stream


@dataclass(frozen=True, slots=True)
class Broken:
    """A request got no orderly end. `status` is HTTP's, 0 when the connection broke."""

    stream: Stream
    status: int
    reason: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """A look at the server's load."""

    load: ServerLoad


@dataclass(frozen=True, slots=True)
class Dead:
    """The server ended, or its scheduler gives no answer any more."""

    reason: str


Event = Ended | Broken | Loaded | Dead
"""What `Client.take` gives."""


class Processes(Protocol):
    """What the watch asks of a server's processes."""

    def fault(self) -> str:
        """What is wrong with them, empty if nothing is."""

    def stopped(self) -> str:
        """Which of them are stopped by a signal, empty if none is."""

    def cpu_s(self) -> float:
        """Processor seconds of the schedulers so far; negative if they are not known."""

    def kill(self) -> None:
        """End them at once."""


class Client:
    """One server's client. `start`, `abort`, `call` and `take` are called from one thread at a time."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._streams: dict[str, Stream] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._calls: set[asyncio.Task[Any]] = set()
        self._watched = True
        self._heard_s = time.monotonic()
        self.dead = ""
        """Why the server was given up; empty while it was not."""
        self._url = ""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sglang client", daemon=True)
        self._thread.start()
        self._session: aiohttp.ClientSession = self._wait(self._open(), 10.0)

    @property
    def fd(self) -> int:
        """Readable while `take` has something to give."""
        return self._bell

    def take(self, timeout_s: float) -> list[Event]:
        """What happened, after waiting at most `timeout_s` for something to happen."""
        if not self._events and timeout_s > 0:
            bell = select.poll()  # which, other than select.select, takes any number of descriptor
            bell.register(self._bell, select.POLLIN)
            bell.poll(1000 * timeout_s)
        try:
            os.eventfd_read(self._bell)
        except BlockingIOError:
            pass
        events: list[Event] = []
        while self._events:
            events.append(self._events.popleft())
        return events

    def progress(self) -> dict[object, int]:
        """Key -> tokens that have come, of every open stream."""
        return {stream.key: len(stream.ids) for stream in list(self._streams.values())}

    def start(self, key: object, rid: str, body: dict[str, Any]) -> Stream:
        """Send a /generate request; an Ended or a Broken follows."""
        stream = self._streams[rid] = Stream(key, rid)
        self._spawn(self._stream(stream, {**body, "rid": rid, "stream": True, "return_logprob": True}))
        return stream

    def abort(self, stream: Stream) -> None:
        """Ask the server to end a request; it ends with what it has sampled. Repeated until it did: an abort can arrive before its request."""
        if not stream.aborting:
            stream.aborting = True
            self._spawn(self._abort(stream))

    @property
    def silent_s(self) -> float:
        """Since the server's last sign of life, once it owes one; else 0."""
        silent = time.monotonic() - self._heard_s
        return silent if self.dead or silent > ANSWER_EVERY_S + 2 * PROBE_S else 0.0

    def call(self, method: str, url: str, body: dict[str, Any] | None = None, *, timeout_s: float = 30.0) -> dict[str, Any]:
        """One plain request. Raises NoAnswer when it is not answered, InfrastructureFault when the answer does not say success."""
        try:
            answer: dict[str, Any] = self._wait(self._call_alive(method, url, body, timeout_s), timeout_s + 5.0)
        except TimeoutError:  # this process stood still, or the answer would be there, if only to say that none came
            raise NoAnswer(f"{method} {url}: no answer within {timeout_s:g} s, in which this process stood still") from None
        return answer

    def watch(self, url: str, processes: Processes, silence_s: float) -> None:
        """Send requests to the server at `url` and look after it and its processes."""
        self._url, self.dead, self._heard_s = url, "", time.monotonic()
        self._spawn(self._watch(processes, silence_s))

    def drop(self) -> None:
        """Forget the server: its requests, whatever they still send, and the watch over it."""
        if not self._loop.is_closed():
            self._wait(self._cancel_all(), 10.0)
        self._events.clear()

    @contextmanager
    def busy(self) -> Iterator[None]:
        """While weights are loaded the scheduler answers nobody; its processes, and whether it works at all, are still looked at."""
        self._watched = False
        try:
            yield
            self._heard_s = time.monotonic()
        finally:
            self._watched = True

    def close(self) -> None:
        """Drop all requests and end the thread."""
        if self._loop.is_closed():
            return
        try:
            self._wait(self._shut(), 10.0)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10.0)
            if not self._thread.is_alive():
                self._loop.close()
                os.close(self._bell)

    # ------------------------------------------------------------------------------------------------ in the loop

    async def _open(self) -> aiohttp.ClientSession:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10.0)
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout, json_serialize=_dump)

    async def _cancel_all(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._streams.clear()

    async def _shut(self) -> None:
        await self._cancel_all()
        await self._session.close()

    async def _call_alive(self, method: str, url: str, body: dict[str, Any] | None, timeout_s: float) -> dict[str, Any]:
        """`_call`, given up as soon as the server is."""
        task = asyncio.create_task(self._call(method, url, body, timeout_s))
        self._calls.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            if (this := asyncio.current_task()) is not None and this.cancelling():
                raise  # nobody waits for it any more
            raise NoAnswer(f"{method} {url}: given up: {self.dead or 'the engine was closed'}") from None
        finally:
            self._calls.discard(task)

    async def _call(self, method: str, url: str, body: dict[str, Any] | None, timeout_s: float) -> dict[str, Any]:
        where = f"{method} {url}"
        try:
            timeout = aiohttp.ClientTimeout(total=timeout_s)
            async with self._session.request(method, url, json=body, timeout=timeout) as answer:
                text = await answer.text()
        except TimeoutError:
            raise NoAnswer(f"{where}: no answer within {timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise InfrastructureFault(f"{where}: {error or type(error).__name__}") from None
        try:
            content = json.loads(text) if text else {}
        except ValueError:
            raise InfrastructureFault(f"{where}: status {answer.status}, no JSON: {text[:200]!r}") from None
        if answer.status != 200 or (isinstance(content, dict) and content.get("success") is False):
            raise InfrastructureFault(f"{where}: status {answer.status}: {_reason(content)}")
        return content if isinstance(content, dict) else {"list": content}

    async def _stream(self, stream: Stream, body: dict[str, Any]) -> None:
        try:
            async with self._session.post(f"{self._url}/generate", json=body) as answer:
                if answer.status != 200:
                    text = await answer.text()
                    self._ended(stream, Broken(stream, answer.status, text[:500]))
                    return
                rest = b""
                async for data in answer.content.iter_any():
                    self._heard_s = time.monotonic()
                    *events, rest = (rest + data).split(b"\n\n")
                    for event in events:
                        if fault := _read_event(stream, event):
                            self._ended(stream, Broken(stream, 500, fault))
                            return
            self._ended(stream, Ended(stream) if stream.finish else Broken(stream, 0, "the stream ended in the middle of a request"))
        except (aiohttp.ClientError, OSError) as error:
            self._ended(stream, Broken(stream, 0, str(error) or type(error).__name__))

    def _ended(self, stream: Stream, event: Event) -> None:
        self._streams.pop(stream.rid, None)
        self._give(event)

    async def _abort(self, stream: Stream) -> None:
        while stream.rid in self._streams:
            try:
                timeout = aiohttp.ClientTimeout(total=10.0)
                async with self._session.post(f"{self._url}/abort_request", json={"rid": stream.rid}, timeout=timeout):
                    pass
            except (aiohttp.ClientError, OSError):
                return  # the stream has noticed as well
            await asyncio.sleep(0.2)

    async def _watch(self, processes: Processes, silence_s: float) -> None:
        asking: asyncio.Task[None] | None = None
        worked_s = 0.0
        turn = 0
        while True:
            slept = time.monotonic()
            await asyncio.sleep(PROBE_S)
            late = time.monotonic() - slept - PROBE_S
            if late > PROBE_S:  # it is this process that stood still
                self._heard_s += late
            if fault := processes.fault():
                self._give_up(processes, fault)
                return
            now = time.monotonic()
            if not self._watched and ((work_s := processes.cpu_s()) < 0 or work_s - worked_s > SIGN_OF_WORK_S):
                self._heard_s, worked_s = now, work_s
            if asking is None and now - self._heard_s >= ANSWER_EVERY_S:
                asking = asyncio.create_task(self._ask(silence_s))
                self._tasks.add(asking)
                asking.add_done_callback(self._tasks.discard)
            elif asking is not None and asking.done():
                asking = None
            if now - self._heard_s > silence_s:
                if asking is not None:
                    asking.cancel()
                how = "no answer from its scheduler" if self._watched else "its scheduler answers nobody and uses no processor"
                stopped = processes.stopped()
                self._give_up(processes, f"{how} for {now - self._heard_s:.0f} s" + (f": {stopped}" if stopped else ""))
                return
            turn += 1
            if turn % 2 == 0 and self._streams and asking is None and self._watched:
                await self._look()

    def _give_up(self, processes: Processes, reason: str) -> None:
        self.dead = reason
        self._give(Dead(reason))
        processes.kill()  # whoever is in the middle of something with it, such as a broadcast of weights, gets an error
        for task in self._calls:
            task.cancel()

    async def _ask(self, timeout_s: float) -> None:
        """Whether the scheduler answers. /server_info goes through it; /health would generate a token, and fail while paused."""
        try:
            await self._call("GET", f"{self._url}/server_info", None, timeout_s)
            self._heard_s = time.monotonic()
        except InfrastructureFault:
            pass  # silence is what the watch looks at

    async def _look(self) -> None:
        try:
            content = await self._call("GET", f"{self._url}/v1/loads?include=core,queues", None, 2.0)
            self._give(Loaded(read_load(content)))
        except InfrastructureFault:
            pass  # says nothing about life: `_ask` does

    def _give(self, event: Event) -> None:
        self._events.append(event)
        os.eventfd_write(self._bell, 1)

    # ------------------------------------------------------------------------------------------------ between the threads

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        def begin() -> None:
            task = self._loop.create_task(work)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        self._loop.call_soon_threadsafe(begin)

    def _wait(self, work: Coroutine[Any, Any, Any], timeout_s: float) -> Any:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout_s)
        except TimeoutError:
            future.cancel()
            raise


def _dump(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _read_event(stream: Stream, event: bytes) -> str:
    """Take one event of a stream into `stream`; returns what is wrong with it, empty if nothing is."""
    if not event.startswith(b"data: ") or event == b"data: [DONE]":
        return ""
    content = json.loads(event[6:])
    meta = content.get("meta_info")
    if meta is None:
        return _reason(content)
    new, logprobs = content.get("output_ids") or [], [entry[0] for entry in meta.get("output_token_logprobs") or []]
    if bad := [value for value in logprobs if value is None or not math.isfinite(value)]:
        return f"a log-prob of {bad[0]}, which is no number: the weights or the server's kernels are broken"
    total = meta["completion_tokens"]
    if len(stream.ids) + len(new) == total:
        stream.ids += new
    elif len(new) == total:  # a server without --incremental-streaming-output sends everything again
        stream.ids = new
    elif new:
        return f"{len(new)} token ids after {len(stream.ids)}, {total} in all"
    if len(stream.logprobs) + len(logprobs) == len(stream.ids):
        stream.logprobs += logprobs
    elif len(logprobs) >= len(stream.ids):
        stream.logprobs = logprobs[: len(stream.ids)]
    else:
        return f"{len(logprobs)} log-probs after {len(stream.logprobs)} for {len(stream.ids)} tokens"
    finish = meta.get("finish_reason")
    if finish:
        stream.finish = finish
        stream.prefilled = meta.get("prompt_tokens", 0) - meta.get("cached_tokens", 0)
        if meta.get("weight_versions") is not None:
            stream.spans = [(span["version"], span["end"]) for span in meta["weight_versions"] if span["end"] > span["start"]]
    return ""


def _reason(content: object) -> str:
    if isinstance(content, dict):
        error = content.get("error")
        found = error.get("message") if isinstance(error, dict) else error
        return str(found or content.get("message") or content)[:500]
    return str(content)[:500]


def read_load(content: dict[str, Any]) -> ServerLoad:
    """What /v1/loads says, summed over the server's data-parallel ranks."""
    ranks = content.get("loads") or []
    return ServerLoad(
        running=sum(rank.get("num_running_reqs", 0) for rank in ranks),
        waiting=sum(rank.get("num_waiting_reqs", 0) for rank in ranks),
        cache_used=max((rank.get("token_usage", 0.0) for rank in ranks), default=0.0),
        retracted=sum((rank.get("queues") or {}).get("retracted", 0) for rank in ranks),
    )
