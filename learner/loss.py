"""From the log-probs of one micro-batch to one number to go down, and what stands behind it.

loss = sum over tokens of  weight * (correction * objective + kl * KL(policy || reference) - entropy * entropy)
                         + sft * likelihood weight * -log-prob
"""

# ruff: noqa: N815 (shapes stand in names)
from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.correction import correction_weights
from learner.objectives import OBJECTIVES, TokenLoss, Tokens
from learner.options import bind
from learner.packing import MicroBatch, TrainSample
from learner.regularisers import kl_estimate
from learner.settings import LearnerSettings
from protocol.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Log-probs and entropies [T] of one micro-batch."""

    policy_T: Tensor
    """With a gradient."""
    entropy_T: Tensor
    """With a gradient when `Loss.entropy_gradient` asked for it."""
    proximal_T: Tensor
    """The policy's log-probs before the first update on the batch, without a gradient."""
    reference_T: Tensor | None
    """Those of the reference model, when there is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroLoss:
    """What a micro-batch adds to the loss, and values [T] of its tokens for the metrics. Only `total` carries a gradient."""

    total: Tensor
    behaviour_T: Tensor
    clipped_T: Tensor
    correction_T: Tensor | None = None
    """The weight before it was bounded."""
    corrected_T: Tensor | None = None
    """bool: where the bound changed it."""
    reference_kl_T: Tensor | None = None


class Loss:
    """The loss that the settings describe. Holds no state: what moves during a run comes as an argument."""

    def __init__(self, settings: LearnerSettings) -> None:
        """Raises ValueError for an objective or an option that is not known."""
        self._settings = settings
        self._objective = bind(settings.objective, OBJECTIVES, settings.objective_options, "objective")
        self._own = settings.objective not in OBJECTIVES

    @property
    def entropy_gradient(self) -> bool:
        """Whether entropies must carry a gradient."""
        return self._settings.entropy.adaptive or self._settings.entropy.coefficient > 0

    @property
    def has_reference(self) -> bool:
        """Whether a reference model is needed."""
        return self._settings.kl.coefficient > 0

    def uses(self, sample: TrainSample) -> bool:
        """Whether the sample can have a gradient at all; if not, it need not go through the model.

        Every objective of the table gives none where the advantage is 0; what one of a user's own does there is not known.
        """
        always = self._own or self.entropy_gradient or self.has_reference
        return bool(sample.num_trainable) and (sample.advantage != 0 or always or (sample.positive and self._settings.sft_coefficient > 0))

    def __call__(self, batch: MicroBatch, inputs: Inputs, *, corrected: bool, entropy_coefficient: float) -> MicroLoss:
        """The loss of one micro-batch; `corrected` says whether sampler-trainer correction weighs the tokens of this iteration."""
        policy_T = inputs.policy_T
        dtype, device = policy_T.dtype, policy_T.device
        behaviour_T, advantages_T, weights_T = (
            torch.from_numpy(array).to(device, dtype) for array in (batch.behaviour_T, batch.advantages_T, batch.weights_T)
        )
        sample_T = torch.from_numpy(batch.sample_T).to(device)
        tokens = Tokens(
            policy_T=policy_T,
            anchor_T=inputs.proximal_T if corrected else behaviour_T,
            behaviour_T=behaviour_T,
            proximal_T=inputs.proximal_T,
            advantages_T=advantages_T,
            sample_T=sample_T,
            num_samples=len(batch.samples),
        )
        objective: TokenLoss = self._checked(self._objective(tokens), policy_T) if self._own else self._objective(tokens)
        loss_T, bounded_T, free_T, reference_kl_T = objective.loss_T, None, None, None
        if corrected:
            bounded_T, free_T = correction_weights(inputs.proximal_T, behaviour_T, sample_T, len(batch.samples), self._settings.correction)
            loss_T = loss_T * bounded_T
        if inputs.reference_T is not None:
            reference_kl_T = kl_estimate(policy_T, inputs.reference_T, self._settings.kl.estimator)
            loss_T = loss_T + self._settings.kl.coefficient * reference_kl_T
        if entropy_coefficient:
            loss_T = loss_T - entropy_coefficient * inputs.entropy_T
        total = (loss_T * weights_T).sum()
        if self._settings.sft_coefficient:
            likelihood_T = torch.from_numpy(batch.likelihood_weights_T).to(device, dtype)
            total = total - self._settings.sft_coefficient * (likelihood_T * policy_T).sum()
        return MicroLoss(
            total=total,
            behaviour_T=behaviour_T,
            clipped_T=objective.clipped_T,
            correction_T=free_T,
            corrected_T=None if bounded_T is None or free_T is None else bounded_T != free_T,
            reference_kl_T=None if reference_kl_T is None else reference_kl_T.detach(),
        )

    def _checked(self, found: object, policy_T: Tensor) -> TokenLoss:
        """What an objective of a user's own returned. Raises ConfigError that names it for anything but a loss for each token."""
        name, tokens = self._settings.objective, len(policy_T)
        if not isinstance(found, TokenLoss):
            raise ConfigError(f"objective {name!r} returned a {type(found).__name__}, expected a learner.objectives.TokenLoss")
        for what, value in (("loss_T", found.loss_T), ("clipped_T", found.clipped_T)):
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            if shape != (tokens,):
                raise ConfigError(f"objective {name!r} returned {what} of {shape}, expected a tensor ({tokens},): one value for each token")
        if policy_T.requires_grad and not found.loss_T.requires_grad:
            raise ConfigError(
                f"objective {name!r} returned a loss_T without a gradient: it must be computed from tokens.policy_T, not detached"
            )
        return dataclasses.replace(found, clipped_T=found.clipped_T.bool())
