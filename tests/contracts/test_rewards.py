"""Every reward of the table keeps the contract of `actors.rewards.Reward`, whatever text a model writes."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from actors.rewards import REWARDS, Reward, Sample, Score
from protocol.errors import ConfigError
from protocol.registry import resolve
from tests.actors.processes import descendants, wait_until
from tests.sandbox_servers import Served, served

ADD = "a, b = map(int, input().split())\nprint(a + b)"
CASES: dict[str, dict[str, Any]] = {
    "math_answer": {
        "options": {"workers": 2},
        "problem": {"id": "half", "prompt": "", "answer": "\\frac{1}{2}"},
        "right": "It is \\boxed{0.5}.",
        "wrong": "It is \\boxed{0.6}.",
    },
    "sandbox_service": {
        "options": {"url": "http://127.0.0.1:1", "token_file": "/dev/null", "options": {"min_time_limit_s": 10, "max_time_limit_s": 10}},
        "problem": {"id": "add", "prompt": "", "tests": [{"input": "1 2\n", "output": "3\n"}, {"input": "5 6\n", "output": "11\n"}]},
        "right": f"```python\n{ADD}\n```",
        "wrong": "```python\nprint(0)\n```",
    },
    "simulated": {
        "options": {"seconds": 0.001, "pass_share": 0.03},
        "problem": {"id": "any", "prompt": ""},
        "right": "accepted by its hash 2",
        "wrong": "refused by its hash",
    },
    "unit_tests": {
        "options": {"cells": 2, "min_time_limit_s": 10, "max_time_limit_s": 10},
        "problem": {"id": "add", "prompt": "", "tests": [{"input": "1 2\n", "output": "3\n"}, {"input": "5 6\n", "output": "11\n"}]},
        "right": f"```python\n{ADD}\n```",
        "wrong": "```python\nprint(0)\n```",
    },
    "weighted": {
        "options": {"parts": {"tests": {"reward": "unit_tests", "options": {"cells": 2, "min_time_limit_s": 10, "max_time_limit_s": 10}}}},
        "problem": {"id": "add", "prompt": "", "tests": [{"input": "1 2\n", "output": "3\n"}]},
        "right": f"```python\n{ADD}\n```",
        "wrong": "```python\nprint(0)\n```",
    },
}
"""A reward without an entry is not tested here and fails `test_every_reward_is_tested`."""

ANYTHING = [
    "",
    "```",
    "```python",
    "```python\n```",
    "\0",
    "\ud800",
    "x" * 100_000,
    "```python\n\0\n```",
    "```python\n\ud800\n```",
    "{}",
    "🙂" * 50,
]


def test_every_reward_is_tested() -> None:
    assert set(CASES) == set(REWARDS)


@pytest.fixture(scope="module", params=sorted(CASES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def service(name: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served | None]:
    """A service where one is needed."""
    if name != "sandbox_service":
        yield None
        return
    with served(tmp_path_factory.mktemp("service"), "--cells", "2") as service:
        yield service


@pytest.fixture(scope="module")
def reward(name: str, service: Served | None) -> Iterator[Reward]:
    def processes() -> set[int]:
        """Ours; those of the service come and go as it likes."""
        return descendants(os.getpid()) - ({service.process.pid} | descendants(service.process.pid) if service else set())

    before, own = processes(), {"url": service.url, "token_file": str(service.token_file)} if service else {}
    reward: Reward = resolve(name, REWARDS, "reward")(CASES[name]["options"] | own)
    try:
        yield reward
    finally:
        reward.close()
        wait_until(lambda: processes() <= before, "every process of the reward ended", 120.0)


def score(reward: Reward, name: str, completion: str) -> Score:
    return reward.score(Sample(problem=CASES[name]["problem"], completion=completion, truncated=False))


def test_right_and_wrong(reward: Reward, name: str) -> None:
    right, wrong = (score(reward, name, CASES[name][key]) for key in ("right", "wrong"))
    assert right.passed and right.value == 1.0 and right.status == "accepted"
    assert not wrong.passed and wrong.value is not None and wrong.value < 1.0 and wrong.status != "accepted"


@pytest.mark.parametrize("completion", ANYTHING, ids=range(len(ANYTHING)))
def test_no_text_makes_it_raise(reward: Reward, name: str, completion: str) -> None:
    result = score(reward, name, completion)
    assert not result.passed and result.value == 0.0 and "\n" not in result.detail


def test_threads_get_their_own_scores(reward: Reward, name: str) -> None:
    results: dict[int, bool] = {}

    def work(number: int) -> None:
        results[number] = all(
            score(reward, name, CASES[name]["right" if number % 2 else "wrong"]).passed is bool(number % 2) for _ in range(5)
        )

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert results == dict.fromkeys(range(4), True)


def test_unknown_options_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="no_such_option"):
        resolve(name, REWARDS, "reward")(CASES[name]["options"] | {"no_such_option": 1})
