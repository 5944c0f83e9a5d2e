"""The quickstart's problems: solvable, varied, split without overlap, the same for the same seed; programs are really run."""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from protocol.errors import DataError
from rlsys.quickstart.operations import RESULTS, TRANSFORMS, Result, Transform
from rlsys.quickstart.tasks import (
    NUM_TESTS,
    Problem,
    Split,
    correct_program,
    make_problem,
    noisy_program,
    reliability,
    split_of,
    write_dataset,
)

OPERATIONS: tuple[Transform | Result, ...] = (*TRANSFORMS, *RESULTS)


def problems(split: Split, count: int, seed: int = 0) -> list[Problem]:
    rng = random.Random(seed)
    return [make_problem(rng, split) for _ in range(count)]


def limits() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (120, 121))
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))


CHILD = """if True:
    import contextlib, io, json, sys
    runs = json.load(sys.stdin)
    def run(program, stdin):
        sys.stdin, out = io.StringIO(stdin), io.StringIO()
        try:
            with contextlib.redirect_stdout(out):
                exec(program, {})
        except Exception:
            return None
        return out.getvalue().rstrip()
    json.dump([run(program, stdin) for program, stdin in runs], sys.__stdout__)
"""


def execute(runs: list[tuple[str, str]]) -> list[str | None]:
    """What each program prints for its stdin, None where it fails. All run in one child with limits, as starting a child takes longest."""
    command = [sys.executable, "-I", "-S", "-c", CHILD]
    done = subprocess.run(command, input=json.dumps(runs), capture_output=True, text=True, timeout=600, preexec_fn=limits, check=True)
    printed: list[str | None] = json.loads(done.stdout)
    assert len(printed) == len(runs)
    return printed


def share_solved(pairs: list[tuple[str, Problem]]) -> float:
    """The share of programs that pass all tests of their problem."""
    printed = iter(execute([(program, stdin) for program, problem in pairs for stdin, _ in problem.tests]))
    verdicts = [[next(printed) == stdout.rstrip() for _, stdout in problem.tests] for _, problem in pairs]
    return sum(map(all, verdicts)) / len(pairs)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_correct_programs_pass_and_most_noisy_ones_do_not(split: Split) -> None:
    rng = random.Random(1)
    sample = problems(split, 300)
    assert share_solved([(correct_program(rng, problem), problem) for problem in sample]) == 1.0
    assert 0.2 < share_solved([(noisy_program(rng, problem), problem) for problem in sample]) < 0.45


def test_a_program_that_always_prints_the_same_never_passes() -> None:
    pairs = [(f"print({stdout.rstrip()!r})", problem) for problem in problems("held_out", 50) for _, stdout in problem.tests]
    assert share_solved(pairs) == 0.0


def test_every_way_to_write_an_operation_is_right_and_every_mistake_shows() -> None:
    rng = random.Random(2)
    lists = [[rng.randint(-9, 12) for _ in range(rng.randint(5, 10))] for _ in range(15)]
    lists += [[0, *numbers[1:-1], numbers[1]] for numbers in lists] + [[3, *numbers, 3] for numbers in lists]
    for operation in OPERATIONS:
        if isinstance(operation, Transform):
            ending, expected = "\nprint(*xs)", [" ".join(map(str, operation.meaning(numbers, 3))) for numbers in lists]
        else:
            ending, expected = "", [str(operation.meaning(numbers)) for numbers in lists]
        templates = operation.correct + operation.mistakes
        assignment = "xs = " if ending else ""
        programs = [f"xs = list(map(int, input().split()))\n{assignment}{code.format(v='xs', k=3)}{ending}" for code in templates]
        printed = execute([(program, " ".join(map(str, numbers))) for program in programs for numbers in lists])
        for number, template in enumerate(templates):
            answers = printed[number * len(lists) : (number + 1) * len(lists)]
            assert (answers == expected) == (template in operation.correct), (operation.name, template)


