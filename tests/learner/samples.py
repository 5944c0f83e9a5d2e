"""Random samples: of many lengths, with masked, cut-off and single-token ones."""

from __future__ import annotations

import numpy as np

from learner.packing import TrainSample

VOCABULARY = 97


def random_samples(count: int, seed: int = 0, *, longest: int = 24, group_size: int = 4, temperature: float = 0.8) -> list[TrainSample]:
    """Groups share a prompt. Every fourth sample has masked tokens in the middle, every fifth one token, every seventh none that trains."""
    rng = np.random.default_rng(seed)
    samples = []
    prompt = np.zeros(0, np.int32)
    for i in range(count):
        if i % group_size == 0:
            prompt = rng.integers(0, VOCABULARY, int(rng.integers(1, 12))).astype(np.int32)
        tokens = 1 if i % 5 == 4 else int(rng.integers(2, longest))
        mask = np.ones(tokens, np.bool_)
        if i % 4 == 3:
            mask[rng.random(tokens) < 0.4] = False
        if i % 7 == 6:
            mask[:] = False
        samples.append(
            TrainSample(
                group_id=100 + i // group_size,
                index=i % group_size,
                prompt_ids=prompt,
                token_ids=rng.integers(0, VOCABULARY, tokens).astype(np.int32),
                behaviour_logprobs=rng.uniform(-6, -0.1, tokens).astype(np.float32),
                loss_mask=mask,
                advantage=float(rng.normal()),
                temperature=temperature,
            )
        )
    return samples
