"""Deaths do not shorten what is trained on: samples that died are drawn again with their own seeds, so long ones stay long.

Generators with the simulated engine sample 20,000 completions with a long tail of lengths on a clock that the test moves. Again and again one
is killed with all that it runs, which hits long samples far more often than short ones. The real custody says what must be issued again.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from actors.custody import Custody
from actors.dispatcher import sample_seed
from actors.engines import EngineOptions, SampleRequest, Sampling
from actors.engines.simulated import SimulatedEngine
from protocol.messages import Version
from tests.directories import tokenizer_directory

pytestmark = pytest.mark.slow

SAMPLES, SIZE, SLOTS, FLEET = 20_000, 8, 64, 4
STEP_S = 0.25
"""How far the clock is moved at a time: short beside the 8 s of a mean sample."""
LENGTHS = {"mean": 400.0, "sigma": 1.2, "cap": 4096}


class Fleet:
    """Generators on one clock. `seed_of` names the random number of (group, index, attempt)."""

    def __init__(self, directory: Path, seed_of: Callable[[int, int, int], int], kill_every_s: float | None) -> None:
        self._directory, self._seed_of, self._kill_every_s = directory, seed_of, kill_every_s
        self.now = 0.0
        self.custody = Custody()
        self.engines: dict[str, SimulatedEngine] = {}
        self.running: dict[str, int] = {}
        self.tasks: dict[str, tuple[int, int, list[int]]] = {}
        self.lengths: dict[tuple[int, int], int] = {}
        self.hit: set[tuple[int, int]] = set()
        self._starts = 0
        for _ in range(FLEET):
            self._start()

    def _start(self) -> None:
        self._starts += 1
        extra = {"tokens_per_s_sample": 50.0, "tokens_per_s": 50.0 * SLOTS, "lengths": LENGTHS}
        options = EngineOptions(model_path=self._directory, max_context=8192, slots=SLOTS, extra=extra)
        engine = SimulatedEngine(options, clock=lambda: self.now)
        engine.load_weights(self._directory, Version(0))
        self.engines[f"generator@{self._starts}"] = engine
        self.running[f"generator@{self._starts}"] = 0

    def _give(self, name: str, group: int, attempt: int, indices: list[int]) -> None:
        request_id = f"{group}/{attempt}"
        self.tasks[request_id] = (group, attempt, indices)
        self.custody.issued(group, attempt, indices, name)
        self.running[name] += len(indices)
        seeds = tuple(self._seed_of(group, i, attempt) for i in indices)
        sampling = Sampling(max_tokens=4096, stop_token_ids=(2,))
        self.engines[name].submit(SampleRequest(request_id=request_id, prompt_ids=np.array([1], np.int32), seeds=seeds, sampling=sampling))

    def run(self) -> npt.NDArray[np.int64]:
        """Sample everything; the lengths by sample."""
        rng = random.Random(1)
        new = deque(range(SAMPLES // SIZE))
        again: deque[tuple[int, int, list[int]]] = deque()
        next_kill = rng.expovariate(1 / self._kill_every_s) if self._kill_every_s else float("inf")
        while len(self.lengths) < SAMPLES:
            for name in self.engines:
                while self.running[name] < SLOTS and (again or new):
                    self._give(name, *(again.popleft() if again else (new.popleft(), 0, list(range(SIZE)))))
            self.now = min(next_kill, self.now + STEP_S)
            for name, engine in self.engines.items():
                for sampled in engine.step(0.0):
                    self.running[name] -= 1
                    group, attempt, indices = self.tasks[sampled.request_id]
                    index = indices[sampled.position]
                    self.lengths.setdefault((group, index), len(sampled.token_ids))
                    self.custody.journaled([(group, index, attempt)])
            if self.now >= next_kill:
                next_kill = self.now + rng.expovariate(1 / self._kill_every_s) if self._kill_every_s else float("inf")
                dead = rng.choice(sorted(self.engines))
                self.engines.pop(dead).close()
                self.custody.died(dead)
                self._start()
                self.custody.ask([])
                for group, lost in (self.custody.settle() or {}).items():
                    self.hit |= {(group, i) for i in lost}
                    again.append((group, self.custody.attempt(group), lost))
        return np.array([self.lengths[key] for key in sorted(self.lengths)])


def kolmogorov_smirnov(a: npt.NDArray[np.int64], b: npt.NDArray[np.int64]) -> float:
    """p of the two-sample test, from the asymptotic distribution (Numerical Recipes, 14.3.3): small when the distributions differ."""
    points = np.union1d(a, b)
    distance = np.abs(np.searchsorted(np.sort(a), points, "right") / len(a) - np.searchsorted(np.sort(b), points, "right") / len(b)).max()
    n = np.sqrt(len(a) * len(b) / (len(a) + len(b)))
    x = (n + 0.12 + 0.11 / n) * distance
    if x < 0.2:
        return 1.0  # the series below converges too slowly there; its value is 1 to 12 places
    j = np.arange(1, 101)
    return float(np.clip(2 * np.sum((-1.0) ** (j - 1) * np.exp(-2 * j**2 * x**2)), 0, 1))


def own_seed(group: int, index: int, attempt: int) -> int:
    return sample_seed(7, group, index)


def fresh_seed(group: int, index: int, attempt: int) -> int:
    return sample_seed(7 + 1000 * attempt, group, index)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tokenizer_directory(tmp_path_factory.mktemp("model"))
    (directory / "config.json").write_text('{"vocab_size": 97}')
    (directory / "model.safetensors").touch()
    return directory


@pytest.fixture(scope="module")
def undisturbed(directory: Path) -> npt.NDArray[np.int64]:
    return Fleet(directory, lambda g, i, a: sample_seed(8, g, i), None).run()


def test_lengths_are_those_of_a_run_without_faults(directory: Path, undisturbed: npt.NDArray[np.int64]) -> None:
    """Against a run with other seeds, so that equality is not by construction."""
    fleet = Fleet(directory, own_seed, kill_every_s=3.0)
    lengths = fleet.run()
    assert len(lengths) == SAMPLES
    assert len(fleet.hit) >= 0.2 * SAMPLES
    assert kolmogorov_smirnov(lengths, undisturbed) > 0.01


def test_fresh_seeds_would_be_noticed(directory: Path, undisturbed: npt.NDArray[np.int64]) -> None:
    fleet = Fleet(directory, fresh_seed, kill_every_s=3.0)
    lengths = fleet.run()
    assert len(fleet.hit) >= 0.2 * SAMPLES
    assert lengths.mean() < 0.97 * undisturbed.mean(), "long samples are hit more often, and drawn shorter the second time"
    assert kolmogorov_smirnov(lengths, undisturbed) < 0.01
