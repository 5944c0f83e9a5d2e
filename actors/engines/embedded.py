"""The embedded engine: continuous batching of a transformers causal LM's weights in this process, on a CPU or a CUDA device.

A request waits, its prompt is prefilled once, and each of its samples starts in the next slot that frees up. A slot's cache holds all
tokens of its sample but the last; a step feeds the last and draws the next. So a sample that starts, one that runs and one whose cache was
recomputed for new weights are the same to a step: "prefill all but the last token" is the only way in.

Limits: one device (no tensor parallelism), a cache of slots x max_context tokens allocated at the start, and kernels launched one by one
(no CUDA graphs), so a small model on a GPU is bound by launches.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ValidationError
from torch import Tensor

from actors.engines import EngineLoad, EngineOptions, Sampled, SampleRequest
from actors.engines.decoder import Decoder
from actors.engines.embedded_options import Options
from actors.engines.invariance import Invariance, padded, widen
from actors.engines.sampling import draw, uniforms
from actors.engines.slots import Rows, Slots
from protocol.errors import ConfigError, InfrastructureFault, WeightsError
from protocol.intervals import phase
from protocol.manifest import digest, read_adds_to
from protocol.messages import Version

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(slots=True, eq=False)
class _Waiting:
    """A request with samples that have not started."""

    request: SampleRequest
    next_position: int = 0
    prefix: tuple[Tensor, Tensor] | None = None
    """Keys [L, K, D, p] and values [L, K, p, D] of all prompt tokens but the last; None until prefilled under the loaded weights."""


class EmbeddedEngine:
    """Implements `actors.engines.Engine`. Nothing happens elsewhere, so `step` never waits: without work it returns at once.

    Samples nothing before the first `load_weights`. `threads` sets torch's threads for the whole process.

    Raises ConfigError for a model, dtype, device or option that it does not support, DataError for a directory without config.json.
    """

    def __init__(self, options: EngineOptions) -> None:
        try:
            self._options = Options.model_validate(options.extra)
        except ValidationError as error:
            first = error.errors()[0]
            raise ConfigError(f"embedded engine: option {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        if options.slots < 1 or options.max_context < 2:
            raise ConfigError(
                f"embedded engine: {options.slots} slots of {options.max_context} tokens; at least 1 slot of 2 tokens is needed"
            )
        torch.set_num_threads(options.threads)
        self._device = _device(options.device)
        if options.dtype not in _DTYPES:
            raise ConfigError(f"embedded engine: dtype {options.dtype!r} is not one of {', '.join(_DTYPES)}")
        self._max_context = options.max_context
        self._base, self._base_digest = options.model_path, ""
        self._decoder = Decoder(
            options.model_path,
            slots=padded(options.slots) if self._options.batch_invariant else options.slots,
            max_context=options.max_context,
            dtype=_DTYPES[options.dtype],
            device=self._device,
        )
        self._invariance: Invariance | None = None
        """Made with the first weights, with `batch_invariant`."""
        self._slots = Slots(options.slots, options.max_context)
        self._waiting: deque[_Waiting] = deque()
        self._aborted: list[Sampled] = []
        self._version: Version | None = None
        self._faulted = False
        self._tokens_sampled = self._tokens_prefilled = self._swaps = 0

    @property
    def version(self) -> Version | None:
        """The loaded version; None before the first."""
        return self._version

    @property
    def load(self) -> EngineLoad:
        """How busy the engine is now."""
        return EngineLoad(
            running=self._slots.running,
            waiting=sum(len(w.request.seeds) - w.next_position for w in self._waiting),
            capacity=self._slots.capacity,
            tokens_sampled=self._tokens_sampled,
            tokens_prefilled=self._tokens_prefilled,
            swaps=self._swaps,
            progress=self._slots.progress(),
        )

    def submit(self, request: SampleRequest) -> None:
        """Queue a request, first in, first out. Raises ValueError when it cannot be sampled as asked."""
        where, sampling = f"request {request.request_id}", request.sampling
        self._check_ids(request.prompt_ids, f"{where}: prompt")
        if not 1 <= len(request.prompt_ids) < self._max_context:
            raise ValueError(f"{where}: {len(request.prompt_ids)} prompt tokens; from 1 to {self._max_context - 1} leave room to sample")
        if not request.seeds:
            raise ValueError(f"{where}: no seeds, so no samples")
        if sampling.max_tokens < 1 or not 0 <= sampling.temperature < np.inf or not 0 < sampling.top_p <= 1 or sampling.top_k < 0:
            raise ValueError(f"{where}: {sampling}; expected max_tokens >= 1, a finite temperature >= 0, 0 < top_p <= 1, top_k >= 0")
        if self._slots.rows_of(request.request_id) or any(w.request.request_id == request.request_id for w in self._waiting):
            raise ValueError(f"{where}: is already being sampled")
        self._waiting.append(_Waiting(request))

    def abort(self, request_id: str) -> None:
        """End what is left of a request; its samples come out of the next `step`. An unknown or ended request is no error."""
        for row in self._slots.rows_of(request_id):
            self._aborted.append(self._slots.end(row, "abort", self._loaded()))
        for waiting in [w for w in self._waiting if w.request.request_id == request_id]:
            self._waiting.remove(waiting)
            self._aborted += [_unstarted(request_id, i) for i in range(waiting.next_position, len(waiting.request.seeds))]

    @torch.inference_mode()
    def step(self, timeout_s: float) -> list[Sampled]:
        """Start what fits, then one token for every running sample. Returns the completions that ended.

        Raises InfrastructureFault when the weights give log-probs that are not numbers; requests then wait for other weights.
        """
        ended, self._aborted = self._aborted, []
        if self._version is None:
            return ended
        self._start_waiting()
        for source, target, length in self._slots.close_holes():
            self._decoder.move(source, target, length)
        if not self._slots.running:
            return ended
        ids, logprobs = self._next_tokens(self._slots.rows())
        if not np.isfinite(logprobs).all():
            row = int(np.flatnonzero(~np.isfinite(logprobs))[0])
            self._aborted, self._faulted = ended, True
            raise InfrastructureFault(f"embedded engine: log-prob {logprobs[row]} for {self._slots.describe(row)} under {self._version}")
        self._tokens_sampled += len(ids)
        return ended + [self._slots.end(row, reason, self._version) for row, reason in self._slots.append(ids, logprobs)]

    @torch.inference_mode()
    def load_weights(self, directory: Path, version: Version) -> float:
        """Copy in the weights of `directory` and recompute the cache of running samples. Returns the seconds that they stood still.

        Also takes a plain Hugging Face directory, and adapters alone, which it adds to the model that it was built from. Hashes are the
        caller's to check. Raises WeightsError when names or shapes differ, or adapters belong to another base; then the old version stays
        loaded and running samples are as they were.
        """
        started = time.monotonic()
        self._copy_in(directory)
        if self._options.batch_invariant and self._invariance is None:
            self._invariance = Invariance(self._decoder, self._max_context)
        running = self._slots.running
        if self._version is not None:
            self._slots.mark(self._version)
            self._swaps += 1
        self._version = version
        if self._faulted:
            self._decoder.clear()
            self._faulted = False
        for waiting in self._waiting:
            waiting.prefix = None
        for source, target, length in self._slots.close_holes():
            self._decoder.move(source, target, length)
        todo = sorted(enumerate(self._slots.prefixes()), key=lambda item: len(item[1]))  # by length, for little padding
        while todo:
            count = self._batch_size([prefix for _, prefix in todo])
            batch, todo = todo[:count], todo[count:]
            for (row, _), cached in zip(batch, self._prefill([prefix for _, prefix in batch]), strict=True):
                self._decoder.fill(row, *cached)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.monotonic() - started if running else 0.0

    def _copy_in(self, directory: Path) -> None:
        adds_to = read_adds_to(directory)
        if adds_to is None:
            self._decoder.weights.load(directory)
            return
        self._base_digest = self._base_digest or digest(self._base)
        if adds_to.base_xxh3_128 != self._base_digest:
            raise WeightsError(f"adapters in {directory} add to another model than the one in {self._base}: their hashes differ")
        self._decoder.weights.load_adapted(self._base, directory, adds_to.scale)

    @torch.inference_mode()
    def score(self, prompt_ids: npt.NDArray[np.int32], token_ids: npt.NDArray[np.int32], temperature: float) -> npt.NDArray[np.float32]:
        """Log-probs [T] of `token_ids` after `prompt_ids`, of log_softmax(logits / temperature); running samples are left alone.

        Raises ValueError for ids that do not fit, InfrastructureFault before the first weights.
        """
        ids = np.concatenate([prompt_ids, token_ids]).astype(np.int64)
        self._check_ids(ids, "score: sequence")
        if not len(prompt_ids) or len(ids) > self._max_context:
            raise ValueError(
                f"score: {len(prompt_ids)} prompt tokens and {len(ids)} in all; expected at least 1, and at most {self._max_context}"
            )
        self._loaded()
        if not len(token_ids):
            return np.zeros(0, np.float32)
        return np.asarray(self._decoder.score(self._to_device(ids), len(prompt_ids), temperature).cpu().numpy(), np.float32)

    def close(self) -> None:
        """Forget all requests. The engine started nothing outside itself."""
        self._waiting.clear()
        self._aborted.clear()
        self._slots = Slots(self._slots.capacity, self._max_context)

    def _limit(self, request: SampleRequest, position: int) -> int:
        """Tokens of prompt and completion at which a sample ends. The benchmark overrides it to force lengths."""
        return min(len(request.prompt_ids) + request.sampling.max_tokens, self._max_context)

    def _next_tokens(self, rows: Rows) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """The next token of every running sample and its log-prob, both [n]."""
        if self._invariance is None:
            return self._decode(rows, 0)
        tiles = [self._decode(tile, first) for first, tile in self._invariance.tiles(rows)]
        ids, logprobs = (np.concatenate(parts)[: len(rows.places)] for parts in zip(*tiles, strict=True))
        return ids, logprobs

    def _decode(self, rows: Rows, first: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """The same for rows of the cache from `first` on."""
        if self._invariance is None:
            bucket = self._options.context_bucket
            context = min(self._max_context, (int(rows.places.max()) // bucket + 1) * bucket)
        else:
            context = self._invariance.context(rows)
        logits = self._decoder.decode(self._to_device(rows.last_tokens), self._to_device(rows.places), context, first)
        if self._invariance is not None:
            logits = widen(logits)
        return draw(logits, uniforms(rows.seeds, rows.sampled), rows.temperature, rows.top_p, rows.top_k)

    def _start_waiting(self) -> None:
        """Fill free slots, oldest request first."""
        while self._slots.free and self._waiting:
            waiting = self._waiting[0]
            if waiting.prefix is None:
                self._prefill_waiting()
            assert waiting.prefix is not None
            request, position = waiting.request, waiting.next_position
            row = self._slots.start(request, position, self._limit(request, position))
            self._decoder.fill(row, *waiting.prefix)
            waiting.next_position += 1
            if waiting.next_position == len(request.seeds):
                self._waiting.popleft()

    def _prefill_waiting(self) -> None:
        """Prefill the first waiting requests in one batch, ahead of the slots that they will need."""
        ahead = [w for w in self._waiting if w.prefix is None][: self._slots.capacity]
        prefixes = [w.request.prompt_ids[:-1].astype(np.int64) for w in ahead]
        count = self._batch_size(prefixes)
        with phase("prefill"):
            for waiting, prefix in zip(ahead[:count], self._prefill(prefixes[:count]), strict=True):
                waiting.prefix = prefix

    def _batch_size(self, prefixes: list[npt.NDArray[np.int64]]) -> int:
        """How many of the first prefixes make a batch of at most `prefill_tokens` padded tokens; at least one."""
        if self._options.batch_invariant:
            return min(1, len(prefixes))
        longest = 0
        for count, prefix in enumerate(prefixes):
            longest = max(longest, len(prefix))
            if count and (count + 1) * longest > self._options.prefill_tokens:
                return count
        return len(prefixes)

    def _prefill(self, prefixes: list[npt.NDArray[np.int64]]) -> list[tuple[Tensor, Tensor]]:
        """Keys [L, K, D, p] and values [L, K, p, D] of each prefix of p tokens; p may be 0."""
        ids = np.zeros((len(prefixes), max(1, *map(len, prefixes))), np.int64)
        for row, prefix in zip(ids, prefixes, strict=True):
            row[: len(prefix)] = prefix
        self._tokens_prefilled += sum(map(len, prefixes))
        _, keys, values = self._decoder.prefill(self._to_device(ids))
        return [(keys[:, i, :, :, : len(prefix)], values[:, i, :, : len(prefix)]) for i, prefix in enumerate(prefixes)]

    def _check_ids(self, ids: npt.NDArray[np.int32] | npt.NDArray[np.int64], what: str) -> None:
        size = self._decoder.architecture.vocabulary
        outside = ids[(ids < 0) | (ids >= size)]
        if len(outside):
            raise ValueError(f"{what} holds token id {outside[0]}, outside the vocabulary of {size}")

    def _loaded(self) -> Version:
        if self._version is None:
            raise InfrastructureFault("embedded engine: no weights loaded yet")
        return self._version

    def _to_device(self, array: npt.NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"embedded engine: device {name!r}: {str(error).splitlines()[0]}") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"embedded engine: device {name!r}; expected cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"embedded engine: device {name!r}, but torch sees no CUDA device")
    return device


def _unstarted(request_id: str, position: int) -> Sampled:
    """An aborted sample that never ran."""
    nothing = np.zeros(0, np.int32)
    return Sampled(
        request_id=request_id, position=position, token_ids=nothing, logprobs=nothing.astype(np.float32), spans=(), finish_reason="abort"
    )
