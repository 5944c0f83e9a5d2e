"""The shared layout: the samples of a group share one pass over their prompt, and nothing is padded outside attention.

A micro-batch is one row of N tokens: every shared prompt once, then every sample without it. Linear layers see these N tokens. Attention
runs over blocks of padded queries and keys that are gathered from the row: the next QUERIES tokens of several samples of about one length,
whose keys are their prompt's and their own so far. Gradients through a shared prompt add up, so the result is that of separate rows.
With `share` off every sample keeps its prompt: that is layout `packed` on a CPU, where no [tokens, tokens] mask is needed.

A group of 8 with prompts and completions of about one length costs 9/16 of the tokens of separate rows. Blocks hold [queries, keys] in full,
which is meant for short samples: see `SHARED_LONGEST`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from learner.packing import Block, MicroBatch, TrainSample, Weighted, assign, flat_arrays

Units = list[list[int]]
"""Samples (places) that share a prompt, for each prompt."""

SHARED_LONGEST = 1024
"""Longest sample in tokens for which layout `auto` shares prompts on a CPU. Measured up to 400 only, where it is well ahead."""

QUERIES = 64
"""Queries of a sample in one block: the next ones stand in another block, so that about half of what is after them is never computed."""

BLOCK_SCORES = 2**17
"""Products of queries and keys in one attention block, for each head: few enough for the cache and for rows of about one length."""


def plan_shared(
    samples: Sequence[TrainSample], useful: Sequence[int], budget: int, ranks: int, rank: int, *, share: bool = True
) -> list[Units]:
    """This rank's micro-batches of at most `budget` tokens (or one unit, if that is longer). Every rank's share is about the same.

    A group is cut in parts where it would be more than a quarter of a rank's share, so that ranks can be balanced. Without `share`
    every sample is a unit of its own.
    """
    total = sum(len(samples[i].prompt_ids) + samples[i].length for i in useful)
    units = _units(samples, useful, limit=min(budget, -(-total // (4 * ranks)))) if share else [[i] for i in useful]
    costs = [_cost(samples, unit) for unit in units]
    mine = sorted(assign(costs, ranks)[rank], key=lambda u: (-max(samples[i].length for i in units[u]), u))
    batches: list[Units] = []
    room = 0
    for u in mine:
        if not batches or costs[u] > room:
            batches.append([])
            room = budget
        batches[-1].append(units[u])
        room -= costs[u]
    return batches


def _units(samples: Sequence[TrainSample], useful: Sequence[int], limit: int) -> Units:
    by_prompt: dict[tuple[int, bytes], list[int]] = {}
    for i in useful:
        by_prompt.setdefault((samples[i].group_id, samples[i].prompt_ids.tobytes()), []).append(i)
    units: Units = []
    for places in by_prompt.values():
        units.append([])
        for i in sorted(places, key=lambda i: (-samples[i].length, i)):
            if units[-1] and _cost(samples, [*units[-1], i]) > limit:
                units.append([])
            units[-1].append(i)
    return units


def _cost(samples: Sequence[TrainSample], unit: list[int]) -> int:
    prompt = len(samples[unit[0]].prompt_ids)
    return prompt + sum(samples[i].length - prompt for i in unit)


def build_shared(weighted: Weighted, units: Units) -> MicroBatch:
    """Lay the samples of `units` (places in `weighted.samples`) out in one row, with the blocks that attention runs over."""
    samples = weighted.samples
    places = [i for unit in units for i in unit]
    flat = [samples[i] for i in places]
    unit_of = np.repeat(np.arange(len(units)), [len(unit) for unit in units])
    prompts = [samples[unit[0]].prompt_ids[: None if len(unit) > 1 else 0] for unit in units]
    prompt_lengths = np.array([len(p) for p in prompts])
    shared_lengths = prompt_lengths[unit_of]
    own_lengths = np.array([s.length for s in flat]) - shared_lengths
    starts = np.concatenate([[0], np.cumsum(np.concatenate([prompt_lengths, own_lengths]))])
    prompt_starts, own_starts = starts[: len(units)], starts[len(units) : -1]

    inputs, positions, hidden = list(prompts), [np.arange(n) for n in prompt_lengths], []
    for s, u, skip, start in zip(flat, unit_of, shared_lengths, own_starts, strict=True):
        inputs.append(np.concatenate([s.prompt_ids, s.token_ids])[skip : s.length])
        positions.append(np.arange(skip, s.length))
        predicting = np.flatnonzero(s.loss_mask) + len(s.prompt_ids) - 1
        hidden.append(predicting + np.where(predicting < skip, prompt_starts[u], start - skip))

    alone = shared_lengths == 0
    nothing = np.zeros(len(units) + int(alone.sum()), np.int64)
    blocks = _blocks(
        nothing,
        nothing,
        np.concatenate([prompt_starts, own_starts[alone]]),
        np.concatenate([prompt_lengths, own_lengths[alone]]),
    )
    of = unit_of[~alone]
    blocks += _blocks(prompt_starts[of], prompt_lengths[of], own_starts[~alone], own_lengths[~alone])
    return MicroBatch(
        input_ids=np.concatenate(inputs).astype(np.int64)[None],
        position_ids=np.concatenate(positions).astype(np.int64)[None],
        hidden_T=np.concatenate(hidden),
        blocks=tuple(blocks),
        **flat_arrays(weighted, places),
    )


Places = npt.NDArray[np.int64]


def _blocks(before_starts: Places, before_lengths: Places, starts: Places, lengths: Places) -> list[Block]:
    """Attention of sequences [start, start + length) that also see all of [before start, before start + before length)."""
    blocks = []
    for first in range(0, int(lengths.max(initial=0)), QUERIES):
        until = np.minimum(lengths, first + QUERIES)
        order = np.argsort(-lengths, kind="stable")
        order = order[lengths[order] > first]
        while len(order):
            width = int(until[order[0]])
            count = max(1, BLOCK_SCORES // ((width - first) * (width + int(before_lengths[order].max()))))
            rows, order = order[:count], order[count:]
            blocks.append(_block(before_starts[rows], before_lengths[rows], starts[rows], until[rows], first))
    return blocks


def _block(before_starts: Places, before_lengths: Places, starts: Places, until: Places, first: int) -> Block:
    """Queries are the places from `first` to `until` of each sequence, keys those before it and its own up to `until`."""
    before, before_real = _padded(before_starts, before_lengths)
    own, _ = _padded(starts, until)
    queries, real = _padded(starts + first, until - first)
    causal = np.arange(own.shape[1]) <= first + np.arange(queries.shape[1])[:, None]
    visible = np.concatenate(
        [
            np.broadcast_to(before_real[:, None, :], (len(starts), queries.shape[1], before.shape[1])),
            np.broadcast_to(causal, (len(starts), *causal.shape)),
        ],
        axis=2,
    )
    return Block(queries=queries, real=real, keys=np.concatenate([before, own], axis=1), visible=visible)


def _padded(starts: Places, lengths: Places) -> tuple[Places, npt.NDArray[np.bool_]]:
    """Places start..start+length-1 in rows of one width, padded with place 0; and which are real."""
    columns = np.arange(lengths.max())
    real = columns < lengths[:, None]
    return np.where(real, starts[:, None] + columns, 0), real
