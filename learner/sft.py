"""Supervised fine-tuning: make a model more likely to write given completions. Loss, batches, optimizers, schedule and the loop.

Knows nothing about where the examples come from. One process, one device; right-padded batches, so it wants examples of similar length.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of a prompt, which is only read, and of the completion to learn, with its end-of-text token."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and completion together."""
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class SftOptions:
    """How to optimise. The defaults are for a model trained from scratch; to tune a pretrained one, lower both rates a hundredfold."""

    muon_lr: float = 1e-2
    """For 2-D weights other than embeddings; the update is scaled to the size of AdamW's (Liu et al. 2025, "Muon is Scalable", eq. 4)."""
    muon_weight_decay: float = 0.1
    adamw_lr: float = 3e-3
    """For embeddings, norms and biases; no weight decay there."""
    adamw_betas: tuple[float, float] = (0.9, 0.95)
    warmup_steps: int = 20
    final_lr_fraction: float = 0.1
    max_grad_norm: float = 1.0
    bfloat16: bool = False
    """Compute in bfloat16 by autocast; weights, gradients and optimizer states stay float32."""


def collate(examples: Sequence[Example], pad_id: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded token ids [B, T] and the loss mask [B, T], True on completion tokens. Causal attention never looks at the padding."""
    if any(not example.prompt_ids or not example.completion_ids for example in examples):
        raise ValueError("an example has no prompt or no completion tokens; both need at least one")
    num_tokens = max(example.num_tokens for example in examples)
    ids_BT = torch.full((len(examples), num_tokens), pad_id, dtype=torch.long)
    mask_BT = torch.zeros(len(examples), num_tokens, dtype=torch.bool)
    for row, example in enumerate(examples):
        ids_BT[row, : example.num_tokens] = torch.tensor(example.prompt_ids + example.completion_ids)
        mask_BT[row, len(example.prompt_ids) : example.num_tokens] = True
    return ids_BT, mask_BT


def completion_loss(model: Any, ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Mean of -log p(token | tokens before it) over the masked tokens of the batch.

    The vocabulary projection runs on masked tokens alone. `model` is a transformers causal language model.
    """
    hidden_BTD = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
    learned_BT = mask_BT[:, 1:]
    logits_NV = model.get_output_embeddings()(hidden_BTD[:, :-1][learned_BT])
    return cross_entropy(logits_NV.float(), ids_BT[:, 1:][learned_BT])


def lr_factor(step: int, num_steps: int, warmup_steps: int, final_fraction: float) -> float:
    """What the learning rates are multiplied with at `step` (from 0): a cosine from 1 to `final_fraction`, times a linear warm-up."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / num_steps))
    return min(1.0, (step + 1) / max(1, warmup_steps)) * (final_fraction + (1 - final_fraction) * cosine)


def build_optimizers(model: torch.nn.Module, options: SftOptions) -> list[torch.optim.Optimizer]:
    """Muon for hidden 2-D weights, AdamW for all else; every trainable parameter stands in exactly one group, tied ones once."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None:
        embeddings.add(id(output.weight))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hidden = [parameter for parameter in trainable if parameter.ndim == 2 and id(parameter) not in embeddings]
    chosen = set(map(id, hidden))
    rest = [parameter for parameter in trainable if id(parameter) not in chosen]
    optimizers: list[torch.optim.Optimizer] = []
    if hidden:
        muon = torch.optim.Muon(
            hidden, lr=options.muon_lr, weight_decay=options.muon_weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        )
        optimizers.append(muon)
    if rest:
        optimizers.append(torch.optim.AdamW(rest, lr=options.adamw_lr, betas=options.adamw_betas, weight_decay=0.0, fused=True))
    return optimizers


def batches_of_similar_length(examples: Sequence[Example], batch_size: int, pool: int, rng: random.Random) -> Iterator[list[Example]]:
    """Cut the examples into batches with little padding: sorted by length within pools of `pool` batches, which come in random order.

    Every example comes once. Only the last batch may be smaller. Pools follow the order of `examples`, so shuffle them before.
    """
    for start in range(0, len(examples), batch_size * pool):
        ordered = sorted(examples[start : start + batch_size * pool], key=lambda example: example.num_tokens)
        batches = [ordered[first : first + batch_size] for first in range(0, len(ordered), batch_size)]
        rng.shuffle(batches)
        yield from batches


def finetune(
    model: Any,
    batches: Sequence[Sequence[Example]],
    options: SftOptions,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Take one optimizer step per batch and return the losses, each of its batch before the step.

    `on_step` hears the number of steps done and the last loss. Deterministic for a given number of threads.
    """
    optimizers = build_optimizers(model, options)
    base_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    losses: list[float] = []
    model.train()
    for step, batch in enumerate(batches):
        factor = lr_factor(step, len(batches), options.warmup_steps, options.final_lr_fraction)
        ids_BT, mask_BT = (tensor.to(model.device) for tensor in collate(batch))
        with torch.autocast(model.device.type, torch.bfloat16, enabled=options.bfloat16):
            loss = completion_loss(model, ids_BT, mask_BT)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.max_grad_norm, error_if_nonfinite=True)
        for optimizer, rates in zip(optimizers, base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if on_step:
            on_step(step + 1, losses[-1])
    return losses
