"""Every objective: value and gradient of each token by closed formulas in plain floats, and what all of them share."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from learner.objectives import OBJECTIVES, TokenLoss, Tokens
from learner.options import bind

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Token:
    """One token, and the mean log-ratio and length of its sample."""

    policy: float
    anchor: float
    behaviour: float
    proximal: float
    advantage: float
    mean_log_ratio: float
    length: int


Formula = Callable[[Token], tuple[float, float]]
"""Loss of the token and d(sum of all losses) / d(its policy log-prob)."""


def surrogate(ratio: float, a: float, low: float, high: float) -> tuple[float, float]:
    """-min(r A, clamp(r) A) and its derivative by log r."""
    clipped = (a > 0 and ratio > 1 + high) or (a < 0 and ratio < 1 - low)
    if clipped:
        return -(1 + high if a > 0 else 1 - low) * a, 0.0
    return -ratio * a, -ratio * a


def clipped(t: Token) -> tuple[float, float]:
    return surrogate(math.exp(t.policy - t.anchor), t.advantage, 0.2, 0.28)


def dual_clip(t: Token) -> tuple[float, float]:
    if t.advantage < 0 and math.exp(t.policy - t.anchor) > 3:
        return -3 * t.advantage, 0.0
    return clipped(t)


def gppo(t: Token) -> tuple[float, float]:
    ratio = math.exp(t.policy - t.anchor)
    if t.advantage < 0 and ratio < 0.8:
        ratio = 0.8
    if t.advantage > 0 and ratio > 1.28:
        ratio = 1.28
    return -ratio * t.advantage, -ratio * t.advantage


def cispo(t: Token) -> tuple[float, float]:
    weight = min(max(math.exp(t.policy - t.anchor), 0.8), 1.28)
    return -weight * t.advantage * t.policy, -weight * t.advantage


def gspo(t: Token) -> tuple[float, float]:
    """All tokens of a sample share one loss, so the sum's derivative by one log-prob is length * (1 / length) of it."""
    return surrogate(math.exp(t.mean_log_ratio), t.advantage, 3e-4, 4e-4)


def reinforce(t: Token) -> tuple[float, float]:
    weight = min(math.exp(t.policy - t.anchor), 2.0)
    return -weight * t.advantage * t.policy, -weight * t.advantage


def decoupled(t: Token) -> tuple[float, float]:
    weight = math.exp(t.proximal - t.behaviour)
    if weight > 5:
        return 0.0, 0.0
    loss, gradient = surrogate(math.exp(t.policy - t.proximal), t.advantage, 0.2, 0.28)
    return weight * loss, weight * gradient


def likelihood(t: Token) -> tuple[float, float]:
    return -t.advantage * t.policy, -t.advantage


FORMULAS: dict[str, Formula] = {f.__name__: f for f in (clipped, dual_clip, gppo, cispo, gspo, reinforce, decoupled, likelihood)}
LENGTHS = (1, 6, 3, 1, 9)


def random_tokens(seed: int, spread: float = 1.0) -> Tokens:
    """Samples of several lengths, one token among them, in mixed order; log-ratios of `spread` nats."""
    generator = torch.Generator().manual_seed(seed)

    def noise(count: int) -> Tensor:
        return torch.randn(count, generator=generator, dtype=torch.float64)

    sample_T = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    sample_T = sample_T[torch.randperm(len(sample_T), generator=generator)]
    count = len(sample_T)
    behaviour_T = -torch.rand(count, generator=generator, dtype=torch.float64) * 5 - 3 * spread
    return Tokens(
        policy_T=(behaviour_T + spread * noise(count)).requires_grad_(),
        anchor_T=behaviour_T,
        behaviour_T=behaviour_T,
        proximal_T=behaviour_T + spread * noise(count),
        advantages_T=noise(len(LENGTHS))[sample_T],
        sample_T=sample_T,
        num_samples=len(LENGTHS),
    )


def objective(name: str) -> Callable[[Tokens], TokenLoss]:
    return bind(name, OBJECTIVES, {}, "objective")


def gradient(name: str, tokens: Tokens) -> Tensor:
    (found,) = torch.autograd.grad(objective(name)(tokens).loss_T.sum(), tokens.policy_T)
    return found


def changed(tokens: Tokens, **changes: Tensor) -> Tokens:
    fields = {name: getattr(tokens, name) for name in Tokens.__dataclass_fields__}
    fields["policy_T"] = fields["policy_T"].detach().clone().requires_grad_()
    return Tokens(**(fields | changes))


def test_every_entry_has_a_formula() -> None:
    assert FORMULAS.keys() == OBJECTIVES.keys()


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("spread", [1e-4, 0.3, 2.0])
def test_value_and_gradient_equal_the_formula(name: str, spread: float) -> None:
    bounded = 0
    for seed in range(5):
        tokens = random_tokens(seed, spread)
        found, slopes = objective(name)(tokens), gradient(name, tokens)
        for t in range(len(tokens.policy_T)):
            same = tokens.sample_T == tokens.sample_T[t]
            token = Token(
                policy=tokens.policy_T[t].item(),
                anchor=tokens.anchor_T[t].item(),
                behaviour=tokens.behaviour_T[t].item(),
                proximal=tokens.proximal_T[t].item(),
                advantage=tokens.advantages_T[t].item(),
                mean_log_ratio=(tokens.policy_T - tokens.anchor_T)[same].mean().item(),
                length=int(same.sum()),
            )
            loss, slope = FORMULAS[name](token)
            assert found.loss_T[t].item() == pytest.approx(loss, rel=1e-9, abs=1e-12)
            assert slopes[t].item() == pytest.approx(slope, rel=1e-9, abs=1e-12)
        bounded += int(found.clipped_T.sum())
    assert bounded > 0 or spread < 2 or name == "likelihood"