def test_the_task_has_the_stated_size_and_no_two_operations_share_a_phrasing() -> None:
    assert (len(TRANSFORMS), len(RESULTS)) == (24, 14)
    assert len({operation.name for operation in OPERATIONS}) == 38
    phrasings = [phrasing for operation in OPERATIONS for phrasing in operation.phrasings]
    assert len(set(phrasings)) == len(phrasings)
    assert all(len(operation.phrasings) in (2, 3) for operation in OPERATIONS)
    assert not {code for operation in OPERATIONS for code in operation.correct if code in operation.mistakes}


def test_splits_share_no_operations_and_a_fifth_is_held_out() -> None:
    triples = [(a.name, b.name, c.name) for a in TRANSFORMS for b in TRANSFORMS if a is not b for c in RESULTS]
    share = sum(split_of(triple) == "held_out" for triple in triples) / len(triples)
    assert 0.18 < share < 0.22
    train, held_out = problems("train", 1500), problems("held_out", 500)
    assert not {p.operations for p in train} & {p.operations for p in held_out}
    assert all(len(problem.operations) == 3 for problem in held_out)
    assert (
        {name for p in train for name in p.operations} == {name for p in held_out for name in p.operations} == {o.name for o in OPERATIONS}
    )


def test_each_problem_has_six_different_inputs_and_no_constant_answer() -> None:
    for problem in [*problems("train", 400), *problems("held_out", 400)]:
        assert len({stdin for stdin, _ in problem.tests}) == len(problem.tests) == NUM_TESTS
        assert len({stdout for _, stdout in problem.tests}) >= 2
        assert all(5 <= len(stdin.split()) <= 10 and stdin.endswith("\n") for stdin, _ in problem.tests)


def test_the_same_seed_gives_the_same_problems_and_programs() -> None:
    def draw(seed: int) -> list[tuple[Problem, str]]:
        rng = random.Random(seed)
        return [(problem, noisy_program(rng, problem)) for problem in (make_problem(rng, "train") for _ in range(50))]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


def test_the_noisy_corpus_is_as_reliable_as_stated() -> None:
    rates = [reliability(operation) for operation in OPERATIONS]
    assert 0.35 <= min(rates) < 0.45
    assert 0.75 < max(rates) <= 0.85
    rng = random.Random(5)
    operation = TRANSFORMS[0]
    written = [noisy_program(rng, problem) for problem in problems("train", 4000) if problem.operations[:-1] == (operation.name,)]
    right = sum(
        any(f" = {code}\n" in program for v in ("xs", "nums", "data") for code in filled(operation.correct, v)) for program in written
    )
    assert len(written) > 30
    assert right / len(written) == pytest.approx(reliability(operation), abs=0.25)


def filled(templates: tuple[str, ...], variable: str) -> list[str]:
    return [template.format(v=variable, k=0) for template in templates]


def test_a_dataset_has_the_lines_that_the_ring_reads(tmp_path: Path) -> None:
    path = tmp_path / "new" / "train.jsonl"
    write_dataset(path, "train", 300, seed=0)
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [record["id"] for record in records] == [f"train-{number}" for number in range(300)]
    assert len({record["prompt"] for record in records}) == 300
    assert all(split_of(tuple(record["operations"])) == "train" for record in records)
    assert all(set(test) == {"input", "output"} for record in records for test in record["tests"])
    assert [file.name for file in path.parent.iterdir()] == ["train.jsonl"], "nothing is left aside"
    first = path.read_bytes()
    write_dataset(path, "train", 300, seed=0)
    assert path.read_bytes() == first
    write_dataset(path, "train", 300, seed=1)
    assert path.read_bytes() != first


def test_a_dataset_that_cannot_be_filled_says_so_and_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "held_out.jsonl"
    write_dataset(path, "held_out", 5, seed=0)
    before = path.read_bytes()
    only = make_problem(random.Random(0), "held_out")
    monkeypatch.setattr("rlsys.quickstart.tasks.make_problem", lambda rng, split: only)
    with pytest.raises(DataError, match="found 1 different held_out prompts, expected 2"):
        write_dataset(path, "held_out", 2, seed=0)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["held_out.jsonl"]
