"""The learner's part of the configuration. Imports no torch, so that `rlsys check` stays fast."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from learner.advantages import ADVANTAGES
from learner.objectives import OBJECTIVES
from learner.options import keyword_options
from protocol.errors import UnknownName
from protocol.registry import check_name


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class OptimizerSettings(_Settings):
    """What turns a gradient into an update."""

    name: Literal["adamw"] = Field(default="adamw", description="AdamW, decoupled weight decay.")
    lr: float = Field(default=1e-6, gt=0, description="Peak learning rate; the schedule multiplies it.")
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="Decay of the first and second moment.")
    eps: float = Field(default=1e-8, gt=0, description="Added to the root of the second moment.")
    weight_decay: float = Field(default=0.0, ge=0, description="Decay of weight matrices; never of norms and biases.")

    @model_validator(mode="after")
    def _betas_below_one(self) -> OptimizerSettings:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas} must lie in [0, 1): at 1 a moment never forgets its start")
        return self


class ScheduleSettings(_Settings):
    """The learning rate over the iterations of the run."""

    name: Literal["constant", "cosine", "linear"] = Field(default="constant", description="Shape after the warm-up.")
    warmup_iterations: int = Field(default=0, ge=0, description="Iterations over which the rate rises linearly to its peak.")
    final_fraction: float = Field(default=0.0, ge=0, le=1, description="Share of the peak rate at the last iteration (cosine, linear).")


class LearnerSettings(_Settings):
    """Everything that decides how a batch becomes an update."""

    ranks: int = Field(default=1, ge=1, description="Learner processes that share every batch; each holds the whole model.")
    threads: int = Field(default=1, ge=1, description="CPU threads of one rank.")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto takes CUDA if there is any.")
    dtype: Literal["bfloat16", "float32", "float64"] = Field(
        default="bfloat16",
        description="Arithmetic of the forward pass; parameters stay float32 (float64 with float64, for comparing runs).",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations in the backward pass: less memory, a third more work."
    )
    collective_timeout_s: float = Field(default=600.0, gt=0, description="Longest wait of one rank for another.")

    optimizer: OptimizerSettings = Field(default_factory=OptimizerSettings, description="What turns a gradient into an update.")
    schedule: ScheduleSettings = Field(default_factory=ScheduleSettings, description="The learning rate over the run.")
    gradient_clip: float = Field(default=1.0, gt=0, description="Largest norm of the whole gradient.")
    updates_per_batch: int = Field(default=1, ge=1, description="Optimizer steps on each batch (mu).")

    advantage: str = Field(default="grpo", description="Name in ADVANTAGES, or your own 'package.module:function'.")
    advantage_options: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of the advantage function.")
    objective: str = Field(default="clipped", description="Name in OBJECTIVES, or your own 'package.module:function'.")
    objective_options: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of the objective.")
    aggregation: Literal["token_mean", "sequence_mean", "constant_length"] = Field(
        default="token_mean",
        description="How token losses become one number: every token alike, every sample alike, or a constant divisor.",
    )
    aggregation_length: int | None = Field(
        default=None, ge=1, description="Tokens that constant_length divides by: the longest completion."
    )

    tokens_per_microbatch: int = Field(
        default=4096, ge=1, description="Budget of one forward pass in padded tokens; a longer sample goes alone, whole."
    )
    layout: Literal["auto", "sorted", "packed"] = Field(
        default="auto",
        description="Rows of one sample sorted by length, or several samples per row; auto takes what computes fewer padded tokens.",
    )

    overlong: Literal["mask", "keep"] = Field(default="mask", description="Whether completions cut off at the length limit leave the loss.")
    zero_variance: Literal["drop", "keep"] = Field(default="drop", description="Whether groups whose scores are all equal leave the batch.")
    min_samples: int | None = Field(default=None, ge=1, description="Fewest scored samples of a group; group_size - 1 if not given.")

    @model_validator(mode="after")
    def _consistent(self) -> LearnerSettings:
        if (self.aggregation == "constant_length") != (self.aggregation_length is not None):
            raise ValueError("aggregation_length is the divisor of aggregation 'constant_length': give both or neither")
        try:
            check_name(self.advantage, ADVANTAGES, "advantage")
            check_name(self.objective, OBJECTIVES, "objective")
        except UnknownName as error:
            raise ValueError(str(error)) from None
        keyword_options(self.advantage, ADVANTAGES, self.advantage_options, "advantage")
        keyword_options(self.objective, OBJECTIVES, self.objective_options, "objective")
        return self
