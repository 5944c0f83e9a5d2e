"""What the SGLang engine costs beside its bare server: the same requests by a plain asynchronous client, on one server, in turn.

Both sides send the same stream of groups (prompt ids, one seed per sample, a fixed length per sample without stop tokens), at most `concurrent`
requests at once, and take token ids and log-probs. The plain client asks for whole answers and does nothing with them; the engine streams,
follows the server's load, watches its life and gives each sample with its versions. Tokens per second of wall time, medians over repeats.

    python -m benchmarks.engine --engine sglang [--repeats 3] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from actors.engines import EngineOptions, SampleRequest, Sampling
from actors.engines.sglang import SGLangEngine
from protocol.messages import Version


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
        try:
            engine.load_weights(directory, Version(0))
            rates: dict[str, list[float]] = {"engine": [], "plain": []}
            for repeat in range(options.repeats + 1):
                for side in ("engine", "plain") if repeat % 2 else ("plain", "engine"):
                    groups = [group_class(f"{repeat}-{side}-{i}", options.group_size, rng) for i in range(options.groups)]
                    tokens, seconds = ours(engine, groups) if side == "engine" else plain(engine.server.url, groups, options.concurrent)
                    if tokens != sum(int(group.lengths.sum()) for group in groups):
                        raise RuntimeError(f"{side}: {tokens} tokens, not those asked for")
                    if repeat:  # the first round warms up
                        rates[side].append(tokens / seconds)
        finally:
            engine.close()
    ratios = [a / b for a, b in zip(rates["engine"], rates["plain"], strict=True)]
    return {
        "settings": vars(options),
        "engine_tokens_per_s": statistics.median(rates["engine"]),
        "plain_tokens_per_s": statistics.median(rates["plain"]),
        "ratio": statistics.median(ratios),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }
