"""Configuration of everything that samples or scores. Imports no heavy library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from actors.engines import ENGINES
from actors.rewards import REWARDS
from protocol.errors import UnknownName
from protocol.registry import check_name

Positive = Annotated[int, Field(ge=1, strict=True)]


def _known(name: str, table: Mapping[str, str], what: str) -> None:
    """As ValueError, which pydantic puts into a sentence with the key's path."""
    try:
        check_name(name, table, what)
    except UnknownName as error:
        raise ValueError(str(error)) from None


class Settings(BaseModel):
    """Unknown keys are refused; values are not changed after the check."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataSettings(Settings):
    """The problems: JSON lines with at least `id` and `prompt`, and what the reward needs (for unit tests: `tests`)."""

    train: Path = Field(description="JSON lines of training problems")
    eval: Path | None = Field(None, description="JSON lines of held-out problems; never trained on")
    prompt_template: str = Field("{prompt}", description="text around a problem's prompt; special tokens may be written out")
    chat: bool = Field(False, description="format the prompt by the model's own chat template instead of prompt_template")
    shuffle: bool = Field(True, description="a new order in each epoch, from the run's seed")

    @model_validator(mode="after")
    def _template_has_a_place(self) -> DataSettings:
        if "{prompt}" not in self.prompt_template:
            raise ValueError(f"prompt_template {self.prompt_template!r} has no {{prompt}}")
        return self


class SamplingSettings(Settings):
    """How completions are drawn. One unit of batch: groups_per_iteration prompts x group_size samples."""

    groups_per_iteration: Positive = Field(128, description="prompts per iteration")
    group_size: Positive = Field(8, description="completions per prompt")
    temperature: float = Field(1.0, ge=0.0, description="0 is greedy; the learner uses the same temperature")
    top_p: float = Field(1.0, gt=0.0, le=1.0, description="draw from the likeliest tokens that hold this much probability; 1 is off")
    top_k: int = Field(0, ge=0, description="draw from so many of the likeliest tokens; 0 is off")
    max_tokens: Positive = Field(description="longest completion, in tokens")
    max_prompt_tokens: Positive | None = Field(None, description="longer prompts are skipped and counted; default: what the context leaves")
    stop_token_ids: list[int] | None = Field(None, description="default: the model's own end-of-sequence tokens")


class EvaluationSettings(Settings):
    """Held-out pass@1, measured through the same ring."""

    at_start: bool = Field(True, description="evaluate the base model before the first training sample")
    at_end: bool = Field(True, description="evaluate the final version")
    every: int = Field(0, ge=0, description="also after every so many iterations, beside training; 0 is never")
    problems: Positive | None = Field(None, description="use the first so many held-out problems; default: all")
    samples: Positive = Field(8, description="completions per held-out problem")
    temperature: float = Field(1.0, ge=0.0, description="of held-out completions; 0 is greedy")
    top_p: float = Field(1.0, gt=0.0, le=1.0, description="of held-out completions; 1 is off")


class GeneratorSettings(Settings):
    """The sampling fleet."""

    count: Positive = Field(1, description="generator actors")
    engine: str = Field("embedded", description="a name of actors/engines, or package.module:Class")
    slots: Positive = Field(64, description="samples that one engine runs at once")
    threads: Positive = Field(1, description="CPU threads of one embedded engine")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the engine's weights and cache")
    device: str = Field("cpu", description="cpu, cuda or cuda:N")
    options: dict[str, Any] = Field(default_factory=dict, description="the engine's own options")

    @model_validator(mode="after")
    def _engine_is_known(self) -> GeneratorSettings:
        _known(self.engine, ENGINES, "engine")
        return self


class RewarderSettings(Settings):
    """The scoring fleet."""

    count: Positive = Field(1, description="reward actors")
    reward: str = Field("unit_tests", description="a name of actors/rewards, or package.module:Class")
    concurrency: Positive = Field(1, description="samples that one reward actor scores at once")
    retries: int = Field(2, ge=0, description="how often a sample is scored again after a fault of our own machinery")
    options: dict[str, Any] = Field(default_factory=dict, description="the reward's own options")

    @model_validator(mode="after")
    def _reward_is_known(self) -> RewarderSettings:
        _known(self.reward, REWARDS, "reward")
        return self


class ScheduleSettings(Settings):
    """How far sampling may run ahead of training. See docs/staleness.md."""

    name: Literal["synchronous", "one_off"] = Field(
        "one_off", description="synchronous: staleness 0; one_off: at most 1, sampling and training overlap"
    )

    @property
    def max_staleness(self) -> int:
        """The bound S: iteration k trains on tokens of versions k - S .. k."""
        return {"synchronous": 0, "one_off": 1}[self.name]