@pytest.mark.parametrize("name", ["clipped", "dual_clip", "gspo", "decoupled", "likelihood"])
def test_gradient_equals_finite_differences(name: str) -> None:
    """Of the objectives that are what they differentiate (the others stop gradients on purpose)."""
    tokens = random_tokens(3, 0.4)
    slopes, step = gradient(name, tokens), 1e-6
    for t in range(len(slopes)):
        up, down = (tokens.policy_T.detach().clone() for _ in range(2))
        up[t] += step
        down[t] -= step
        high, low = (objective(name)(changed(tokens, policy_T=p)).loss_T.sum().item() for p in (up, down))
        assert slopes[t].item() == pytest.approx((high - low) / (2 * step), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_at_ratio_one_it_is_the_policy_gradient(name: str) -> None:
    tokens = random_tokens(0)
    same = tokens.anchor_T.clone()
    tokens = changed(tokens, policy_T=same.requires_grad_(), proximal_T=tokens.anchor_T)
    torch.testing.assert_close(gradient(name, tokens), -tokens.advantages_T, rtol=1e-12, atol=1e-12)
    assert not objective(name)(tokens).clipped_T.any()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_zero_advantage_has_no_loss_and_no_gradient(name: str) -> None:
    tokens = changed(random_tokens(1), advantages_T=torch.zeros(sum(LENGTHS), dtype=torch.float64))
    assert not objective(name)(tokens).loss_T.any() and not gradient(name, tokens).any()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_extreme_log_ratios_stay_finite(name: str) -> None:
    tokens = random_tokens(2)
    signs = torch.tensor([1.0, -1.0]).repeat(len(tokens.policy_T))[: len(tokens.policy_T)]
    far = changed(tokens, policy_T=(tokens.anchor_T + 500 * signs).float().requires_grad_(), proximal_T=tokens.anchor_T - 500 * signs)
    assert objective(name)(far).loss_T.isfinite().all() and gradient(name, far).isfinite().all()


@pytest.mark.parametrize(("name", "advantage", "log_ratio", "slope"), [
    ("gppo", -1.0, -25.0, 0.8),
    ("gppo", 1.0, 25.0, -1.28),
    ("clipped", -1.0, 25.0, math.exp(20)),
    ("clipped", 1.0, -25.0, -math.exp(-20)),
    ("clipped", -1.0, -25.0, 0.0),
])  # fmt: skip
def test_beyond_the_limit_of_ratios_the_gradient_is_that_of_the_limit(name: str, advantage: float, log_ratio: float, slope: float) -> None:
    one = torch.ones(1, dtype=torch.float64)
    tokens = changed(
        random_tokens(0), policy_T=(log_ratio * one).requires_grad_(), anchor_T=0 * one, behaviour_T=0 * one, proximal_T=0 * one,
        advantages_T=advantage * one, sample_T=torch.zeros(1, dtype=torch.int64),
    )  # fmt: skip
    assert gradient(name, tokens).item() == pytest.approx(slope, rel=1e-9)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_order_of_tokens_does_not_matter(name: str) -> None:
    tokens = random_tokens(4)
    order = torch.randperm(len(tokens.policy_T), generator=torch.Generator().manual_seed(1))
    moved = changed(tokens, **{f: getattr(tokens, f)[order] for f in ("anchor_T", "behaviour_T", "proximal_T", "advantages_T", "sample_T")})
    moved = changed(moved, policy_T=tokens.policy_T.detach()[order].requires_grad_())
    torch.testing.assert_close(gradient(name, moved), gradient(name, tokens)[order], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("advantage", "log_ratio", "slope"),
    [
        (1.0, math.log(1.28) - 1e-9, -1.28),
        (1.0, math.log(1.28) + 1e-9, 0.0),
        (1.0, math.log(0.5), -0.5),
        (-1.0, math.log(0.8) + 1e-9, 0.8),
        (-1.0, math.log(0.8) - 1e-9, 0.0),
        (-1.0, math.log(2.0), 2.0),
    ],
)
def test_clipping_at_its_borders(advantage: float, log_ratio: float, slope: float) -> None:
    one = torch.ones(1, dtype=torch.float64)
    tokens = Tokens(
        policy_T=(log_ratio * one).requires_grad_(),
        anchor_T=0 * one,
        behaviour_T=0 * one,
        proximal_T=0 * one,
        advantages_T=advantage * one,
        sample_T=torch.zeros(1, dtype=torch.int64),
        num_samples=1,
    )
    assert gradient("clipped", tokens).item() == pytest.approx(slope, abs=1e-6)
    assert objective("clipped")(tokens).clipped_T.item() == (slope == 0)


def test_options_are_checked_without_torch() -> None:
    program = (
        "import sys\n"
        "from learner.settings import LearnerSettings\n"
        "from learner.objectives import OBJECTIVES\n"
        "for name in OBJECTIVES:\n"
        "    LearnerSettings(objective=name, objective_options={})\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'torch was imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
