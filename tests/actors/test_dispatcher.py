"""The pure dispatcher: what is issued, in which order, under which names; and the whole one over real sockets."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.dispatcher import FIRST_EVAL_GROUP, Dispatcher, DispatcherJob, run_dispatcher, sample_seed
from actors.pacing import PacingRule
from actors.settings import DataSettings, EvaluationSettings, SamplingSettings
from actors.stages import StagePlan
from protocol.errors import DataError
from protocol.messages import Credit, Event, Finished, GroupOutcome, GroupTask, Hello, WeightsReady
from tests.directories import WORDS, dataset, problems, tokenizer_directory
from tests.ring import Peer, Ring


def make_job(
    tmp_path: Path, *, iterations: int = 3, staleness: int = 1, train: int = 5, held_out: int = 2, **changes: Any
) -> DispatcherJob:
    evaluation = {"samples": 2, **changes.pop("evaluation", {})}
    data = {"train": dataset(tmp_path / "train.jsonl", problems(train)), "shuffle": False, **changes.pop("data", {})}
    if held_out:
        data["eval"] = dataset(tmp_path / "eval.jsonl", problems(held_out, "e"))
    pacing = changes.pop("pacing", {})
    sampling = {"groups_per_iteration": 2, "group_size": 3, "max_tokens": 8, **changes.pop("sampling", {})}
    settings = SamplingSettings(**sampling)
    stages = (StagePlan(name="0", train=data["train"], max_tokens=settings.max_tokens, temperature=settings.temperature),)
    values: dict[str, Any] = {
        "seed": 7,
        "iterations": iterations,
        "pacing": PacingRule(iterations=iterations, groups_per_iteration=2, max_staleness=staleness, **pacing),
        "max_requeues": 1,
        "stages": stages,
        "model_dir": tokenizer_directory(tmp_path / "model"),
        "max_context": 64,
        "data": DataSettings(**data),
        "sampling": settings,
        "evaluation": EvaluationSettings(**evaluation),
        "ledger": tmp_path / "ledger.sqlite",
    }
    return DispatcherJob(**{**values, **changes})


def drain(dispatcher: Dispatcher) -> list[GroupTask]:
    """Issue everything that may be issued now."""
    tasks = []
    while (task := dispatcher.next_task()) is not None:
        dispatcher.issue(task)
        tasks.append(task)
    return tasks


def ended(task: GroupTask, *, passed: int = 1, state: str = "", samples: int | None = None) -> GroupOutcome:
    return GroupOutcome(
        group_id=task.group_id, iteration=task.iteration, purpose=task.purpose, problem_id=task.problem_id,
        state=state or ("trained" if task.purpose == "train" else "evaluated"), reason="",  # type: ignore[arg-type]
        num_samples=len(task.indices) if samples is None else samples, num_passed=passed, mean_score=0.5,
        oldest_version=task.iteration, newest_version=task.iteration, in_batch=task.purpose == "train",
    )  # fmt: skip


def whole_run(job: DispatcherJob) -> tuple[list[GroupTask], list[dict[str, Any]]]:
    """Every task of a run in which each group ends at once, and the results of its evaluations."""
    dispatcher, tasks, results = Dispatcher(job), [], []
    for version in range(job.iterations + 1):
        dispatcher.on_version(version, 2 * version)
        for task in drain(dispatcher):
            tasks.append(task)
            results += [result for result in [dispatcher.on_outcome(ended(task))] if result]
    assert dispatcher.done
    return tasks, results


def test_a_task_carries_everything_that_a_generator_needs(tmp_path: Path) -> None:
    dispatcher = Dispatcher(make_job(tmp_path, held_out=0, sampling={"temperature": 0.7, "top_p": 0.9, "top_k": 5}))
    dispatcher.on_version(0, 0)
    task = dispatcher.next_task()
    assert task is not None
    assert not task.fault()
    assert [WORDS[i] for i in task.prompt_ids] == ["w0", "w1"]
    assert (task.group_id, task.iteration, task.attempt, task.purpose, task.min_version) == (0, 0, 0, "train", 0)
    assert (task.temperature, task.top_p, task.top_k, task.max_tokens) == (0.7, 0.9, 5, 8)
    assert task.indices.tolist() == [0, 1, 2]
    assert task.stop_token_ids.tolist() == [WORDS.index("<eos>")]
    assert dispatcher.next_task() is not task, "asking again issues nothing"
    assert dispatcher.outstanding == {}


def test_pacing_holds_groups_back_until_their_version_is_published(tmp_path: Path) -> None:
    dispatcher = Dispatcher(make_job(tmp_path, held_out=0))
    assert dispatcher.next_task() is None
    assert dispatcher.waits_for()[:2] == ("waiting:first version", "learner")
    dispatcher.on_version(0, 0)
    assert dispatcher.waits_for()[:2] == ("waiting:credits", "generator")
    assert [(t.iteration, t.min_version) for t in drain(dispatcher)] == [(0, 0), (0, 0), (1, 0), (1, 0)]
    assert dispatcher.waits_for() == ("waiting:version", "learner", "v1 opens the next iteration")
    dispatcher.on_version(1, 2)
    assert [(t.iteration, t.min_version) for t in drain(dispatcher)] == [(2, 1), (2, 1)]
    assert dispatcher.waits_for() == ("waiting:outcomes", "learner", "6 groups have no terminal state yet")


@pytest.mark.parametrize(
    ("when", "versions"),
    [
        ({"at_start": True, "at_end": True}, [0, 5]),
        ({"at_start": False, "at_end": True}, [5]),
        ({"at_start": True, "at_end": False}, [0]),
        ({"at_start": False, "at_end": False, "every": 2}, [2, 4]),
        ({"at_start": True, "at_end": True, "every": 1}, [0, 1, 2, 3, 4, 5]),
        ({"at_start": False, "at_end": False}, []),
    ],
)
def test_evaluation_comes_when_it_is_asked_for(tmp_path: Path, when: dict[str, Any], versions: list[int]) -> None:
    tasks, results = whole_run(make_job(tmp_path, iterations=5, evaluation={"samples": 4, "temperature": 0.3, "top_p": 0.8, **when}))
    rounds = [task for task in tasks if task.purpose == "eval"]
    assert [(t.iteration, t.problem_id) for t in rounds] == [(v, e) for v in versions for e in ("e0", "e1")]
    assert all(t.min_version == t.iteration and len(t.indices) == 4 and (t.temperature, t.top_p) == (0.3, 0.8) for t in rounds)
    assert [result["version"] for result in results] == versions
    assert all((r["pass_at_1"], r["problems"], r["failed"], r["samples"]) == (0.25, 2, 0, 8) for r in results)


def test_the_first_evaluation_is_issued_before_the_first_training_sample(tmp_path: Path) -> None:
    """Also when a generator has loaded v0 before the dispatcher has heard of it."""
    dispatcher = Dispatcher(make_job(tmp_path))
    assert dispatcher.next_task() is None
    dispatcher.on_version(0, 0)
    assert [t.purpose for t in drain(dispatcher)] == ["eval"] * 2 + ["train"] * 4


def test_training_groups_are_alike_with_and_without_evaluation(tmp_path: Path) -> None:
    def training(tasks: list[GroupTask]) -> list[Any]:
        return [(t.group_id, t.iteration, t.problem_id, t.seeds.tolist()) for t in tasks if t.purpose == "train"]

    without, _ = whole_run(make_job(tmp_path, iterations=4, held_out=0))
    every, _ = whole_run(make_job(tmp_path, iterations=4, evaluation={"every": 1}))
    assert training(every) == training(without)
    assert [group for group, *_ in training(without)] == list(range(8))
    evaluated = [t.group_id for t in every if t.purpose == "eval"]
    assert len(set(evaluated)) == len(evaluated) == 2 * 5
    assert min(evaluated) >= FIRST_EVAL_GROUP


def test_seeds_depend_on_run_group_and_index_alone(tmp_path: Path) -> None:
    tasks, _ = whole_run(make_job(tmp_path, held_out=0))
    again, _ = whole_run(make_job(tmp_path, held_out=0))
    assert [t.seeds.tolist() for t in tasks] == [t.seeds.tolist() for t in again]
    seeds = [seed for task in tasks for seed in task.seeds.tolist()]
    assert len(set(seeds)) == len(seeds) == 3 * 2 * 3
    assert seeds[:2] == [sample_seed(7, 0, 0), sample_seed(7, 0, 1)]
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    others, _ = whole_run(make_job(tmp_path, held_out=0, seed=8))
    assert not {s for t in others for s in t.seeds.tolist()} & set(seeds)


def test_epochs_go_through_every_problem(tmp_path: Path) -> None:
    tasks, _ = whole_run(make_job(tmp_path, iterations=5, train=5, held_out=0, data={"shuffle": True}))
    ids = [t.problem_id for t in tasks]
    assert sorted(ids[:5]) == sorted(ids[5:]) == [f"p{i}" for i in range(5)]


def test_prompts_that_leave_no_room_are_skipped_and_counted(tmp_path: Path) -> None:
    def skipped(**changes: Any) -> list[str]:
        lines = [*problems(2), {"id": "long", "prompt": " ".join(["w1"] * 10)}, {"id": "none", "prompt": " "}]
        train = dataset(tmp_path / "mixed.jsonl", lines)
        job = make_job(tmp_path, held_out=0, **changes)
        changed = {"data": DataSettings(train=train), "stages": (replace(job.stages[0], train=train),)}
        return [p.problem_id for p in Dispatcher(DispatcherJob(**{**_fields(job), **changed})).skipped]

    assert skipped(max_context=18) == ["none"], "10 tokens of prompt and 8 of completion fill 18"
    assert skipped(max_context=17) == ["long", "none"]
    assert skipped(sampling={"max_prompt_tokens": 9}) == ["long", "none"]
    assert skipped(sampling={"max_prompt_tokens": 1000}, max_context=17) == ["long", "none"], "the context is a limit in any case"
    with pytest.raises(DataError, match=r"mixed\.jsonl: every prompt is longer than 1 tokens"):
        skipped(sampling={"max_prompt_tokens": 1})


def _fields(job: DispatcherJob) -> dict[str, Any]:
    return {name: getattr(job, name) for name in job.__dataclass_fields__}


def test_done_only_when_everything_has_its_terminal_state(tmp_path: Path) -> None:
    dispatcher = Dispatcher(make_job(tmp_path, iterations=1))
    assert not dispatcher.done
    dispatcher.on_version(0, 0)
    out = drain(dispatcher)
    dispatcher.on_version(1, 2)
    assert not dispatcher.done, "the last evaluation was not issued"
    out += drain(dispatcher)
    assert [t.purpose for t in out] == ["eval", "eval", "train", "train", "eval", "eval"]
    for task in out:
        assert not dispatcher.done
        dispatcher.on_outcome(ended(task))
    assert dispatcher.done


def test_the_run_is_not_done_before_its_last_version(tmp_path: Path) -> None:
    dispatcher = Dispatcher(make_job(tmp_path, iterations=1, held_out=0))
    dispatcher.on_version(0, 0)
    for task in drain(dispatcher):
        dispatcher.on_outcome(ended(task))
    assert not dispatcher.done
    dispatcher.on_version(1, 2)
    assert dispatcher.done


def test_outcomes_of_unknown_groups_and_repeats_change_nothing(tmp_path: Path) -> None:
    dispatcher = Dispatcher(make_job(tmp_path))
    dispatcher.on_version(0, 0)
    tasks = drain(dispatcher)
    first, second = tasks[:2]
    stranger = GroupTask(**{**{n: getattr(first, n) for n in GroupTask.__slots__}, "group_id": FIRST_EVAL_GROUP + 99})
    assert dispatcher.on_outcome(ended(stranger)) is None
    assert dispatcher.on_outcome(ended(first)) is None
    assert dispatcher.on_outcome(ended(first)) is None, "told again after a reconnection: not the round's second problem"
    assert len(dispatcher.outstanding) == len(tasks) - 1
    result = dispatcher.on_outcome(ended(second, passed=2))
    assert result is not None
    assert result["pass_at_1"] == pytest.approx((1 / 2 + 2 / 2) / 2)


def test_failed_groups_of_an_evaluation_are_counted_not_scored(tmp_path: Path) -> None:
    dispatcher = Dispatcher(make_job(tmp_path, held_out=3))
    dispatcher.on_version(0, 0)
    a, b, c = drain(dispatcher)[:3]
    dispatcher.on_outcome(ended(a, passed=1))
    dispatcher.on_outcome(ended(b, state="failed", passed=0, samples=0))
    result = dispatcher.on_outcome(ended(c, passed=0, samples=1))
    assert result is not None
    assert (result["pass_at_1"], result["problems"], result["failed"], result["samples"]) == (0.25, 2, 1, 3)


def test_old_news_of_versions_starts_no_evaluation_twice(tmp_path: Path) -> None:
    dispatcher = Dispatcher(make_job(tmp_path, evaluation={"every": 1}))
    for version in (0, 1, 0, 1):
        dispatcher.on_version(version, 2 * version)
    assert [t.iteration for t in drain(dispatcher) if t.purpose == "eval"] == [0, 0, 1, 1]


# ---------------------------------------------------------------------------------------------------- over sockets


def ready(number: int) -> WeightsReady:
    return WeightsReady(
        number=number, incarnation=0, directory="/nowhere", manifest_sha256="0" * 64, num_bytes=1, published_s=0.0, groups_taken=2 * number
    )


def greet(generator: Peer, identity: str, credit: int, loaded: int) -> None:
    generator.tell(Hello(role="generator", index=0, identity=identity, epoch=1, loaded=(loaded, 0)))
    generator.tell(Credit(total=credit, loaded=(loaded, 0)))


def test_a_task_goes_only_to_a_generator_that_asked_and_has_the_version(ring: Ring, tmp_path: Path) -> None:
    job = make_job(tmp_path, held_out=0, staleness=0, iterations=2, train=3)
    lines = [*problems(3), {"id": "long", "prompt": " ".join(["w1"] * 100)}]
    dataset(job.data.train, lines)
    learner = ring.serve("learner-0@1", "weights")
    role = ring.run("dispatcher", lambda node: run_dispatcher(node, job))
    old, new = (ring.link(f"generator-{i}@1", "tasks", role.identity) for i in range(2))
    outcomes = ring.link("learner-0@1", "outcomes", role.identity)
    ring.until(lambda: learner.of(Hello), "the dispatcher greets the learner")
    greet(old, "generator-0@1", credit=1, loaded=0)
    greet(new, "generator-1@1", credit=1, loaded=0)

    learner.tell(ready(0), to=role.identity)
    ring.until(lambda: len(old.of(GroupTask)) + len(new.of(GroupTask)) == 2, "the two groups of iteration 0")
    assert [t.iteration for t in old.of(GroupTask)] == [t.iteration for t in new.of(GroupTask)] == [0]
    old.tell(Credit(total=9, loaded=(0, 0)))

    learner.tell(ready(1), to=role.identity)
    beats = ring.heartbeats(role.identity)
    ring.never(
        lambda: len(old.of(GroupTask)) + len(new.of(GroupTask)) > 2,
        "a generator with v0 was given a group that needs v1",
        lambda: ring.heartbeats(role.identity) > beats + 1,
    )
    new.tell(Credit(total=2, loaded=(1, 0)))
    ring.until(lambda: any(t.iteration == 1 for t in new.of(GroupTask)), "the generator with v1 gets its group")
    second = [t for t in old.of(GroupTask) + new.of(GroupTask) if t.iteration == 1]
    assert len(second) == 1, "credits are the limit"
    new.tell(Credit(total=3, loaded=(1, 0)))
    ring.until(lambda: len([t for t in new.of(GroupTask) if t.iteration == 1]) == 2, "the last group")

    learner.tell(ready(2), to=role.identity)
    tasks = old.of(GroupTask) + new.of(GroupTask)
    for task in tasks[:-1]:
        outcomes.tell(ended(task))
    assert not ring.control.of(Finished)
    outcomes.tell(ended(tasks[-1]))
    ring.until(lambda: ring.control.of(Finished), "the dispatcher is done")
    assert [f.error for f in ring.control.of(Finished)] == [""]

    events = {e.name: e.data for e in ring.control.of(Event)}
    assert events["skipped"] == {"count": 1, "reason": "prompt too long", "first": ["long"]}
    ring.end(role)
    with sqlite3.connect(job.ledger) as ledger:
        rows = ledger.execute("SELECT group_id, iteration, attempt, purpose, generator FROM issued ORDER BY group_id").fetchall()
        skipped = ledger.execute("SELECT problem_id, reason FROM skipped").fetchall()
    ledger.close()
    assert [(g, k, a, p) for g, k, a, p, _ in rows] == [(0, 0, 0, "train"), (1, 0, 0, "train"), (2, 1, 0, "train"), (3, 1, 0, "train")]
    assert [g for *_, g in rows[2:]] == ["generator-1@1"] * 2
    assert skipped == [("long", "prompt too long")]
