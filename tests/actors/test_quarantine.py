"""The canary: weights that arrive whole and are wrong in the engine are found out, loaded once more, and nothing sampled with them counts."""

from __future__ import annotations

import shutil
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.engines import EngineOptions, Sampled, SampleRequest, Sampling
from actors.engines.conformance import check_conformance
from actors.engines.embedded import EmbeddedEngine
from actors.generator import Generator
from actors.weights import LOSSES, WeightsIntake
from protocol.canary import PROMPT_TOKENS, Canary, canary_ids, difference
from protocol.errors import InfrastructureFault, WeightsError
from protocol.manifest import publish
from protocol.messages import Completion, Credit, Event, Hello, Version, WeightsLoaded, WeightsReady
from protocol.node import Node
from tests.actors import tiny_models
from tests.actors.test_generator import task
from tests.ring import Ring

MODELS = 3


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, Path]]:
    """Versions 0, 1 and 2 of a model."""
    return [(model := tiny_models.build(seed=seed), tiny_models.save(model, tmp_path_factory.mktemp(f"m{seed}"))) for seed in range(MODELS)]


def published(root: Path, models: list[tuple[Any, Path]], number: int) -> WeightsReady:
    """A version with the canary that a learner would publish."""
    model, directory = models[number]
    ids = canary_ids(tiny_models.VOCABULARY)
    canary = Canary(ids, tiny_models.reference_logprobs(model, ids[:PROMPT_TOKENS], ids[PROMPT_TOKENS:], 1.0))
    done = publish(root, Version(number), "base", lambda d: shutil.copy(directory / "model.safetensors", d), canary=canary)  # type: ignore[arg-type]
    return WeightsReady(
        number=number, incarnation=0, directory=str(done.directory), manifest_sha256=done.manifest_sha256, num_bytes=done.num_bytes,
        published_s=0.0,
    )  # fmt: skip


class Misloading(EmbeddedEngine):
    """Puts the weights of another model in place when version 1 is loaded, the first `times` times."""

    times = 1
    other = Path()

    def load_weights(self, directory: Path, version: Version) -> float:
        if version.number == 1 and self.times:
            self.times -= 1
            return super().load_weights(self.other, version)
        return super().load_weights(directory, version)


class Scene:
    """A generator whose engine misloads version 1 `times` times."""

    def __init__(self, ring: Ring, models: list[tuple[Any, Path]], times: int) -> None:
        self.ring = ring
        self.dispatcher = ring.serve("dispatcher-0@1", "tasks")
        self.learner = ring.serve("learner-0@1", "weights")
        self.rewarder = ring.serve("rewarder-0@1", "completions")

        def body(node: Node) -> None:
            engine = Misloading(EngineOptions(model_path=models[0][1], max_context=tiny_models.CONTEXT, slots=4))
            engine.times, engine.other = times, models[2][1]
            Generator(node, engine, 2).run()

        self.role = ring.run("generator", body)
        ring.until(lambda: all(peer.of(Hello) for peer in (self.dispatcher, self.learner, self.rewarder)), "the generator greets")
        self.rewarder.tell(Credit(total=100), to=self.role.identity)

    def announce(self, ready: WeightsReady) -> None:
        self.learner.tell(ready, to=self.role.identity)

    def loads(self) -> list[WeightsLoaded]:
        return self.learner.of(WeightsLoaded)

    def events(self) -> list[Event]:
        return self.ring.control.of(Event, self.role.identity)


