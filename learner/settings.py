"""The learner's part of the configuration. Imports no torch, so that `rlsys check` stays fast."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from learner.advantages import ADVANTAGES
from learner.objectives import OBJECTIVES
from learner.optimizers import OPTIMIZERS
from learner.options import keyword_options
from learner.steps import STEPS
from protocol.errors import UnknownName
from protocol.registry import check_name
from protocol.settings import Settings


class _Settings(Settings):
    def _refuse_idle(self, condition: str, *keys: str) -> None:
        """Raise ValueError when one of the keys was changed although it means nothing under `condition`."""
        for key in keys:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is {getattr(self, key)} but {condition}: it would change nothing")


class OptimizerSettings(_Settings):
    """What turns a gradient into an update."""

    name: str = Field(
        default="adamw", description="adamw, muon, adamw_8bit, paged_adamw, paged_adamw_8bit, or your own 'package.module:function'."
    )
    lr: float = Field(default=1e-6, gt=0, description="Peak learning rate; the schedule multiplies it.")
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="Decay of the first and second moment.")
    eps: float = Field(default=1e-8, gt=0, description="Added to the root of the second moment.")
    weight_decay: float = Field(default=0.0, ge=0, description="Decay of weight matrices; never of norms and biases.")
    momentum: float | None = Field(default=None, ge=0, lt=1, description="Of muon: share of the momentum that stays; 0.95 if not given.")
    adamw_lr: float | None = Field(
        default=None, gt=0, description="Of muon: peak rate of what AdamW takes (embeddings, head, norms, biases); lr if not given."
    )
    offload: bool = Field(
        default=False,
        description="On a GPU: keep the optimizer's state in host memory and compute updates there (sharded: masters and gradients too).",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="For an optimizer of your own, which reads them from its settings.")

    @model_validator(mode="after")
    def _betas_below_one(self) -> OptimizerSettings:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas} must lie in [0, 1): at 1 a moment never forgets its start")
        return self

    @model_validator(mode="after")
    def _known(self) -> OptimizerSettings:
        try:
            check_name(self.name, OPTIMIZERS, "optimizer")
        except UnknownName as error:
            raise ValueError(str(error)) from None
        if self.momentum is not None and self.name in OPTIMIZERS and self.name != "muon":
            raise ValueError(f"momentum belongs to optimizer 'muon', {self.name!r} has betas")
        if self.adamw_lr is not None and self.name in OPTIMIZERS and self.name != "muon":
            raise ValueError(f"adamw_lr is the second rate of optimizer 'muon', {self.name!r} has lr alone")
        if self.options and self.name in OPTIMIZERS:
            raise ValueError(f"options are for an optimizer of your own; those of {self.name!r} stand beside its name")
        if self.offload and (self.name.startswith("paged_") or self.name.endswith("_8bit")):
            raise ValueError(
                f"offload moves whole states to the host; {self.name!r} keeps them small or paged on the GPU: choose one of the two"
            )
        return self


class ScheduleSettings(_Settings):
    """The learning rate over the iterations of the run."""

    name: Literal["constant", "cosine", "linear"] = Field(default="constant", description="Shape after the warm-up.")
    warmup_iterations: int = Field(default=0, ge=0, description="Iterations over which the rate rises linearly to its peak.")
    final_fraction: float = Field(default=0.0, ge=0, le=1, description="Share of the peak rate at the last iteration (cosine, linear).")

    @model_validator(mode="after")
    def _falls(self) -> ScheduleSettings:
        if self.name == "constant":
            self._refuse_idle("name is constant, so the rate never falls", "final_fraction")
        return self


class CorrectionSettings(_Settings):
    """The importance weight between the policy that sampled a token and the trainer's own; see `learner/correction.py`."""

    mode: Literal["auto", "off", "truncate", "mask"] = Field(
        default="auto", description="auto truncates from the iteration on after which drift was above auto_drift, and is off before."
    )
    level: Literal["token", "sequence", "geometric"] = Field(
        default="token", description="A weight for each token, the product over the sample's tokens, or that product's mean per token."
    )
    cap: float = Field(default=2.0, gt=0, description="Largest weight; above it a token is cut to it (truncate) or left out (mask).")
    floor: float = Field(default=0.5, ge=0, description="Smallest weight that mask keeps.")
    auto_drift: float = Field(
        default=0.1, gt=0, description="Mean |log-prob of the trainer - of the sampler| of a batch, in nats, that turns auto on for good."
    )

    @model_validator(mode="after")
    def _floor_below_cap(self) -> CorrectionSettings:
        if self.mode == "mask" and self.floor >= self.cap:
            raise ValueError(f"floor {self.floor} must be below cap {self.cap}: mask keeps the weights between them")
        if self.mode == "off":
            self._refuse_idle("mode is off", "level", "cap", "floor", "auto_drift")
        if self.mode != "mask":
            self._refuse_idle(f"mode is {self.mode}, and only mask has a smallest weight", "floor")
        if self.mode != "auto":
            self._refuse_idle(f"mode is {self.mode}, and only auto waits for drift", "auto_drift")
        return self


