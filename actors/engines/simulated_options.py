"""Options of the simulated engine."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, field_validator

from actors.engines.lengths import LengthOptions


class Options(BaseModel):
    """A model of one sampling device. Times are those of the device; the run is faster by `speed`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def share(self, index: int) -> float:
        """Share of a device that a generator has."""
        return 1.0 if self.device_shares is None or index >= len(self.device_shares) else self.device_shares[index]

    @field_validator("device_shares")
    @classmethod
    def _shares_are_shares(cls, value: list[float] | None) -> list[float] | None:
        if value is not None and not all(0 < share <= 1 for share in value):
            raise ValueError(f"device_shares {value}: each must lie above 0 and at most at 1")
        return value

    tokens_per_s_sample: float = Field(gt=0, description="tokens per second of a sample that runs alone")
    tokens_per_s: float = Field(gt=0, description="tokens per second of all samples on the device together")
    lengths: LengthOptions = Field(description="tokens of a completion")
    prefill_tokens_per_s: float | None = Field(None, gt=0, description="prompt tokens per second; not given, prompts cost nothing")
    update_s: float = Field(0.0, ge=0, description="how long a weight update holds up everything that runs")
    recompute_cache: bool = Field(False, description="whether an update prefills running samples again, at prefill_tokens_per_s")
    device_shares: list[float] | None = Field(
        None, description="share of a device that generator 0, 1, ... has, where learners have the rest; not given, a whole one each"
    )
    speed: float = Field(1.0, gt=0, description="simulated seconds in one second of the run; the same in every simulated part")
