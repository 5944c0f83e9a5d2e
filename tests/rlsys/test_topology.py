"""Which processes a configuration means."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from rlsys.config import parse_config
from rlsys.roles import ROLES
from rlsys.topology import describe, processes
from tests.configuration import minimal


def test_every_fleet_has_its_size_and_every_process_a_role(tmp_path: Path) -> None:
    content = {**minimal(tmp_path), "generators": {"count": 3}, "rewarders": {"count": 2}, "learner": {"ranks": 2}}
    fleet = processes(parse_config(content, "test"))
    assert Counter(role for role, _ in fleet) == {"learner": 2, "generator": 3, "rewarder": 2, "dispatcher": 1, "dashboard": 1}
    assert len(set(fleet)) == len(fleet)
    assert {role for role, _ in fleet} == set(ROLES)
    assert fleet[0] == ("learner", 0), "the slowest to start goes first"


def test_the_description_names_what_would_run(tmp_path: Path) -> None:
    content = {**minimal(tmp_path), "generators": {"count": 3}}
    text = "\n".join(describe(parse_config(content, "test")))
    assert "3 iterations of 2 groups x 2 = 4 samples" in text
    assert "generators  3 x embedded on cpu" in text
    assert "no held-out problems" in text
    assert "processes   8 with the supervisor, over ipc" in text
    evaluated = {**content, "data": {**content["data"], "eval": content["data"]["train"]}, "evaluation": {"every": 5, "at_start": False}}
    assert "8 samples each, at the end and every 5 iterations" in "\n".join(describe(parse_config(evaluated, "test")))


def test_an_estimator_that_holds_nothing_back_is_noted(tmp_path: Path) -> None:
    for estimator, noted in (("k1", True), ("k3", False)):
        content = {**minimal(tmp_path), "learner": {"kl": {"coefficient": 0.1, "estimator": estimator}}}
        assert ("k1 has a gradient of 0 on average" in "\n".join(describe(parse_config(content, "test")))) is noted
