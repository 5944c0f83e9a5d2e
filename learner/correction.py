"""The importance weight between the policy that sampled and the trainer's own: engine mismatch and staleness, taken out of the gradient.

With a correction the objective's ratio is taken against the *proximal* policy (the trainer's, before the first update on the batch) and
each token's loss is multiplied by a bounded sg(proximal / behaviour). Without one the ratio is taken against the behaviour policy.
Sources: Yao et al. 2025 (Your efficient RL framework secretly brings you off-policy RL training) for truncation; IcePop for masking.
"""

from __future__ import annotations

from torch import Tensor

from learner.objectives import LOG_RATIO_LIMIT, sample_sums
from learner.settings import CorrectionSettings


def correction_weights(
    proximal_T: Tensor, behaviour_T: Tensor, sample_T: Tensor, num_samples: int, settings: CorrectionSettings
) -> tuple[Tensor, Tensor]:
    """The bounded weight of each token [T], and the free one [T].

    Level token: proximal / behaviour of the token. sequence: the product over the sample's trainable tokens, the same for all of them.
    geometric: its root of degree the number of tokens. Truncation cuts at `cap`; masking gives 0 outside [`floor`, `cap`].
    """
    log_T = (proximal_T - behaviour_T).detach()
    if settings.level != "token":
        total_S = sample_sums(log_T, sample_T, num_samples)
        if settings.level == "geometric":
            total_S = total_S / sample_sums(log_T.new_ones(log_T.shape), sample_T, num_samples).clamp(min=1)
        log_T = total_S[sample_T]
    free_T = log_T.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    if settings.mode == "mask":
        return free_T.masked_fill((free_T < settings.floor) | (free_T > settings.cap), 0.0), free_T
    return free_T.clamp(max=settings.cap), free_T
