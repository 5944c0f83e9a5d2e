"""The SGLang engine: a real SGLang server sampled over HTTP, with exact log-probs, the version of every token, and a seed per sample.

    submit --> waiting --(limit, steered by the server's load)--> running (a stream each) --> ended --> step
                  ^                                                   |
                  `--- the server died or hung: sampled again --------'

The server is a child of this process under a guard (`sglang_server`, `guard`), or one that runs at `options.url`. When it ends, or its
scheduler is silent, it is started again; `version` is None until weights are loaded again, and unfinished samples begin anew: the
random numbers of a sample hang on its seed and position alone. Token ids go in and come out; text is never seen.

Limits: log-probs at a temperature other than 1 are right for sampled tokens, while `score` finds them there by asking for the whole
vocabulary, which is slow for large ones. With top_k 1 alone at a temperature other than 1, SGLang reports the log-probs of temperature 1.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from actors.engines import EngineLoad, EngineOptions, Sampled, SampleRequest, ServerTrouble
from actors.engines.concurrency import Concurrency
from actors.engines.lanes import Lane, PartlyLoaded, Target, make_lane
from actors.engines.sglang_client import Broken, Client, Dead, Ended, Event, Loaded, NoAnswer, Stream
from actors.engines.sglang_options import Options
from actors.engines.sglang_server import ATTACH_S, Server, device_kind, device_places
from actors.engines.swaps import FLUSH_SINCE, Swap, choose_swap, parse_version
from actors.engines.tensors import Shapes, check_shapes, read_shapes
from protocol.errors import ConfigError, DataError, InfrastructureFault, WeightsError
from protocol.messages import FinishReason, Span, Version

log = logging.getLogger("rlsys.sglang")

RETRIES = 2
"""How often one request is sent again to a server that lives but broke it off."""
DEATH_S = 1.0
"""From the end of a process's connections to its own, at most: the kernel closes its files first, and a busy machine may pause between."""
_FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}


@dataclass(slots=True, eq=False)
class _Sample:
    """One sample from `submit` to its end."""

    request: SampleRequest
    position: int
    limit: int
    """Most tokens of it."""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    """Tokens of earlier requests of the same sample, when swaps abort and resume."""
    stream: Stream | None = None
    sent_under: Version | None = None
    aborted: bool = False
    retries: int = 0

    def begin_anew(self) -> None:
        """Forget every token."""
        self.ids, self.logprobs, self.spans, self.stream = [], [], [], None


