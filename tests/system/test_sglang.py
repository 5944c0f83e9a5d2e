"""Real SGLang servers on a CPU: faults of the server below a generator, weights by every lane and policy, a run through `rlsys up`.

Each start of a server takes half a minute on an idle core and minutes on a busy machine, so one engine goes through all faults in turn.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.engines import EngineLoad, EngineOptions
from actors.engines.conformance import check_conformance
from actors.engines.sglang import SGLangEngine
from actors.weights import WeightsIntake
from protocol.canary import PROMPT_TOKENS, Canary, canary_ids
from protocol.errors import InfrastructureFault, WeightsError
from protocol.manifest import publish
from protocol.messages import Span, Version, WeightsReady
from rlsys.lines import read_lines
from rlsys.waits import Explanation
from rlsys.why import explain_status
from tests.actors import tiny_models
from tests.actors.processes import alive, born, descendants, wait_until
from tests.actors.tiny_models import CONTEXT, drain, in_flight, prompt, reference_logprobs, request, until_tokens
from tests.disks import largest_file
from tests.system.conftest import Run

pytestmark = pytest.mark.sglang

REPORTED_S = 120.0
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


@pytest.mark.parametrize("extra", [{"swap": "abort_resume"}, {"lane": "tensor"}, {"lane": "distributed"}], ids=str)
def test_every_policy_and_lane_leaves_each_token_with_its_version(
    attached: Callable[..., SGLangEngine], models: list[tuple[Any, Path]], extra: dict[str, object]
) -> None:
    engine = attached(**extra)
    engine.load_weights(models[0][1], Version(0))
    swapped = 0
    for number in range(1, 20):  # a swap may come after the samples' ends: then another
        in_flight(engine, f"r{number}", (1, 2), count=4, max_tokens=50)
        engine.load_weights(models[number % 2][1], Version(number))
        ended = drain(engine)
        assert len(ended) == 2
        for sample in ended.values():
            assert sample.spans[-1].end == 50 and {span.version for span in sample.spans} <= {number - 1, number}
            start = 0
            for version, _, end in sample.spans:
                expected = reference_logprobs(models[version % 2][0], prompt(7), sample.token_ids, 1.0)
                np.testing.assert_allclose(sample.logprobs[start:end], expected[start:end], atol=1e-4)
                start = end
        swapped += any(len(sample.spans) == 2 for sample in ended.values())
        if swapped == 3:
            return
    raise AssertionError(f"a request was in flight over {swapped} swaps alone")


def test_weights_that_are_no_numbers_give_no_samples(
    attached: Callable[..., SGLangEngine], models: list[tuple[Any, Path]], tmp_path: Path
) -> None:
    """The server samples on, from nothing; that must not come out as tokens."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(models[0][1] / "model.safetensors")
    save_file({name: torch.full_like(tensor, float("nan")) for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    engine = attached()
    engine.load_weights(tmp_path, Version(0))
    engine.submit(request("r", prompt(7), (1,), max_tokens=8))
    with pytest.raises(InfrastructureFault, match=r"broke 3 times.*no number"):
        drain(engine)


def test_in_place_is_offered_and_does_what_its_name_says(attached: Callable[..., SGLangEngine], models: list[tuple[Any, Path]]) -> None:
    engine = attached(swap="in_place")
    engine.load_weights(models[0][1], Version(0))
    for number in range(1, 20):  # a swap may come after the sample's end: then another
        name = in_flight(engine, f"r{number}", (1,), count=4, max_tokens=50)
        engine.load_weights(models[number % 2][1], Version(number))
        sample = drain(engine)[name, 0]
        if len(sample.spans) == 2 and sample.spans[0].end <= 40:  # a token or two may agree by chance
            break
    end = sample.spans[0].end
    assert [span.version for span in sample.spans] == [number - 1, number]
    new = reference_logprobs(models[number % 2][0], prompt(7), sample.token_ids, 1.0)
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
                in_flight(engine, "flying", (1,), count=2, max_tokens=50)
            loaded = intake.load(ready)
            assert bool(loaded.error) == (number == 1 and not good), loaded
        drain(engine)
        assert intake.quarantined != good


def test_a_real_server_conforms(attached: Callable[..., SGLangEngine], models: list[tuple[Any, Path]]) -> None:
    engine = attached()
    engine.load_weights(models[0][1], Version(0))
    check_conformance(engine, canary_ids(tiny_models.VOCABULARY), "float32")


# ---------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("lane", ["disk", "tensor", "distributed"])
def test_files_that_end_early_and_a_full_dev_shm_leave_the_old_version_at_work(
    attached: Callable[..., SGLangEngine], models: list[tuple[Any, Path]], tmp_path: Path, lane: str
) -> None:
    """As the weights look when the disk ran full below their writer; and no room for the tensors that an actor shares with its server."""
    engine = attached(lane=lane)
    engine.load_weights(models[0][1], Version(0))
    whole = (models[1][1] / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    name = in_flight(engine, "r", (1,), count=2, max_tokens=50)
    with pytest.raises(WeightsError, match=str(tmp_path)):
        engine.load_weights(tmp_path, Version(1))
    if lane == "tensor":
        with largest_file(8192), pytest.raises(WeightsError, match="shared memory"):
            engine.load_weights(models[1][1], Version(1))
    assert engine.version == Version(0) and engine.load.restarts == 0
    sample = drain(engine)[name, 0]
    assert sample.spans == (Span(0, 0, 50),)
    np.testing.assert_allclose(sample.logprobs, reference_logprobs(models[0][0], prompt(7), sample.token_ids, 1.0), atol=1e-4)
    engine.load_weights(models[1][1], Version(1))
    engine.submit(request("after", prompt(7), (1,), max_tokens=20))
    sample = drain(engine)["after", 0]
    np.testing.assert_allclose(sample.logprobs, reference_logprobs(models[1][0], prompt(7), sample.token_ids, 1.0), atol=1e-4)


def one_of(engine: SGLangEngine, kind: str) -> int:
    return next(pid for pid, name in engine.server.processes.items() if name == kind)


def kill_all(engine: SGLangEngine) -> None:
    os.kill(one_of(engine, "HTTP"), signal.SIGKILL)


def kill_scheduler(engine: SGLangEngine) -> None:
    os.kill(one_of(engine, "scheduler"), signal.SIGKILL)


def stop_scheduler(engine: SGLangEngine) -> None:
    """And wait until it stands."""
    scheduler = one_of(engine, "scheduler")
    os.kill(scheduler, signal.SIGSTOP)
    wait_until(lambda: f"({scheduler}) is stopped" in engine.server.stopped(), "a stopped scheduler")


def stop_all(engine: SGLangEngine) -> None:
    for pid in engine.server.processes:
        os.kill(pid, signal.SIGSTOP)


@contextmanager
def as_told(engine: SGLangEngine) -> Iterator[list[EngineLoad]]:
    """The engine's `load` at the moment of every word of a lost server: whoever reads it beside a swap must see the loss whole."""
    seen: list[EngineLoad] = []

    class Reader(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "the server is lost" in record.getMessage():
                seen.append(engine.load)

    reader = Reader()
    logging.getLogger("rlsys.sglang").addHandler(reader)
    try:
        yield seen
    finally:
        logging.getLogger("rlsys.sglang").removeHandler(reader)


def swaps_while_it_hangs(engine: SGLangEngine, weights: Path, version: Version) -> None:
    """A swap finds the scheduler stopped: that is told in time too, and the swap goes to the next server."""
    before = engine.load.restarts
    stop_scheduler(engine)
    engine.submit(request("hangs", prompt(7), (1, 2), max_tokens=50))
    struck = time.monotonic()
    swap = threading.Thread(target=engine.load_weights, args=(weights, version), daemon=True)
    swap.start()
    while engine.load.restarts == before:
        swap.join(0.2)
        assert time.monotonic() < struck + REPORTED_S, f"the hang was not told within {REPORTED_S:g} s"
    swap.join(2 * START_S)
    assert engine.version == version
    wait_until(lambda: engine.load.trouble is None, "a server without trouble")
    ended = drain(engine)
    assert sorted(ended) == [("hangs", 0), ("hangs", 1)]
    assert {sample.spans for sample in ended.values()} == {(Span(*version, 50),)}


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
    seen: set[tuple[int, int]] = set()
    try:
        engine.load_weights(models[0][1], Version(0))
        engine.submit(request("calm", prompt(7), (1, 2, 3, 4, 5, 6), max_tokens=50))
        calm = drain(engine)
        for round_, (fault, words) in enumerate(((kill_all, "HTTP process"), (kill_scheduler, "scheduler"), (stop_all, "no answer")), 1):
            seen |= born(engine.server.processes)
            before = engine.load.restarts  # a start that came to nothing counts as well, such as one whose port was taken
            engine.submit(request(f"r{round_}", prompt(7), (1, 2, 3, 4, 5, 6), max_tokens=50))
            ended = list(until_tokens(engine, f"r{round_}", 2).values())
            fault(engine)
            struck = time.monotonic()
            while engine.load.restarts == before:
                ended += engine.step(0.2)
                assert time.monotonic() < struck + REPORTED_S, f"{fault.__name__} was not told within {REPORTED_S:g} s"
            assert words in engine.load.fault or "exit code" in engine.load.fault, engine.load.fault
            assert engine.version is None and engine.load.waiting + len(ended) == 6
            with pytest.raises(WeightsError):
                engine.load_weights(tmp_path, Version(round_))  # a bad directory in this moment changes nothing
            engine.load_weights(models[0][1], Version(round_))
            ended += drain(engine).values()
            assert sorted(s.position for s in ended) == list(range(6)), "each sample once"
            for sample in ended:
                np.testing.assert_array_equal(sample.token_ids, calm["calm", sample.position].token_ids)
                assert sample.spans in ((Span(round_, 0, 50),), (Span(round_ - 1, 0, 50),))
        seen |= born(engine.server.processes)
        before = engine.load.restarts
        with as_told(engine) as told:
            swaps_while_it_hangs(engine, models[1][1], Version(5))
        assert (told[0].restarts, told[0].running, told[0].waiting) == (before + 1, 0, 2), told
        assert told[0].trouble is not None and told[0].trouble.doing == "starts" and "is stopped" in told[0].trouble.detail, told
        seen |= born(engine.server.processes)
        before = engine.load.restarts
        kill_scheduler(engine)
        with pytest.raises(InfrastructureFault, match="/generate"):  # as the canary is scored: a loss, nothing about the weights
            engine.score(prompt(7), prompt(3), 1.0)
        assert engine.version is None and engine.load.restarts == before + 1 and "scheduler" in engine.load.fault, engine.load
        seen |= born(engine.server.processes)
    finally:
        engine.close()
    wait_until(lambda: not alive(seen), "nothing of any server is left", 120.0)


# ---------------------------------------------------------------------------------------------------- a whole run


def scheduler_of(generator: int) -> int:
    """The scheduler process below a generator actor, 0 while there is none (which is no pid to send a signal to: it means every process here)."""
    for pid in descendants(generator):
        try:
            if "schedul" in Path(f"/proc/{pid}/comm").read_text("utf-8", "replace"):
                return pid
        except OSError:
            continue
    return 0


def find_wait(run: Run, condition: Callable[[Explanation], Any], what: str, deadline_s: float = START_S) -> Any:
    """What `condition` gives for the explanation of `rlsys why`, once it is true."""
    return run.until(lambda status: status.get("processes") and condition(explain_status(status, run.process.pid)[0]), what, deadline_s)


def events(run: Run, name: str) -> list[dict[str, Any]]:
    try:
        return [row for row in read_lines(run.path / "metrics.jsonl") if row.get("event") == name]
    except OSError:
        return []


def moves_on(run: Run, iterations: int = 2) -> None:
    before = run.status().get("iteration", 0)
    run.until(lambda status: status.get("iteration", 0) >= before + iterations, "movement", 2 * START_S)


def next_scheduler(run: Run, generator: int, before: int) -> int:
    """The scheduler of the server that came after the one of `before`, once samples of it are trained."""
    run.until(lambda status: scheduler_of(generator) not in (0, before), "a new scheduler", START_S)
    run.until(lambda status: doing(status, "generator-0") not in ("", "start server", "waiting:engine"), "a server that samples", START_S)
    moves_on(run, 3)
    return the_scheduler(generator)


def the_scheduler(generator: int) -> int:
    found = scheduler_of(generator)
    assert found, f"no scheduler below process {generator}"
    return found


def settled(status: dict[str, Any], **doing_what: str) -> bool:
    """Whether these roles have waited, for two seconds already, for what is named: others of the ring may only just have begun to."""
    return all(doing(status, f"{role}-0", 2.0) == f"waiting:{what}" for role, what in doing_what.items())


def newest(versions: Path) -> Path:
    return max((path.parent for path in versions.glob("rlsys-*/v*/manifest.json")), key=lambda path: int(path.name[1:]))


def test_a_run_goes_on_after_every_fault_of_its_server_and_of_an_update(
    config: dict[str, Any], start: Callable[..., Run], tmp_path: Path
) -> None:
    """The scheduler is killed, then stopped; then a published version is damaged on its disk, so that the actor refuses it twice and ends."""
    gate, versions = tmp_path / "gate", tmp_path / "versions"
    gate.touch()
    config["generators"] = {"engine": "sglang", "slots": 16, "options": {"start_s": START_S, "stream_interval": 8, "silence_s": 40.0}}
    config["rewarders"] = {"reward": "tests.system.rewards:HangingReward", "options": {"file": str(gate)}, "concurrency": 8}
    config["iterations"] = 120
    config["sampling"] = {"groups_per_iteration": 2, "group_size": 4, "max_tokens": 24}
    config["evaluation"] = {"at_start": False, "at_end": False}
    config["weights"] = {"directory": str(versions)}
    config["deadlines"] = {
        "startup_s": START_S, "stall_s": 2 * START_S, "heartbeat_s": 120.0, "shutdown_s": 10.0, "silent_s": 5.0, "quiet_s": 4.0,
    }  # fmt: skip
    run = start(config, "--plain")
    sentence = find_wait(
        run, lambda found: "has been starting its SGLang server" in found.sentence and found.sentence, "the start in words"
    )
    assert "generator-0 has been starting its SGLang server for" in sentence
    generator = run.until(lambda status: run.pids().get("generator-0"), "a generator", START_S)
    moves_on(run)
    processes = born(descendants(generator))
    killed = the_scheduler(generator)
    os.kill(killed, signal.SIGKILL)
    told = run.until(lambda status: events(run, "engine restarted"), "word of the lost server", REPORTED_S)
    assert "its scheduler process" in told[0]["fault"] or "exit code" in told[0]["fault"], told
    scheduler = next_scheduler(run, generator, killed)

    processes |= born(descendants(generator))
    os.kill(scheduler, signal.SIGSTOP)
    text = f"(its scheduler process ({scheduler}) is stopped)"
    blame = find_wait(
        run, lambda found: [b for b in found.guilty if b.kind == "server" and text in b.what], "blame of the server", REPORTED_S
    )[0]
    assert blame.name == "generator-0"
    assert f"no answer from its SGLang server for {blame.for_s:.0f} s {text}" in blame.what
    told = run.until(lambda status: events(run, "engine restarted")[1:], "word of the silent server", REPORTED_S)
    assert f"its scheduler process ({scheduler}) is stopped" in told[0]["fault"], told
    find_wait(
        run, lambda found: "starting its SGLang server" in found.sentence and "is stopped" in found.sentence, "the second start in words"
    )
    next_scheduler(run, generator, scheduler)

    processes |= born(descendants(generator))
    gate.unlink()
    run.until(lambda status: settled(status, generator="tasks", learner="trajectories"), "a ring that waits for its scores")
    os.kill(generator, signal.SIGSTOP)
    published = newest(versions)
    gate.touch()
    run.until(
        lambda status: newest(versions) != published and settled(status, rewarder="completions", learner="trajectories"), "a new version"
    )
    shard = next(newest(versions).glob("*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.kill(generator, signal.SIGCONT)
    run.until(lambda status: run.pids().get("generator-0", generator) != generator, "a new generator", START_S)
    shard.write_bytes(content)
    refused = run.until(lambda status: events(run, "weights refused"), "word of the refused weights")
    assert all("differs from its manifest" in event["error"] for event in refused), f"a lost server is no fault of the weights: {refused}"

    assert run.wait(3 * START_S, restarts=True) == 0, run.err
    assert run.exit_record["outcome"] == "done" and run.exit_record["iterations_done"] == 120
    assert "generator-0 lost its server and starts it again (1 so far)" in run.out
    assert "differs from its manifest" in json.dumps(run.exit_record["restarts"])
    audit = subprocess.run(
        [sys.executable, "-P", "-m", "rlsys", "audit", str(run.path)], capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert audit.returncode == 0, audit.stdout + audit.stderr
    wait_until(lambda: not alive(processes), "nothing of the servers is left", 120.0)


def doing(status: dict[str, Any], name: str, for_s: float = 0.0) -> str:
    """What a process has been at for at least so long."""
    return next((str(p["doing"]) for p in status.get("processes", ()) if p["name"] == name and p["for_s"] >= for_s), "")


# ---------------------------------------------------------------------------------------------------- ends of a run

NEVER_READY = """#!/bin/sh
[ "$1" = -I ] && echo True && exit  # is asked whether it has sglang
exec {python} -c 'import subprocess, sys, time; subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]); time.sleep(600)'
"""


def down(run: Run) -> None:
    subprocess.run(
        [sys.executable, "-P", "-m", "rlsys", "down", str(run.path), "--timeout", "100"], check=True, capture_output=True, timeout=120
    )


ENDS: dict[str, Callable[[Run], object]] = {
    "ctrl-c": lambda run: os.kill(run.process.pid, signal.SIGINT),
    "terminated": lambda run: os.kill(run.process.pid, signal.SIGTERM),
    "down": down,
    "a generator that gives up": lambda run: os.kill(run.pids()["generator-0"], signal.SIGKILL),
    "supervisor killed": lambda run: os.kill(run.process.pid, signal.SIGKILL),
    "supervisor killed, a real server samples": lambda run: os.kill(run.process.pid, signal.SIGKILL),
}


@pytest.mark.parametrize("end", ENDS)
def test_no_process_of_a_server_outlives_its_run(config: dict[str, Any], start: Callable[..., Run], tmp_path: Path, end: str) -> None:
    """All but the last end while the server starts, with an interpreter that never gets ready: SGLang has no part in that."""
    real = "real" in end
    options: dict[str, Any] = {"start_s": START_S, "stream_interval": 8}
    if not real:
        stand_in = tmp_path / "python"
        stand_in.write_text(NEVER_READY.format(python=sys.executable))
        stand_in.chmod(0o755)
        options["python"] = str(stand_in)
    config["generators"] = {"engine": "sglang", "slots": 16, "options": options}
    config["iterations"] = 100_000
    config["evaluation"] = {"at_start": False, "at_end": False}
    config["deadlines"] = {"startup_s": START_S, "stall_s": 2 * START_S, "heartbeat_s": 120.0, "shutdown_s": 8.0}
    config["restarts"] = dict.fromkeys(("generator", "rewarder", "dispatcher", "learner", "dashboard"), 0)
    run = start(config)
    if real:
        run.until(lambda status: status.get("iteration", 0) >= 1, "an iteration", START_S)
    else:
        run.until(lambda status: doing(status, "generator-0") == "start server", "the start of a server")
    below: set[tuple[int, int]] = set()

    def all_there() -> bool:
        below.update(born(descendants(run.pids()["generator-0"])))
        return len(below) >= 3  # the guard and the two of the server

    wait_until(all_there, "the server's processes", 120.0)
    model = run.path / "logs" / "generator-0-server" / "config.json"
    assert model.exists(), "what a killed actor leaves lies in the run directory"
    ENDS[end](run)
    run.process.communicate(timeout=120)
    wait_until(lambda: not alive(below), "nothing of the server is left", 120.0)
