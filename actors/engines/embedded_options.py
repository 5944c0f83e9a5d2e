"""Options of the embedded engine, importable without torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Options(BaseModel):
    """Sizes of work. The defaults suit small models on a CPU; none changes a token beyond floating-point rounding."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prefill_tokens: int = Field(512, ge=1)
    """Most padded tokens that one batch of prompts holds; a longer prompt is prefilled alone. Bounds how long samples are held up."""
    context_bucket: int = Field(16, ge=1)
    """Attention covers the longest running sample, rounded up to a multiple of this."""
    batch_invariant: bool = False
    """What is sampled depends, to the last bit, on nothing but weights, prompt and seed: not on who else is sampled at the time. Runs that are
    to be repeatable have it on by themselves (docs/delivery.md). Samples are then decoded in tiles of a fixed size and prompts one by one."""