KLEstimator = Literal["k1", "k2", "k3"]


class KLSettings(_Settings):
    """A penalty for leaving a reference policy. Off by default, as in GRPO+ and DAPO: no second model is held."""

    coefficient: float = Field(default=0.0, ge=0, description="Weight of the penalty; above 0 a frozen reference model is held in memory.")
    estimator: KLEstimator = Field(
        default="k3",
        description="How it is estimated from one token: k2 has the divergence's gradient, k3's is near; k1's is 0 on average: noise.",
    )
    reference: str | None = Field(
        default=None, description="Directory of the reference model; the model that training starts from if not given."
    )

    @model_validator(mode="after")
    def _used(self) -> KLSettings:
        if self.coefficient == 0:
            self._refuse_idle("coefficient is 0, so there is no penalty", "estimator", "reference")
        return self


class EntropySettings(_Settings):
    """A bonus for the entropy of the policy. Off by default."""

    coefficient: float = Field(default=0.0, ge=0, description="Weight of the bonus; with adaptive its start.")
    adaptive: bool = Field(default=False, description="Move the coefficient so that entropy stays near the target (Skywork-OR1).")
    target: float = Field(default=0.2, ge=0, description="Mean entropy of a token in nats that adaptive holds.")
    delta: float = Field(default=0.0005, gt=0, description="By how much adaptive moves the coefficient in an iteration.")

    @model_validator(mode="after")
    def _used(self) -> EntropySettings:
        if not self.adaptive:
            self._refuse_idle("adaptive is off, so the coefficient stays", "target", "delta")
        elif self.target == 0:
            raise ValueError(
                "target is 0 and adaptive on: no entropy lies below 0, so the bonus would never be raised; give the entropy to hold"
            )
        return self


class CheckpointSettings(_Settings):
    """Which checkpoints stay on disk."""

    keep_last: int = Field(default=2, ge=1, description="The newest so many stay.")
    keep_every: int | None = Field(
        default=None, ge=1, description="Those of every so many iterations are written in any case and stay for good; none if not given."
    )


class LoraSettings(_Settings):
    """Train small matrices beside the frozen model (LoRA). No dropout: the ratio to the behaviour policy would be noise."""

    rank: int = Field(default=16, ge=1, description="Inner size of the adapters.")
    alpha: float = Field(default=32.0, gt=0, description="Their output is scaled by alpha / rank.")
    target_modules: Literal["all-linear"] | tuple[str, ...] = Field(
        default="all-linear", description="Names of linear layers, such as [q_proj, v_proj]; all-linear: every one but the head."
    )
    publish: Literal["merged", "adapter"] = Field(
        default="merged", description="What a version holds: the whole model with the adapters added in, or the adapters alone."
    )

    def in_words(self) -> str:
        """One line, which checkpoints carry; `from_words` reads it."""
        targets = self.target_modules if isinstance(self.target_modules, str) else ", ".join(self.target_modules)
        return f"rank {self.rank}, alpha {self.alpha:g} on {targets}"

    @classmethod
    def from_words(cls, words: str) -> LoraSettings | None:
        """The inverse of `in_words`; None for anything else."""
        found = re.fullmatch(r"rank (\d+), alpha (\S+) on (.+)", words)
        if found is None:
            return None
        targets = found[3] if found[3] == "all-linear" else found[3].split(", ")
        return cls.model_validate({"rank": int(found[1]), "alpha": float(found[2]), "target_modules": targets})


