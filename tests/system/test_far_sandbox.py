"""A run whose programs are judged by a `rlsys sandbox serve`: its verdicts are those of a sandbox here, also when the service is killed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import msgpack
import pytest

from actors.dataset import read_problems
from actors.rewards import Sample
from actors.rewards.unit_tests import UnitTests
from actors.text import Text
from protocol.messages import Trajectory
from tests.sandbox_servers import Served, served
from tests.system.conftest import Run
from tests.system.test_ring import trajectories
from tests.system.test_survival import command, sound

pytestmark = pytest.mark.faults

JUDGING = {"fence": "optional", "min_time_limit_s": 2, "max_time_limit_s": 2}


def judged_far(config: dict[str, Any], server: Served, **options: Any) -> dict[str, Any]:
    """The run's programs go to that server. The tiny model's texts are programs with errors in them, which is a verdict as well."""
    config["rewarders"] = {
        "reward": "sandbox_service",
        "concurrency": 4,
        "retries": 0,
        "options": {"url": server.url, "token_file": str(server.token_file), "options": JUDGING, **options},
    }
    config["learner"]["zero_variance"] = "keep"
    return config


def judged_here(config: dict[str, Any], samples: list[Trajectory]) -> list[tuple[str, float | None]]:
    """Status and score of each of these samples from a sandbox of this process."""
    text = Text(Path(config["model"]["path"]))
    problems = {
        p.problem_id: msgpack.unpackb(p.payload) for name in ("train", "eval") for p in read_problems(Path(config["data"][name]), None)
    }
    with closing(UnitTests({**JUDGING, "cells": 2})) as reward:
        scores = [
            reward.score(Sample(problem=problems[t.problem_id], completion=text.decode(t.token_ids), truncated=t.finish_reason != "stop"))
            for t in samples
        ]
    return [(score.status, score.value) for score in scores]


def held_far(config: dict[str, Any], server: Served, gate: Path, **options: Any) -> dict[str, Any]:
    """The same, but only the first 20 programs are judged before there is a file `gate`: the rest of the run is certainly still to come then."""
    judged_far(config, server, count=20, gate=str(gate), **options)
    config["rewarders"]["reward"] = "tests.system.rewards:HeldService"
    return config


def until_held(run: Run, gate: Path) -> None:
    run.until(lambda status: gate.with_name(f"{gate.name}.held").exists(), "programs that are kept back")


def kill(server: Served) -> None:
    """The server dies with all that it judges."""
    os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait(timeout=10)


def test_a_service_that_is_killed_and_comes_back_changes_no_verdict(
    config: dict[str, Any], start: Callable[..., Run], tmp_path: Path
) -> None:
    config["iterations"] = 8
    with served(tmp_path, "--cells", "2") as server:
        run = start(held_far(config, server, tmp_path / "gate"))
        until_held(run, tmp_path / "gate")
        kill(server)
        (tmp_path / "gate").touch()
        run.until(
            lambda status: [p for p in status["processes"] if (p["doing"], p["peer"]) == ("waiting:sandbox", "sandbox service")],
            "a reward actor that names what it waits for",
        )
        why = json.loads(command("why", str(run.path), "--json").stdout)
        assert any("from the sandbox service" in wait["sentence"] and server.url in wait["sentence"] for wait in why["waits"]), why
        assert why["guilty"] == [], "nobody of the run"
        with served(tmp_path, "--cells", "2", "--listen", server.url.removeprefix("http://")):
            assert run.wait(300) == 0, run.err
    sound(run, 8)
    samples = trajectories(run.path)
    assert judged_here(config, samples) == [(t.status, t.score) for t in samples]
    assert {t.status for t in samples} >= {"runtime_error"} and all(t.score is not None for t in samples)


def test_a_service_that_stays_away_leaves_samples_without_a_score_and_the_run_says_so(
    config: dict[str, Any], start: Callable[..., Run], tmp_path: Path
) -> None:
    config["iterations"] = 8
    config["data"].pop("eval")
    with served(tmp_path, "--cells", "2") as server:
        run = start(held_far(config, server, tmp_path / "gate", wait_s=1.0))
        until_held(run, tmp_path / "gate")
        kill(server)
        (tmp_path / "gate").touch()
        assert run.wait(300) == 0, run.err
    audit = sound(run, 8)
    samples = trajectories(run.path)
    scored, without = [t for t in samples if t.score is not None], [t for t in samples if t.score is None]
    assert 0 < len(scored) <= 20 and without, "those judged before, and the rest"
    assert {t.status for t in without} == {"failed"} and all(server.url in t.detail for t in without)
    config["data"]["eval"] = config["data"]["train"]
    assert judged_here(config, scored) == [(t.status, t.score) for t in scored], "no verdict but the sandbox's"
    assert audit["states"]["train failed"] >= 1, "and the groups failed"
    log = "".join(path.read_text() for path in (run.path / "logs").glob("rewarder-*.log"))
    assert "no verdict from the sandbox service" in log


def test_a_wrong_token_ends_the_run_with_a_sentence(config: dict[str, Any], start: Callable[..., Run], tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("f" * 32)
    (tmp_path / "server").mkdir()
    with served(tmp_path / "server", "--cells", "1") as server:
        run = start(judged_far(config, server, token_file=str(wrong)))
        assert run.wait(120) == 2, run.err
    assert "the sandbox service at" in run.err and "Authorization: Bearer TOKEN" in run.err, run.err
    assert "Traceback" not in run.err
