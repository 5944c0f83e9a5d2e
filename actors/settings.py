"""Configuration of everything that samples or scores. Imports no heavy library."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from actors.engines import ENGINES
from actors.rewards import REWARDS
from protocol.errors import UnknownName
from protocol.registry import check_name
from protocol.settings import Settings

Positive = Annotated[int, Field(ge=1, strict=True)]
MOST_ACTORS = 4096
"""Of one fleet: more is a slip of the keyboard, and a host that tried would not live."""
Fleet = Annotated[int, Field(ge=1, le=MOST_ACTORS, strict=True)]


def _known(name: str, table: Mapping[str, str], what: str) -> None:
    """As ValueError, which pydantic puts into a sentence with the key's path."""
    try:
        check_name(name, table, what)
    except UnknownName as error:
        raise ValueError(str(error)) from None


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

    count: Fleet = Field(1, description="generator actors")
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

    count: Fleet = Field(1, description="reward actors")
    reward: str = Field("unit_tests", description="a name of actors/rewards, or package.module:Class")
    min: Positive | None = Field(None, description="with max: the run adds and removes reward actors by itself, by what waits to be scored")
    max: Positive | None = Field(None, description="with min: never more reward actors than this, also by `rlsys scale`")
    scale_after_s: float = Field(10.0, gt=0, description="how long too much must wait before one is added; three times as long for removal")
    concurrency: Positive = Field(1, description="samples that one reward actor scores at once")
    retries: int = Field(2, ge=0, description="how often a sample is scored again after a fault of our own machinery")
    max_not_finite: Positive = Field(
        20, description="samples in a row whose reward is NaN or infinite that end the run; fewer are left without a score, and counted"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="the reward's own options")

    @model_validator(mode="after")
    def _count_is_within_limits(self) -> RewarderSettings:
        if (self.min is None) != (self.max is None):
            raise ValueError(
                f"{'max' if self.max is None else 'min'} is missing: the number of reward actors follows the queue between both"
            )
        if self.min is not None and self.max is not None and not self.min <= self.count <= self.max:
            raise ValueError(f"count is {self.count}, expected a number from min ({self.min}) to max ({self.max})")
        return self

    @model_validator(mode="after")
    def _reward_is_known(self) -> RewarderSettings:
        _known(self.reward, REWARDS, "reward")
        return self


class ScheduleSettings(Settings):
    """How far sampling may run ahead of training, and what happens to groups that are late. See docs/staleness.md."""

    name: Literal["synchronous", "minibatch", "one_off", "bounded"] = Field(
        "one_off",
        description="synchronous: staleness 0; minibatch: 0, trained in parts as groups come; one_off: at most 1; bounded: at most max_staleness",
    )
    max_staleness: Positive | None = Field(None, description="of bounded: the bound S; default 2")
    minibatches: Annotated[int, Field(ge=2, strict=True)] | None = Field(
        None, description="of minibatch: parts of an iteration, an optimizer step each; default 4"
    )
    reorder: Annotated[int, Field(ge=0, strict=True)] | None = Field(
        None,
        description="of bounded: how many later groups may overtake one that is waited for; default 0, what overtakes shortens the lead",
    )
    stragglers: Literal["wait", "drop", "mask"] = Field(
        "wait",
        description="groups that are late when the batch could close: wait for them, drop them, or train them later without too old tokens",
    )
    quorum: float | None = Field(
        None, gt=0.0, lt=1.0, description="of drop and mask: share of an iteration's groups that is waited for in any case; default 0.85"
    )
    over_issue: Annotated[int, Field(ge=0, strict=True)] = Field(
        0,
        description="groups issued beyond what the batches need; unused ones wait for the next batch, or end when they are too old for it",
    )
    max_requeues: Annotated[int, Field(ge=0, strict=True)] | None = Field(
        None, description="how often the prompt of a group that was dropped, rejected or superseded is queued again; default 1"
    )

    @property
    def bound(self) -> int:
        """S: iteration k trains on tokens of versions k - S .. k."""
        return {"synchronous": 0, "minibatch": 0, "one_off": 1}.get(self.name, self.max_staleness or 2)

    @property
    def parts(self) -> int:
        """Optimizer steps of an iteration, each on a part of its groups."""
        return (self.minibatches or 4) if self.name == "minibatch" else 1

    @property
    def overtaking(self) -> int:
        """How many later groups may overtake one that is waited for."""
        return self.reorder or 0

    def may_lag(self, groups_per_iteration: int) -> int:
        """Without how many of its groups a batch may close."""
        if self.stragglers == "wait":
            return 0
        return groups_per_iteration - math.ceil(groups_per_iteration * (self.quorum or 0.85) - 1e-9)

    @model_validator(mode="after")
    def _means_something(self) -> ScheduleSettings:
        def only(given: object, key: str, meaning: bool, why: str) -> None:
            if given is not None and not meaning:
                raise ValueError(f"{key} is {given}, which means nothing here: {why}")

        name = self.name
        only(self.max_staleness, "max_staleness", name == "bounded", f"{name} has staleness {self.bound} by definition; choose bounded")
        only(self.minibatches, "minibatches", name == "minibatch", f"{name} takes an iteration's groups as one batch; choose minibatch")
        only(self.reorder, "reorder", name == "bounded", f"{name} takes groups in their order; choose bounded")
        only(
            self.reorder, "reorder", self.stragglers == "wait", f"with stragglers '{self.stragglers}' a batch passes by who is late anyway"
        )
        only(self.quorum, "quorum", self.stragglers != "wait", "with stragglers 'wait' a batch waits for all its groups")
        gives_up = self.stragglers != "wait" or self.over_issue > 0
        only(self.max_requeues, "max_requeues", gives_up, "with stragglers 'wait' and no over_issue no group is given up")
        if self.stragglers == "mask" and self.bound == 0:
            raise ValueError(
                f"stragglers 'mask' means nothing with {name}: at staleness 0 every token that was sampled before a batch closed is too old "
                "for the next one; choose drop, or one_off or bounded"
            )
        return self


