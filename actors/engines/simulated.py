"""An engine that samples nothing and takes the time that a device would: for measuring schedules without devices.

    submit --> [ FluidDevice, on the machine's clock times `speed` ] --(a sample's time is over)--> step returns it

Token ids are arbitrary ids of the vocabulary, fixed by the sample's seed; log-probs are those of a uniform policy, -ln(vocabulary). Lengths
come from `lengths`. All else is as with any engine: versions in spans, swaps while samples run, abort. Nothing runs in the background and
nothing waits busily: `load.ready_in_s` says how long the caller may wait on its own sockets. Imports no model library.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from actors.engines import EngineLoad, EngineOptions, Sampled, SampleRequest
from actors.engines.fluid import FluidDevice
from actors.engines.lengths import Lengths
from actors.engines.simulated_options import Options
from protocol.errors import ConfigError, InfrastructureFault, WeightsError
from protocol.messages import FinishReason, Span, Version

_TABLE = 1 << 15
"""Ids in the table from which completions are cut."""


@dataclass(slots=True)
class _Sample:
    request: SampleRequest
    position: int
    tokens: int
    reason: FinishReason
    spans: list[Span] = field(default_factory=list)


class SimulatedEngine:
    """Implements `actors.engines.Engine`. `clock` gives seconds; tests move it by hand.

    Raises ConfigError for options that it does not know or that make no sense.
    """

    samples_the_model = False
    """So no canary is asked of it."""

    def __init__(self, options: EngineOptions, clock: Callable[[], float] = time.monotonic) -> None:
        try:
            self._options = Options.model_validate(options.extra)
        except ValidationError as error:
            first = error.errors()[0]
            raise ConfigError(f"simulated engine: option {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        if options.slots < 1 or options.max_context < 2:
            raise ConfigError(f"simulated engine: {options.slots} slots of {options.max_context} tokens; at least 1 of 2 tokens is needed")
        self._clock, self._started_s = clock, clock()
        self._vocabulary = _vocabulary(options.model_path)
        self._max_context = options.max_context
        self._lengths = Lengths(self._options.lengths)
        total_rate = self._options.share(options.index) * self._options.tokens_per_s
        self._device: FluidDevice[tuple[str, int]] = FluidDevice(
            sample_rate=min(self._options.tokens_per_s_sample, total_rate),
            total_rate=total_rate,
            slots=max(1, round(self._options.share(options.index) * options.slots)),
        )
        self._samples: dict[tuple[str, int], _Sample] = {}
        self._held: list[SampleRequest] = []
        self._ended: list[Sampled] = []
        self._tables: dict[tuple[int, ...], npt.NDArray[np.int32]] = {}
        self._version: Version | None = None
        self._tokens_prefilled = self._swaps = 0

    @property
    def version(self) -> Version | None:
        """The loaded version; None before the first."""
        return self._version

    @property
    def load(self) -> EngineLoad:
        """How busy the engine is, as of the last call that moved it."""
        device = self._device
        progress: dict[str, int] = {}
        for key in device.active():
            progress[key[0]] = max(progress.get(key[0], 0), int(device.sampled(key)))
        return EngineLoad(
            running=device.running + len(self._ended),
            waiting=device.waiting + sum(len(request.seeds) for request in self._held),
            capacity=device.slots,
            tokens_sampled=int(device.tokens),
            tokens_prefilled=self._tokens_prefilled,
            swaps=self._swaps,
            progress=progress,
            ready_in_s=self._ready_in_s(),
        )

    def submit(self, request: SampleRequest) -> None:
        """Queue a request, first in, first out. Raises ValueError when it cannot be sampled as asked."""
        where, sampling = f"request {request.request_id}", request.sampling
        self._check_ids(request.prompt_ids, f"{where}: prompt")
        if not 1 <= len(request.prompt_ids) < self._max_context:
            raise ValueError(f"{where}: {len(request.prompt_ids)} prompt tokens; from 1 to {self._max_context - 1} leave room to sample")
        if not request.seeds:
            raise ValueError(f"{where}: no seeds, so no samples")
        if sampling.max_tokens < 1 or not 0 <= sampling.temperature < math.inf or not 0 < sampling.top_p <= 1 or sampling.top_k < 0:
            raise ValueError(f"{where}: {sampling}; expected max_tokens >= 1, a finite temperature >= 0, 0 < top_p <= 1, top_k >= 0")
        if (request.request_id, len(request.seeds) - 1) in self._samples or any(h.request_id == request.request_id for h in self._held):
            raise ValueError(f"{where}: is already being sampled")
        if self._version is None:
            self._held.append(request)
            return
        self._move()
        self._begin(request)

    def abort(self, request_id: str) -> None:
        """End what is left of a request; its samples come out of the next `step`. An unknown or ended request is no error."""
        self._move()
        for held in [h for h in self._held if h.request_id == request_id]:
            self._held.remove(held)
            self._ended += [self._sampled(_Sample(held, i, 0, "abort")) for i in range(len(held.seeds))]
        for key in [key for key in self._samples if key[0] == request_id]:
            done = self._device.cancel(key)
            sample = self._samples.pop(key)
            sample.tokens, sample.reason = int(done or 0), "abort"
            self._ended.append(self._sampled(sample))

    def step(self, timeout_s: float) -> list[Sampled]:
        """Return the completions whose time is over. Returns at once: wait for `load.ready_in_s` before calling it again."""
        self._move()
        ended, self._ended = self._ended, []
        return ended

    def load_weights(self, directory: Path, version: Version) -> float:
        """Take `version` on after `update_s`, in which nothing is sampled. Returns the seconds of the run that running samples stood still.

        Raises WeightsError for a directory without safetensors; their hashes are the caller's to check, their content is not looked at.
        """
        if not any(directory.glob("*.safetensors")):
            raise WeightsError(f"{directory}: holds no *.safetensors weights")
        self._move()
        running = self._device.running
        if self._version is not None:
            self._mark(self._version)
            self._swaps += 1
        self._version = version
        seconds = self._options.update_s
        if self._options.recompute_cache and self._options.prefill_tokens_per_s is not None:
            cached = sum(len(self._samples[key].request.prompt_ids) + int(self._device.sampled(key)) for key in self._device.active())
            self._tokens_prefilled += cached
            seconds += cached / self._options.prefill_tokens_per_s
        self._device.stall(seconds)
        for request in self._held:
            self._begin(request)
        self._held.clear()
        paused = seconds / self._options.speed
        if paused:
            time.sleep(paused)
        return paused if running else 0.0

    def score(self, prompt_ids: npt.NDArray[np.int32], token_ids: npt.NDArray[np.int32], temperature: float) -> npt.NDArray[np.float32]:
        """Log-probs [T] of `token_ids` under the uniform policy. Raises ValueError for ids that do not fit."""
        self._check_ids(np.concatenate([prompt_ids, token_ids]), "score: sequence")
        if self._version is None:
            raise InfrastructureFault("simulated engine: no weights loaded yet")
        return self._logprobs(len(token_ids))

    def close(self) -> None:
        """Forget all requests. The engine started nothing outside itself."""
        for key in self._device.active():
            self._device.cancel(key)
        self._samples.clear()
        self._held.clear()
        self._ended.clear()

    # ------------------------------------------------------------------------------------------------ inside

    def _now(self) -> float:
        return (self._clock() - self._started_s) * self._options.speed

    def _ready_in_s(self) -> float:
        if self._ended:
            return 0.0
        event = self._device.next_event()
        return math.inf if event is None else max(0.0, (event - self._now()) / self._options.speed)

    def _move(self) -> None:
        """Bring the device to the present."""
        for _, key in self._device.advance(self._now()):
            self._ended.append(self._sampled(self._samples.pop(key)))

    def _begin(self, request: SampleRequest) -> None:
        rate, prompt = self._options.prefill_tokens_per_s, len(request.prompt_ids)
        self._tokens_prefilled += prompt
        limit = min(request.sampling.max_tokens, self._max_context - prompt)
        for position, seed in enumerate(request.seeds):
            drawn = self._lengths(seed)
            reason: FinishReason = "length" if drawn >= limit or not request.sampling.stop_token_ids else "stop"
            key = (request.request_id, position)
            self._samples[key] = _Sample(request, position, min(drawn, limit), reason)
            self._device.submit(key, min(drawn, limit), prompt / rate if rate is not None and position == 0 else 0.0)

    def _mark(self, version: Version) -> None:
        """Close a span in every running sample."""
        for key in self._device.active():
            spans, done = self._samples[key].spans, int(self._device.sampled(key))
            if done > (spans[-1].end if spans else 0):
                spans.append(Span(version.number, version.incarnation, done))

    def _sampled(self, sample: _Sample) -> Sampled:
        spans, count, version = sample.spans, sample.tokens, self._version
        if count > (spans[-1].end if spans else 0) and version is not None:
            spans.append(Span(version.number, version.incarnation, count))
        return Sampled(
            request_id=sample.request.request_id,
            position=sample.position,
            token_ids=self._ids(sample.request, sample.position, count, sample.reason),
            logprobs=self._logprobs(count),
            spans=tuple(spans),
            finish_reason=sample.reason,
        )

    def _ids(self, request: SampleRequest, position: int, count: int, reason: FinishReason) -> npt.NDArray[np.int32]:
        """[count] ids, none of them a stop token but the last of a sample that stopped."""
        stops = request.sampling.stop_token_ids
        table = self._tables.get(stops)
        if table is None:
            allowed = np.setdiff1d(np.arange(self._vocabulary, dtype=np.int32), np.array(stops, np.int32))
            table = self._tables[stops] = np.random.default_rng(0).choice(allowed if len(allowed) else np.zeros(1, np.int32), _TABLE)
        start = request.seeds[position] % _TABLE
        ids = np.resize(np.roll(table, -start), count) if count > _TABLE - start else table[start : start + count].copy()
        if reason == "stop" and count:
            ids[-1] = stops[0]
        return ids

    def _logprobs(self, count: int) -> npt.NDArray[np.float32]:
        return np.full(count, -math.log(self._vocabulary), np.float32)

    def _check_ids(self, ids: npt.NDArray[np.int32], what: str) -> None:
        outside = ids[(ids < 0) | (ids >= self._vocabulary)]
        if len(outside):
            raise ValueError(f"{what} holds token id {outside[0]}, outside the vocabulary of {self._vocabulary}")


def _vocabulary(model_path: Path) -> int:
    path = model_path / "config.json"
    try:
        size = json.loads(path.read_text(encoding="utf-8")).get("vocab_size")
    except (OSError, ValueError, AttributeError):
        size = None
    if not isinstance(size, int) or size < 2:
        raise ConfigError(f"simulated engine: {path} names no vocab_size above 1")
    return size
