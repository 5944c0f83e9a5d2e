"""What the embedded engine remembers of its running samples: arrays with one row per slot, so that a step needs no loop over samples."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from actors.engines import Sampled, SampleRequest
from protocol.messages import FinishReason, Span, Version

_FIELDS = np.dtype(
    [
        ("length", np.int64),  # tokens of prompt and completion so far; all but the last are in the cache
        ("prompt", np.int64),  # tokens of the prompt
        ("limit", np.int64),  # length at which the sample ends
        ("seed", np.uint64),
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("top_k", np.int64),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Columns of the running samples, each [n]."""

    last_tokens: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64]
    """Where the last token stands in its sequence."""
    sampled: npt.NDArray[np.int64]
    """Tokens of the completion so far."""
    seeds: npt.NDArray[np.uint64]
    temperature: npt.NDArray[np.float32]
    top_p: npt.NDArray[np.float32]
    top_k: npt.NDArray[np.int64]

    def tile(self, first: int, width: int) -> Rows:
        """Rows first..first+width-1; where no sample runs, a first token that is drawn without a filter."""
        columns = {column.name: getattr(self, column.name)[first : first + width] for column in fields(self)}
        missing = width - len(columns["places"])
        return Rows(**{name: np.pad(values, (0, missing), constant_values=_NOTHING.get(name, 0)) for name, values in columns.items()})


_NOTHING = {"temperature": 1, "top_p": 1}


class Slots:
    """Running samples in rows 0..running-1, without gaps between steps: `end` leaves holes, `start` fills them, `close_holes` the rest.

    Pure bookkeeping: row r stands for row r of the decoder's cache, which the caller moves alike.
    """

    def __init__(self, capacity: int, max_context: int) -> None:
        self.capacity = capacity
        self._state = np.zeros(capacity, _FIELDS)
        self._tokens = np.zeros((capacity, max_context), np.int64)
        self._logprobs = np.zeros((capacity, max_context), np.float32)
        self._stops = np.full((capacity, 1), -1, np.int64)
        self._requests: list[SampleRequest | None] = []
        self._positions = [0] * capacity
        self._spans: list[list[Span]] = [[] for _ in range(capacity)]
        self._holes: list[int] = []

    @property
    def free(self) -> int:
        """How many more samples can start."""
        return self.capacity - self.running

    @property
    def running(self) -> int:
        """How many samples run."""
        return len(self._requests) - len(self._holes)

    def start(self, request: SampleRequest, position: int, limit: int) -> int:
        """Begin sample `position` of `request`, to end at `limit` tokens of prompt and completion. Returns its row."""
        row = self._holes.pop() if self._holes else len(self._requests)
        if row == len(self._requests):
            self._requests.append(request)
        else:
            self._requests[row] = request
        prompt, sampling = request.prompt_ids, request.sampling
        seed = request.seeds[position] & 0xFFFF_FFFF_FFFF_FFFF
        self._state[row] = (len(prompt), len(prompt), limit, seed, sampling.temperature, sampling.top_p, sampling.top_k)
        self._tokens[row, : len(prompt)] = prompt
        missing = len(sampling.stop_token_ids) - self._stops.shape[1]
        if missing > 0:
            self._stops = np.pad(self._stops, ((0, 0), (0, missing)), constant_values=-1)
        self._stops[row] = -1
        self._stops[row, : len(sampling.stop_token_ids)] = sampling.stop_token_ids
        self._positions[row], self._spans[row] = position, []
        return row

    def close_holes(self) -> list[tuple[int, int, int]]:
        """Move the last samples into the rows of ended ones. Returns (source row, target row, length) in order, for the cache."""
        moves = []
        for hole in sorted(self._holes, reverse=True):
            source = len(self._requests) - 1
            if source != hole:
                length = int(self._state["length"][source])
                self._state[hole], self._stops[hole] = self._state[source], self._stops[source]
                self._tokens[hole, :length] = self._tokens[source, :length]
                self._logprobs[hole, :length] = self._logprobs[source, :length]
                self._requests[hole] = self._requests[source]
                self._positions[hole], self._spans[hole] = self._positions[source], self._spans[source]
                moves.append((source, hole, length))
            self._requests.pop()
        self._holes.clear()
        return moves

    def rows(self) -> Rows:
        """What the next step needs of all running samples; call it after `close_holes`."""
        n = len(self._requests)
        state = self._state[:n]
        places = state["length"] - 1
        return Rows(
            last_tokens=self._tokens[np.arange(n), places],
            places=places,
            sampled=state["length"] - state["prompt"],
            seeds=state["seed"].copy(),
            temperature=state["temperature"].copy(),
            top_p=state["top_p"].copy(),
            top_k=state["top_k"].copy(),
        )

    def prefixes(self) -> list[npt.NDArray[np.int64]]:
        """What belongs into the cache of each running sample: its tokens but the last."""
        return [self._tokens[row, : length - 1] for row, length in enumerate(self._state["length"][: len(self._requests)])]

    def append(self, ids: npt.NDArray[np.int64], logprobs: npt.NDArray[np.float32]) -> list[tuple[int, FinishReason]]:
        """Add one token to every running sample [n]. Returns (row, why) of those that are to end."""
        rows, state = np.arange(len(ids)), self._state[: len(ids)]
        self._tokens[rows, state["length"]] = ids
        self._logprobs[rows, state["length"]] = logprobs
        state["length"] += 1
        stopped = (self._stops[: len(ids)] == ids[:, None]).any(1)
        ended = np.flatnonzero(stopped | (state["length"] >= state["limit"]))
        return [(int(row), "stop" if stopped[row] else "length") for row in ended]

    def mark(self, version: Version) -> None:
        """Close a span: what was sampled since the last mark was sampled under `version`."""
        for row, request in enumerate(self._requests):
            if request is not None:
                self._mark(row, version)

    def end(self, row: int, reason: FinishReason, version: Version) -> Sampled:
        """Take a sample out; its row is a hole until `start` or `close_holes`."""
        request = self._requests[row]
        assert request is not None
        self._mark(row, version)
        prompt, length = self._state["prompt"][row], self._state["length"][row]
        self._requests[row] = None
        self._holes.append(row)
        return Sampled(
            request_id=request.request_id,
            position=self._positions[row],
            token_ids=self._tokens[row, prompt:length].astype(np.int32),
            logprobs=self._logprobs[row, prompt:length].copy(),
            spans=tuple(self._spans[row]),
            finish_reason=reason,
        )

    def rows_of(self, request_id: str) -> list[int]:
        """Rows of a request's running samples."""
        return [row for row, request in enumerate(self._requests) if request is not None and request.request_id == request_id]

    def progress(self) -> dict[str, int]:
        """request_id -> tokens of its longest running sample."""
        longest: dict[str, int] = {}
        for row, request in enumerate(self._requests):
            if request is not None:
                sampled = int(self._state["length"][row] - self._state["prompt"][row])
                longest[request.request_id] = max(sampled, longest.get(request.request_id, 0))
        return longest

    def describe(self, row: int) -> str:
        """For error messages: which token of which sample is next."""
        request, state = self._requests[row], self._state[row]
        return f"token {state['length'] - state['prompt']} of {request.request_id if request else '?'}/{self._positions[row]}"

    def _mark(self, row: int, version: Version) -> None:
        spans, sampled = self._spans[row], int(self._state["length"][row] - self._state["prompt"][row])
        if sampled > (spans[-1].end if spans else 0):
            if spans and spans[-1][:2] == tuple(version):
                spans.pop()
            spans.append(Span(version.number, version.incarnation, sampled))