def test_wrong_weights_are_quarantined_loaded_again_and_leave_no_trace(ring: Ring, models: list[tuple[Any, Path]], tmp_path: Path) -> None:
    scene = Scene(ring, models, times=1)
    scene.announce(published(tmp_path / "w", models, 0))
    ring.until(lambda: any(c.total for c in scene.dispatcher.of(Credit)), "credit")
    assert scene.loads()[0].error == "" and scene.loads()[0].canary_error < 1e-4
    scene.announce(published(tmp_path / "w", models, 1))
    for group in (1, 2):
        scene.dispatcher.tell(task(group), to=scene.role.identity)
    ring.until(lambda: len(scene.rewarder.of(Completion)) == 4, "every sample ends once")
    ring.until(lambda: len(scene.loads()) == 3, "version 1 is loaded twice")
    wrong, right = scene.loads()[1:]
    assert "the canary's log-probs differ by" in wrong.error and wrong.canary_error > 0.1
    assert right.error == "" and right.canary_error < 1e-4 and right.number == 1
    ring.until(lambda: [e for e in scene.events() if e.name == "quarantine"], "the quarantine is told")
    for completion in scene.rewarder.of(Completion):
        start = 0
        for version, _, end in completion.spans.tolist():
            expected = tiny_models.reference_logprobs(models[version][0], completion.prompt_ids, completion.token_ids, 1.0)
            np.testing.assert_allclose(completion.behaviour_logprobs[start:end], expected[start:end], atol=1e-4)
            start = end


def test_weights_that_stay_wrong_end_the_actor_with_the_reason(ring: Ring, models: list[tuple[Any, Path]], tmp_path: Path) -> None:
    scene = Scene(ring, models, times=5)
    scene.role.expected = WeightsError
    scene.announce(published(tmp_path / "w", models, 0))
    scene.announce(published(tmp_path / "w", models, 1))
    ring.until(lambda: scene.role.error is not None, "the actor ends")
    assert "2 loads in a row failed, the last: the canary's log-probs differ" in str(scene.role.error)


class Losing(EmbeddedEngine):
    """Loses what it samples with, as an engine does whose server dies, at the calls of `score` and `step` that are named, counted from 1."""

    def __init__(self, options: EngineOptions, scores: Container[int] = (), steps: Container[int] = ()) -> None:
        super().__init__(options)
        self.scores, self.steps, self.scored, self.stepped, self.loads = scores, steps, 0, 0, 0
        self.lost = False

    @property
    def version(self) -> Version | None:
        return None if self.lost else super().version

    def load_weights(self, directory: Path, version: Version) -> float:
        self.lost, self.loads = False, self.loads + 1
        return super().load_weights(directory, version)

    def score(self, prompt_ids: Any, token_ids: Any, temperature: float) -> Any:
        self.scored += 1
        if self.scored in self.scores:
            self.lost = True
            raise InfrastructureFault("its server died")
        return super().score(prompt_ids, token_ids, temperature)

    def step(self, timeout_s: float) -> list[Sampled]:
        self.stepped += 1
        self.lost = self.lost or self.stepped in self.steps
        return super().step(timeout_s)


@pytest.mark.parametrize(
    ("what", "loads"), [({}, 1), ({"scores": [1]}, 2), ({"scores": [1, 2]}, 3), ({"scores": [5]}, 2), ({"steps": [3]}, 2)],
    ids=["no loss", "at the canary", "twice", "at a score of the start-up check", "at a sample of it"],
)  # fmt: skip
def test_a_server_that_is_lost_in_a_proof_is_no_fault_of_the_weights(
    options: EngineOptions, models: list[tuple[Any, Path]], tmp_path: Path, what: dict[str, list[int]], loads: int
) -> None:
    engine = Losing(options, **what)
    intake = WeightsIntake("generator-0@1", engine)
    loaded = intake.load(published(tmp_path / "w", models, 0))
    assert loaded.error == "" and loaded.canary_error < 1e-4
    assert engine.loads == loads and engine.version == Version(0) and not intake.quarantined and intake.failures == 0
    assert engine.load.running + engine.load.waiting == 0 and engine.step(0.0) == [], "nothing of the start-up check is left"


