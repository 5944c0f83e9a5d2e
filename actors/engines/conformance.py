"""Whether an engine samples as it says, tried on eight prompts when a generator starts, before it asks for work.

The checks need nothing but the engine: what one call says is held against what another says. That the model itself is right, and that no
token such as BOS is put before a prompt, is what the canary shows, whose log-probs come from the learner.
"""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt

from actors.engines import Engine, Sampled, SampleRequest, Sampling
from protocol.canary import bound_of
from protocol.errors import InfrastructureFault

PROMPTS, TOKENS = 8, 6
COLD, HOT = 0.6, 1.7
DEADLINE_S = 120.0

Ids = npt.NDArray[np.int32]


def check_conformance(engine: Engine, ids: Ids, dtype: str) -> None:
    """Try `engine` on prompts cut from `ids` (known token ids). Raises InfrastructureFault that names what it does otherwise.

    Compared are: the same seed twice; greedy with top-k 1 and with a tiny top-p; log-probs at two temperatures (whose differences must be
    in the ratio of the temperatures); a limit; a stop token; the engine's own score; and ids outside the vocabulary, which it must refuse.
    """
    bound = 4 * bound_of([dtype])
    prompts = [ids[start : start + len(ids) // 2] for start in range(PROMPTS)]
    _refuses(engine, prompts[0])
    greedy = _sample(engine, "greedy", prompts, Sampling(max_tokens=TOKENS, temperature=0.0))
    again = _sample(engine, "again", prompts, Sampling(max_tokens=TOKENS))
    same = _sample(engine, "same", prompts, Sampling(max_tokens=TOKENS))
    first = _sample(engine, "top-k", prompts, Sampling(max_tokens=1, top_k=1))
    nucleus = _sample(engine, "top-p", prompts, Sampling(max_tokens=1, top_p=1e-6))
    cold = _sample(engine, "cold", prompts, Sampling(max_tokens=1, temperature=COLD), (11, 12))
    hot = _sample(engine, "hot", prompts, Sampling(max_tokens=1, temperature=HOT), (11, 12))
    for i, prompt in enumerate(prompts):
        where = f"prompt {i}"
        for name, sample in ((f"{where}, greedy", greedy[i][0]), (f"{where}, sampled", again[i][0])):
            _demand(
                len(sample.token_ids) == TOKENS and sample.finish_reason == "length",
                f"{name}: {TOKENS} tokens were allowed, it gave {sample}",
            )
            scored = engine.score(prompt, sample.token_ids, 1.0)
            _demand(_close(scored, sample.logprobs, bound), f"{name}: log-probs {sample.logprobs} while sampling, {scored} when scored")
        _demand(
            _likely_same(again[i][0], same[i][0], bound), f"{where}: one seed gave {again[i][0].token_ids} and then {same[i][0].token_ids}"
        )
        best = greedy[i][0]
        for name, sample in (("top-k 1", first[i][0]), ("top-p 1e-6", nucleus[i][0])):
            _demand(
                sample.token_ids[0] == best.token_ids[0] or _close(sample.logprobs[:1], best.logprobs[:1], bound),
                f"{where}: {name} drew token {sample.token_ids[0]}, the likeliest is {best.token_ids[0]}",
            )
        _demand(_close(nucleus[i][0].logprobs, best.logprobs[:1], bound), f"{where}: log-probs are renormalised after top-p")
        for temperature, (a, b) in ((COLD, cold[i]), (HOT, hot[i])):
            scores = [engine.score(prompt, sample.token_ids, 1.0)[0] for sample in (a, b)]
            expected, found = (scores[0] - scores[1]) / temperature, a.logprobs[0] - b.logprobs[0]
            _demand(
                abs(expected - found) <= bound / min(temperature, 1), f"{where}: log-probs are not those of temperature {temperature:g}"
            )
    _stops(engine, prompts, greedy)


def _stops(engine: Engine, prompts: list[Ids], greedy: list[list[Sampled]]) -> None:
    """A token of the greedy continuation as stop token must end it right there, and be part of it."""
    for i, prompt in enumerate(prompts):
        free = greedy[i][0].token_ids
        stop = int(free[TOKENS // 2])
        end = int(np.flatnonzero(free == stop)[0]) + 1
        sampling = Sampling(max_tokens=TOKENS, temperature=0.0, stop_token_ids=(stop,))
        sample = _sample(engine, f"stop-{i}", [prompt], sampling)[0][0]
        stopped = sample.finish_reason == "stop" and sample.token_ids[-1] == stop
        _demand(
            stopped and (np.array_equal(sample.token_ids, free[:end]) or stop not in sample.token_ids[:-1]),
            f"prompt {i}: stop token {stop} after {free}, but it gave {sample.token_ids} ({sample.finish_reason})",
        )


def _refuses(engine: Engine, prompt: Ids) -> None:
    for bad in (-1, 2**31 - 1):
        try:
            engine.submit(
                SampleRequest(
                    request_id=f"conformance/{bad}",
                    prompt_ids=np.append(prompt, np.int32(bad)),
                    seeds=(0,),
                    sampling=Sampling(max_tokens=1),
                )
            )
        except ValueError:
            continue
        raise InfrastructureFault(f"the engine takes token id {bad}, which no vocabulary has")


def _sample(engine: Engine, name: str, prompts: list[Ids], sampling: Sampling, seeds: tuple[int, ...] = (7,)) -> list[list[Sampled]]:
    """Samples of each prompt, one per seed."""
    for i, prompt in enumerate(prompts):
        engine.submit(SampleRequest(request_id=f"conformance/{name}/{i}", prompt_ids=prompt, seeds=seeds, sampling=sampling))
    found: list[list[Sampled | None]] = [[None] * len(seeds) for _ in prompts]
    left, until = len(prompts) * len(seeds), time.monotonic() + DEADLINE_S
    while left:
        for sample in engine.step(0.1):
            found[int(sample.request_id.rpartition("/")[2])][sample.position] = sample
            left -= 1
        if left and (time.monotonic() > until or engine.version is None):
            lost = "lost its server and" if engine.version is None else f"within {DEADLINE_S:g} s"
            _withdraw(engine, name, len(prompts), left)
            raise InfrastructureFault(f"the engine {lost} left {left} samples of its start-up check open; {engine.load.fault}")
    return [[sample for sample in row if sample is not None] for row in found]


def _withdraw(engine: Engine, name: str, prompts: int, left: int) -> None:
    """Take back what is open, so that nothing of the check comes out among a run's samples."""
    for i in range(prompts):
        engine.abort(f"conformance/{name}/{i}")
    until = time.monotonic() + DEADLINE_S
    while left and time.monotonic() < until:
        left -= len(engine.step(0.1))


def _close(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32], bound: float) -> bool:
    return a.shape == b.shape and bool((np.abs(a - b) <= bound).all())


def _likely_same(a: Sampled, b: Sampled, bound: float) -> bool:
    """Equal, or different from a place on whose probability was within rounding of the number drawn: with bfloat16 that happens."""
    same = a.token_ids == b.token_ids
    until = len(same) if same.all() else int(np.argmin(same))
    return bool(same.all()) or (bound > 0.01 and _close(a.logprobs[:until], b.logprobs[:until], bound))


def _demand(holds: bool, otherwise: str) -> None:
    if not holds:
        raise InfrastructureFault(f"the engine does not sample as it should: {otherwise}")
