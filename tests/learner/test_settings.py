"""What the configuration refuses, and how it says so."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from actors.rewards.math_answer import Options as Think
from learner.settings import LearnerSettings, LoraSettings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "clip"}, "did you mean 'clipped'"),
        ({"objective": "no_such_package.module:name"}, "no module named 'no_such_package'"),
        ({"objective_options": {"clip_lo": 0.2}}, "clip_lo is none of them; did you mean clip_low. .it takes: clip_low, clip_high"),
        ({"objective_options": {"clip_high": -1}}, "clip_high: Input should be greater than 0"),
        ({"advantage": "pass_at_k", "advantage_options": {"k": 0}}, "k: Input should be greater than or equal to 1"),
        ({"aggregation": "constant_length"}, "give both or neither"),
        ({"aggregation_length": 10}, "give both or neither"),
        ({"optimizer": {"betas": (0.9, 1.0)}}, "never forgets"),
        ({"correction": {"mode": "mask", "floor": 3.0}}, "floor 3.0 must be below cap 2.0"),
        ({"correction": {"floor": 3.0}}, "floor is 3.0 but mode is auto, and only mask has a smallest weight"),
        ({"objective": "decoupled", "correction": {"mode": "mask"}}, "carries its own weight"),
        ({"overlong_penalty_tokens": 8}, "choose overlong 'keep'"),
        ({"optimiser": {}}, "Extra inputs"),
        ({"optimizer": {"lr": float("inf")}}, "optimizer.lr\n.*finite number"),
        ({"gradient_clip": float("nan")}, "gradient_clip\n"),
        ({"objective_options": {"clip_high": float("inf")}}, "clip_high: Input should be a finite number"),
        ({"correction": {"mode": "truncate", "floor": 0.1}}, "floor is 0.1 but mode is truncate, and only mask has a smallest weight"),
        ({"correction": {"mode": "off", "cap": 3.0}}, "cap is 3.0 but mode is off: it would change nothing"),
        ({"correction": {"mode": "mask", "auto_drift": 1.0}}, "auto_drift is 1.0 but mode is mask, and only auto waits for drift"),
        ({"kl": {"reference": "models/base"}}, "reference is models/base but coefficient is 0, so there is no penalty"),
        ({"entropy": {"coefficient": 0.1, "target": 0.5}}, "target is 0.5 but adaptive is off"),
        ({"schedule": {"final_fraction": 0.1}}, "final_fraction is 0.1 but name is constant"),
        ({"tokens_per_microbatch": 0}, "greater than or equal to 1"),
        ({"objective": "decoupled", "correction": {"cap": 9.0}}, "cap is 9.0 but objective 'decoupled' carries its own weight"),
        ({"objective": "likelihood", "updates_per_batch": 4}, "as if the present policy had written them"),
        ({"entropy": {"adaptive": True, "target": 0.0}}, "no entropy lies below 0"),
        ({"advantage": "pass_at_k", "overlong": "keep", "overlong_penalty_tokens": 4}, "reads whether samples passed, not their scores"),
        ({"advantage": "pass_at_k", "reward_weights": {"words": 2.0}}, "reads whether samples passed, not their scores"),
        ({"commit_every": 0, "checkpoints": {"keep_every": 5}}, "keep_every is 5 but commit_every is 0: no checkpoint is written"),
        ({"objective": "os:name"}, r"objective 'os:name' is a str, expected a function of \(tokens, \*, options\)"),
        ({"objective": "tests.my_recipe:TokenLoss"}, "objective 'tests.my_recipe:TokenLoss' is a class, expected a function"),
        (
            {"advantage": "tests.learner.bad_recipes:three_arguments"},
            r"takes \(scores_N, group_ids_N, scale\), expected a function of \(scores_N, group_ids_N\[, passed_N\], \*, options\)",
        ),
        (
            {"objective": "tests.learner.bad_recipes:annotated_with_nothing"},
            "annotations of its options .beta. cannot be checked: .* not fully defined; you should define `Nothing`",
        ),
    ],
)
def test_what_cannot_run_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LearnerSettings.model_validate(changes)


def test_what_means_something_together_is_taken() -> None:
    LearnerSettings.model_validate({"correction": {"mode": "truncate", "cap": 0.4}})
    LearnerSettings.model_validate({"correction": {"mode": "mask", "cap": 0.4, "floor": 0.1}})
    own = {"objective": "tests.learner.bad_recipes:without_annotations", "objective_options": {"beta": "any"}}
    assert LearnerSettings.model_validate(own).objective_options == {"beta": "any"}


def test_a_bare_off_of_yaml_is_the_word() -> None:
    assert LearnerSettings.model_validate(yaml.safe_load("correction: {mode: off}")).correction.mode == "off"
    assert Think.model_validate(yaml.safe_load("think: off")).think == "off"
    with pytest.raises(ValidationError, match=r"correction.mode\n.*'auto', 'off', 'truncate' or 'mask'"):
        LearnerSettings.model_validate(yaml.safe_load("correction: {mode: on}"))
    assert LearnerSettings.model_validate(yaml.safe_load("gradient_checkpointing: off")).gradient_checkpointing is False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sharding": "full"}, "sharding is full but ranks is 1"),
        ({"optimizer": {"name": "paged_adamw"}, "device": "cpu"}, "paged_adamw, which pages GPU memory, but device is cpu"),
        ({"optimizer": {"name": "adamw_8bit"}, "ranks": 2, "sharding": "full"}, "adamw_8bit, whose blocks are of whole tensors"),
    ],
)
def test_what_no_group_of_ranks_can_run_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearnerSettings.model_validate(changes).check_group()


def test_adapters_survive_their_words() -> None:
    for settings in (LoraSettings(), LoraSettings(rank=4, alpha=0.5, target_modules=("q_proj", "v_proj"))):
        assert LoraSettings.from_words(settings.in_words()) == settings
    assert LoraSettings.from_words("none") is None


def fields(model: type[BaseModel], path: str = "") -> list[tuple[str, str | None]]:
    found: list[tuple[str, str | None]] = []
    for name, field in model.model_fields.items():
        found.append((path + name, field.description))
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += fields(field.annotation, f"{path}{name}.")
    return found


def test_every_field_says_what_it_is() -> None:
    assert [name for name, text in fields(LearnerSettings) if not text] == []
    assert "correction.auto_drift" in dict(fields(LearnerSettings))


def test_settings_survive_a_round_trip() -> None:
    settings = LearnerSettings.model_validate({"objective": "gspo", "objective_options": {"clip_low": 0.1}, "entropy": {"adaptive": True}})
    assert LearnerSettings.model_validate_json(settings.model_dump_json()) == settings
