"""What the SGLang engine costs beside its bare server: the same requests by a plain asynchronous client, on one server, in turn.

Both sides send the same stream of groups (prompt ids, one seed per sample, a fixed length per sample without stop tokens), at most `concurrent`
requests at once, and take token ids and log-probs, after the server's prefix cache was emptied. The plain client asks for whole answers and
does nothing with them; the engine streams, follows the server's load, watches its life and gives each sample with its versions. Tokens per
second of wall time, medians over repeats, the two sides in turn. On a CPU the client's process takes its time from the cores that the
server's three processes compute on, so each side's processor seconds per thousand tokens are given too; on a GPU the client has cores of its own.

    python -m benchmarks.engine --engine sglang [--repeats 5] [--groups 24] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from actors.engines import EngineOptions, SampleRequest, Sampling
from actors.engines.sglang import SGLangEngine
from protocol.messages import Version


def say(text: str) -> None:
    """Progress, beside the figures."""
    print(text, file=sys.stderr, flush=True)


def plain(url: str, groups: list[Any], concurrent: int) -> tuple[int, float]:
    """Tokens and seconds of the plain client."""
    work = [(group, int(length), seed) for group in groups for seed, length in enumerate(group.lengths)]

    async def run() -> int:
        tokens = 0
        left = iter(work)

        async def lane(session: aiohttp.ClientSession) -> None:
            nonlocal tokens
            for group, length, seed in left:
                params = {"temperature": 1.0, "max_new_tokens": length, "sampling_seed": seed}
                body = {"input_ids": group.prompt_ids.tolist(), "sampling_params": params, "return_logprob": True}
                async with session.post(f"{url}/generate", json=body) as answer:
                    tokens += len((await answer.json())["output_ids"])

        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)) as session:
            await asyncio.gather(*(lane(session) for _ in range(concurrent)))
        return tokens

    started = time.monotonic()
    tokens = asyncio.run(run())
    return tokens, time.monotonic() - started


def ours(engine: SGLangEngine, groups: list[Any]) -> tuple[int, float]:
    """Tokens and seconds of the engine. A request per length, because the lengths are given here and found in earnest."""
    started = time.monotonic()
    left = tokens = 0
    for group in groups:
        for seed, length in enumerate(group.lengths):
            engine.submit(
                SampleRequest(
                    request_id=f"{group.name}/{seed}", prompt_ids=group.prompt_ids, seeds=(seed,), sampling=Sampling(max_tokens=int(length))
                )
            )
            left += 1
    while left:
        ended = engine.step(1.0)
        left -= len(ended)
        tokens += sum(len(sample.token_ids) for sample in ended)
    return tokens, time.monotonic() - started


def empty_cache(url: str) -> None:
    """Both sides begin without cached prompts."""
    urllib.request.urlopen(urllib.request.Request(f"{url}/flush_cache", data=b"{}", method="POST"), timeout=60).close()


def measure(options: argparse.Namespace, build_model: Any, group_class: Any) -> dict[str, Any]:
    """The figures; the two sides take turns, and which goes first changes."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        build_model(directory)
        engine = SGLangEngine(
            EngineOptions(
                model_path=directory, max_context=256, slots=options.concurrent, threads=options.threads, log_dir=directory,
                extra={"stream_interval": options.stream_interval, "start_s": 600},
            )
        )  # fmt: skip
        rates: dict[str, list[float]] = {"engine": [], "plain": []}
        costs: dict[str, list[float]] = {"engine": [], "plain": []}
        try:
            say("the server starts")
            engine.load_weights(directory, Version(0))
            for repeat in range(options.repeats + 1):
                groups = [group_class(f"{repeat}-{i}", options.group_size, rng) for i in range(options.groups)]
                for side in ("engine", "plain") if repeat % 2 else ("plain", "engine"):
                    empty_cache(engine.server.url)
                    before = time.process_time()
                    tokens, seconds = ours(engine, groups) if side == "engine" else plain(engine.server.url, groups, options.concurrent)
                    if tokens != sum(int(group.lengths.sum()) for group in groups):
                        raise RuntimeError(f"{side}: {tokens} tokens, not those asked for")
                    say(f"round {repeat} of {options.repeats}, {side}: {tokens:,} tokens in {seconds:.1f} s")
                    if repeat:  # the first round warms up
                        rates[side].append(tokens / seconds)
                        costs[side].append((time.process_time() - before) / tokens * 1000)
        finally:
            engine.close()
    ratios = [a / b for a, b in zip(rates["engine"], rates["plain"], strict=True)]
    return {
        "settings": vars(options),
        "engine_tokens_per_s": statistics.median(rates["engine"]),
        "plain_tokens_per_s": statistics.median(rates["plain"]),
        "engine_cpu_s_per_1000_tokens": statistics.median(costs["engine"]),
        "plain_cpu_s_per_1000_tokens": statistics.median(costs["plain"]),
        "ratio": statistics.median(ratios),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }
