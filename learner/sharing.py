"""The shared layout: the samples of a group share one pass over their prompt, and nothing is padded outside attention.

A micro-batch is one row of N tokens: every prompt once, then every completion. Linear layers see these N tokens. Attention runs over
blocks of padded queries and keys that are gathered from the row: one block of prompts, and blocks of completions of about one length, whose
keys are their prompt's and their own. Gradients through a shared prompt add up, so the result is that of separate rows.

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

BLOCK_SCORES = 2**18
"""Products of queries and keys in one attention block, for each head: few enough for the cache and for rows of about one length."""


def plan_shared(samples: Sequence[TrainSample], useful: Sequence[int], budget: int, ranks: int, rank: int) -> list[Units]:
    """This rank's micro-batches of at most `budget` tokens (or one unit, if that is longer). Every rank's share is about the same.

    A group is cut in parts where it would be more than a quarter of a rank's share, so that ranks can be balanced.
    """
    total = sum(len(samples[i].prompt_ids) + samples[i].length for i in useful)
    units = _units(samples, useful, limit=min(budget, -(-total // (4 * ranks))))
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
    prompts = [samples[unit[0]].prompt_ids for unit in units]
    prompt_lengths = np.array([len(p) for p in prompts])
    own_lengths = np.array([s.length - len(s.prompt_ids) for s in flat])
    starts = np.concatenate([[0], np.cumsum(np.concatenate([prompt_lengths, own_lengths]))])
    prompt_starts, own_starts = starts[: len(units)], starts[len(units) : -1]

    own_inputs = [s.token_ids[:n] for s, n in zip(flat, own_lengths, strict=True)]
    positions = [np.arange(n) for n in prompt_lengths]
    positions += [np.arange(n) + len(s.prompt_ids) for s, n in zip(flat, own_lengths, strict=True)]
    hidden = []
    for s, u, start in zip(flat, unit_of, own_starts, strict=True):
        trained = np.flatnonzero(s.loss_mask)
        hidden.append(np.where(trained == 0, prompt_starts[u] + len(s.prompt_ids) - 1, start + trained - 1))

    blocks = [_prompt_block(prompt_starts[rows], prompt_lengths[rows]) for rows in _rows(prompt_lengths, prompt_lengths)]
    for rows in _rows(own_lengths, own_lengths + prompt_lengths[unit_of]):
        of = unit_of[rows]
        blocks.append(_completion_block(prompt_starts[of], prompt_lengths[of], own_starts[rows], own_lengths[rows]))
    return MicroBatch(
        input_ids=np.concatenate([*prompts, *own_inputs]).astype(np.int64)[None],
        position_ids=np.concatenate(positions).astype(np.int64)[None],
        hidden_T=np.concatenate(hidden),
        blocks=tuple(blocks),
        **flat_arrays(weighted, places),
    )


def _rows(queries: npt.NDArray[np.int64], keys: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """Rows of each block: those with queries, the longest first, until a block holds BLOCK_SCORES."""
    order = [int(i) for i in np.argsort(-queries, kind="stable") if queries[i]]
    blocks = []
    while order:
        count = max(1, BLOCK_SCORES // int(queries[order[0]] * keys.max()))
        blocks.append(np.array(order[:count]))
        order = order[count:]
    return blocks


def _prompt_block(starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> Block:
    tokens, real = _padded(starts, lengths)
    width = tokens.shape[1]
    causal = np.tril(np.ones((width, width), np.bool_))
    return Block(queries=tokens, real=real, keys=tokens, visible=np.broadcast_to(causal, (len(starts), width, width)))


def _completion_block(
    prompt_starts: npt.NDArray[np.int64],
    prompt_lengths: npt.NDArray[np.int64],
    own_starts: npt.NDArray[np.int64],
    own_lengths: npt.NDArray[np.int64],
) -> Block:
    prompt, prompt_real = _padded(prompt_starts, prompt_lengths)
    own, real = _padded(own_starts, own_lengths)
    width = own.shape[1]
    causal = np.tril(np.ones((width, width), np.bool_))
    visible = np.concatenate(
        [
            np.broadcast_to(prompt_real[:, None, :], (len(own), width, prompt.shape[1])),
            np.broadcast_to(causal, (len(own), width, width)),
        ],
        axis=2,
    )
    return Block(queries=own, real=real, keys=np.concatenate([prompt, own], axis=1), visible=visible)


def _padded(starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Places start..start+length-1 in rows of one width, padded with place 0; and which are real."""
    columns = np.arange(lengths.max())
    real = columns < lengths[:, None]
    return np.where(real, starts[:, None] + columns, 0), real
