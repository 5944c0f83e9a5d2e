"""A plug-in of the SGLang server: each sample draws from its own `sampling_seed`.

SGLang honours `sampling_seed` only together with batch-invariant kernels, which cost throughput, rule out some attention backends, and on a
CPU need compiled operators. Drawing needs none of that: one uniform number per row, a hash of (seed, position), and the inverse of the
cumulative distribution. So the batch is given its seeds, and the draw that takes them is this one. A request without a seed gets one at
random, because a batch has seeds for all of its rows or for none.

The hash is splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014, figure 14), in wrapping int64.
"""

import random

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def _mix(z):
    """The finaliser of splitmix64; shifts of int64 bring the sign along, so it is masked off."""
    z = (z ^ ((z >> 30) & (2**34 - 1))) * _FIRST
    z = (z ^ ((z >> 27) & (2**37 - 1))) * _SECOND
    return z ^ ((z >> 31) & (2**33 - 1))


def uniforms(seeds, positions):
    """Numbers in [0, 1) as float64, one per row, for int64 `seeds` and `positions` of any device."""
    words = _mix(_mix(seeds + _GOLDEN) + (positions + 1) * _GOLDEN)
    return ((words >> 11) & (2**53 - 1)).double() * 2.0**-53


def draw(logprobs, seed, positions):
    """One column per row, [n, 1] as torch.multinomial returns it, with probability in proportion to exp(logprobs [n, m])."""
    import torch

    cumulative = logprobs.double().exp().cumsum(-1)
    points = uniforms(seed.long(), positions.long())[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, points, right=True).clamp_(max=logprobs.shape[1] - 1)


def register():
    """Called by SGLang once in each of its processes, before anything is sampled."""
    import torch
    from sglang.srt.layers import sampler
    from sglang.srt.sampling import sampling_batch_info

    batch_info = sampling_batch_info.SamplingBatchInfo
    build = batch_info.from_schedule_batch.__func__

    def with_seeds(cls, batch, *arguments, **options):
        info = build(cls, batch, *arguments, **options)
        seeds = [r.sampling_params.sampling_seed for r in batch.reqs]
        seeds = [random.getrandbits(62) if seed is None else seed for seed in seeds]
        info.sampling_seed = torch.tensor(seeds, dtype=torch.int64).to(info.temperatures.device, non_blocking=True)
        return info

    batch_info.from_schedule_batch = classmethod(with_seeds)
    sampler.multinomial_with_seed = draw
