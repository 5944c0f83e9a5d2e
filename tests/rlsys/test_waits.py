"""Every edge of the ring stalled on paper: the guilty process is named, and nobody else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from rlsys.states import from_data, to_data
from rlsys.waits import Limits, ProcessState, explain, nothing_moves
from rlsys.why import explain_status

LIMITS = Limits(silent_s=5.0, quiet_s=30.0, deaf_s=60.0)
NOW = 1000.0


def ring(**changes: dict[str, Any]) -> list[ProcessState]:
    """A run in the middle of iteration 3: two generators sample groups 12 and 13, group 14 is scored, 15 waits in generator-1's outbox.
    `changes`: process (with _ for -) -> fields."""
    states = {
        "learner-0": ProcessState(
            name="learner-0", doing="waiting:trajectories", peer="rewarder", for_s=41.0, silent_s=0.2, quiet_s=41.0,
            facts={"version": 3, "published_s": NOW - 41, "wanted": 3, "missing": [[12, 3], [14, 2]], "complete": [11], "ranks": 2},
        ),
        "learner-1": ProcessState(name="learner-1", doing="waiting:batch", peer="learner", for_s=41.0, quiet_s=500.0),
        "dispatcher-0": ProcessState(
            name="dispatcher-0", doing="waiting:version", peer="learner", detail="v4 opens the next iteration", for_s=40.0, quiet_s=40.0,
            facts={
                "published": 3, "needs": -1,
                "outstanding": [[11, 3, "generator-0@1"], [12, 3, "generator-1@1"], [13, 3, "generator-0@1"], [14, 3, "generator-0@1"],
                                [15, 3, "generator-1@1"], [20, 4, "generator-0@1"]],
            },
        ),
        "generator-0": ProcessState(
            name="generator-0", doing="decode", for_s=1.0, quiet_s=0.5,
            facts={"version": 3, "announced": 3, "running": [[13, 4, 100, 16384, 0.0]], "sent": [[14, "rewarder-0@1", 2]]},
        ),
        "generator-1": ProcessState(
            name="generator-1", doing="decode", for_s=1.0, quiet_s=0.5,
            facts={"version": 3, "announced": 3, "running": [[12, 3, 7900, 16384, 0.0]], "sent": [[15, "", 4]]},
        ),
        "rewarder-0": ProcessState(
            name="rewarder-0", doing="scoring", for_s=1.0, quiet_s=0.5, facts={"held": [[14, 2, 0]], "scoring_since_s": NOW - 1}
        ),
        "dashboard-0": ProcessState(name="dashboard-0", doing="waiting:observations", peer="everyone", quiet_s=1e6),
    }  # fmt: skip
    for name, fields in changes.items():
        key = name.replace("_", "-")
        states[key] = replace(states[key], **fields)
    return list(states.values())


def blamed(states: list[ProcessState]) -> list[tuple[str, str]]:
    return [(blame.name, blame.kind) for blame in explain(states, LIMITS, NOW).guilty]


def test_a_living_run_blames_nobody_and_says_where_each_sample_is() -> None:
    found = explain(ring(), LIMITS, NOW)
    assert found.guilty == ()
    sentences = {w.on: w.sentence for w in found.waits if w.waiter == "learner-0"}
    assert (
        sentences["generator-0"]
        == "learner-0 waits 41 s for 4 samples of group 13; generator-0 samples them (100 of at most 16,384 tokens)"
    )
    assert sentences["generator-1"].startswith("learner-0 waits 41 s for samples of 2 groups, the first is group 12")
    assert sentences["rewarder-0"] == "learner-0 waits 41 s for 2 samples of group 14; rewarder-0 scores them"
    assert "group 20" not in str(sentences), "of another iteration"


def test_of_many_peers_the_text_names_a_few_and_counts_the_rest() -> None:
    sampling = [ProcessState(name=f"generator-{i}", doing="decode", for_s=1.0, quiet_s=0.5) for i in range(200)]
    waiting = [ProcessState(name=f"rewarder-{i}", doing="waiting:completions", peer="generator", for_s=3.0, quiet_s=3.0) for i in range(2)]
    found = explain([*sampling, *waiting], LIMITS, NOW)
    lines = [line.removeprefix("waits        ") for line in found.lines() if line.startswith("waits")]
    assert len(found.data()["waits"]) == 400
    assert len(lines) == 2 * 5
    assert lines[4] == "rewarder-0 waits for 196 more generators (--json names them)"
    assert lines[5] == "rewarder-1 waits 3 s for completions; generator-0 is at 'decode'"


def test_the_example_of_the_documentation() -> None:
    last = {"outstanding": [[812, 3, "generator-1@1"]]}
    learner = {"version": 3, "published_s": NOW - 41, "wanted": 3, "missing": [[812, 3]], "complete": []}
    states = ring(
        learner_0={"facts": learner},
        dispatcher_0={"facts": last},
        generator_1={"facts": {"version": 3, "running": [[812, 3, 7900, 16384, 0.0]]}},
    )
    assert explain(states, LIMITS, NOW).sentence.startswith(
        "learner-0 waits 41 s for 3 samples of group 812; generator-1 samples them (7,900 of at most 16,384 tokens)"
    )


@pytest.mark.parametrize("victim", ["learner_0", "learner_1", "dispatcher_0", "generator_0", "generator_1", "rewarder_0", "dashboard_0"])
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("stopped", {"stopped": True, "computing": False, "silent_s": 6.0}),
        ("silent", {"computing": False, "silent_s": 6.0}),
        ("deaf", {"computing": True, "silent_s": 61.0}),
    ],
)
def test_whoever_shows_no_life_is_named(victim: str, kind: str, fields: dict[str, Any]) -> None:
    name = victim.replace("_", "-")
    states = ring(**{victim: fields})
    assert blamed(states) == [(name, kind)]
    sentence = explain(states, LIMITS, NOW).sentence
    assert sentence.startswith(name)
    if victim == "generator_1":
        assert "learner-0 waits 41 s for samples of 2 groups" in sentence, "and whom it keeps waiting"


def test_two_at_once_are_both_named() -> None:
    states = ring(generator_0={"stopped": True, "computing": False}, rewarder_0={"silent_s": 9.0, "computing": False})
    assert blamed(states) == [("generator-0", "stopped"), ("rewarder-0", "silent")]
    sentence = explain(states, LIMITS, NOW).sentence
    assert "generator-0 is stopped" in sentence
    assert "rewarder-0 has been silent" in sentence


@pytest.mark.parametrize(
    "fields",
    [
        {"silent_s": 20.0, "computing": True},
        {"for_s": 300.0, "quiet_s": 300.0, "computing": True},
        {"for_s": 300.0, "quiet_s": 4.0, "computing": False},
        {"silent_s": 4.0, "computing": False},
    ],
)
@pytest.mark.parametrize("victim", ["generator_0", "rewarder_0"])
def test_who_is_slow_but_lives_is_not_blamed(victim: str, fields: dict[str, Any]) -> None:
    """Late, but computing; at it for long, but computing, or with results; silent for less than the deadline."""
    assert blamed(ring(**{victim: fields})) == []


def test_a_learner_in_a_long_step_is_not_blamed_and_one_that_hangs_in_it_is() -> None:
    step = {"doing": "train", "peer": "", "for_s": 500.0, "quiet_s": 500.0}
    assert blamed(ring(learner_0={**step, "computing": True})) == []
    assert blamed(ring(learner_0={**step, "computing": False})) == [("learner-0", "stuck")]


def test_an_engine_or_a_reward_that_hangs_inside_a_living_process_is_stuck() -> None:
    stuck = {"quiet_s": 31.0, "for_s": 40.0, "computing": False}
    assert blamed(ring(generator_1=stuck)) == [("generator-1", "stuck")]
    full = {"doing": "waiting:reward credit", "peer": "rewarder", "detail": "64 completions wait to be scored", "for_s": 30.0}
    states = ring(rewarder_0=stuck, generator_0=full, generator_1=full)
    assert blamed(states) == [("rewarder-0", "stuck")], "a full channel is the fault of who does not empty it"
    assert "generator-0 waits 30 s for reward credit (64 completions wait to be scored)" in explain(states, LIMITS, NOW).sentence


def test_a_service_elsewhere_that_is_away_is_named_and_nobody_of_the_run_is_blamed() -> None:
    away = {"doing": "waiting:sandbox", "peer": "sandbox service", "detail": "http://far:1: refused", "for_s": 40.0, "quiet_s": 41.0}
    states = ring(rewarder_0={**away, "computing": False})
    assert blamed(states) == []
    waits = [wait.sentence for wait in explain(states, LIMITS, NOW).waits if wait.waiter == "rewarder-0"]
    assert waits == ["rewarder-0 waits 40 s for sandbox (http://far:1: refused) from the sandbox service"]


def test_a_server_that_starts_or_hangs_is_named_with_its_generator() -> None:
    def told(state: str, for_s: float, detail: str = "", **more: Any) -> list[ProcessState]:
        facts = {"version": -1, "announced": 3, "server": ["SGLang server", state, for_s, detail, 20.0 if "doing" in more else 300.0]}
        return ring(generator_1={"doing": "start server", "quiet_s": 41.0, "computing": False, "facts": facts, **more})

    starts = told("starts", 12.0)
    assert blamed(starts) == [], "starting takes its time"
    assert "generator-1 has been starting its SGLang server for 12 s of at most 300 s" in explain(starts, LIMITS, NOW).working
    starts = told("starts", 42.0, "no answer from its scheduler for 20 s")
    assert blamed(starts) == [("generator-1", "starting")]
    assert (
        "generator-1 has been starting its SGLang server for 42 s of at most 300 s, because of the one before: no answer from its scheduler "
        "for 20 s" in explain(starts, LIMITS, NOW).sentence
    )
    held = {"version": -1, "running": [[12, 3, 0, 80, 0.0]], "server": ["SGLang server", "starts", 12.0, "", 300.0]}
    [wait] = [w for w in explain(ring(generator_1={"facts": held}), LIMITS, NOW).waits if w.waiter == "learner-0" and w.on == "generator-1"]
    assert "has them to sample, and has been starting its SGLang server for 12 s" in wait.sentence
    assert "has been waiting for its SGLang server for 42 s of at most 300 s" in explain(told("is awaited", 42.0), LIMITS, NOW).sentence
    assert blamed(told("is silent", 4.0, doing="waiting:engine")) == []
    hangs = told("is stopped", 9.0, "its scheduler process (7) is stopped", doing="waiting:engine", silent_s=0.5)
    assert blamed(hangs) == [("generator-1", "server")]
    sentence = explain(hangs, LIMITS, NOW).sentence
    assert (
        "generator-1 has had no answer from its SGLang server for 10 s (its scheduler process (7) is stopped); after 20 s it counts as hung"
        in sentence
    )


def test_a_ring_whose_server_starts_does_move() -> None:
    quiet = {"quiet_s": 99.0}
    waiting = {f"{name}_0": quiet for name in ("learner", "dispatcher", "rewarder", "generator")} | {"learner_1": quiet}

    def starting(for_s: float, **more: Any) -> list[ProcessState]:
        facts = {"server": ["SGLang server", "starts", for_s, "", 300.0]}
        return ring(**waiting, generator_1={"doing": "start server", "computing": False, "facts": facts, **quiet, **more})

    assert nothing_moves(ring(**waiting, generator_1=quiet), 30.0)
    for seconds in (0.0, 88.0, 299.0, 320.0):
        assert not nothing_moves(starting(seconds), 30.0), "whether or not its imports use the processor at this moment"
    assert nothing_moves(starting(331.0), 30.0), "its own deadline is over, and nobody has acted on it"
    assert nothing_moves(starting(50.0, stopped=True), 30.0)
    assert nothing_moves(starting(250.0, silent_s=90.0), 30.0)


def test_weights_that_never_arrive_are_told_from_those_that_are_not_loaded() -> None:
    waiting = {"doing": "waiting:tasks", "peer": "dispatcher", "quiet_s": 41.0}
    states = ring(generator_0={**waiting, "facts": {"version": 2, "announced": 2}})
    assert blamed(states) == [("generator-0", "weights")]
    assert "learner-0 published v3 41 s ago, generator-0 has not heard of it" in explain(states, LIMITS, NOW).sentence
    states = ring(generator_0={**waiting, "facts": {"version": -1, "announced": 3}})
    assert "generator-0 has no weights" in explain(states, LIMITS, NOW).sentence
    assert "was told of it and has not loaded it" in explain(states, LIMITS, NOW).sentence
    swapping = ring(generator_0={"doing": "swap weights", "facts": {"version": 2, "announced": 3}, "quiet_s": 3.0})
    assert blamed(swapping) == [], "it is at it"


def test_who_has_too_old_weights_for_the_next_group_is_waited_for() -> None:
    facts = {"published": 3, "needs": 3, "outstanding": []}
    states = ring(
        dispatcher_0={"doing": "waiting:credits", "peer": "generator", "facts": facts, "for_s": 7.0},
        generator_1={"facts": {"version": 2, "announced": 3}, "doing": "swap weights"},
    )
    edges = [w for w in explain(states, LIMITS, NOW).waits if w.waiter == "dispatcher-0"]
    assert [(w.on, w.state) for w in edges] == [("generator-1", "has v2")]


def test_a_circle_of_waits_is_shown_when_nobody_is_to_blame() -> None:
    states = ring(
        learner_0={"facts": {"wanted": 3, "missing": [], "complete": [], "version": 3, "published_s": NOW - 100}, "quiet_s": 99.0},
        dispatcher_0={"doing": "waiting:credits", "peer": "generator", "facts": {"needs": 3, "outstanding": []}, "quiet_s": 99.0},
        generator_0={"doing": "waiting:tasks", "peer": "dispatcher", "facts": {"version": 3, "announced": 3}, "quiet_s": 99.0},
        generator_1={"doing": "waiting:tasks", "peer": "dispatcher", "facts": {"version": 3, "announced": 3}, "quiet_s": 99.0},
        rewarder_0={"doing": "waiting:completions", "peer": "generator", "facts": {}, "quiet_s": 99.0},
    )
    found = explain(states, LIMITS, NOW)
    assert found.guilty == ()
    assert set(found.circle) == {"dispatcher-0", "generator-0"}
    assert "a message must have been lost" in found.sentence
    assert nothing_moves(states, 30.0)


def test_groups_that_the_learner_holds_are_not_waited_for() -> None:
    """The head of the line is missing: groups behind it are complete, and nobody is told to hurry for them."""
    learner = {"version": 3, "published_s": NOW - 41, "wanted": 3, "missing": [[12, 3]], "complete": [11, 13, 14, 15]}
    waits = [w for w in explain(ring(learner_0={"facts": learner}), LIMITS, NOW).waits if w.waiter == "learner-0"]
    assert [(w.on, w.what) for w in waits] == [("generator-1", "3 samples of group 12")]


def test_a_generator_whose_engine_lost_its_samples_is_stuck() -> None:
    lost = {"doing": "waiting:tasks", "peer": "dispatcher", "for_s": 31.0, "quiet_s": 31.0}
    assert blamed(ring(generator_1=lost)) == [("generator-1", "stuck")]
    assert "though 1 groups are with it, the first is 12" in explain(ring(generator_1=lost), LIMITS, NOW).sentence
    assert blamed(ring(generator_1={**lost, "for_s": 2.0})) == []
    assert blamed(ring(generator_1={**lost, "facts": {"version": 3, "running": []}})) == []


def test_who_starts_is_blamed_for_a_hang_and_not_for_long_imports() -> None:
    start = {"registered": False, "doing": "starting", "peer": ""}
    assert blamed(ring(learner_0={**start, "silent_s": 100.0, "computing": True})) == []
    assert blamed(ring(learner_0={**start, "silent_s": 31.0, "computing": False})) == [("learner-0", "starting")]
    assert blamed(ring(learner_0={**start, "silent_s": 151.0, "computing": True})) == [("learner-0", "starting")]


def test_a_supervisor_that_stands_still_puts_nobody_else_on_the_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it wrote is 20 s old: of the others nothing is known since, which is no fault of theirs."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True) as stopped:
        try:
            os.kill(stopped.pid, signal.SIGSTOP)
            os.waitid(os.P_PID, stopped.pid, os.WSTOPPED | os.WNOWAIT)
            states = [
                {"pid": os.getpid(), **to_data(replace(s, computing=False, silent_s=min(s.silent_s, 0.5), quiet_s=1.0))} for s in ring()
            ]
            content = {"time_s": NOW - 20.0, "processes": states, "limits": {"silent_s": 5.0, "quiet_s": 30.0, "deaf_s": 60.0}}
            monkeypatch.setattr("time.time", lambda: NOW)
            found, about = explain_status(content, stopped.pid)
        finally:
            stopped.kill()
    assert found.guilty == ()
    assert about.startswith(f"the supervisor (process {stopped.pid}) is stopped: it has written nothing for 20 s")


def test_movement() -> None:
    still = [replace(s, quiet_s=31.0) for s in ring()]
    assert nothing_moves(still, 30.0)
    assert not nothing_moves(ring(), 30.0)
    training = [replace(s, doing="train", peer="") if s.name == "learner-0" else s for s in still]
    assert not nothing_moves(training, 30.0), "a long step is no stall"
    stopped = [replace(s, stopped=True) if s.name == "learner-0" else s for s in training]
    assert nothing_moves(stopped, 30.0), "a step of a stopped learner is"
    assert not nothing_moves([], 30.0)


def test_states_come_back_from_the_status_file_older() -> None:
    state = ring()[0]
    back = from_data({"pid": 5, "addresses": {}, **to_data(state)}, later_s=2.0)
    assert back == replace(state, for_s=43.0), "who wrote it may be the one that is silent since"


def test_machines_get_the_same() -> None:
    data = explain(ring(generator_0={"stopped": True}), LIMITS, NOW).data()
    assert data["guilty"][0]["name"] == "generator-0"
    assert {"waiter", "on", "what", "for_s", "state", "sentence"} == set(data["waits"][0])
