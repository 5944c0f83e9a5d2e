"""Real SGLang servers on a CPU: faults of the server below a generator, weights by every lane and policy, a run through `rlsys up`.

Each start of a server takes half a minute on an idle core and minutes on a busy machine, so one engine goes through all faults in turn.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.engines import EngineOptions, Sampled
from actors.engines.conformance import check_conformance
from actors.engines.sglang import SGLangEngine
from actors.weights import WeightsIntake
from protocol.canary import PROMPT_TOKENS, Canary, canary_ids
from protocol.errors import WeightsError
from protocol.manifest import publish
from protocol.messages import Span, Version, WeightsReady
from tests.actors import tiny_models
from tests.actors.processes import descendants, wait_until
from tests.actors.tiny_models import CONTEXT, drain, prompt, reference_logprobs, request
from tests.system.conftest import Run

pytestmark = pytest.mark.sglang

REPORTED_S = 30.0
START_S = 400.0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, Path]]:
    return [(model := tiny_models.build("qwen3", s), tiny_models.save(model, tmp_path_factory.mktemp(f"s{s}"))) for s in (0, 1)]


@pytest.fixture
def attached(models: list[tuple[Any, Path]], sglang_url: str) -> Iterator[Callable[..., SGLangEngine]]:
    """Engines on the shared server."""
    engines: list[SGLangEngine] = []

    def make(**extra: object) -> SGLangEngine:
        engines.append(
            SGLangEngine(EngineOptions(model_path=models[0][1], max_context=CONTEXT, slots=4, extra={"url": sglang_url, **extra}))
        )
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def until_tokens(engine: SGLangEngine, name: str, count: int) -> list[Sampled]:
    ended: list[Sampled] = []
    while engine.load.progress.get(name, 0) < count and not ended:
        ended += engine.step(0.1)
    return ended


@pytest.mark.parametrize("extra", [{"swap": "abort_resume"}, {"lane": "tensor"}, {"lane": "distributed"}], ids=str)
def test_every_policy_and_lane_leaves_each_token_with_its_version(
    attached: Callable[..., SGLangEngine], models: list[tuple[Any, Path]], extra: dict[str, object]
) -> None:
    engine = attached(**extra)
    engine.load_weights(models[0][1], Version(0))
    for number in (1, 2, 3):
        name = f"r{number}"
        engine.submit(request(name, prompt(7), (1, 2), max_tokens=50))
        early = until_tokens(engine, name, 4)
        engine.load_weights(models[number % 2][1], Version(number))
        ended = drain(engine) | {(s.request_id, s.position): s for s in early}
        assert len(ended) == 2
        for sample in ended.values():
            assert sample.spans[-1].end == 50 and {span.version for span in sample.spans} <= {number - 1, number}
            start = 0
            for version, _, end in sample.spans:
                expected = reference_logprobs(models[version % 2][0], prompt(7), sample.token_ids, 1.0)
                np.testing.assert_allclose(sample.logprobs[start:end], expected[start:end], atol=1e-4)
                start = end
        assert any(len(sample.spans) == 2 for sample in ended.values()), "no request was in flight over the swap"


def test_in_place_is_offered_and_does_what_its_name_says(attached: Callable[..., SGLangEngine], models: list[tuple[Any, Path]]) -> None:
    engine = attached(swap="in_place")
    engine.load_weights(models[0][1], Version(0))
    engine.submit(request("r", prompt(7), (1,), max_tokens=50))
    assert not until_tokens(engine, "r", 4)
    engine.load_weights(models[1][1], Version(1))
    sample = drain(engine)["r", 0]
    end = sample.spans[0].end
    assert [span.version for span in sample.spans] == [0, 1]
    new = reference_logprobs(models[1][0], prompt(7), sample.token_ids, 1.0)
    assert np.abs(sample.logprobs[end:] - new[end:]).max() > 1e-2, "the old cache was dropped, so this was not in place"


def test_a_stale_prefix_is_found_out_by_the_canary(
    attached: Callable[..., SGLangEngine], models: list[tuple[Any, Path]], tmp_path: Path
) -> None:
    """A swap that keeps the prefix cache is what the canary is for: its prompt is cached, requests are in flight."""
    ids = canary_ids(tiny_models.VOCABULARY)
    for swap, good in (("auto", True), ("in_place", False)):
        engine = attached(swap=swap)
        intake = WeightsIntake("generator-0@1", engine)
        for number in (0, 1):
            model, directory = models[number]
            canary = Canary(ids, reference_logprobs(model, ids[:PROMPT_TOKENS], ids[PROMPT_TOKENS:], 1.0))
            done = publish(
                tmp_path / swap, Version(number), "b", lambda d, f=directory: shutil.copy(f / "model.safetensors", d), canary=canary
            )  # type: ignore[misc,arg-type]
            intake.announce(
                WeightsReady(
                    number=number, incarnation=0, directory=str(done.directory), manifest_sha256=done.manifest_sha256, num_bytes=1, published_s=0.0
                )
            )  # fmt: skip
            ready = intake.pending
            assert ready is not None
            if number:
                engine.submit(request("flying", prompt(7), (1,), max_tokens=50))
                assert not until_tokens(engine, "flying", 2)
            loaded = intake.load(ready)
            assert bool(loaded.error) == (number == 1 and not good), loaded
        drain(engine)
        assert intake.quarantined != good


def test_a_real_server_conforms(attached: Callable[..., SGLangEngine], models: list[tuple[Any, Path]]) -> None:
    engine = attached()
    engine.load_weights(models[0][1], Version(0))
    check_conformance(engine, canary_ids(tiny_models.VOCABULARY), "float32")


# ---------------------------------------------------------------------------------------------------- faults


def kill_all(engine: SGLangEngine) -> None:
    os.kill(next(pid for pid, name in engine.server.processes.items() if name == "HTTP"), signal.SIGKILL)


def kill_scheduler(engine: SGLangEngine) -> None:
    os.kill(next(pid for pid, name in engine.server.processes.items() if name == "scheduler"), signal.SIGKILL)


def stop_scheduler(engine: SGLangEngine) -> None:
    os.kill(next(pid for pid, name in engine.server.processes.items() if name == "scheduler"), signal.SIGSTOP)


def stop_all(engine: SGLangEngine) -> None:
    for pid in engine.server.processes:
        os.kill(pid, signal.SIGSTOP)


def test_a_dead_or_hung_server_is_told_and_replaced_and_the_same_samples_come_out(models: list[tuple[Any, Path]], tmp_path: Path) -> None:
    options = EngineOptions(
        model_path=models[0][1],
        max_context=CONTEXT,
        slots=4,
        log_dir=tmp_path,
        name="faulty",
        extra={"stream_interval": 1, "start_s": START_S},
    )
    engine = SGLangEngine(options)
    seen: set[int] = set()
    try:
        engine.load_weights(models[0][1], Version(0))
        engine.submit(request("calm", prompt(7), (1, 2, 3, 4, 5, 6), max_tokens=50))
        calm = drain(engine)
        for round_, (fault, words) in enumerate(
            ((kill_all, "HTTP process"), (kill_scheduler, "scheduler"), (stop_scheduler, "no answer"), (stop_all, "no answer")), 1
        ):
            seen |= set(engine.server.processes)
            engine.submit(request(f"r{round_}", prompt(7), (1, 2, 3, 4, 5, 6), max_tokens=50))
            ended = until_tokens(engine, f"r{round_}", 2)
            fault(engine)
            struck = time.monotonic()
            while engine.load.restarts < round_:
                ended += engine.step(0.2)
                assert time.monotonic() < struck + REPORTED_S, f"{fault.__name__} was not told within {REPORTED_S:g} s"
            assert words in engine.load.fault or "exit code" in engine.load.fault, engine.load.fault
            assert engine.version is None and engine.load.waiting + len(ended) == 6
            with pytest.raises(WeightsError):
                engine.load_weights(tmp_path, Version(round_))  # a bad directory in this moment changes nothing
            engine.load_weights(models[0][1], Version(round_))
            ended += drain(engine, 120.0).values()
            assert sorted(s.position for s in ended) == list(range(6)), "each sample once"
            for sample in ended:
                np.testing.assert_array_equal(sample.token_ids, calm["calm", sample.position].token_ids)
                assert sample.spans in ((Span(round_, 0, 50),), (Span(round_ - 1, 0, 50),))
        seen |= set(engine.server.processes)
    finally:
        engine.close()
    wait_until(lambda: not [pid for pid in seen if Path(f"/proc/{pid}").exists()], "nothing of any server is left")


# ---------------------------------------------------------------------------------------------------- a whole run


def scheduler_of(generator: int) -> int:
    """The scheduler process below a generator actor, 0 while there is none."""
    for pid in descendants(generator):
        try:
            if "schedul" in Path(f"/proc/{pid}/comm").read_text():
                return pid
        except OSError:
            continue
    return 0


def test_a_run_goes_on_when_its_server_loses_its_scheduler(config: dict[str, Any], start: Callable[..., Run]) -> None:
    config["generators"] = {"engine": "sglang", "slots": 16, "options": {"start_s": START_S, "stream_interval": 8}}
    config["iterations"] = 6
    config["deadlines"] = {"startup_s": START_S, "stall_s": 2 * START_S, "heartbeat_s": 60.0, "shutdown_s": 10.0}
    run = start(config)
    generator = run.until(lambda status: run.pids().get("generator-0"), "a generator", START_S)
    run.until(lambda status: status.get("iteration", 0) >= 2, "two iterations", 2 * START_S)
    processes = descendants(generator)
    os.kill(scheduler_of(generator), signal.SIGKILL)
    assert run.wait(3 * START_S) == 0, run.err
    assert run.exit_record["outcome"] == "done" and run.exit_record["iterations_done"] == 6
    log = (run.path / "logs" / "generator-0.log").read_text()
    assert "the server is lost (1 in a row)" in log and "scheduler" in log
    audit = subprocess.run(
        [sys.executable, "-P", "-m", "rlsys", "audit", str(run.path)], capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert audit.returncode == 0, audit.stdout + audit.stderr
    wait_until(lambda: not [pid for pid in processes if Path(f"/proc/{pid}").exists()], "nothing of the servers is left")
