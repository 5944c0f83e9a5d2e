"""A slow learner written from the formulas: one sample at a time, one token at a time, no packing and no code of ours."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from learner.packing import TrainSample

TokenFormula = Callable[[Tensor, float, float], Tensor]
"""(policy log-prob, behaviour log-prob, advantage) -> loss of one token."""


def clipped_token(policy: Tensor, behaviour: float, advantage: float, clip_low: float = 0.2, clip_high: float = 0.28) -> Tensor:
    """DAPO, eq. 8, with if instead of min and clamp."""
    ratio = torch.exp(policy - behaviour)
    bounded = ratio
    if ratio.item() < 1 - clip_low:
        bounded = torch.tensor(1 - clip_low, dtype=ratio.dtype)
    if ratio.item() > 1 + clip_high:
        bounded = torch.tensor(1 + clip_high, dtype=ratio.dtype)
    return -(bounded if bounded.item() * advantage < ratio.item() * advantage else ratio) * advantage


@dataclass
class Reference:
    """A float64 model and a plain AdamW."""

    directory: Path
    lr: float
    eps: float
    formula: TokenFormula = clipped_token
    aggregation: str = "token_mean"
    length: int = 1
    clip: float = 1.0
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Load the model."""
        self.model: Any = AutoModelForCausalLM.from_pretrained(self.directory, dtype=torch.float64).eval()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.lr, betas=(0.9, 0.95), eps=self.eps, weight_decay=0.0)

    def logprobs(self, sample: TrainSample) -> Tensor:
        """Log-probs [T] of all completion tokens."""
        ids = torch.tensor(np.concatenate([sample.prompt_ids, sample.token_ids]).astype(np.int64))[None]
        logits = self.model(input_ids=ids).logits[0, len(sample.prompt_ids) - 1 : -1] / sample.temperature
        return torch.stack([row[token] - row.logsumexp(-1) for row, token in zip(logits, ids[0, len(sample.prompt_ids) :], strict=True)])

    def loss(self, samples: Sequence[TrainSample]) -> Tensor:
        """The loss of the whole batch, by the definition of each aggregation."""
        sums, counts = [], []
        for sample in samples:
            policy = self.logprobs(sample)
            terms = [
                self.formula(policy[t], float(sample.behaviour_logprobs[t]), sample.advantage)
                for t in range(len(policy))
                if sample.loss_mask[t]
            ]
            if terms:
                sums.append(torch.stack(terms).sum())
                counts.append(len(terms))
        if self.aggregation == "token_mean":
            return torch.stack(sums).sum() / sum(counts)
        if self.aggregation == "sequence_mean":
            return torch.stack([s / n for s, n in zip(sums, counts, strict=True)]).mean()
        return torch.stack(sums).sum() / (self.length * len(sums))

    def train(self, samples: Sequence[TrainSample]) -> None:
        """One update."""
        self.optimizer.zero_grad()
        loss = self.loss(samples)
        loss.backward()
        gradients = [p.grad for p in self.model.parameters()]
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
        for gradient in gradients:
            gradient.mul_(min(1.0, self.clip / (norm + 1e-6)))
        self.optimizer.step()
        self.losses.append(loss.item())
        self.norms.append(norm)

    def parameters(self) -> dict[str, Tensor]:
        """Copies of the parameters by name."""
        return {name: copy.deepcopy(p.detach()) for name, p in self.model.named_parameters()}
