"""Stages in a configuration: what is refused and why, and that the recipes in configs/ pass `rlsys check`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import ConfigError, DataError
from rlsys.config import load_config, parse_config
from rlsys.prepare import check_files
from rlsys.stages import describe_stages, stage_plans, stage_rules
from tests.configuration import minimal

CONFIGS = Path(__file__).parent.parent.parent / "configs"


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([{}, {}], "stages.0.until is missing: stage 1 would never begin"),
        ([{"until": {"iteration": 1}}], "stages.0.until: the last stage ends with the run, after iteration 3"),
        ([{"until": {"iteration": 3}}, {}], "stages.0.until.iteration is 3: expected more than 0 and less than iterations"),
        ([{"until": {"iteration": 2}}, {"until": {"iteration": 2}}, {}], "stages.1.until.iteration is 2: expected more than 2"),
        ([{"until": {}}, {}], "stages.0.until: has no end: give iteration, reward or truncated"),
        ([{"until": {"iteration": 1, "over": 2}}, {}], "over is 2, which means nothing without reward or truncated"),
        ([{"until": {"iteration": 1}, "name": "a"}, {"name": "a"}], "stages.0.name: two stages are called 'a'"),
        ([{"until": {"iteration": 1}, "filters": {"drop_solved": True}}, {}], "stages.0.filters: nothing was sampled before"),
        ([{"until": {"iteration": 1}}, {"filters": {"solved_at_most": {"times": 4, "of": 4}}}], "times 4 of 4 leaves out nothing"),
        ([{"until": {"iteration": 1}}, {"max_token": 4}], "unknown key stages.1.max_token"),
        (
            [{"until": {"iteration": 1}}, {"max_tokens": 64}],
            "stages.1.max_tokens is 64, which leaves no room for a prompt in model.max_context",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_reason(tmp_path: Path, stages: list[dict[str, Any]], said: str) -> None:
    content = minimal(tmp_path) | {"stages": stages}
    content["model"]["max_context"] = 64
    with pytest.raises(ConfigError) as refused:
        parse_config(content, "test")
    assert said in str(refused.value)


def test_what_a_stage_does_not_say_is_as_in_the_rest(tmp_path: Path) -> None:
    stages = [{"name": "first", "until": {"reward": 0.5}}, {"max_tokens": 20, "temperature": 0.5, "lr": 0.1, "train": "other.jsonl"}]
    config = parse_config(minimal(tmp_path) | {"stages": stages}, "test", tmp_path)
    plans, rules = stage_plans(config), stage_rules(config)
    assert [(p.name, p.train.name, p.max_tokens, p.temperature) for p in plans] == [
        ("first", "train.jsonl", 8, 1.0),
        ("1", "other.jsonl", 20, 0.5),
    ]
    assert plans[1].train == tmp_path / "other.jsonl"
    assert [(r.lr, r.iteration, r.reward, r.over) for r in rules] == [(0.001, None, 0.5, 10), (0.1, None, None, 10)]
    assert len(describe_stages(config)) == 2
    with pytest.raises(DataError, match=r"other\.jsonl: cannot be read"):
        check_files(config)
    assert describe_stages(parse_config(minimal(tmp_path), "test")) == []


@pytest.mark.parametrize("name", ["deepcoder", "deepscaler", "acereason"])
def test_the_recipes_pass_once_they_are_given_a_model_and_data(tmp_path: Path, name: str) -> None:
    """As they stand they name what they lack; with a model of enough context and problems, everything about them is checked."""
    with pytest.raises(DataError, match=r"data/.*\.jsonl: cannot be read"):
        check_files(load_config(CONFIGS / f"{name}.yaml"))
    files = minimal(tmp_path)
    model = Path(files["model"]["path"])
    about = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(about | {"max_position_embeddings": 131072}))
    overrides = [f"model.path={model}", f"data.train={files['data']['train']}", "data.chat=false"]
    stages = len(load_config(CONFIGS / f"{name}.yaml").stages)
    overrides += [f"stages.{i}.train={files['data']['train']}" for i in range(stages)]
    config = load_config(CONFIGS / f"{name}.yaml", overrides)
    check_files(config)
    limits = [plan.max_tokens for plan in stage_plans(config)]
    assert {"deepcoder": [16384, 32768], "deepscaler": [8192, 16384, 24576]}.get(name, [8192, 16384, 24576, 32768, 24576, 32768]) == limits


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.7.lr=1", "'7' is no place in a list of 3 groups of keys"),
        ("stages.x.lr=1", "'x' is no place in a list"),
        ("stages.0=1", "stages.0 is 1"),
    ],
)
def test_places_in_a_list_are_numbered(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(CONFIGS / "stages_tiny.yaml", [override])
    assert said in str(refused.value)