Sharding = Literal["auto", "none", "full"]


class LearnerSettings(_Settings):
    """Everything that decides how a batch becomes an update."""

    ranks: int = Field(default=1, ge=1, description="Learner processes that share every batch.")
    sharding: Sharding = Field(
        default="auto",
        description="none: each rank holds the whole model; full: parameters, gradients and optimizer state are cut over the ranks (FSDP2); "
        "auto: full if a whole replica takes more than 40 % of a rank's memory.",
    )
    threads: int = Field(default=1, ge=1, description="CPU threads of one rank.")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto takes CUDA if there is any.")
    dtype: Literal["bfloat16", "float32", "float64"] = Field(
        default="bfloat16",
        description="Arithmetic of the forward pass; parameters stay float32 (float64 with float64, for comparing runs).",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations in the backward pass: less memory, a third more work."
    )
    commit_every: int | Literal["auto"] = Field(
        default="auto",
        description="Iterations from one commit to the next; auto: as often as costs at most 2 % of the time; 0: never (a restart begins anew).",
    )
    collective_timeout_s: float = Field(default=3600.0, gt=0, description="Longest wait of one rank for another.")
    checkpoints: CheckpointSettings = Field(default_factory=CheckpointSettings, description="Which checkpoints stay on disk.")

    step: str = Field(default="gradient", description="gradient trains; simulated only takes the time that training would.")
    step_options: dict[str, Any] = Field(default_factory=dict, description="The step's own options.")

    optimizer: OptimizerSettings = Field(default_factory=OptimizerSettings, description="What turns a gradient into an update.")
    schedule: ScheduleSettings = Field(default_factory=ScheduleSettings, description="The learning rate over the run.")
    lora: LoraSettings | None = Field(default=None, description="Train adapters only; the whole model if not given.")
    gradient_clip: float = Field(default=1.0, gt=0, description="Largest norm of the whole gradient.")
    max_bad_steps: int = Field(
        default=5, ge=1, description="Batches in a row without an optimizer step, because nothing in them was finite, that end the run."
    )
    updates_per_batch: int = Field(default=1, ge=1, description="Optimizer steps on each batch (mu).")

    advantage: str = Field(default="grpo", description="Name in ADVANTAGES, or your own 'package.module:function'.")
    advantage_options: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of the advantage function.")
    objective: str = Field(default="clipped", description="Name in OBJECTIVES, or your own 'package.module:function'.")
    objective_options: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of the objective.")
    correction: CorrectionSettings = Field(default_factory=CorrectionSettings, description="Sampler against trainer: a bounded weight.")
    kl: KLSettings = Field(default_factory=KLSettings, description="Penalty for leaving a reference policy.")
    entropy: EntropySettings = Field(default_factory=EntropySettings, description="Bonus for entropy.")
    sft_coefficient: float = Field(
        default=0.0, ge=0, description="Weight of the plain likelihood of positive samples (Klear-Reasoner: 0.1)."
    )
    aggregation: Literal["token_mean", "sequence_mean", "constant_length"] = Field(
        default="token_mean",
        description="How token losses become one number: every token alike, every sample alike, or a constant divisor.",
    )
    aggregation_length: int | None = Field(
        default=None, ge=1, description="Tokens that constant_length divides by: the longest completion."
    )

    tokens_per_microbatch: int = Field(
        default=8192, ge=1, description="Budget of one forward pass in padded tokens; a longer sample goes alone, whole."
    )
    layout: Literal["auto", "shared", "sorted", "packed"] = Field(
        default="auto",
        description="Prompts computed once per group (short samples on a CPU), rows of one sample sorted by length, or several per row.",
    )

    reward_weights: dict[str, float] | None = Field(
        default=None, description="Weight of each part of the score; not given, the score counts as the reward actor made it."
    )
    overlong_penalty_tokens: int | None = Field(
        default=None, ge=1, description="DAPO's L_cache: the score falls by up to 1 over the last so many tokens before the length limit."
    )
    overlong: Literal["mask", "keep"] = Field(default="mask", description="Whether completions cut off at the length limit leave the loss.")
    zero_variance: Literal["drop", "keep", "refill"] = Field(
        default="drop",
        description="Groups whose scores are all equal: leave the batch, stay, or are replaced by others for the same batch (DAPO).",
    )
    refill_rounds: int | None = Field(
        default=None, ge=1, description="Of refill: at most so many times an iteration's groups are replaced; 4 if not given."
    )
    min_samples: int | None = Field(default=None, ge=1, description="Fewest scored samples of a group; group_size - 1 if not given.")

    @model_validator(mode="after")
    def _consistent(self) -> LearnerSettings:
        if self.refill_rounds is not None and self.zero_variance != "refill":
            raise ValueError(f"refill_rounds is {self.refill_rounds} but zero_variance is '{self.zero_variance}': nothing is refilled")
        if self.overlong_penalty_tokens is not None and self.overlong == "mask":
            raise ValueError(
                "overlong_penalty_tokens punishes long completions and overlong 'mask' leaves them out: choose overlong 'keep'"
            )
        if (self.aggregation == "constant_length") != (self.aggregation_length is not None):
            raise ValueError("aggregation_length is the divisor of aggregation 'constant_length': give both or neither")
        if self.objective == "decoupled":
            if self.correction.mode in ("truncate", "mask"):
                raise ValueError("objective 'decoupled' carries its own weight between sampler and trainer: leave correction.mode out")
            self.correction._refuse_idle("objective 'decoupled' carries its own weight", "level", "cap", "auto_drift")
        if self.objective == "likelihood" and self.updates_per_batch > 1:
            raise ValueError(
                f"updates_per_batch is {self.updates_per_batch} but objective 'likelihood' takes samples as if the present policy had written "
                "them, which is true of the first update on a batch alone: choose another objective, or 1"
            )
        if self.advantage == "pass_at_k":
            for key in ("overlong_penalty_tokens", "reward_weights"):
                self._refuse_idle("advantage 'pass_at_k' reads whether samples passed, not their scores", key)
        if self.checkpoints.keep_every is not None and self.commit_every == 0:
            raise ValueError(f"checkpoints.keep_every is {self.checkpoints.keep_every} but commit_every is 0: no checkpoint is written")
        try:
            check_name(self.advantage, ADVANTAGES, "advantage")
            check_name(self.objective, OBJECTIVES, "objective")
            check_name(self.step, STEPS, "step")
        except UnknownName as error:
            raise ValueError(str(error)) from None
        keyword_options(self.advantage, ADVANTAGES, self.advantage_options, "advantage")
        keyword_options(self.objective, OBJECTIVES, self.objective_options, "objective")
        return self

    def check_group(self) -> None:
        """Raise ValueError for what cannot work on the device or the ranks that a run is started with."""
        name = self.optimizer.name
        if self.sharding == "full" and self.ranks == 1:
            raise ValueError("sharding is full but ranks is 1: there is nothing to cut it over; leave sharding at auto")
        if name in OPTIMIZERS and name.startswith("paged_") and self.device == "cpu":
            raise ValueError(f"optimizer.name is {name}, which pages GPU memory, but device is cpu: take adamw or adamw_8bit")
        if name in OPTIMIZERS and name.endswith("_8bit") and self.sharding == "full":
            raise ValueError(
                f"optimizer.name is {name}, whose blocks are of whole tensors, but sharding is full: take adamw, whose state sharding makes "
                "smaller, or sharding none"
            )

    @field_validator("commit_every")
    @classmethod
    def _commits(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 0:
            raise ValueError("expected a number of iterations, 0 for never, or auto")
        return value
