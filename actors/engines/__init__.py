"""Engines: what turns prompts into sampled tokens. This file is the interface and the table.

To add one: a new file beside this one and a line in ENGINES. `tests/contracts/test_engines.py` then tests it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from protocol.messages import FinishReason, Span, Version

ENGINES = {
    "embedded": "actors.engines.embedded:EmbeddedEngine",
    "simulated": "actors.engines.simulated:SimulatedEngine",
    "sglang": "actors.engines.sglang:SGLangEngine",
}
"""Name in the configuration -> class. The class is built as `Class(options: EngineOptions)`."""

ENGINE_OPTIONS = {
    "embedded": "actors.engines.embedded_options:Options",
    "simulated": "actors.engines.simulated_options:Options",
    "sglang": "actors.engines.sglang_options:Options",
}
"""Name -> pydantic model of `generators.options`, importable without torch, so that a run is checked before anything starts."""

TAKES_ADAPTERS = ("embedded",)
"""Engines whose `load_weights` takes versions of adapters alone. A class of one's own says so by `takes_adapters = True`."""


ENGINE_CHECKS = {"sglang": "actors.engines.sglang_check:check"}
"""Name -> function of (options, device, number of actors) that is asked before a run: what is missing on this host, in sentences; it raises
ConfigError for what can work nowhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn. `top_p` 1 and `top_k` 0 are off; temperature 0 is greedy."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """Sample `len(seeds)` completions of one prompt; they share the prompt's prefill.

    Sample i draws its t-th token with a random number that depends on (seeds[i], t) alone: not on slots, neighbours or timing.
    """

    request_id: str
    prompt_ids: npt.NDArray[np.int32]
    seeds: tuple[int, ...]
    sampling: Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """One completion that has ended. `position` is its place in the request's `seeds`."""

    request_id: str
    position: int
    token_ids: npt.NDArray[np.int32]
    """[T], with the stop token if one was drawn."""
    logprobs: npt.NDArray[np.float32]
    """[T] log_softmax(logits / temperature) at the drawn token, before top-p and top-k; at temperature 0, of the unscaled logits."""
    spans: tuple[Span, ...]
    """Which version drew which tokens; the last end is T."""
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerTrouble:
    """Why an engine's server does not sample now."""

    server: str
    """Its name, such as "SGLang server"."""
    doing: Literal["starts", "is awaited", "is silent", "is stopped"]
    """A server that somebody else starts is awaited."""
    for_s: float
    detail: str = ""
    """Why it is started again; which of its processes is stopped."""
    limit_s: float = 0.0
    """How long that may take before the engine acts on it, in seconds; 0 if that is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """How busy an engine is, in samples and tokens."""

    running: int
    """With those that are done and that `step` has not given out yet: while there are any, a caller comes for them."""
    waiting: int
    capacity: int
    """Samples that it runs at once."""
    tokens_sampled: int = 0
    """Since it started."""
    tokens_prefilled: int = 0
    swaps: int = 0
    progress: dict[str, int] = field(default_factory=dict)
    """request_id -> tokens of its longest running sample."""
    ready_in_s: float = 0.0
    """How long `step` has nothing to do, so that the caller may wait on its own sockets: 0 for an engine that computes in `step`."""
    restarts: int = 0
    """How often the engine lost what it samples with and started it again. Each time unfinished samples begin anew from their seeds."""
    fault: str = ""
    """Why, the last time."""
    trouble: ServerTrouble | None = None
    """What keeps the engine's server, if it has one, from sampling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What every engine is built from. `extra` holds the options of the engine's own `Options` model."""

    model_path: Path
    """A Hugging Face directory. Its configuration holds for every version; weights, the first too, come by `load_weights`."""
    max_context: int
    """Most tokens of prompt and completion together."""
    slots: int = 64
    threads: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    index: int = 0
    """Of the generator actor that the engine works for, on this host; an engine may take its devices by it."""
    joined: bool = False
    """Whether this host joined the run: what the options say of the devices of the run's own host does not hold here."""
    extra: dict[str, object] = field(default_factory=dict)
    name: str = "engine"
    log_dir: Path | None = None
    """Where an engine's own processes write their logs, as <name>-server.log; None: the directory for temporary files."""


class Engine(Protocol):
    """Samples many requests at once.

    One thread at a time calls it; no method blocks for longer than one decode step, except `load_weights`, `score` and `close`.
    Nothing is sampled before the first `load_weights`.

    An engine that works elsewhere (a server) may have an attribute `wake_fd`: a file descriptor that can be read while `step` has
    something to give. Its `load_weights` may take minutes; it is then called from a thread of its own, and nothing else meanwhile.
    Such an engine mends itself: if it loses what it samples with, `version` is None until the next `load_weights`, `load` counts the
    restart and names the fault, and unfinished samples begin anew from their seeds. InfrastructureFault: it could not.
    """

    def submit(self, request: SampleRequest) -> None:
        """Queue a request. Raises ValueError for token ids outside the vocabulary and for a prompt that leaves no room to sample."""

    def abort(self, request_id: str) -> None:
        """End what is left of a request: its samples come out of a following `step` with finish reason "abort" and the tokens so far.

        Until then they count as running. An unknown or ended request is no error.
        """

    def step(self, timeout_s: float) -> list[Sampled]:
        """Do one unit of work (or wait for at most `timeout_s` for work done elsewhere) and return the completions that ended.

        An engine that works in this process has nothing to wait for and returns at once when idle: an idle caller waits on its own sockets.
        """

    def load_weights(self, directory: Path, version: Version) -> float:
        """Swap in the published weights while requests run: later tokens carry `version`, with the cache recomputed.

        Takes a plain Hugging Face directory as well. Returns the seconds that running samples stood still.
        Raises WeightsError when the tensors do not fit the model; the old version then stays loaded.
        """

    def score(self, prompt_ids: npt.NDArray[np.int32], token_ids: npt.NDArray[np.int32], temperature: float) -> npt.NDArray[np.float32]:
        """Log-probs [T] of given tokens after a prompt under the loaded weights, computed as while sampling.

        Raises InfrastructureFault when they cannot be had; `version` is None then if the engine lost what it samples with.
        """

    @property
    def version(self) -> Version | None:
        """The loaded version; None before the first, and after the engine lost it."""

    @property
    def load(self) -> EngineLoad:
        """How busy the engine is now."""

    def close(self) -> None:
        """End everything that the engine started."""
