"""Attention of packed rows on a CUDA device: torch's FlexAttention with the samples' borders as a block mask.

A dense mask of a row of L tokens has L x L numbers and is multiplied in full. Here blocks of 128 x 128 places of which no query sees a key are
never touched, so a row costs what its samples cost, and rows may be as long as a micro-batch. The list of blocks is made here in numpy, from
the borders alone; which places of a block on a border see each other is left to the kernel.

Source: Dong et al. 2024, "Flex Attention: A Programming Model for Generating Optimized Attention Kernels".
"""

# ruff: noqa: N815 (shapes stand in names)
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface

NAME = "rlsys_flex"
"""Under which transformers finds it."""

BLOCK = 128
"""Places of a block: the kernels' own, and what torch's block masks default to."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """For each row and each block of queries: the blocks of keys that it sees in part, and in full.

    Counts are [R, B], places [R, B, B] with the counted ones first; B blocks make up a row.
    """

    partial_counts_RB: npt.NDArray[np.int32]
    partial_RBB: npt.NDArray[np.int32]
    full_counts_RB: npt.NDArray[np.int32]
    full_RBB: npt.NDArray[np.int32]


def documents(position_ids_RL: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """Which sample of its row each place belongs to [R, L], counted from 0: positions start again at 0. Padding is samples of one place."""
    return np.asarray(np.cumsum(position_ids_RL == 0, axis=1) - 1, np.int32)


def find_blocks(documents_RL: npt.NDArray[np.int32]) -> Blocks:
    """Blocks in which a query sees a key of its own sample at or before its place.

    Samples stand one after the other, so an earlier block is seen if its last place is of the sample of the query block's first one, and in
    full if all places of both are of one sample. A query block sees itself in part. One that the row does not fill is never seen in full.
    """
    length = documents_RL.shape[1]
    starts = np.arange(0, length, BLOCK)
    ends = np.minimum(starts + BLOCK, length)
    first_RB, last_RB = documents_RL[:, starts], documents_RL[:, ends - 1]
    earlier_BB = starts[:, None] > starts[None, :]
    whole_B = ends - starts == BLOCK
    seen_RBB = (earlier_BB & (last_RB[:, None, :] == first_RB[:, :, None])) | np.eye(len(starts), dtype=np.bool_)
    full_RBB = seen_RBB & earlier_BB & whole_B[:, None] & (first_RB[:, None, :] == last_RB[:, :, None])
    return Blocks(*_listed(seen_RBB & ~full_RBB), *_listed(full_RBB))


def _listed(chosen_RBB: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    places = np.argsort(~chosen_RBB, axis=-1, kind="stable")
    return chosen_RBB.sum(-1).astype(np.int32), places.astype(np.int32)


def sees(documents_RL: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Whether the query at a place sees the key at another: the same sample, and not later."""

    def mask(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents_RL[row, query] == documents_RL[row, key])

    return mask


def block_mask(position_ids_RL: npt.NDArray[np.int64], device: torch.device) -> BlockMask:
    """The mask of one micro-batch of packed rows; made once, used by every layer."""
    documents_RL = documents(position_ids_RL)
    blocks = find_blocks(documents_RL)

    def place(array: npt.NDArray[np.int32]) -> Tensor:
        return torch.from_numpy(array[:, None]).to(device, non_blocking=True)  # one mask for all heads

    length = documents_RL.shape[1]
    return BlockMask.from_kv_blocks(
        place(blocks.partial_counts_RB),
        place(blocks.partial_RBB),
        place(blocks.full_counts_RB),
        place(blocks.full_RBB),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees(torch.from_numpy(documents_RL).to(device)),
        seq_lengths=(length, length),
    )


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    document_mask: BlockMask,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """query [R, heads, L, D], key and value [R, kv heads, L, D] to outputs [R, L, heads, D]. The interface of transformers."""
    if sliding_window is not None or softcap is not None or s_aux is not None:
        raise NotImplementedError(
            f"{type(module).__name__}: flex attention here has no sliding window, soft cap or sinks; use layout 'sorted'"
        )
    query, key = query.to(value.dtype), key.to(value.dtype)  # rotary positions may leave them in float32 under autocast
    run = _compiled() if query.device.type == "cuda" else flex_attention
    found = run(query, key, value, block_mask=document_mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
    return found.transpose(1, 2).contiguous(), None


@cache
def _compiled() -> Any:
    """One kernel for all layers and lengths. Uncompiled it would hold every score, as a dense mask does."""
    return torch.compile(flex_attention, dynamic=True)


AttentionInterface.register(NAME, attend)
