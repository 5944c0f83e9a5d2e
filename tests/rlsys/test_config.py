"""Configurations: what is refused, in which words, and that what is accepted comes back unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from protocol.errors import ConfigError
from rlsys.config import RunConfig, dump_config, load_config, parse_config
from tests.configuration import minimal, write


def changed(content: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """`content` with one key set; None of a parent is made."""
    *parents, last = path.split(".")
    place = content
    for parent in parents:
        place = place.setdefault(parent, {})
    place[last] = value
    return content


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("learner.optimiser", r"unknown key learner\.optimiser; did you mean learner\.optimizer\?"),
        (
            "learner.optimizer.learning_rate",
            r"unknown key learner\.optimizer\.learning_rate; known here: adamw_lr, betas, eps, lr, momentum, name, offload, options, weight_decay",
        ),
        ("sampling.groupsize", r"unknown key sampling\.groupsize; did you mean sampling\.group_size\?"),
        ("iteration", r"unknown key iteration; did you mean iterations\?"),
        ("deadlines.stall", r"unknown key deadlines\.stall; did you mean deadlines\.stall_s\?"),
    ],
)
def test_an_unknown_key_is_named_with_its_path_and_the_nearest_known_one(tmp_path: Path, path: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=rf"^run\.yaml: {sentence}$"):
        parse_config(changed(minimal(tmp_path), path, 1), "run.yaml")


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("iterations", "many", r"iterations is 'many': input should be a valid integer"),
        ("iterations", 0, r"iterations is 0: input should be greater than or equal to 1"),
        ("sampling.group_size", 2.5, r"sampling\.group_size is 2\.5: input should be a valid integer"),
        ("learner.optimizer.lr", "fast", r"learner\.optimizer\.lr is 'fast': input should be a valid number"),
        ("learner.optimizer.betas", [0.9], r"learner\.optimizer\.betas\.1 is missing"),
        ("sampling.temperature", float("nan"), r"sampling\.temperature is nan: input should be"),
        ("sampling.temperature", float("inf"), r"sampling\.temperature is inf: input should be a finite number"),
        ("sampling.top_p", 1.5, r"sampling\.top_p is 1\.5: input should be less than or equal to 1"),
        ("generators", [], r"generators is \[\]: expected keys with values"),
        ("evaluation", None, r"evaluation is None: expected keys with values"),
        ("weights.dtype", "float16", r"weights\.dtype is 'float16': input should be 'float32' or 'bfloat16'"),
        ("name", "a/b", r"name is 'a/b': string should match pattern"),
        ("generators.engine", "embeded", r"generators: engine 'embeded' is not known; did you mean 'embedded'\? Known: "),
        ("rewarders.reward", "unit_test", r"rewarders: reward 'unit_test' is not known; did you mean 'unit_tests'\? Known: "),
        ("learner.objective", "cliped", r"learner: objective 'cliped' is not known; did you mean 'clipped'\?"),
        ("data.prompt_template", "no place", r"data: prompt_template 'no place' has no \{prompt\}"),
    ],
)
def test_a_wrong_value_is_one_line_with_its_path(tmp_path: Path, path: str, value: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=rf"^run\.yaml: {sentence}") as caught:
        parse_config(changed(minimal(tmp_path), path, value), "run.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"learner.ranks": 3}, r"learner\.ranks is 3 but an iteration has only 2 groups \(sampling\.groups_per_iteration\)"),
        ({"model.max_context": 8}, r"sampling\.max_tokens is 8, which leaves no room for a prompt in model\.max_context 8"),
        ({"sampling.temperature": 0}, r"sampling\.temperature is 0: greedy samples of a group are all alike"),
        ({"sampling.group_size": 1}, r"sampling\.group_size is 1: group-relative advantages need at least 2"),
        ({"sampling.group_size": 1, "learner.advantage": "reinforce_pp"}, r"sampling\.group_size is 1: every group has one score"),
        ({"learner.min_samples": 3}, r"learner\.min_samples is 3, more than the sampling\.group_size of 2"),
        (
            {"learner.advantage": "pass_at_k"},
            r"learner\.advantage 'pass_at_k' draws k = 4 samples .*, but sampling\.group_size is 2: choose a k",
        ),
        ({"learner.advantage": "pass_at_k", "learner.advantage_options": {"k": 3}}, r"learner\.advantage 'pass_at_k' draws k = 3 samples"),
        ({"learner.reward_weights": {"style": 1.0}}, r"learner\.reward_weights names style, but scores have the part unit_tests"),
        ({"learner.overlong_penalty_tokens": 4}, r"learner: overlong_penalty_tokens punishes long completions"),
        ({"learner.aggregation": "constant_length"}, r"learner: aggregation_length is the divisor"),
        (
            {"learner.objective": "decoupled", "learner.correction": {"mode": "mask"}},
            r"learner: objective 'decoupled' carries its own weight",
        ),
        ({"learner.correction": {"mode": "mask", "floor": 3}}, r"learner\.correction: floor 3\.0 must be below cap 2\.0"),
        ({"learner.sharding": "full"}, r"learner\.sharding is full but ranks is 1"),
        (
            {"learner.overlong": "keep", "learner.overlong_penalty_tokens": 9},
            r"learner\.overlong_penalty_tokens is 9, more than sampling\.max_tokens \(8\)",
        ),
        ({"learner.commit_every": -1}, r"learner\.commit_every: expected a number of iterations, 0 for never, or auto$"),
        ({"learner.optimizer.betas": [0.9, 1.0]}, r"learner\.optimizer: betas \(0\.9, 1\.0\) must lie in \[0, 1\)"),
        (
            {"learner.objective_options": {"clip": 0.2}},
            r"learner: options of objective 'clipped': clip is none of them; did you mean clip_low\? \(it takes: ",
        ),
    ],
)
def test_an_impossible_combination_is_explained(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    content = minimal(tmp_path)
    for path, value in changes.items():
        changed(content, path, value)
    with pytest.raises(ConfigError, match=rf"^run\.yaml: {sentence}"):
        parse_config(content, "run.yaml")


def test_a_group_of_one_trains_when_nothing_needs_its_fellows(tmp_path: Path) -> None:
    content = changed(minimal(tmp_path), "learner.zero_variance", "keep")
    content = changed(changed(content, "learner.advantage", "reinforce_pp"), "sampling.group_size", 1)
    assert parse_config(content, "run.yaml").sampling.group_size == 1


def test_every_fault_is_told_at_once_each_on_its_line(tmp_path: Path) -> None:
    content = changed(changed(minimal(tmp_path), "iterations", 0), "sampling.typo", 1)
    del content["model"]
    with pytest.raises(ConfigError) as caught:
        parse_config(content, "run.yaml")
    assert sorted(line.split(":")[1].split()[0] for line in str(caught.value).splitlines()) == ["iterations", "model", "unknown"]


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("learner.optimizer.lr=1e-6", lambda c: c.learner.optimizer.lr == 1e-6),
        ("learner.optimizer.lr=2.5E-4", lambda c: c.learner.optimizer.lr == 2.5e-4),
        ("learner.optimizer.betas=[0.8, 0.9]", lambda c: c.learner.optimizer.betas == (0.8, 0.9)),
        ("sampling.stop_token_ids=[1, 2]", lambda c: c.sampling.stop_token_ids == [1, 2]),
        ("data.shuffle=false", lambda c: c.data.shuffle is False),
        ("evaluation.problems=null", lambda c: c.evaluation.problems is None),
        ("generators.options={prefill_tokens: 64}", lambda c: c.generators.options == {"prefill_tokens": 64}),
        ("data.prompt_template=a=b {prompt}", lambda c: c.data.prompt_template == "a=b {prompt}"),
        ("name=nan", lambda c: c.name == "nan"),
        ("name=infinity", lambda c: c.name == "infinity"),
        ("transport.kind=tcp", lambda c: c.transport.kind == "tcp"),
    ],
)
def test_overrides_are_read_as_yaml(tmp_path: Path, override: str, read: Any) -> None:
    assert read(load_config(write(tmp_path / "run.yaml", minimal(tmp_path)), [override]))


def test_an_override_may_fill_a_section_that_stands_empty(tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", {**minimal(tmp_path), "evaluation": None})
    assert load_config(path, ["evaluation.every=5"]).evaluation.every == 5


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("learner.optimizer.lr", r"--set learner\.optimizer\.lr: expected KEY=VALUE"),
        ("=3", r"--set =3: expected KEY=VALUE"),
        ("iterations=[1", r"--set iterations=\[1: the value is not YAML"),
        ("iterations.more=1", r"--set iterations\.more=1: iterations is 3, not a group of keys"),
        ("sampling.grup_size=4", r"unknown key sampling\.grup_size; did you mean sampling\.group_size\?"),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, override: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_config(write(tmp_path / "run.yaml", minimal(tmp_path)), [override])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: [1", r"not YAML \(.*line"),
        ("- 1\n", "holds list, expected keys such as model, data, sampling"),
        ("", "is empty, expected keys"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"run\.yaml: {sentence}"):
        load_config(path)
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read \(No such file"):
        load_config(tmp_path / "none.yaml")


def test_what_is_dumped_is_read_back_equal(tmp_path: Path) -> None:
    content = minimal(tmp_path)
    for path, value in {
        "learner.optimizer.betas": [0.5, 0.6], "sampling.stop_token_ids": [3], "generators.options": {"prefill_tokens": 8},
        "schedule.name": "synchronous", "data.prompt_template": "<|bos|>{prompt}\n: 'q'",
    }.items():  # fmt: skip
        changed(content, path, value)
    config = parse_config(content, "run.yaml")
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config
    assert (config.schedule.bound, parse_config(minimal(tmp_path), "x").schedule.bound) == (0, 1)


def test_paths_count_from_the_file_and_may_hold_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_ROOT", "/srv/data")
    content = {**minimal(tmp_path), "model": {"path": "model"}, "data": {"train": "$DATA_ROOT/a.jsonl", "eval": "~/b.jsonl"}}
    content["learner"] = {"kl": {"reference": "../reference", "coefficient": 0.1}}
    config = load_config(write(tmp_path / "run.yaml", content))
    assert config.model.path == tmp_path / "model"
    assert (str(config.data.train), config.data.eval) == ("/srv/data/a.jsonl", Path("~/b.jsonl").expanduser())
    assert config.learner.kl.reference == str(tmp_path.parent / "reference")
    builtin = {**content, "model": {"path": "builtin:quickstart"}}
    assert str(load_config(write(tmp_path / "run.yaml", builtin)).model.path) == "builtin:quickstart"


def test_every_key_says_what_it_is() -> None:
    silent, seen = [], 0

    def walk(model: type[BaseModel], path: str) -> None:
        nonlocal seen
        for name, spec in model.model_fields.items():
            seen += 1
            if not spec.description:
                silent.append(f"{path}{name}")
            for part in (spec.annotation, *get_args(spec.annotation)):
                if isinstance(part, type) and issubclass(part, BaseModel):
                    walk(part, f"{path}{name}.")

    walk(RunConfig, "")
    assert silent == []
    assert seen > 60


def test_the_shipped_configurations_have_few_keys() -> None:
    def count(value: Any) -> int:
        return sum(count(v) for v in value.values()) if isinstance(value, dict) else 1

    for path in (Path(__file__).parents[2] / "configs").glob("*.yaml"):
        assert count(yaml.safe_load(path.read_text())) < 60, path
