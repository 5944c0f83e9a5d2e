"""From samples to micro-batches. Pure numpy; the same samples give the same micro-batches on every machine.

    samples --admit--> sound ones --assign--> this rank's share --plan--> places in rows --build--> MicroBatch of arrays

Only tokens that receive gradient (`loss_mask`) are laid out flat as T; tokens after a sample's last trainable one are left out.
Padding stands on the right, where causal attention never looks at it, so sorted rows need no attention mask. Packed rows hold
several samples, told apart by position ids that start again at 0; transformers makes the block-diagonal mask from these. A third
layout, which shares prompts, has a file of its own: `learner/sharing.py`.
"""

# ruff: noqa: N815 (shapes stand in names)
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Layout = Literal["sorted", "packed"]
LAYOUTS: tuple[Layout, Layout] = ("sorted", "packed")
Aggregation = Literal["token_mean", "sequence_mean", "constant_length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSample:
    """One completion as the step trains on it.

    Example:
        TrainSample(group_id=7, index=0, prompt_ids=array([1, 9, 2]), token_ids=array([9, 2, 3]),
                    behaviour_logprobs=array([-0.1, -1.3, -0.2]), loss_mask=array([True, True, True]), advantage=0.7)
    """

    group_id: int
    index: int
    prompt_ids: npt.NDArray[np.int32]
    """[P], at least one token."""
    token_ids: npt.NDArray[np.int32]
    """[T]"""
    behaviour_logprobs: npt.NDArray[np.float32]
    """[T] at `temperature`."""
    loss_mask: npt.NDArray[np.bool_]
    """[T] True where a token receives gradient: masked tool tokens, too stale tokens and overlong completions are False already."""
    advantage: float
    temperature: float = 1.0
    """At which the completion was sampled."""
    positive: bool = False
    """Whether the answer is right: what the likelihood term learns from."""

    @property
    def num_trainable(self) -> int:
        """Tokens that receive gradient."""
        return int(np.count_nonzero(self.loss_mask))

    @property
    def length(self) -> int:
        """Tokens that go into the model: up to the one before the last trainable token. 0 without a trainable token."""
        places = np.flatnonzero(self.loss_mask)
        return len(self.prompt_ids) + int(places[-1]) if len(places) else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A sample that could not be trained on, and why."""

    group_id: int
    index: int
    reason: str


def admit(samples: Sequence[TrainSample]) -> tuple[list[TrainSample], list[Skipped]]:
    """Samples that can be trained on, and those that cannot: not finite where it matters.

    Raises ValueError for arrays that do not fit together, which is a bug of the caller.
    """
    sound: list[TrainSample] = []
    skipped: list[Skipped] = []
    for sample in samples:
        where = f"sample {sample.group_id}/{sample.index}"
        tokens = len(sample.token_ids)
        if len(sample.behaviour_logprobs) != tokens or len(sample.loss_mask) != tokens:
            raise ValueError(
                f"{where}: {tokens} token_ids but {len(sample.behaviour_logprobs)} behaviour_logprobs and {len(sample.loss_mask)} loss_mask"
            )
        if not len(sample.prompt_ids):
            raise ValueError(f"{where}: the prompt is empty, so nothing predicts the first token")
        if sample.temperature <= 0:
            raise ValueError(f"{where}: temperature {sample.temperature}, expected above 0")
        if not np.isfinite(sample.advantage):
            skipped.append(Skipped(group_id=sample.group_id, index=sample.index, reason=f"advantage {sample.advantage}"))
        elif not np.isfinite(sample.behaviour_logprobs[sample.loss_mask]).all():
            bad = int(np.flatnonzero(sample.loss_mask & ~np.isfinite(sample.behaviour_logprobs))[0])
            reason = f"behaviour log-prob {sample.behaviour_logprobs[bad]} at token {bad}"
            skipped.append(Skipped(group_id=sample.group_id, index=sample.index, reason=reason))
        else:
            sound.append(sample)
    return sound, skipped


def token_weights(samples: Sequence[TrainSample], aggregation: Aggregation, length: int | None = None) -> npt.NDArray[np.float64]:
    """What the loss of a token of each sample is multiplied by [num samples]. Counts the whole iteration, over all ranks.

    token_mean: 1 / trainable tokens (DAPO). sequence_mean: 1 / (samples * own tokens) (GRPO). constant_length: 1 / (samples * `length`)
    (Dr. GRPO). Samples without a trainable token count for nothing.
    """
    tokens_N = np.array([sample.num_trainable for sample in samples], np.float64)
    num_samples = max(int(np.count_nonzero(tokens_N)), 1)
    if aggregation == "token_mean":
        return np.full(len(samples), 1 / max(tokens_N.sum(), 1))
    if aggregation == "sequence_mean":
        return np.asarray(1 / (num_samples * np.maximum(tokens_N, 1)), np.float64)
    if length is None:
        raise ValueError("aggregation constant_length: the length to divide by is missing")
    return np.full(len(samples), 1 / (num_samples * length))


def likelihood_weights(samples: Sequence[TrainSample]) -> npt.NDArray[np.float64]:
    """1 / trainable tokens of all positive samples, for positive samples; 0 for the others [num samples]."""
    positive_N = np.array([sample.positive for sample in samples], np.float64)
    tokens = sum(sample.num_trainable for sample in samples if sample.positive)
    return positive_N / max(tokens, 1)


def assign(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Places of samples by rank, about the same number of tokens for each: the longest first, always to the least loaded rank."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for place in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = loads.index(min(loads))
        shares[rank].append(place)
        loads[rank] += lengths[place]
    return shares


Rows = list[list[int]]
"""Places of the samples in each row of a micro-batch."""


def plan(lengths: Sequence[int], budget: int, layout: Layout, pack_tokens: int | None = None) -> list[Rows]:
    """Micro-batches of rows of places in `lengths`, each of at most `budget` padded tokens (or one sample, if that is longer).

    Sorted rows hold one sample each. Packed rows hold several and are filled first-fit, longest first, up to `pack_tokens` (PACK_TOKENS).
    """
    order = sorted((i for i in range(len(lengths)) if lengths[i]), key=lambda i: (-lengths[i], i))
    if layout == "sorted":
        return _sorted_rows(order, lengths, budget)
    return _packed_rows(order, lengths, budget, PACK_TOKENS if pack_tokens is None else pack_tokens)


def emptiest(lengths: Sequence[int], budget: int, pack_tokens: int | None = None) -> Layout:
    """The layout with fewer padded tokens; sorted if they are within 10 %, since its attention needs no mask."""
    in_sorted, in_packed = (sum(padded_tokens(rows, lengths) for rows in plan(lengths, budget, layout, pack_tokens)) for layout in LAYOUTS)
    return "sorted" if in_sorted <= 1.1 * in_packed else "packed"


def padded_tokens(rows: Rows, lengths: Sequence[int]) -> int:
    """Rows times the longest row."""
    return len(rows) * max(sum(lengths[i] for i in row) for row in rows)


def _sorted_rows(order: list[int], lengths: Sequence[int], budget: int) -> list[Rows]:
    batches: list[Rows] = []
    while order:
        count = max(1, budget // lengths[order[0]])
        batches.append([[i] for i in order[:count]])
        order = order[count:]
    return batches


def _packed_rows(order: list[int], lengths: Sequence[int], budget: int, pack_tokens: int) -> list[Rows]:
    """First-fit decreasing into rows of the longest sample's length or `pack_tokens`, whichever is more."""
    if not order:
        return []
    capacity = max(lengths[order[0]], min(pack_tokens, budget))
    rows: Rows = []
    room: list[int] = []
    for i in order:
        place = next((r for r, free in enumerate(room) if free >= lengths[i]), None)
        if place is None:
            rows.append([])
            room.append(capacity)
            place = len(rows) - 1
        rows[place].append(i)
        room[place] -= lengths[i]
    per_batch = max(1, budget // capacity)
    return [rows[start : start + per_batch] for start in range(0, len(rows), per_batch)]


PACK_TOKENS = 512
"""Length of a packed row under a dense mask: attention costs its square; ahead of sorted rows on a CPU for samples of 20-400 tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """R rows of attention in the shared layout: which tokens of the row are queries and keys, and what sees what."""

    queries: npt.NDArray[np.int64]
    """[R, Q] places in the row, padded with 0."""
    real: npt.NDArray[np.bool_]
    """[R, Q] False on padding. Every token of the row is a real query once."""
    keys: npt.NDArray[np.int64]
    """[R, K]"""
    visible: npt.NDArray[np.bool_]
    """[R, Q, K]; every query, padding too, sees a key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """One forward pass: R rows of L tokens, of which T trainable tokens of `num_samples` samples lie flat."""

    input_ids: npt.NDArray[np.int64]
    """[R, L], 0 on padding."""
    position_ids: npt.NDArray[np.int64] | None
    """[R, L], starting again at 0 for each sample of a packed row; None when every row is one sample."""
    blocks: tuple[Block, ...] | None = None
    """Only in the shared layout."""
    hidden_T: npt.NDArray[np.int64]
    """Place in the flattened [R * L] of the hidden state that predicts each token."""
    targets_T: npt.NDArray[np.int64]
    behaviour_T: npt.NDArray[np.float32]
    advantages_T: npt.NDArray[np.float64]
    weights_T: npt.NDArray[np.float64]
    likelihood_weights_T: npt.NDArray[np.float64]
    """1 / trainable tokens of positive samples in the whole iteration, on the tokens of these; 0 elsewhere."""
    temperature_T: npt.NDArray[np.float64]
    sample_T: npt.NDArray[np.int64]
    """Which of `samples` the token belongs to: 0..num_samples-1."""
    samples: tuple[int, ...]
    """Places of the samples in the list that the micro-batch was built from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighted:
    """The sound samples of an iteration with what their token losses are multiplied by."""

    samples: Sequence[TrainSample]
    objective_N: npt.NDArray[np.float64]
    likelihood_N: npt.NDArray[np.float64]


def weigh(samples: Sequence[TrainSample], aggregation: Aggregation, length: int | None = None) -> Weighted:
    """Count once, over the whole iteration, what all losses are divided by."""
    return Weighted(samples=samples, objective_N=token_weights(samples, aggregation, length), likelihood_N=likelihood_weights(samples))


def build(weighted: Weighted, rows: Rows) -> MicroBatch:
    """Lay the samples of `rows` (places in `weighted.samples`) out in arrays."""
    samples = weighted.samples
    lengths = [[samples[i].length for i in row] for row in rows]
    width = max(sum(row) for row in lengths)
    input_ids = np.zeros((len(rows), width), np.int64)
    packed = any(len(row) > 1 for row in rows)
    position_ids = np.zeros((len(rows), width), np.int64) if packed else None
    hidden: list[npt.NDArray[np.int64]] = []
    for r, row in enumerate(rows):
        start = 0
        for i, length in zip(row, lengths[r], strict=True):
            sample = samples[i]
            input_ids[r, start : start + length] = np.concatenate([sample.prompt_ids, sample.token_ids])[:length]
            if position_ids is not None:
                position_ids[r, start : start + length] = np.arange(length)
            hidden.append(np.flatnonzero(sample.loss_mask) + (r * width + start + len(sample.prompt_ids) - 1))
            start += length
    return MicroBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        hidden_T=np.concatenate(hidden),
        **flat_arrays(weighted, [i for row in rows for i in row]),
    )


def flat_arrays(weighted: Weighted, places: Sequence[int]) -> dict[str, Any]:
    """The fields [T] of a MicroBatch of these samples, which are the same in every layout."""
    flat = [weighted.samples[i] for i in places]
    counts = [sample.num_trainable for sample in flat]
    return {
        "targets_T": np.concatenate([s.token_ids[s.loss_mask] for s in flat]).astype(np.int64),
        "behaviour_T": np.concatenate([s.behaviour_logprobs[s.loss_mask] for s in flat]).astype(np.float32),
        "advantages_T": np.repeat(np.array([s.advantage for s in flat], np.float64), counts),
        "weights_T": np.repeat(weighted.objective_N[list(places)], counts),
        "likelihood_weights_T": np.repeat(weighted.likelihood_N[list(places)], counts),
        "temperature_T": np.repeat(np.array([s.temperature for s in flat], np.float64), counts),
        "sample_T": np.repeat(np.arange(len(flat)), counts),
        "samples": tuple(places),
    }
