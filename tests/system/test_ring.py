"""The whole ring on a small run: it trains, its record is complete, and its staleness is what the schedule promises."""

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protocol.codec import decode
from protocol.journal import read_journal
from protocol.messages import Trajectory, token_versions
from tests.system.conftest import Run


def trajectories(run: Path) -> list[Trajectory]:
    """Every journaled trajectory."""
    run_id = int(json.loads((run / "status.json").read_text())["run_id"], 16)
    decoded = [decode(record[1:], run_id) for record in read_journal(run / "journal", strict=True) if record[0] == b"trajectory"]
    return [t for t in decoded if isinstance(t, Trajectory)]


def records(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def all_take_part(status: dict[str, Any]) -> bool:
    """Each generator has samples or is asked for them next, and each reward actor has one to score."""
    facts = {p["name"]: p["facts"] for p in status.get("processes", ())}
    credits = facts.get("dispatcher-0", {}).get("credits", {})
    scoring = [facts.get(f"rewarder-{i}", {}).get("active", 0) > 0 for i in range(2)]
    sampling = [credits.get(f"generator-{i}@1", 0) > 0 or facts.get(f"generator-{i}", {}).get("sent") for i in range(2)]
    return all(scoring) and all(sampling)


@pytest.mark.parametrize("schedule", ["one_off", "synchronous"])
def test_a_run_trains_and_accounts_for_every_sample(
    config: dict[str, Any], start: Callable[..., Run], tmp_path: Path, schedule: str
) -> None:
    """Rewards wait until everyone is there: else the first of two, were the other late, might do all the work of so small a run."""
    config["schedule"] = {"name": schedule}
    config["generators"]["count"] = config["rewarders"]["count"] = 2
    config["rewarders"] |= {"reward": "tests.system.rewards:HangingReward", "options": {"file": str(tmp_path / "go")}}
    run = start(config, "--json")
    run.until(all_take_part, "two generators and two reward actors at work")
    (tmp_path / "go").touch()
    assert run.wait() == 0, run.err
    figures = json.loads(run.out.splitlines()[-1])
    assert figures["outcome"] == "done"
    assert figures["iterations"] == 4
    assert [e["version"] for e in figures["evaluations"]] == [0, 4]
    assert figures["staleness_max"] == (1 if schedule == "one_off" else 0)

    everything = trajectories(run.path)
    train = [t for t in everything if t.purpose == "train"]
    assert len({(t.group_id, t.index) for t in train}) == len(train) == 4 * 4 * 4
    assert {t.group_id for t in train} == set(range(16))
    assert {t.generator.partition("@")[0] for t in everything} == {"generator-0", "generator-1"}
    assert {t.rewarder.partition("@")[0] for t in everything} == {"rewarder-0", "rewarder-1"}
    bound = 1 if schedule == "one_off" else 0
    for t in train:
        versions = token_versions(t.spans)
        assert len(versions) == len(t.token_ids) == len(t.behaviour_logprobs)
        assert versions.min() >= t.iteration - bound
        assert versions.max() <= t.iteration
        assert (t.behaviour_logprobs <= 0).all()
    evaluated = [t for t in everything if t.purpose == "eval"]
    assert {(t.iteration, int(t.spans[0, 0]), int(t.spans[-1, 0])) for t in evaluated} == {(0, 0, 0), (4, 4, 4)}

    ledger = sqlite3.connect(run.path / "ledger.sqlite")
    states = dict(ledger.execute("SELECT purpose || ' ' || state, COUNT(*) FROM ended GROUP BY 1").fetchall())
    issued = ledger.execute("SELECT COUNT(*) FROM issued").fetchone()[0]
    ledger.close()
    assert states.pop("eval evaluated") == 2 * 6
    assert sum(states.values()) == 16
    assert set(states) <= {"train trained", "train filtered"}
    assert issued == 16 + 12

    losses = [r["train/loss"] for r in records(run) if "train/loss" in r]
    assert len(losses) == 4
    assert np.isfinite(losses).all()
    assert any(abs(loss) > 0 for loss in losses)


def test_the_final_model_loads_and_differs_from_the_base(config: dict[str, Any], start: Callable[..., Run], tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config["iterations"] = 2
    config["evaluation"] = {"at_start": False, "at_end": False}
    run = start(config)
    assert run.wait() == 0, run.err
    final = AutoModelForCausalLM.from_pretrained(run.path / "final_model")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    AutoTokenizer.from_pretrained(run.path / "final_model")
    assert any((a != b).any() for a, b in zip(final.parameters(), base.parameters(), strict=True))
    assert not (Path("/dev/shm") / f"rlsys-{run.status()['run_id']}").exists()


def test_two_sharded_ranks_over_tcp_give_the_losses_of_one(config: dict[str, Any], start: Callable[..., Run]) -> None:
    """One generator, one reward actor and no overlap: the same tokens reach the learner, so the losses must be the same."""
    config["schedule"] = {"name": "synchronous"}
    config["evaluation"] = {"at_start": False, "at_end": False}
    config["iterations"] = 3
    losses = []
    for ranks, sharding, transport in ((1, "none", "ipc"), (2, "full", "tcp")):
        config["learner"] |= {"ranks": ranks, "sharding": sharding}
        config["transport"] = {"kind": transport}
        run = start(config)
        assert run.wait() == 0, run.err
        losses.append([r["train/loss"] for r in records(run) if "train/loss" in r])
    assert len(losses[0]) == 3
    np.testing.assert_allclose(losses[0][0], losses[1][0], rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(
        losses[0], losses[1], rtol=1e-3, atol=1e-6, err_msg="later iterations sample from weights that differ by rounding"
    )


def test_sharded_adapters_alone_a_reward_of_nan_and_the_checkpoints_that_stay(config: dict[str, Any], start: Callable[..., Run]) -> None:
    config["rewarders"] = {"reward": "tests.system.rewards:OnceNotFinite"}
    config["evaluation"] = {"at_start": False, "at_end": False}
    config["learner"] |= {
        "ranks": 2, "sharding": "full", "lora": {"rank": 4, "publish": "adapter"}, "commit_every": 1, "zero_variance": "keep",
        "checkpoints": {"keep_last": 1, "keep_every": 3},
    }  # fmt: skip
    run = start(config)
    assert run.wait() == 0, run.err
    assert sorted(path.name for path in (run.path / "checkpoints").iterdir()) == ["00000003", "00000004"]
    everything = trajectories(run.path)
    [broken] = [t for t in everything if t.status == "not_finite"]
    assert (broken.score, broken.passed) == (None, False)
    assert f"sample {broken.group_id}/{broken.index}" in (run.path / "logs" / "rewarder-0.log").read_text()
    assert sum(r.get("reward/samples_not_finite") or 0.0 for r in records(run)) == 1.0
    newest = {int(t.spans[-1, 0]) for t in everything if len(t.spans)}
    assert max(newest) >= 2, "generators took versions of adapters, each of which proved itself on its canary"
    assert (run.path / "final_model" / "model.safetensors").is_file()


def test_faults_of_the_judge_never_become_scores(config: dict[str, Any], start: Callable[..., Run]) -> None:
    config["rewarders"] = {"reward": "tests.system.rewards:FaultyReward", "retries": 1}
    config["iterations"] = 2
    run = start(config)
    assert run.wait() == 0, run.err
    everything = trajectories(run.path)
    failed = [t for t in everything if t.status == "failed"]
    assert failed
    assert all(t.score is None and not t.passed and "on fire" in t.detail for t in failed)
    assert {t.problem_id for t in failed} == {t.problem_id for t in everything if int(t.problem_id[-1]) % 2 == 0}
    ledger = sqlite3.connect(run.path / "ledger.sqlite")
    reasons = dict(ledger.execute("SELECT problem_id, state FROM ended WHERE purpose = 'train'").fetchall())
    ledger.close()
    assert all((state == "failed") == (int(problem[-1]) % 2 == 0) for problem, state in reasons.items())
