"""The mathematics reward on real answers, on near misses, on hostile text, and when its processes die.

The public sets lie beside the repository (`../shared/data`) and are read in place. `make test` takes a seeded sample of the two large
ones, the slow run all.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from actors.rewards import Sample, Score
from actors.rewards.math_answer import MathAnswer, parse_references
from actors.rewards.math_judge import MAX_FRAME_BYTES
from actors.rewards.math_text import is_words, tidy
from actors.rewards.math_workers import MathWorkers
from protocol.errors import ConfigError, DataError, InfrastructureFault
from tests.actors.math_spellings import lines, near_misses, sample_of, spellings
from tests.actors.processes import descendants, parents, wait_until

HANGS = "10^{10^{10}}"


@pytest.fixture(scope="module")
def reward() -> Iterator[MathAnswer]:
    before = descendants(os.getpid())
    reward = MathAnswer({"workers": 2, "time_limit_s": 10})
    try:
        yield reward
    finally:
        reward.close()
        wait_until(lambda: descendants(os.getpid()) <= before, "every process of the reward ended")


def score(reward: MathAnswer, reference: object, completion: str) -> Score:
    return reward.score(Sample(problem={"id": "p", "answer": reference}, completion=completion, truncated=False))


def boxed(reward: MathAnswer, reference: object, answer: str) -> Score:
    return score(reward, reference, f"So it is \\boxed{{{answer}}}.")


def not_accepted(reward: MathAnswer, references: list[str]) -> list[str]:
    cases = [(reference, spelling) for reference in references for spelling in spellings(reference)]
    assert len(cases) > 4 * len(references) > 0
    with ThreadPoolExecutor(2) as threads:
        scores = list(threads.map(lambda case: boxed(reward, *case), cases))
    return [f"{case}: {found.status} {found.detail}" for case, found in zip(cases, scores, strict=True) if not found.passed]


def _solutions(name: str, number: int | None) -> list[str]:
    found = [line["answer"] for line in lines(name)]
    return found if number is None else sample_of(found, number, seed=1)


@pytest.mark.parametrize("name", ["math_test_math500.json", "math_test_aime.json", "math_test_amc.json"])
def test_every_reference_equals_itself_in_its_usual_spellings(reward: MathAnswer, name: str) -> None:
    references = sorted({reference for line in lines(name) for reference in parse_references(line)})
    assert not_accepted(reward, references) == []


@pytest.mark.parametrize("number", [120, pytest.param(None, marks=pytest.mark.slow)])
def test_references_of_the_training_set_equal_themselves(reward: MathAnswer, number: int | None) -> None:
    references = sorted({reference.strip() for reference in _solutions("math_train.json", number)})
    assert not_accepted(reward, references) == []


@pytest.mark.parametrize("number", [60, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["gsm8k_test.jsonl", "gsm8k_train_3000.jsonl"])
def test_gsm8k_solutions_are_right_answers(reward: MathAnswer, name: str, number: int | None) -> None:
    for solution in _solutions(name, number):
        value = solution.rpartition("####")[2].strip()
        for completion in (solution, f"#### ${value}", f"\\boxed{{{value} \\text{{ dollars}}}}", f"#### {value.replace(',', '')}.00"):
            assert score(reward, solution, completion).passed, (value, completion)
        assert score(reward, solution, f"#### {value}1").status == "wrong_answer"


def test_algebra_alone_finds_each_reference_equal_to_itself(reward: MathAnswer) -> None:
    """Without the comparison of texts."""
    references = [tidy(reference) for reference in sample_of([line["answer"] for line in lines("math_test_math500.json")], 80, seed=2)]
    verdicts = {reference: reward.workers.ask([reference], [reference]).verdict for reference in references if not is_words(reference)}
    assert len(verdicts) > 60
    assert [reference for reference, verdict in verdicts.items() if verdict != "equal"] == []


def test_near_misses_are_refused(reward: MathAnswer) -> None:
    references = sample_of([str(line["answer"]) for line in lines("math_test_math500.json")], 500, seed=3)
    missed = [(reference, miss) for reference in references for miss in near_misses(reference)]
    forms = {"swapped or another bracket": "(", "surd": "sqrt", "fraction": "frac", "a list": ","}
    chosen = [case for mark in forms.values() for case in [case for case in missed if mark in case[0]][:45]]
    chosen = list(dict.fromkeys(chosen + [case for case in missed if case[0].lstrip("-").isdigit()][:100]))
    assert len(chosen) >= 200
    with ThreadPoolExecutor(2) as threads:
        scores = list(threads.map(lambda case: boxed(reward, *case), chosen))
    assert [case for case, found in zip(chosen, scores, strict=True) if found.status != "wrong_answer" or found.value != 0.0] == []


CONSTANTS = (
    "0=0",
    "x=x",
    "x \\approx x",
    "\\frac{0}{0}",
    "\\emptyset",
    "\\{\\}",
    "(-\\infty,\\infty)",
    "\\mathbb{R}",
    "a,b",
    "\\text{None}",
)


def test_no_constant_answers_everything(reward: MathAnswer) -> None:
    references = [str(line["answer"]) for line in lines("math_test_math500.json")]
    references = sample_of([reference for reference in references if not reference.lstrip("-").isdigit()], 25, seed=5)
    with ThreadPoolExecutor(2) as threads:
        cases = [(reference, constant) for reference in references for constant in CONSTANTS]
        scores = list(threads.map(lambda case: boxed(reward, *case), cases))
    assert [case for case, found in zip(cases, scores, strict=True) if found.value != 0.0] == []


EQUAL = [
    ("\\frac{1}{2}", "0.5"),
    ("\\frac{1}{3}", "0.333333"),
    ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}"),
    ("\\sqrt{12}", "2\\sqrt{3}"),
    ("1,2", "\\{2, 1\\}"),
    ("1 \\pm \\sqrt{19}", "1-\\sqrt{19}, 1+\\sqrt{19}"),
    ("(x+1)^2", "x^2+2x+1"),
    ("x \\in [-2,7]", "[-2,7]"),
    ("y = 2x+3", "y = 3 + 2x"),
    ("x = 5", "5"),
    ("75\\%", "0.75"),
    ("75\\%", "75"),
    ("50.5\\%", "50.5"),
    ("(3, \\frac{\\pi}{2})", "(3, \\pi/2)"),
    ("(0,9) \\cup (9,36)", "(9,36) \\cup (0,9)"),
    ("\\begin{pmatrix} 1/2 \\\\ 2 \\end{pmatrix}", "\\begin{bmatrix} 0.5 \\\\ 2 \\end{bmatrix}"),
    ("2^{27} - 2^{11}", "134215680"),
    ("6 - 5i", "-5i + 6"),
    (142.0, "142"),
    (0.25, "\\frac14"),
    (["7", "8"], "8"),
]
UNEQUAL = [
    ("3t", "3"),
    ("3t", "3s"),
    ("1 + 2m", "3"),
    (".0000672", "0.000067"),
    ("0.00000005", "0.0"),
    ("\\frac{1}{3}", "0.333"),
    ("\\text{odd}", "dod"),
    ("\\text{(C)}", "D"),
    ("75\\%", "75.1"),
    ("75\\%", "0.0075"),
    ("[0,1)", "[0,1]"),
    ("-\\infty", "\\infty"),
    ("5", "\\{5, 6\\}"),
    ("5", "5 \\text{ or } 6"),
    ("5", "\\pm 5"),
    ("(1,2,3)", "(1,3,2)"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix} 2 \\\\ 1 \\end{pmatrix}"),
    (["7", "8"], "9"),
]


@pytest.mark.parametrize(("reference", "answer"), EQUAL)
def test_equal_in_another_form(reward: MathAnswer, reference: object, answer: str) -> None:
    found = boxed(reward, reference, answer)
    assert (found.status, found.value, found.passed) == ("accepted", 1.0, True), found.detail


@pytest.mark.parametrize(("reference", "answer"), UNEQUAL)
def test_not_equal(reward: MathAnswer, reference: object, answer: str) -> None:
    found = boxed(reward, reference, answer)
    assert (found.status, found.value, found.passed) == ("wrong_answer", 0.0, False), found.detail


HOSTILE = {
    "eval": "__import__('os').system('touch {file}')",
    "eval in a function's name": "\\operatorname{{exec(open('{file}','w'))}}(1)",
    "eval in a number": "1.__class__.__base__.__subclasses__()",
    "sum": "\\sum_{{n=1}}^{{1000000000}} \\frac{{1}}{{n^3}}",
    "factorial": "100000000!",
    "tower": HANGS,
    "nested braces": "{{" * 300 + "5" + "}}" * 300,
    "nested parentheses": "(" * 300 + "6" + ")" * 300,
    "long number": "9" * 999,
    "surrogate": "\ud800",
    "zero byte": "\0",
    "open command": "\\frac",
}


def test_hostile_text_ends_by_the_limits(tmp_path: Path) -> None:
    reward = MathAnswer({"workers": 1, "time_limit_s": 0.3})
    try:
        for name, text in HOSTILE.items():
            answer = text.replace("{file}", str(tmp_path / "written")).replace("{{", "{").replace("}}", "}")
            found = boxed(reward, "7", answer)
            assert found.value == 0.0 and found.status in ("wrong_answer", "unparseable", "time_limit", "memory_limit"), (name, found)
            assert "\n" not in found.detail and found.detail.encode()
        assert boxed(reward, "7", "\\frac{14}{2}").passed
    finally:
        reward.close()
    assert list(tmp_path.iterdir()) == []


def test_no_text_reaches_eval() -> None:
    """In a process of its own, because sympy is changed for good."""
    source = """if True:
        from actors.rewards.math_judge import Judge
        judge = Judge()
        import sympy
        assert sympy.Number("0.5") == sympy.Float(0.5) and sympy.Number("12") == 12
        for text in ("1+1", "__import__('os')", "x", "", "1e5", "0x10", "1_0"):
            for door in (sympy.sympify, sympy.Number, sympy.S):
                try:
                    door(text)
                except (ValueError, sympy.SympifyError):
                    continue
                raise SystemExit(f"{door} took {text!r}")
        print(judge.compare(["1/2"], ["0.5"]))
    """
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=600, check=False)
    assert done.stdout == "('equal', '')\n", done.stderr


@pytest.mark.parametrize(("on_timeout", "value"), [("wrong", -1.0), ("missing", None)])
def test_a_hung_comparison_ends_by_its_limit_with_a_status(on_timeout: str, value: float | None) -> None:
    reward = MathAnswer({"workers": 1, "time_limit_s": 0.2, "on_timeout": on_timeout, "scale": "plus_minus_one"})
    try:
        found = boxed(reward, "5", HANGS)
        assert (found.value, found.status, found.passed) == (value, "time_limit", False) and "0.2 s" in found.detail
        assert reward.workers.num_replaced == 1
        assert boxed(reward, "5", "10/2").passed
    finally:
        reward.close()


def test_a_question_beyond_its_memory_ends_with_a_status() -> None:
    workers = MathWorkers(1, cpu_s=60.0, memory_bytes=88 << 20)
    try:
        assert workers.ask(["5"], ["\\operatorname{ones}(500,500)"]).verdict == "memory_limit"
        assert workers.num_replaced == 1 and workers.ask(["5"], ["5.0"]).verdict == "equal"
    finally:
        workers.close()


def test_a_killed_process_is_replaced_and_asked_again() -> None:
    reward = MathAnswer({"workers": 1})
    try:
        assert boxed(reward, "5", "10/2").passed
        (pid,) = reward.workers.pids()
        os.kill(pid, signal.SIGKILL)
        assert boxed(reward, "5", "10/2").passed
        assert reward.workers.num_replaced == 1 and reward.workers.pids().isdisjoint({pid})
    finally:
        reward.close()


def test_a_process_that_dies_twice_is_an_infrastructure_fault() -> None:
    reward = MathAnswer({"workers": 1, "time_limit_s": 300})
    try:
        with ThreadPoolExecutor(1) as thread:
            asked = thread.submit(boxed, reward, "5", HANGS)
            seen: set[int] = set()
            for _ in range(2):
                wait_until(lambda: bool(reward.workers.pids() - seen), "a process that was not seen before", 600)
                (pid,) = reward.workers.pids() - seen
                seen.add(pid)
                os.kill(pid, signal.SIGKILL)
            with pytest.raises(InfrastructureFault, match="signal 9"):
                asked.result(600)
    finally:
        reward.close()


def test_eight_threads_get_their_own_scores(reward: MathAnswer) -> None:
    def work(number: int) -> list[bool]:
        return [boxed(reward, str(number), f"{number * 6 + shift}/6").passed for shift in (0, 6, 0)]

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(work, range(8))) == [[True, False, True]] * 8
    assert len(reward.workers.pids()) <= 2


def test_close_ends_a_running_question_and_every_process() -> None:
    before = descendants(os.getpid())
    reward = MathAnswer({"workers": 1, "time_limit_s": 300})
    assert descendants(os.getpid()) <= before, "processes are started when they are needed"
    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(boxed, reward, "5", HANGS)
        wait_until(lambda: bool(reward.workers.pids()), "a process", 600)
        reward.close()
        with pytest.raises(InfrastructureFault):
            asked.result(600)
    wait_until(lambda: descendants(os.getpid()) <= before, "every process of the reward ended")
    with pytest.raises(InfrastructureFault, match="closed"):
        boxed(reward, "5", "10/2")
    reward.close()


def test_processes_end_with_their_owner() -> None:
    source = """if True:
        import threading
        from actors.rewards.math_workers import MathWorkers
        workers = MathWorkers(1, 300.0, 1 << 30)
        workers.ask(["5"], ["10/2"])
        threading.Thread(target=workers.ask, args=(["5"], ["10^{10^{10}}"]), daemon=True).start()
        print(*workers.pids(), flush=True)
        threading.Event().wait(300)
    """
    owner = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        worker = int(owner.stdout.readline())
    finally:
        owner.kill()
        owner.wait(120)
        owner.stdout and owner.stdout.close()
    wait_until(lambda: worker not in parents(), "the worker ended with its owner")


def test_think_terms() -> None:
    klear = MathAnswer({"scale": "plus_minus_one", "think": "written", "think_penalty": 0.5})
    interpreter = MathAnswer({"think": "opened_by_prompt", "think_bonus": 0.1, "think_penalty": 0.1})
    try:
        right, wrong, thought = "\\boxed{5}", "\\boxed{6}", "<think>so</think>"
        assert [score(klear, "5", text).value for text in (thought + right, right, thought + wrong, wrong)] == [1.0, 0.5, -1.0, -1.5]
        values = [score(interpreter, "5", text).value for text in ("so</think>" + right, right, "so</think>" + wrong, wrong)]
        assert values == pytest.approx([1.1, 0.9, 0.1, -0.1])
        assert score(klear, "5", right).passed and score(klear, "5", right).metrics == {"math/think_block": 0.0}
        assert klear.workers.pids() == interpreter.workers.pids() == set()
    finally:
        klear.close()
        interpreter.close()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"scale": "soft"}, "scale"),
        ({"time_limit_s": 0}, "time_limit_s"),
        ({"workers": 0}, "workers"),
        ({"memory_limit_bytes": 1}, "memory_limit_bytes"),
        ({"think_penalty": 0.5}, "think"),
        ({"nope": 1}, "nope"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        MathAnswer(options)


@pytest.mark.parametrize(
    ("problem", "references"),
    [
        ({"answer": "5"}, ["5"]),
        ({"answer": 5}, ["5"]),
        ({"answer": 5.0}, ["5"]),
        ({"answer": 0.5}, ["0.5"]),
        ({"answer": "so\n#### 1,234"}, ["1,234"]),
        ({"answer": ["1", 2]}, ["1", "2"]),
        ({"answer": None, "solution": "so \\boxed{3}."}, ["3"]),
        ({"solution": "so \\boxed{3}."}, ["3"]),
    ],
)
def test_layouts(problem: dict[str, object], references: list[str]) -> None:
    assert parse_references(problem) == references


@pytest.mark.parametrize(
    "problem",
    [{}, {"answer": ""}, {"answer": []}, {"answer": True}, {"answer": {"a": 1}}, {"answer": float("nan")}, {"solution": "no box"}],
)
def test_a_problem_without_a_reference_is_bad_data(problem: dict[str, object]) -> None:
    with pytest.raises(DataError, match=r"problem 'p', field '(answer|solution)'"):
        parse_references({"id": "p"} | problem)


def test_the_longest_question_fits_a_frame() -> None:
    """A character takes at most 12 bytes of JSON; a question holds at most two readings of each side."""
    longest_bytes = 12 * 2 * (20_000 + 20_000)
    assert longest_bytes < MAX_FRAME_BYTES


def test_a_score_needs_no_process_where_the_texts_agree() -> None:
    reward = MathAnswer({})
    try:
        assert boxed(reward, "\\frac{1}{2}", "\\dfrac12").passed
        assert boxed(reward, "\\text{odd}", "even").status == "wrong_answer"
        assert boxed(reward, "1,234", "1234.00").passed and boxed(reward, "5", "6").status == "wrong_answer"
        assert reward.workers.pids() == set()
    finally:
        reward.close()
