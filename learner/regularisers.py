"""Loss terms beside the objective: distance to a reference policy, and the control of entropy."""

from __future__ import annotations

from torch import Tensor

from learner.objectives import LOG_RATIO_LIMIT
from learner.settings import EntropySettings, KLEstimator


def kl_estimate(policy_T: Tensor, reference_T: Tensor, estimator: KLEstimator) -> Tensor:
    """An estimate of KL(policy || reference) for each token [T], sampled from the policy.

    With d = reference - policy: k1 = -d, k2 = d^2 / 2, k3 = exp(d) - 1 - d. As loss terms only k2 has the gradient of the divergence on
    average; that of k1 is 0 on average, k3's is near for policies that are near. Source: Schulman, Approximating KL divergence; GRPO takes k3.
    """
    delta_T = (reference_T - policy_T).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    if estimator == "k1":
        return -delta_T
    if estimator == "k2":
        return delta_T**2 / 2
    return delta_T.exp() - 1 - delta_T


def next_entropy_coefficient(coefficient: float, entropy: float, settings: EntropySettings) -> float:
    """The coefficient after an iteration whose tokens had this mean entropy (nats).

    Raised by `delta` below the target, lowered by it otherwise, never below 0. Source: Skywork-OR1, section 3.3. The paper also switches
    the bonus off in any step whose entropy is above the target; here it fades out, as the coefficient falls.
    """
    if not settings.adaptive:
        return coefficient
    return max(coefficient + (settings.delta if entropy < settings.target else -settings.delta), 0.0)
