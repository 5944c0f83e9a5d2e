"""The configuration of `rlsys sft`. Imports no heavy library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from actors.settings import Positive
from learner.settings import CheckpointSettings, LearnerSettings
from protocol.errors import ConfigError
from protocol.settings import Settings
from rlsys.config import ModelSettings, explain, read_content, with_paths

REINFORCEMENT_ONLY = (
    "advantage", "advantage_options", "objective", "objective_options", "correction", "kl", "entropy", "sft_coefficient",
    "updates_per_batch", "reward_weights", "overlong_penalty_tokens", "overlong", "zero_variance", "refill_rounds", "min_samples",
    "step", "step_options",
)  # fmt: skip
"""Keys of the learner that mean nothing without rewards."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "optimizer": {"lr": 4e-5},
    "schedule": {"name": "cosine", "final_fraction": 0.1},
}
"""Of keys that usually differ from reinforcement: those of Open R1's recipe, a cosine to a tenth."""


class SftData(Settings):
    """The examples."""

    train: Path = Field(description="JSON lines or a JSON list (.gz too), Parquet, or a directory of these or of a saved datasets.Dataset")
    eval: Path | None = Field(None, description="held-out examples in any of these layouts")
    split: str = Field("train", description="of a saved DatasetDict: which part to train on")
    eval_split: str = Field("test", description="of a saved DatasetDict: which part is held out")
    chat: bool = Field(False, description="wrap prompts and completions in the model's chat template; rows of messages always are")
    prompt_template: str = Field("{prompt}", description="text around a prompt when chat is off")
    prompt_field: str = Field("prompt", description="name of the field that is only read")
    completion_field: str = Field("completion", description="name of the field that is learned")
    messages_field: str = Field("messages", description="name of the field with a list of role and content; rows that have it are chats")
    turns: Literal["all", "last"] = Field("all", description="which of the assistant's turns of a chat are learned")
    too_long: Literal["skip", "refuse"] = Field("skip", description="samples longer than the context: counted and left out, or an error")
    limit: Positive | None = Field(None, description="use only so many rows of each file")

    @model_validator(mode="after")
    def _prompt_has_a_place(self) -> SftData:
        if "{prompt}" not in self.prompt_template:
            raise ValueError(f"prompt_template is {self.prompt_template!r}: it must contain {{prompt}}")
        return self


class SftConfig(Settings):
    """Everything about one fine-tuning."""

    name: str = Field("sft", pattern=r"^[A-Za-z0-9._-]{1,60}$", description="part of the output directory's name")
    seed: int = Field(0, ge=0, description="of the order of examples")
    model: ModelSettings = Field(description="the model to start from")
    data: SftData = Field(description="the examples")
    epochs: float = Field(1.0, gt=0, allow_inf_nan=False, description="times that every example is seen; parts of an epoch too")
    steps: Positive | None = Field(None, description="optimizer steps, in place of epochs")
    samples_per_step: Positive = Field(32, description="examples of one optimizer step, over all ranks")
    eval_every: int = Field(0, ge=0, description="steps between losses on held-out examples; 0: before the first step and after the last")
    checkpoint_every: int = Field(0, ge=0, description="steps between checkpoints for --resume; 0: none")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the saved model")
    learner: LearnerSettings = Field(default_factory=LearnerSettings, description="the step: ranks, memory, optimizer, schedule, layout")

    def writes_checkpoint(self, step: int) -> bool:
        """Whether one is written after `step` steps: every `checkpoint_every`, and those that stay for good."""
        stays = self.learner.checkpoints.keep_every
        return bool(self.checkpoint_every) and (step % self.checkpoint_every == 0 or (stays is not None and step % stays == 0))

    @model_validator(mode="after")
    def _fits_together(self) -> SftConfig:
        try:
            self.learner.check_group()
        except ValueError as error:
            raise ValueError(f"learner.{error}") from None
        if not self.checkpoint_every and self.learner.checkpoints != CheckpointSettings():
            raise ValueError("learner.checkpoints says which stay, but checkpoint_every is 0: none is written")
        return self

    @model_validator(mode="before")
    @classmethod
    def _as_likelihood(cls, content: Any) -> Any:
        if not isinstance(content, dict) or not isinstance(content.get("learner") or {}, dict):
            return content
        given = dict(content.get("learner") or {})
        wrong = [key for key in REINFORCEMENT_ONLY if key in given]
        if wrong:
            raise ValueError(f"learner.{wrong[0]} belongs to reinforcement: sft learns the completions as they stand, so leave it out")
        if given.get("commit_every", "auto") != "auto":
            raise ValueError("learner.commit_every is of runs: for sft, checkpoint_every says after how many steps a checkpoint is written")
        for key, defaults in DEFAULTS.items():
            section = given.get(key)
            given[key] = {**defaults, **(section or {})} if section is None or isinstance(section, dict) else section
        likelihood = {"objective": "likelihood", "correction": {"mode": "off"}}
        return {**content, "learner": {**given, **likelihood}}


def load_sft_config(path: Path, overrides: Sequence[str] = ()) -> SftConfig:
    """Read and check a configuration. Raises ConfigError, one line per fault."""
    return parse_sft_config(read_content(path, overrides, "model, data, epochs"), str(path), path.parent)


def parse_sft_config(content: Mapping[str, Any], source: str, base: Path | None = None) -> SftConfig:
    """A checked configuration from plain data. Relative paths count from `base`."""
    try:
        return SftConfig.model_validate(with_paths(content, source, base))
    except ValidationError as error:
        raise ConfigError("\n".join(f"{source}: {explain(fault, SftConfig)}" for fault in error.errors())) from None


def dump_sft_config(config: SftConfig) -> str:
    """The resolved configuration as YAML; `load_sft_config` reads it back to an equal one."""
    text: str = yaml.safe_dump(config.model_dump(mode="json", exclude={"learner": set(REINFORCEMENT_ONLY)}), sort_keys=False)
    return text
