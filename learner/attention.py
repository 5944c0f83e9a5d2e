"""Attention over the blocks of the shared layout (`learner/sharing.py`), for transformers models.

Plain matrix products: on a CPU the backward pass of torch's fused attention took 42 % of a step on rows of 100 tokens, and products in
its place took a third off the whole step. Grouped-query heads are laid side by side as queries, so keys and values are never repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from learner.packing import Block

NAME = "rlsys_blocks"
"""Under which transformers finds it."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """Where the rows of one block stand among (token, head) rows, and its additive mask."""

    queries: Tensor
    """[blocks rows * kv heads * heads per kv head * queries]"""
    keys: Tensor
    """[block rows * kv heads * keys]"""
    mask: Tensor
    """[block rows * kv heads, heads per kv head * queries, keys], 0 or -inf."""


class BlockPlan:
    """The blocks of one micro-batch as indices on the device; made once, used by every layer."""

    def __init__(
        self, blocks: Sequence[Block], num_tokens: int, heads: int, kv_heads: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        """`dtype` is that of the attention products."""
        self.heads, self.kv_heads = heads, kv_heads
        shared = heads // kv_heads
        kv, group = np.arange(kv_heads)[:, None, None], np.arange(shared)[None, :, None]
        self.rows: list[_Rows] = []
        output = np.zeros((num_tokens, heads), np.int64)
        start = 0
        for block in blocks:
            rows, width = block.queries.shape
            queries = block.queries[:, None, None, :] * heads + kv * shared + group
            keys = block.keys[:, None, :] * kv_heads + kv[:, 0]
            mask = np.where(block.visible, np.float32(0), np.float32(-np.inf))[:, None, None]
            mask = np.broadcast_to(mask, (rows, kv_heads, shared, *mask.shape[-2:]))
            place = start + np.arange(queries.size).reshape(rows, heads, width).transpose(0, 2, 1)
            output[block.queries[block.real]] = place[block.real]
            start += queries.size
            self.rows.append(
                _Rows(
                    torch.from_numpy(queries.reshape(-1)).to(device),
                    torch.from_numpy(keys.reshape(-1)).to(device),
                    torch.from_numpy(mask.reshape(rows * kv_heads, shared * width, -1).copy()).to(device, dtype),
                )
            )
        self.output = torch.from_numpy(output.reshape(-1)).to(device)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    block_plan: BlockPlan,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """query [1, heads, N, D], key and value [1, kv heads, N, D] to outputs [1, N, heads, D]. The interface of transformers."""
    if sliding_window is not None or softcap is not None or s_aux is not None:
        raise NotImplementedError(f"{type(module).__name__}: layout 'shared' has no sliding window, soft cap or sinks; use layout 'sorted'")
    plan, width = block_plan, int(query.shape[-1])
    queries, keys, values = (x.transpose(1, 2).reshape(-1, width) for x in (query * scaling, key, value))
    outputs = []
    for rows in plan.rows:
        batch, _, num_keys = rows.mask.shape
        block_queries = queries.index_select(0, rows.queries).view(batch, -1, width)
        block_keys = keys.index_select(0, rows.keys).view(batch, num_keys, width)
        block_values = values.index_select(0, rows.keys).view(batch, num_keys, width)
        scores = torch.baddbmm(rows.mask, block_queries.to(rows.mask.dtype), block_keys.to(rows.mask.dtype).transpose(1, 2))
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(rows.mask.dtype)
        outputs.append(torch.bmm(weights, block_values.to(rows.mask.dtype)).view(-1, width))
    flat = torch.cat(outputs).index_select(0, plan.output)
    return flat.view(1, -1, plan.heads, width), None


AttentionInterface.register(NAME, attend)
