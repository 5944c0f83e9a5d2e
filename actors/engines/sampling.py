"""Drawing tokens: random numbers that depend on (seed, position) alone, and the draw itself for many rows at once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FloatArray = npt.NDArray[np.float32] | npt.NDArray[np.float64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64: a bijection of 64-bit words in which every input bit moves every output bit."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniforms(seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1), one per row, multiples of 2**-53: the output number `positions[i]` of splitmix64 started at a hash of `seeds[i]`.

    The seed is hashed first, so that neighbouring seeds do not give shifted copies of one sequence.
    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014), figure 14 with the constants of variant 13.
    """
    start = _mix(seeds + _GOLDEN)
    words = _mix(start + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw(
    logits: Tensor, uniform: npt.NDArray[np.float64], temperature: FloatArray, top_p: FloatArray, top_k: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """One token for each of n rows, by inverting the cumulative distribution at `uniform`.

    logits [n, vocabulary] on any device, the others [n]. `top_k` 0 and `top_p` 1 are off; temperature 0 takes the largest logit.
    top-k comes first, top-p then keeps the smallest set whose share of what is left reaches `top_p` (the order of transformers and vLLM).

    Returns token ids [n] and their log_softmax(logits / temperature) [n] before top-k and top-p (temperature 0: of the unscaled logits).
    A row with a logit that is not a number has a log-prob that is not a number; the caller checks.
    """
    device = logits.device
    greedy = temperature == 0
    logits = logits.float()
    logits = logits - logits.amax(-1, keepdim=True)  # before the division, which may then overflow downwards only
    if not np.all(greedy | (temperature == 1)):
        logits = logits / torch.from_numpy(np.where(greedy, 1, temperature).astype(np.float32)).to(device)[:, None]
    weights = logits.exp()
    cumulative = weights.cumsum(-1, dtype=torch.float64)  # in double, so that rare tokens of a large vocabulary keep their share
    total = cumulative[:, -1:]
    points = torch.from_numpy(uniform).to(device)[:, None]
    # u < 1 makes u * total < total also after rounding, so the first entry above it exists and has weight > 0
    ids: Tensor = torch.searchsorted(cumulative, points * total, right=True).clamp_(max=logits.shape[1] - 1)
    filtered = np.flatnonzero(~greedy & ((top_k > 0) | (top_p < 1)))
    if len(filtered):
        rows = torch.from_numpy(filtered).to(device)
        ids[rows] = _draw_filtered(weights[rows], points[rows], top_p[filtered], top_k[filtered])
    if greedy.any():
        ids = torch.where(torch.from_numpy(greedy).to(device)[:, None], logits.argmax(-1, keepdim=True), ids)
    logprobs = logits.gather(1, ids).double() - total.log()
    return ids[:, 0].cpu().numpy(), logprobs[:, 0].float().cpu().numpy()


def _draw_filtered(weights: Tensor, points: Tensor, top_p: FloatArray, top_k: npt.NDArray[np.int64]) -> Tensor:
    """Token ids [m, 1] from what top-k and then top-p leave of unnormalised `weights` [m, vocabulary]; `points` [m, 1] in [0, 1)."""
    vocabulary = weights.shape[1]
    ordered, order = weights.sort(stable=True, dim=-1, descending=True)
    most = torch.from_numpy(np.where(top_k > 0, top_k, vocabulary)).to(weights.device)[:, None]
    ordered = ordered * (torch.arange(vocabulary, device=weights.device) < most)
    cumulative = ordered.cumsum(-1, dtype=torch.float64)
    share = torch.from_numpy(top_p.astype(np.float64)).to(weights.device)[:, None]
    ordered = ordered * (cumulative - ordered < share * cumulative[:, -1:])
    cumulative = ordered.cumsum(-1, dtype=torch.float64)
    places: Tensor = torch.searchsorted(cumulative, points * cumulative[:, -1:], right=True).clamp_(max=vocabulary - 1)
    return order.gather(1, places)