def test_a_server_that_is_lost_in_every_proof_ends_the_actor(
    options: EngineOptions, models: list[tuple[Any, Path]], tmp_path: Path
) -> None:
    engine = Losing(options, scores=range(1, 99))
    with pytest.raises(InfrastructureFault, match="its server died"):
        WeightsIntake("generator-0@1", engine).load(published(tmp_path / "w", models, 0))
    assert engine.loads == LOSSES


def test_an_engine_that_lives_and_cannot_score_is_quarantined(
    options: EngineOptions, models: list[tuple[Any, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Losing(options, scores=[1])
    monkeypatch.setattr(Losing, "version", EmbeddedEngine.version)
    intake = WeightsIntake("generator-0@1", engine)
    loaded = intake.load(published(tmp_path / "w", models, 0))
    assert loaded.error == "the canary cannot be scored (its server died)" and intake.quarantined and engine.loads == 1


def test_a_canary_that_is_not_a_number_differs() -> None:
    assert difference(np.zeros(2, np.float32), np.array([0, np.nan], np.float32)) == np.inf
    assert difference(np.zeros(2, np.float32), np.zeros(3, np.float32)) == np.inf


# ---------------------------------------------------------------------------------------------------- conformance


class Hot(EmbeddedEngine):
    """Ignores the temperature."""

    def submit(self, request: SampleRequest) -> None:
        super().submit(_with(request, temperature=1.0 if request.sampling.temperature else 0.0))


class Greedy(EmbeddedEngine):
    """Draws more than top-k allows."""

    def submit(self, request: SampleRequest) -> None:
        super().submit(_with(request, top_k=0))


class Long(EmbeddedEngine):
    """Has another idea of how long is long enough."""

    def submit(self, request: SampleRequest) -> None:
        super().submit(_with(request, max_tokens=request.sampling.max_tokens + 1))


class Deaf(EmbeddedEngine):
    """Does not know stop tokens."""

    def submit(self, request: SampleRequest) -> None:
        super().submit(_with(request, stop_token_ids=()))


class Seedless(EmbeddedEngine):
    """Draws from seeds of its own."""

    count = 0

    def submit(self, request: SampleRequest) -> None:
        self.count += 1
        super().submit(
            SampleRequest(
                request_id=request.request_id, prompt_ids=request.prompt_ids, sampling=request.sampling,
                seeds=tuple(seed + 1000 * self.count for seed in request.seeds),
            )
        )  # fmt: skip


class Trusting(EmbeddedEngine):
    """Takes any token id."""

    def _check_ids(self, ids: Any, what: str) -> None:
        pass


def _with(request: SampleRequest, **changes: Any) -> SampleRequest:
    old = request.sampling
    values = {name: getattr(old, name) for name in ("max_tokens", "temperature", "top_p", "top_k", "stop_token_ids")}
    return SampleRequest(
        request_id=request.request_id, prompt_ids=request.prompt_ids, seeds=request.seeds, sampling=Sampling(**{**values, **changes})
    )


@pytest.fixture
def options(models: list[tuple[Any, Path]]) -> Iterator[EngineOptions]:
    yield EngineOptions(model_path=models[0][1], max_context=tiny_models.CONTEXT, slots=8)


def check(engine: EmbeddedEngine, directory: Path) -> None:
    engine.load_weights(directory, Version(0))
    check_conformance(engine, canary_ids(tiny_models.VOCABULARY), "float32")


def test_an_engine_that_does_as_it_says_passes(options: EngineOptions) -> None:
    check(EmbeddedEngine(options), options.model_path)


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (Hot, "not those of temperature"),
        (Greedy, "top-k 1 drew"),
        (Long, "6 tokens were allowed"),
        (Deaf, "stop token"),
        (Seedless, "one seed gave"),
        (Trusting, "token id -1"),
    ],
)
def test_an_engine_that_does_not_is_refused_with_the_reason(options: EngineOptions, broken: type[EmbeddedEngine], why: str) -> None:
    with pytest.raises(InfrastructureFault, match=why):
        check(broken(options), options.model_path)