class StageEndSettings(Settings):
    """When a stage ends: at whichever of these comes first."""

    iteration: Positive | None = Field(None, description="the next stage begins with this iteration, counted from the start of the run")
    reward: float | None = Field(None, description="once the mean score over the last `over` iterations is at least this")
    truncated: float | None = Field(
        None, gt=0.0, le=1.0, description="once at least this share of the completions of the last `over` iterations was cut off"
    )
    over: Positive | None = Field(None, description="of reward and truncated: over how many iterations; default 10")

    @model_validator(mode="after")
    def _ends(self) -> StageEndSettings:
        if self.iteration is None and self.reward is None and self.truncated is None:
            raise ValueError("has no end: give iteration, reward or truncated")
        if self.over is not None and self.reward is None and self.truncated is None:
            raise ValueError(f"over is {self.over}, which means nothing without reward or truncated")
        return self


class SolvedSettings(Settings):
    """Problems that at most `times` of their newest `of` samples solved."""

    times: Annotated[int, Field(ge=0, strict=True)] = Field(description="most samples that solved the problem")
    of: Positive = Field(description="of so many of its newest samples")

    @model_validator(mode="after")
    def _a_share(self) -> SolvedSettings:
        if self.times >= self.of:
            raise ValueError(f"times {self.times} of {self.of} leaves out nothing: times must be smaller")
        return self


class StageFilterSettings(Settings):
    """Which problems of a stage's data set are left out. Problems that were never sampled stay."""

    drop_solved: bool = Field(False, description="leave out problems that every sample of the stage before solved")
    solved_at_most: SolvedSettings | None = Field(
        None, description="keep only problems that at most {times} of the newest {of} samples solved"
    )


class StageSettings(Settings):
    """One stage of a run. What is not given is as in the rest of the configuration."""

    name: str = Field("", description="for logs and metrics; default: its number")
    until: StageEndSettings | None = Field(None, description="when it ends; the last stage ends with the run")
    train: Path | None = Field(None, description="its problems; default: data.train")
    max_tokens: Positive | None = Field(None, description="longest completion; default: sampling.max_tokens")
    temperature: float | None = Field(None, gt=0.0, description="default: sampling.temperature")
    lr: float | None = Field(None, gt=0.0, description="peak learning rate; default: learner.optimizer.lr")
    filters: StageFilterSettings = Field(default_factory=StageFilterSettings, description="which problems it leaves out")
