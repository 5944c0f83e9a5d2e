"""Learning guards: signs that a run learns nothing, breaks, or cheats, each with what to look at. Pure.

A guard compares the last few iterations with the run's own past, because absolute values differ between models and tasks. It speaks once, and
again only after it was well in between. What happens then is the configuration's choice: `guards.action` warn or stop.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import mean, median
from typing import Literal

from pydantic import Field

from protocol.settings import Settings

WINDOW = 5
"""Iterations that are averaged, so that one odd batch is no alarm."""
HISTORY = 50


class GuardSettings(Settings):
    """When a run says that its learning looks wrong."""

    action: Literal["warn", "stop", "off"] = Field("warn", description="warn: a line and an event; stop: the run ends with the reason")
    entropy_share: float = Field(0.1, ge=0, lt=1, description="entropy below this share of the run's first iterations is a collapse")
    ratio: float = Field(10.0, gt=1, description="mean ratio above this, or below its inverse, has exploded")
    grad_norm_times: float = Field(20.0, gt=1, description="gradient norm above so many times the median so far has exploded")
    drift: float = Field(0.5, gt=0, description="mean log-prob difference of sampler and trainer, in nats")
    truncated_rise: float = Field(0.3, gt=0, le=1, description="rise of the truncated share above the run's first iterations")
    zero_variance_share: float = Field(0.95, gt=0, le=1, description="share of groups without any difference between samples")
    reward_jump: float = Field(
        0.25, gt=0, description="rise of the mean reward within ten iterations, in parts of its range so far plus 1e-6"
    )
    length_share: float = Field(0.5, gt=0, lt=1, description="completion length below this share of what it was, at such a jump")


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """A guard that spoke."""

    guard: str
    iteration: int
    what: str
    look: str
    """What to look at, and what usually helps."""

    @property
    def sentence(self) -> str:
        return f"{self.guard} at iteration {self.iteration}: {self.what}. Look at: {self.look}"


class Guards:
    """Feed it the numbers of each iteration, in order."""

    def __init__(self, settings: GuardSettings) -> None:
        self._settings = settings
        self._past: dict[str, deque[float]] = {}
        self._first: dict[str, list[float]] = {}
        self._raised: set[str] = set()
        self._checks: dict[str, tuple[Callable[[], str], str]] = {
            "entropy collapse": (
                self._entropy,
                "`rlsys samples RUN` for answers that are all alike; a larger clip_high, an entropy bonus, a lower learning rate",
            ),
            "exploding ratio": (
                self._ratio,
                "train/ratio_max, train/clip_share and staleness/mean; a lower learning rate or fewer updates",
            ),
            "exploding gradient": (
                self._gradient,
                "train/grad_norm and train/skipped; a lower learning rate, gradient_clip, longer warm-up",
            ),
            "log-prob drift": (
                self._drift,
                "whether sampler and trainer use the same dtype and chat template; learner.correction bounds what it does",
            ),
            "truncation": (self._truncation, "data/completion_tokens_mean and the longest samples; max_tokens, overlong_penalty_tokens"),
            "nothing to learn from": (
                self._variance,
                "reward/mean: near 0 the problems are too hard, near 1 too easy; other problems, refill, a larger group_size",
            ),
            "reward jump with shorter answers": (
                self._hacking,
                "`rlsys samples RUN --reward-min 1` for answers that please the reward without solving the problem; held-out pass@1",
            ),
        }

    def observe(self, iteration: int, values: Mapping[str, float]) -> list[Alarm]:
        """The alarms that this iteration raises."""
        for name, value in values.items():
            if math.isfinite(value):
                self._past.setdefault(name, deque(maxlen=HISTORY)).append(value)
                first = self._first.setdefault(name, [])
                if len(first) < WINDOW:
                    first.append(value)
        alarms = []
        for guard, (check, look) in self._checks.items():
            what = check() if self._settings.action != "off" else ""
            if what and guard not in self._raised:
                self._raised.add(guard)
                alarms.append(Alarm(guard=guard, iteration=iteration, what=what, look=look))
            elif not what:
                self._raised.discard(guard)
        return alarms

    # ------------------------------------------------------------------------------------------------ what is wrong, in words

    def _recent(self, name: str) -> float:
        """The mean of the last WINDOW values; NaN before there are as many."""
        past = self._past.get(name, ())
        return mean(list(past)[-WINDOW:]) if len(past) >= WINDOW else float("nan")

    def _begin(self, name: str) -> float:
        """The mean of the run's first WINDOW values; NaN until later ones can be compared with it."""
        first, past = self._first.get(name, []), self._past.get(name, ())
        return mean(first) if len(past) >= 2 * WINDOW else float("nan")

    def _entropy(self) -> str:
        now, begin, least = self._recent("train/entropy"), self._begin("train/entropy"), self._settings.entropy_share
        return f"entropy fell from {begin:.3g} to {now:.3g} nats per token" if now < least * begin else ""

    def _ratio(self) -> str:
        now = self._recent("train/ratio_mean")
        limit = self._settings.ratio
        return f"the mean ratio is {now:.3g}, policy and sampler are far apart" if now > limit or now < 1 / limit else ""

    def _gradient(self) -> str:
        past = list(self._past.get("train/grad_norm", ()))
        if len(past) < 2 * WINDOW:
            return ""
        usual, now = median(past[:-1]), past[-1]
        return f"the gradient norm is {now:.3g}, usual are {usual:.3g}" if now > self._settings.grad_norm_times * max(usual, 1e-12) else ""

    def _drift(self) -> str:
        now = self._recent("train/logprob_drift")
        return f"log-probs of sampler and trainer differ by {now:.3g} nats on average" if now > self._settings.drift else ""

    def _truncation(self) -> str:
        now, begin = self._recent("data/truncated_share"), self._begin("data/truncated_share")
        return f"{now:.0%} of completions are cut off, at first {begin:.0%} were" if now - begin > self._settings.truncated_rise else ""

    def _variance(self) -> str:
        share = self._recent("data/zero_variance_share")
        return f"{share:.0%} of groups have one score for all samples" if share >= self._settings.zero_variance_share else ""

    def _hacking(self) -> str:
        rewards = list(self._past.get("reward/mean", ()))
        lengths = list(self._past.get("data/completion_tokens_mean", ()))
        if len(rewards) < 3 * WINDOW or len(lengths) < 3 * WINDOW:
            return ""
        before, now = mean(rewards[-3 * WINDOW : -WINDOW]), mean(rewards[-WINDOW:])
        long, short = mean(lengths[-3 * WINDOW : -WINDOW]), mean(lengths[-WINDOW:])
        spread = max(1.0, max(rewards) - min(rewards)) if max(rewards) <= 1.0 else max(rewards) - min(rewards) + 1e-6
        if now - before > self._settings.reward_jump * spread and short < self._settings.length_share * long:
            return f"the reward rose from {before:.3g} to {now:.3g} while completions shrank from {long:.0f} to {short:.0f} tokens"
        return ""
