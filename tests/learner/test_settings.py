"""What the configuration refuses, and how it says so."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from learner.settings import LearnerSettings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "clip"}, "did you mean 'clipped'"),
        ({"objective": "no_such_package.module:name"}, "no module named 'no_such_package'"),
        ({"objective_options": {"clip_lo": 0.2}}, "clip_lo: Extra inputs.*It takes: clip_low, clip_high"),
        ({"objective_options": {"clip_high": -1}}, "clip_high: Input should be greater than 0"),
        ({"advantage": "pass_at_k", "advantage_options": {"k": 0}}, "k: Input should be greater than or equal to 1"),
        ({"aggregation": "constant_length"}, "give both or neither"),
        ({"aggregation_length": 10}, "give both or neither"),
        ({"optimizer": {"betas": (0.9, 1.0)}}, "never forgets"),
        ({"correction": {"floor": 3.0}}, "floor 3.0 must be below cap 2.0"),
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
    ],
)
def test_what_cannot_run_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LearnerSettings.model_validate(changes)


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