class SGLangEngine:
    """Implements `actors.engines.Engine`.

    Raises ConfigError for options that cannot work and for a missing environment, DataError for a model directory that cannot be read.
    """

    def __init__(self, options: EngineOptions) -> None:
        try:
            self._options = Options.model_validate(options.extra)
        except ValidationError as error:
            first = error.errors()[0]
            raise ConfigError(f"sglang engine: option {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        self._engine = options
        device_kind(options.device)
        self._vocabulary = _vocabulary(options.model_path)
        try:
            self._shapes: Shapes = read_shapes(options.model_path)
        except WeightsError as error:
            raise DataError(f"sglang engine: {error}") from None
        self._server = Server(options, self._options)
        self._waiting: deque[_Sample] = deque()
        self._running: dict[int, _Sample] = {}
        self._ended: deque[Sampled] = deque()
        self._requests: dict[str, int] = {}
        self._concurrency = Concurrency(self._options.min_concurrency, options.slots)
        self._version: Version | None = None
        self._swap: Swap = "abort_resume"
        self._lane: Lane | None = None
        self._sent = 0
        self._resuming = self._closed = self._ready = self._met = self._flushes = False
        self._starts = 0
        self._restarts, self._fault, self._why_lost = 0, "", ""
        self._began_s = time.monotonic()
        self._tokens_sampled = self._tokens_prefilled = self._swaps = 0
        self._client = Client()
        self._starting: threading.Thread | None = None
        self._start_error: InfrastructureFault | None = None
        try:
            self._start(first=True)
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------------------------------------ what callers see

    @property
    def version(self) -> Version | None:
        """The loaded version; None before the first, and after the server was lost."""
        return self._version

    @property
    def wake_fd(self) -> int:
        """Readable while `step` has something to give."""
        return self._client.fd

    @property
    def load(self) -> EngineLoad:
        """How busy the engine is now. `capacity` is the present limit."""
        streamed = self._client.progress()
        progress: dict[str, int] = {}
        for number, sample in list(self._running.items()):
            name = sample.request.request_id
            progress[name] = max(progress.get(name, 0), len(sample.ids) + streamed.get(number, 0))
        return EngineLoad(
            running=len(self._running) + len(self._ended),
            waiting=len(self._waiting),
            capacity=self._concurrency.limit,
            tokens_sampled=self._tokens_sampled,
            tokens_prefilled=self._tokens_prefilled,
            swaps=self._swaps,
            progress=progress,
            restarts=self._restarts,
            fault=self._fault,
            trouble=self._trouble(),
            ready_in_s=0.0 if self._ended else 60.0,  # `wake_fd` ends the wait
        )

    def _trouble(self) -> ServerTrouble | None:
        attached = self._server.attached

        def trouble(
            doing: Literal["starts", "is awaited", "is silent", "is stopped"], for_s: float, detail: str, limit_s: float
        ) -> ServerTrouble:
            name = f"SGLang server at {self._server.url}" if attached else "SGLang server"
            return ServerTrouble(server=name, doing=doing, for_s=for_s, detail=detail, limit_s=limit_s)

        if not self._ready:
            limit_s = ATTACH_S if attached and not self._met else self._options.start_s
            return trouble("is awaited" if attached else "starts", time.monotonic() - self._began_s, self._why_lost, limit_s)
        silent_s = self._client.silent_s
        if not silent_s:
            return None
        stopped = self._server.stopped()
        return trouble("is stopped" if stopped else "is silent", silent_s, stopped, self._options.silence_s)

    @property
    def server(self) -> Server:
        """The server, for those who look after it from outside: tests, benchmarks, an operator's tools."""
        return self._server

    def submit(self, request: SampleRequest) -> None:
        """Queue a request. Raises ValueError when it cannot be sampled as asked; a bad token id would end the whole server."""
        where, sampling = f"request {request.request_id}", request.sampling
        self._check_ids(request.prompt_ids, f"{where}: prompt")
        self._check_ids(np.array(sampling.stop_token_ids, np.int64), f"{where}: stop tokens")
        room = self._engine.max_context - len(request.prompt_ids)
        if not len(request.prompt_ids) or room < 1:
            raise ValueError(
                f"{where}: {len(request.prompt_ids)} prompt tokens; from 1 to {self._engine.max_context - 1} leave room to sample"
            )
        if not request.seeds:
            raise ValueError(f"{where}: no seeds, so no samples")
        if sampling.max_tokens < 1 or not 0 <= sampling.temperature < np.inf or not 0 < sampling.top_p <= 1 or sampling.top_k < 0:
            raise ValueError(f"{where}: {sampling}; expected max_tokens >= 1, a finite temperature >= 0, 0 < top_p <= 1, top_k >= 0")
        if request.request_id in self._requests:
            raise ValueError(f"{where}: is already being sampled")
        self._requests[request.request_id] = len(request.seeds)
        self._waiting += [_Sample(request, position, min(room, sampling.max_tokens)) for position in range(len(request.seeds))]
        self._fill()

    def abort(self, request_id: str) -> None:
        """End what is left of a request; its samples come out of a following `step`. An unknown or ended request is no error."""
        for sample in self._running.values():
            if sample.request.request_id == request_id and not sample.aborted:
                sample.aborted = True
                if sample.stream is not None:
                    self._client.abort(sample.stream)
        for sample in [s for s in self._waiting if s.request.request_id == request_id]:
            self._waiting.remove(sample)
            self._finish(sample, "abort")

    def step(self, timeout_s: float) -> list[Sampled]:
        """Wait for at most `timeout_s` until a sample ends; returns those that did.

        Raises InfrastructureFault when the server died more often in a row than `restarts` allows.
        """
        self._fill()
        for event in self._client.take(0.0 if self._ended else timeout_s):
            self._handle(event)
        self._fill()
        ended = list(self._ended)
        self._ended.clear()
        return ended

    def load_weights(self, directory: Path, version: Version) -> float:
        """Swap in the weights of `directory` while requests run. Waits for the server to start, if it must.

        Returns the seconds that running samples stood still. Raises WeightsError for tensors that are not the model's (the old version
        stays), InfrastructureFault when the server cannot be brought to answer.
        """
        check_shapes(directory, read_shapes(directory), self._shapes)
        while True:
            self._await_server()
            try:
                return self._load(directory, version)
            except InfrastructureFault as fault:
                if not self._ready:
                    continue  # it was lost meanwhile, and that was told
                if not isinstance(fault, NoAnswer | PartlyLoaded) and self._lives():
                    raise WeightsError(f"{directory}: the server refused the weights ({fault})") from None
                self._lost(self._why_dead() or str(fault))

    def score(self, prompt_ids: npt.NDArray[np.int32], token_ids: npt.NDArray[np.int32], temperature: float) -> npt.NDArray[np.float32]:
        """Log-probs [T] of `token_ids` after `prompt_ids`; running samples go on. The prompt's cached prefix is used, if there is one.

        Raises InfrastructureFault when no answer comes; `version` is None then if the server was lost.
        """
        ids = np.concatenate([prompt_ids, token_ids]).astype(np.int64)
        self._check_ids(ids, "score: sequence")
        if not len(prompt_ids) or len(ids) > self._engine.max_context:
            raise ValueError(
                f"score: {len(prompt_ids)} prompt tokens and {len(ids)} in all; expected at least 1, and at most {self._engine.max_context}"
            )
        if self._version is None:
            raise InfrastructureFault("sglang engine: no weights loaded yet")
        if not len(token_ids):
            return np.zeros(0, np.float32)
        body: dict[str, Any] = {
            "input_ids": ids.tolist(),
            "sampling_params": {"temperature": 0, "max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": len(prompt_ids) - 1,
        }
        if temperature not in (0.0, 1.0):
            body["token_ids_logprob"] = list(range(self._vocabulary))
        try:
            meta = self._client.call("POST", f"{self._server.url}/generate", body, timeout_s=self._options.update_s)["meta_info"]
        except InfrastructureFault as fault:
            if not self._lives():
                self._lost(self._why_dead() or str(fault))
            raise
        if temperature in (0.0, 1.0):
            return np.array([entry[0] for entry in meta["input_token_logprobs"][1:]], np.float32)
        rows = meta["input_token_ids_logprobs"][1:]
        every = np.array([[entry[0] for entry in row] for row in rows], np.float64) / temperature
        every -= every.max(-1, keepdims=True)
        every -= np.log(np.exp(every).sum(-1, keepdims=True))
        return every[np.arange(len(token_ids)), token_ids].astype(np.float32)

    def close(self) -> None:
        """Forget all requests, end the server if it is ours, and wait until nothing of it is left."""
        self._closed = True
        self._waiting.clear()
        self._running.clear()
        try:
            self._client.close()
        finally:
            if self._starting is not None:
                self._starting.join()
            self._server.close()
            if self._lane is not None:
                self._lane.close()

    # ------------------------------------------------------------------------------------------------ requests

    def _fill(self) -> None:
        """Send what the present limit allows."""
        while self._waiting and self._version is not None and self._ready and not self._resuming:
            if len(self._running) >= self._concurrency.limit:
                return
            self._send(self._waiting.popleft())

    def _send(self, sample: _Sample) -> None:
        request, sampling = sample.request, sample.request.sampling
        self._sent += 1
        params: dict[str, Any] = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_new_tokens": sample.limit - len(sample.ids),
            "sampling_seed": int(request.seeds[sample.position]),
        }
        if sampling.top_k:
            params["top_k"] = sampling.top_k
        if sampling.stop_token_ids:
            params["stop_token_ids"] = list(sampling.stop_token_ids)
        body = {"input_ids": [*request.prompt_ids.tolist(), *sample.ids], "sampling_params": params}
        sample.sent_under = self._version
        self._running[self._sent] = sample
        sample.stream = self._client.start(self._sent, f"{request.request_id}#{sample.position}.{self._sent}", body)
        if sample.aborted:
            self._client.abort(sample.stream)

    def _handle(self, event: Event) -> None:
        if isinstance(event, Loaded):
            self._concurrency.observe(event.load)
        elif isinstance(event, Dead):
            if self._ready:  # else its loss was noticed by a broken request before
                self._lost(event.reason)
        elif isinstance(event, Ended):
            self._ended_stream(event.stream)
        else:
            self._broken(event)

    def _ended_stream(self, stream: Stream) -> None:
        if isinstance(
            fault := (stream.finish or {}).get("matched"), str
        ):  # no text can match: so SGLang says that its last token is forged
            self._broken(Broken(stream, 500, f"the server ended it with {fault!r}"))
            return
        sample = self._running.pop(int(str(stream.key)), None)
        if sample is None:
            return
        self._take_tokens(sample, stream)
        kind = (stream.finish or {}).get("type", "")
        if kind not in _FINISH:
            raise InfrastructureFault(
                f"sglang engine: request {stream.rid} ended with {stream.finish}, which is none of {', '.join(_FINISH)}"
            )
        if kind == "abort" and not sample.aborted:
            if not self._resuming and sample.retries >= RETRIES:
                raise InfrastructureFault(f"sglang engine: the server aborts request {stream.rid} again and again: {stream.finish}")
            sample.retries += not self._resuming
            if len(sample.ids) < sample.limit:
                sample.stream = None
                self._waiting.appendleft(sample)
                return
            kind = "length"
        if kind == "stop" and not asked_for(stream.finish or {}, sample.request.sampling.stop_token_ids):
            if len(sample.ids) < sample.limit and not sample.aborted:  # a server at a `url` may have stop tokens of its own: it goes on
                sample.stream = None
                self._waiting.appendleft(sample)
                return
            kind = "abort" if sample.aborted else "length"
        self._starts = 0
        self._finish(sample, "abort" if sample.aborted and kind == "abort" else _FINISH[kind])

    def _take_tokens(self, sample: _Sample, stream: Stream) -> None:
        """Append what a request sampled, with the version of each token."""
        if not stream.ids:
            return
        before = len(sample.ids)
        sample.ids += stream.ids
        sample.logprobs += stream.logprobs
        self._tokens_sampled += len(stream.ids)
        self._tokens_prefilled += stream.prefilled
        if stream.spans is not None:
            spans = [(_read_version(text), before + end) for text, end in stream.spans]
        elif sample.sent_under is not None and self._swap == "abort_resume":
            spans = [(sample.sent_under, len(sample.ids))]  # such a request never crosses a swap
        else:
            raise InfrastructureFault(f"sglang engine: the server does not say which version sampled request {stream.rid}")
        for version, end in spans:
            if sample.spans and sample.spans[-1][:2] == tuple(version):
                sample.spans.pop()
            sample.spans.append(Span(*version, end))
        if sample.spans[-1].end != len(sample.ids) or len(sample.logprobs) != len(sample.ids):
            raise InfrastructureFault(
                f"sglang engine: request {stream.rid}: {len(sample.ids)} tokens, {len(sample.logprobs)} log-probs, spans {sample.spans}"
            )

    def _broken(self, event: Broken) -> None:
        sample = self._running.pop(int(str(event.stream.key)), None)
        if sample is None:
            return
        if 400 <= event.status < 500:
            raise InfrastructureFault(
                f"sglang engine: the server refused request {event.stream.rid}: status {event.status}: {event.reason}"
            )
        sample.begin_anew()
        if sample.aborted:
            self._finish(sample, "abort")
            return
        self._waiting.appendleft(sample)
        if not self._lives():
            self._lost(self._why_dead() or event.reason)
            return
        sample.retries += 1
        if sample.retries > RETRIES:
            raise InfrastructureFault(
                f"sglang engine: request {event.stream.rid} broke {sample.retries} times, the last: status {event.status}: {event.reason}"
            )

    def _finish(self, sample: _Sample, reason: FinishReason) -> None:
        request_id = sample.request.request_id
        self._requests[request_id] -= 1
        if not self._requests[request_id]:
            del self._requests[request_id]
        self._ended.append(
            Sampled(
                request_id=request_id,
                position=sample.position,
                token_ids=np.array(sample.ids, np.int32),
                logprobs=np.array(sample.logprobs, np.float32),
                spans=tuple(sample.spans),
                finish_reason=reason,
            )
        )

    def _check_ids(self, ids: npt.NDArray[np.int32] | npt.NDArray[np.int64], what: str) -> None:
        outside = ids[(ids < 0) | (ids >= self._vocabulary)]
        if len(outside):
            raise ValueError(f"{what} holds token id {outside[0]}, outside the vocabulary of {self._vocabulary}")

    # ------------------------------------------------------------------------------------------------ weights

    def _load(self, directory: Path, version: Version) -> float:
        assert self._lane is not None
        if self._swap == "abort_resume":
            return self._abort_and_resume(directory, version)
        mode, flush = ("in_place", False) if self._swap == "in_place" else ("retract", self._swap == "retract_flush")
        if self._version is None and self._flushes:  # a server that served others may hold a cache of theirs
            mode, flush = "retract", True
        running = bool(self._running)
        started = time.monotonic()
        self._command("/pause_generation", {"mode": mode})
        self._update(directory, version, flush)
        self._loaded(version)
        return time.monotonic() - started if running else 0.0

    def _update(self, directory: Path, version: Version, flush: bool) -> None:
        """Load into the paused server and let it go on, also when it refused. Raises NoAnswer when it is silent."""
        assert self._lane is not None
        try:
            with self._client.busy():
                self._lane.update(directory, _write_version(version), flush)
        except NoAnswer:
            raise  # there is nobody to go on
        except BaseException:
            if self._lives():
                self._command("/continue_generation", {})
            raise
        self._command("/continue_generation", {})

    def _abort_and_resume(self, directory: Path, version: Version) -> float:
        """Running requests return what they have; after the update they go on as prompt + tokens. No server has trouble with this."""
        assert self._lane is not None
        running = bool(self._running)
        started = time.monotonic()
        self._resuming = True
        try:
            self._command("/pause_generation", {"mode": "abort"})
            deadline = started + self._options.silence_s
            while self._running:
                for event in self._client.take(0.1):
                    self._handle(event)
                if not self._ready:
                    raise NoAnswer("the server was lost while its requests were ended")
                if time.monotonic() > deadline:
                    raise NoAnswer(f"{len(self._running)} requests did not end within {self._options.silence_s:g} s of a pause")
            self._update(directory, version, True)
        finally:
            self._resuming = False
        self._loaded(version)
        self._fill()
        return time.monotonic() - started if running else 0.0

    def _loaded(self, version: Version) -> None:
        self._swaps += self._version is not None
        self._version = version

    def _command(self, path: str, body: dict[str, Any]) -> None:
        """What a scheduler answers between two steps, paused or not. Raises NoAnswer when it does not, which is how it is found to hang."""
        self._client.call("POST", self._server.url + path, body, timeout_s=self._options.silence_s)

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._client.call("POST", self._server.url + path, body, timeout_s=self._options.update_s)

    # ------------------------------------------------------------------------------------------------ the server's life

    def _start(self, *, first: bool = False) -> None:
        """Begin a start in a thread of its own: ending a hung server takes seconds, and a new one many."""
        self._ready, self._start_error, self._began_s = False, None, time.monotonic()
        if first:
            self._server.begin()  # here, so that what is wrong with the configuration is told at once
            return

        def again() -> None:
            try:
                self._server.end()
                if not self._closed:
                    self._server.begin()
            except (OSError, InfrastructureFault) as error:
                self._start_error = InfrastructureFault(f"the server could not be started again: {error}")

        self._starting = threading.Thread(target=again, name="sglang start", daemon=True)
        self._starting.start()

    def _await_server(self) -> None:
        """Return once the server answers and is known; start it again as often as `restarts` allows."""
        while not self._ready:
            try:
                if self._starting is not None:
                    self._starting.join()
                if self._start_error is not None:
                    raise self._start_error
                self._server.wait_ready(
                    lambda path: self._client.call("GET", self._server.url + path, timeout_s=5.0), lambda: self._closed, first=not self._met
                )
                self._meet()
            except InfrastructureFault as fault:
                if self._closed:
                    raise
                if not self._met and self._starts:
                    raise InfrastructureFault(f"sglang engine: its server did not start, twice: {fault}") from None
                self._lost(str(fault))

    def _meet(self) -> None:
        """Learn what the server is, and begin to watch it."""
        about = self._client.call("GET", f"{self._server.url}/server_info", timeout_s=60.0)
        version = str(about.get("version", ""))
        if self._server.attached:
            model = self._client.call("GET", f"{self._server.url}/model_info", timeout_s=60.0)
            check_attached(self._server.url, self._engine, about, model)
        self._swap = choose_swap(self._options.swap, version, not about.get("disable_radix_cache", False))
        self._flushes = parse_version(version) >= FLUSH_SINCE
        if self._lane is not None:
            self._lane.close()
        self._lane = self._make_lane(about)
        self._client.take(0.0)  # news of the server before
        self._client.watch(self._server.url, self._server, self._options.silence_s)
        self._ready = self._met = True
        log.info("SGLang %s answers at %s, weights are swapped by %s", version, self._server.url, self._swap)

    def _make_lane(self, about: dict[str, Any]) -> Lane:
        """The configured way to this server. Raises ConfigError for a server that it cannot serve."""
        options, engine = self._options, self._engine
        many = [name for name in ("pp_size", "dp_size") if int(about.get(name) or 1) > 1]
        if options.lane != "disk" and many:
            raise ConfigError(
                f"sglang engine: lane {options.lane} serves tensor-parallel ranks alone, but the server has {many[0]} {about[many[0]]}"
            )
        own = options.url is None
        target = Target(
            post=self._post,
            url=self._server.url,
            version=parse_version(str(about.get("version", ""))),
            tp=int(about.get("tp_size", 1)),
            device=engine.device,
            places=device_places(options, engine.device, engine.index, joined=engine.joined) if own else (),
            taken=(() if engine.joined else options.devices or ()),
            index=engine.index,
        )
        return make_lane(options.lane, target)

    def _lives(self) -> bool:
        """Whether the server's processes are there and it answers."""
        if self._client.dead or self._server.fault():
            return False
        try:
            self._client.call("GET", f"{self._server.url}/model_info", timeout_s=self._options.silence_s)
        except InfrastructureFault:
            return False
        return not self._server.fault()

    def _why_dead(self) -> str:
        """What ended of a server that does not live, once the kernel says so; empty if its processes stay."""
        until = time.monotonic() + (0.0 if self._server.attached else DEATH_S)
        while not (fault := self._client.dead or self._server.fault()) and time.monotonic() < until:
            time.sleep(0.01)
        return fault

    def _lost(self, reason: str) -> None:
        """The server is gone: all unfinished samples wait for the next one, and for weights. Raises InfrastructureFault when it is too often."""
        if self._closed:  # a swap in a thread of its own may find out so
            raise InfrastructureFault(f"sglang engine: it was closed; {reason}")
        stopped = self._server.stopped()
        if self._ready:  # the watch says why it gives a server up, and kills it then: what was stopped before that, is so no more
            reason = self._client.dead or reason
        self._why_lost = f"{reason} ({stopped})" if stopped and stopped not in reason else reason
        self._fault = f"{self._why_lost}; {self._server.tail()}" if not self._server.attached else reason
        self._ready, self._began_s, self._version = False, time.monotonic(), None
        back = [sample for sample in self._running.values() if not sample.aborted]
        gone = [sample for sample in self._running.values() if sample.aborted]
        self._running.clear()
        self._client.drop()
        for sample in back:
            sample.begin_anew()
        for sample in self._waiting:
            sample.begin_anew()  # tokens of a version that is not loaded any more could not be gone on with
        self._waiting.extendleft(reversed(back))
        for sample in gone:
            sample.begin_anew()
            self._finish(sample, "abort")
        self._restarts += 1  # it is told from here on, once all of the loss is seen: `load` is read beside a swap
        self._starts += 1
        log.error("the server is lost (%d in a row): %s", self._starts, self._fault)
        if self._starts > self._options.restarts:
            raise InfrastructureFault(f"sglang engine: the server was lost {self._starts} times in a row, the last: {self._fault}")
        self._start()


def _write_version(version: Version) -> str:
    return f"{version.number}.{version.incarnation}"


def _read_version(text: str) -> Version:
    number, _, incarnation = text.partition(".")
    if not (number.isdigit() and incarnation.isdigit()):
        raise InfrastructureFault(f"sglang engine: tokens of version {text!r}, which was never loaded from here")
    return Version(int(number), int(incarnation))


def asked_for(finish: dict[str, Any], stop_token_ids: Sequence[int]) -> bool:
    """Whether a request that ended with "stop" ended at one of the stop tokens that it named."""
    return finish.get("matched") in stop_token_ids


def check_attached(url: str, engine: EngineOptions, about: dict[str, Any], model: dict[str, Any]) -> None:
    """Raise ConfigError for a server at `url` that cannot do what one that we start does; `about` and `model` are what it says of itself."""
    where = f"sglang engine: the server at {url}"
    if not parse_version(str(about.get("version", ""))):
        raise ConfigError(f"{where} is no SGLang server that we know: it says version {about.get('version')!r}")
    try:
        ours = json.loads((engine.model_path / "config.json").read_text()).get("model_type")
    except (OSError, ValueError) as error:
        raise DataError(f"{engine.model_path / 'config.json'}: not a readable model configuration ({error})") from None
    if "model_type" in model and model["model_type"] != ours:
        raise ConfigError(f"{where} has a model of type {model['model_type']!r} ({model.get('model_path')}), this run's is {ours!r}")
    if about.get("skip_tokenizer_init") is False:
        raise ConfigError(f"{where} has a tokenizer, and with it stop tokens of its own; start it with --skip-tokenizer-init")
    length = about.get("context_length")
    if isinstance(length, int) and length <= engine.max_context:
        raise ConfigError(
            f"{where} has a context of {length} tokens; {engine.max_context + 1} are needed for {engine.max_context} of a run"
        )


def _vocabulary(model: Path) -> int:
    """Rows of the embedding. Raises DataError for a configuration without it."""
    try:
        config = json.loads((model / "config.json").read_text())
        return int(config.get("vocab_size") or config["text_config"]["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{model / 'config.json'}: no vocab_size ({error})") from None
