"""The forward pass of a decoder over a static cache: `prefill` for whole prompts, `decode` for one token of each running sample.

Shapes: n rows, B prompts of up to P tokens, L layers, H heads, K key-value heads, G = H / K, D head size, C hidden, T cached tokens.
Norms, softmax and rotations are computed in float32 whatever the dtype of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, rms_norm, scaled_dot_product_attention, silu

from actors.engines.architecture import read_architecture
from actors.engines.decoder_weights import Layer, Weights


class Decoder:
    """Weights and cache of a model. Row r of the cache belongs to the sample in slot r; the caller keeps track of lengths."""

    def __init__(self, model_path: Path, *, slots: int, max_context: int, dtype: torch.dtype, device: torch.device) -> None:
        self.architecture = a = read_architecture(model_path, max_context)
        self.weights = Weights(a, dtype, device)
        angles = torch.outer(torch.arange(max_context, dtype=torch.float32), a.frequencies)
        self._rotations = torch.polar(torch.full_like(angles, a.rotary_scale), angles).to(device)
        """[max_context, D / 2] complex"""
        self._keys = torch.zeros(a.layers, slots, a.kv_heads, a.head_dim, max_context, dtype=dtype, device=device)
        """Transposed, so that scores are a plain product: on a CPU 1.1 (float32) to 1.8 (bfloat16) times as fast as row by row."""
        self._values = torch.zeros(a.layers, slots, a.kv_heads, max_context, a.head_dim, dtype=dtype, device=device)
        self._columns = torch.arange(max_context, device=device)
        self._rows = torch.arange(slots, device=device)

    def decode(self, ids: Tensor, positions: Tensor, context: int, first: int = 0) -> Tensor:
        """Logits [n, vocabulary] after `ids` [n], which stand at `positions` [n] of rows first..first+n-1 and are added to the cache.

        Attention reads the first `context` cached tokens, of which each row sees those up to its position.
        """
        a, n = self.architecture, len(ids)
        rows, rotations = self._rows[first : first + n], self._rotations[positions][:, None]
        hidden = embedding(ids, self.weights.embedding)
        mask = hidden.new_zeros(n, context).masked_fill_(self._columns[:context] > positions[:, None], -torch.inf)
        mask = mask[:, None].expand(n, a.kv_heads, context).reshape(n * a.kv_heads, 1, context)
        for layer, keys, values in zip(self.weights.layers, self._keys, self._values, strict=True):
            query, key, value = self._project(layer, hidden, rotations)
            keys[rows, :, :, positions] = key
            values[rows, :, positions] = value
            query = query.reshape(n * a.kv_heads, a.heads // a.kv_heads, a.head_dim)
            seen_keys = keys[first : first + n].view(n * a.kv_heads, a.head_dim, -1)[:, :, :context]
            seen_values = values[first : first + n].view(n * a.kv_heads, -1, a.head_dim)[:, :context]
            scores = torch.baddbmm(mask, query, seen_keys, alpha=a.head_dim**-0.5)
            hidden = self._finish(layer, hidden, torch.bmm(scores.softmax(-1), seen_values).view(n, -1))
        return self._logits(hidden)

    def prefill(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run B prompts from their first token, `ids` [B, P] padded on the right. The cache is left alone.

        Returns hidden states [B, P, C] before the last norm, keys [L, B, K, D, P] and values [L, B, K, P, D];
        what stands at padding means nothing.
        """
        a, (batch, length) = self.architecture, ids.shape
        rotations = self._rotations[:length].repeat(batch, 1)[:, None]
        hidden = embedding(ids.flatten(), self.weights.embedding)
        keys = hidden.new_empty(a.layers, batch, a.kv_heads, a.head_dim, length)
        values = hidden.new_empty(a.layers, batch, a.kv_heads, length, a.head_dim)
        for i, layer in enumerate(self.weights.layers):
            query, key, value = (x.view(batch, length, -1, a.head_dim).transpose(1, 2) for x in self._project(layer, hidden, rotations))
            keys[i], values[i] = key.transpose(-1, -2), value
            mixed = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=a.heads != a.kv_heads)
            hidden = self._finish(layer, hidden, mixed.transpose(1, 2).reshape(batch * length, -1))
        return hidden.view(batch, length, -1), keys, values

    def fill(self, row: int, keys: Tensor, values: Tensor) -> None:
        """Set the first p tokens of a cache row: keys [L, K, D, p], values [L, K, p, D]."""
        length = values.shape[2]
        self._keys[:, row, :, :, :length] = keys
        self._values[:, row, :, :length] = values

    def clear(self) -> None:
        """Zero the cache, so that what is not a number in it cannot spread: a hidden token weighs 0, and 0 x nan is nan."""
        self._keys.zero_()
        self._values.zero_()

    def scribble(self, order: Sequence[int]) -> None:
        """Fill the first len(order) rows of the cache with random numbers, row i with those of number order[i]: for checks."""
        for row, number in enumerate(order):
            generator = torch.Generator(self._keys.device).manual_seed(number)
            self._keys[:, row].normal_(generator=generator)
            self._values[:, row].normal_(generator=generator)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of cache row `source` to row `target`."""
        self.fill(target, self._keys[:, source, :, :, :length], self._values[:, source, :, :length])

    def score(self, ids: Tensor, start: int, temperature: float) -> Tensor:
        """Log-probs [P - start] of ids[start:] of one sequence `ids` [P], float32, scaled by `temperature` (0: unscaled)."""
        hidden = self.prefill(ids[None, :-1])[0][0, start - 1 :]
        logits = self._logits(hidden).float() / (temperature or 1.0)
        return logits.log_softmax(-1).gather(1, ids[start:, None])[:, 0]

    def _project(self, layer: Layer, hidden: Tensor, rotations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [n, H, D], rotated keys [n, K, D] and values [n, K, D] of `hidden` [n, C]."""
        a, n = self.architecture, len(hidden)
        fused = linear(self._norm(hidden, layer.input_norm), layer.qkv, layer.qkv_bias).view(n, -1, a.head_dim)
        turned = fused[:, : a.heads + a.kv_heads]
        if layer.head_norms is not None:
            turned = rms_norm(turned, (a.head_dim,), eps=a.norm_epsilon) * layer.head_norms
        pairs = torch.view_as_complex(turned.float().view(n, -1, a.head_dim // 2, 2))
        turned = torch.view_as_real(pairs * rotations).flatten(-2).to(hidden.dtype)
        return turned[:, : a.heads], turned[:, a.heads :], fused[:, a.heads + a.kv_heads :]

    def _finish(self, layer: Layer, hidden: Tensor, mixed: Tensor) -> Tensor:
        """The rest of a block: output projection of `mixed` [n, H D], then the MLP, each added to `hidden` [n, C]."""
        hidden = _add_linear(hidden, mixed, layer.output, layer.output_bias)
        gate, up = linear(self._norm(hidden, layer.mlp_norm), layer.gate_up, layer.gate_up_bias).chunk(2, -1)
        return _add_linear(hidden, silu(gate) * up, layer.down, layer.down_bias)

    def _logits(self, hidden: Tensor) -> Tensor:
        return linear(self._norm(hidden, self.weights.norm), self.weights.head)

    def _norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(hidden, weight.shape, weight, self.architecture.norm_epsilon)


def _add_linear(base: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """base [n, C] + x [n, I] @ weight [C, I]^T + bias, with one product that adds as it goes."""
    return torch.addmm(base if bias is None else base + bias, x, weight.t())
