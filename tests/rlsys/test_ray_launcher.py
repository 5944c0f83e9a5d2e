"""What a run asks of a Ray cluster, and the sentences when it cannot have it. The cluster itself is in tests/system/test_ray.py."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("ray")

from rlsys.config import parse_config
from rlsys.launchers.ray import Place, in_words, lacking, needs
from rlsys.token import Token
from tests.configuration import minimal


def test_processes_take_what_the_configuration_says(tmp_path: Path) -> None:
    content = minimal(tmp_path)
    content["generators"] = {"threads": 2, "device": "cuda"}
    content["rewarders"] = {"concurrency": 6}
    content["learner"] |= {"threads": 3}
    assert needs(parse_config(content, "test")) == {
        "learner": {"CPU": 3.0},
        "generator": {"CPU": 2.0, "GPU": 1.0},
        "rewarder": {"CPU": 6.0},
    }
    content["generators"] |= {"engine": "sglang", "options": {"tp": 2}}
    assert needs(parse_config(content, "test"))["generator"] == {"CPU": 2.0, "GPU": 2.0}, "a server of two devices"
    content["ray"] = {"generator": {"GPU": 4, "H200": 1}, "rewarder": {"CPU": 0.5}}
    given = needs(parse_config(content, "test"))
    assert given["generator"] == {"CPU": 2.0, "GPU": 4.0, "H200": 1.0}
    assert given["rewarder"] == {"CPU": 0.5}


def test_what_is_missing_and_what_is_free_are_named() -> None:
    missing = [("generator", [{"CPU": 1.0, "GPU": 2.0}] * 3), ("learner", [{"CPU": 4.0, "node:10.0.0.1": 0.001}])]
    sentence = lacking(missing, {"CPU": 16.0, "GPU": 4.0, "memory": 1e9}, {"CPU": 32.0, "GPU": 8.0}, 2)
    assert sentence == (
        "the Ray cluster has no room for 3 generators of 2 GPU, 1 CPU; 1 learner of 4 CPU: 2 GPU is missing; free are 4 GPU, 16 CPU, "
        "of 8 GPU, 32 CPU on 2 nodes"
    )
    scattered = lacking([("learner", [{"CPU": 4.0}])], {"CPU": 6.0}, {"CPU": 8.0}, 4)
    assert "no single node has enough of it free" in scattered
    assert in_words({"node:10.0.0.1": 0.001, "GPU": 0.0}) == "nothing"


def test_another_version_on_a_node_is_a_sentence_with_the_node() -> None:
    token = Token("0123456789abcdef", "tcp://127.0.0.1:9", "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7", "5e" * 24, "9.9.9")
    code, sentence = Place().run(token.text(), False)
    assert code == 2
    assert sentence.startswith("node ") and "the run has rlsys 9.9.9, this host has rlsys" in sentence
