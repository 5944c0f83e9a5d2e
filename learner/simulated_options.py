"""Options of the simulated step, importable without torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Options(BaseModel):
    """A model of the learner's devices. Times are those of the devices; the run is faster by `speed`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    tokens_per_s: float = Field(gt=0, description="tokens of prompt and completion that one device trains on per second")
    devices: float = Field(1, gt=0, description="devices of one rank; a fraction is a device shared with a generator")
    fixed_s: float = Field(0.0, ge=0, description="time of a step besides its tokens")
    publish_s: float = Field(0.0, ge=0, description="time to gather the weights before they are written")
    weight_bytes: int = Field(1 << 20, ge=64, description="size of the safetensors file that is really written and published")
    speed: float = Field(1.0, gt=0, description="simulated seconds in one second of the run; the same in every simulated part")

    def step_s(self, tokens: float, updates: int = 1, ranks: int = 1) -> float:
        """Simulated seconds of a step on so many tokens."""
        return self.fixed_s + updates * tokens / (self.tokens_per_s * self.devices * ranks)
