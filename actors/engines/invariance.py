"""Decoding in tiles, so that no bit of a sample depends on its neighbours.

A matrix product of n rows may round differently from one of m rows, because other kernels are chosen. With a fixed number of rows, padded
where fewer samples run, the kernels are the same at each step. What is left, that a row's place in its tile and the masked end of its
context change nothing, is promised by no library, so it is measured before the first sample. The order in which numbers are added does not
depend on the numbers, so random ones show it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from actors.engines.decoder import Decoder
from actors.engines.sampling import draw
from actors.engines.slots import Rows

TILES = (16, 8, 4, 2, 1)
"""Rows of a tile, the first that holds is taken: wider ones are faster when many samples run, narrower ones for the last few."""
LANES = 64
"""Logits are padded to a multiple of this, more than any vector register holds, so that rows end where registers do."""
ORDERS = 4
"""Random orders of a tile's rows that are tried."""
SHORTEST = 64
"""Attention reads this many cached tokens, or twice as many, and so on, whichever first holds the longest sample of a tile."""


class Invariance:
    """The width of a tile, and how far the context is cut, for one decoder whose weights are loaded and whose cache nothing uses.

    Neither depends on the number of slots, so other fleets sample the same bits.
    """

    def __init__(self, decoder: Decoder, max_context: int) -> None:
        self._contexts: tuple[int, ...] = (max_context,)
        self.width = next(width for width in TILES if not _place_matters(decoder, width, max_context))
        contexts = (*_shorter(max_context), max_context)
        if not any(_length_matters(decoder, self.width, a, b) for a, b in pairwise(contexts)):
            self._contexts = contexts
        decoder.clear()

    def tiles(self, rows: Rows) -> Iterator[tuple[int, Rows]]:
        """(first row, rows) of each tile."""
        for first in range(0, len(rows.places), self.width):
            yield first, rows.tile(first, self.width)

    def context(self, rows: Rows) -> int:
        """How many cached tokens attention reads."""
        longest = int(rows.places.max()) + 1
        return next(context for context in self._contexts if context >= longest)


def padded(slots: int) -> int:
    """Rows of the cache, so that every tile has all of its rows."""
    return -(-slots // TILES[0]) * TILES[0]


def widen(logits: Tensor) -> Tensor:
    """Logits [n, vocabulary] with columns that are never drawn, up to a multiple of LANES."""
    return pad(logits, (0, -logits.shape[1] % LANES), value=-torch.inf)


def _shorter(max_context: int) -> Iterator[int]:
    """Contexts that are told apart from the longest: few enough to try them all."""
    context = SHORTEST
    while context < max_context:
        yield context
        context *= 2


def _place_matters(decoder: Decoder, width: int, context: int) -> bool:
    """Whether any bit depends on a row's place in a tile. One row has but one place."""
    rng = np.random.default_rng(0)
    orders = [np.arange(width)] + [rng.permutation(width) for _ in range(ORDERS if width > 1 else 0)]
    as_is, *others = [(order, _decode(decoder, order, context, context)) for order in orders]
    return any(not np.array_equal(found, as_is[1][:, order]) for order, found in others)


def _length_matters(decoder: Decoder, width: int, shorter: int, longer: int) -> bool:
    """Whether any bit depends on how much of the context is masked."""
    order = np.arange(width)
    return not np.array_equal(_decode(decoder, order, shorter, shorter), _decode(decoder, order, shorter, longer))


def _decode(decoder: Decoder, order: npt.NDArray[np.int64], reach: int, context: int) -> npt.NDArray[np.float64]:
    """Logits, a drawn token and its log-prob, [vocabulary + 2, n], of n random rows that stand in `order`, at places below `reach`."""
    rng, n = np.random.default_rng(1), len(order)
    ids, places = rng.integers(0, decoder.architecture.vocabulary, n)[order], rng.integers(0, reach, n)[order]
    uniform = rng.random(n)[order]
    decoder.scribble(order.tolist())
    device = decoder.weights.device
    logits = decoder.decode(torch.from_numpy(ids).to(device), torch.from_numpy(places).to(device), context)
    drawn, logprobs = draw(widen(logits), uniform, np.ones(n, np.float32), np.ones(n, np.float32), np.zeros(n, np.int64))
    return np.concatenate([logits.double().cpu().numpy().T, drawn[None], logprobs[None]])
