"""Options of the SGLang engine, importable without torch or a server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

SwapPolicy = Literal["auto", "retract_flush", "retract", "abort_resume", "in_place"]


_OURS = "is chosen by the actor; leave it out"
_TP = "set options.tp, by which servers are given their devices"
RESERVED = {
    **dict.fromkeys(
        ("host", "port", "model", "model-path", "load-format", "device", "base-gpu-id", "skip-tokenizer-init", "config"), _OURS
    ),
    **dict.fromkeys(("tp", "tp-size", "tensor-parallel-size"), _TP),
    **dict.fromkeys(("api-key", "admin-api-key"), "the actor sends no key; its server listens on the loopback interface alone"),
    **dict.fromkeys(
        ("nnodes", "node-rank", "dist-init-addr"), "a server that an actor starts lies on one host; start it yourself, use url"
    ),
}
"""Flags of the server that may not be given -> why."""


class Options(BaseModel):
    """How the server is started or found, and how it is driven."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    python: Path | None = Field(None, description="interpreter that has sglang; default: what `rlsys engines install sglang` made")
    url: str | None = Field(
        None, description="use the server that runs at this address instead of starting one, such as http://127.0.0.1:30000"
    )
    tp: int = Field(1, ge=1, description="tensor-parallel size: devices of one server")
    devices: list[int] | None = Field(
        None,
        description="CUDA devices of all servers on the run's own host, counted as torch counts them; server i takes the i-th tp of them "
        "(default: from 0 on, as on hosts that join, which use those that they are given)",
    )
    memory_fraction: float | None = Field(
        None, gt=0, lt=1, description="share of a device's memory for weights and cache; default: 0.8 on a GPU"
    )
    attention_backend: str | None = Field(None, description="default: torch_native on a CPU, triton on a GPU")
    server_args: dict[str, bool | int | float | str] = Field(
        default_factory=dict, description="any other flag of the server, such as {chunked-prefill-size: 4096, enable-metrics: true}"
    )
    environment: dict[str, str] = Field(default_factory=dict, description="environment variables of the server")
    swap: SwapPolicy = Field(
        "auto",
        description="what becomes of running requests when weights change; auto: the cheapest that keeps each token's version true, by the "
        "server's version; in_place goes on with the old cache under new weights, so that log-probs match neither",
    )
    lane: Literal["disk", "tensor", "distributed"] = Field(
        "disk",
        description="how new weights reach the server: files; shared memory or CUDA IPC from the actor; broadcast (NCCL, on a CPU Gloo)",
    )
    min_concurrency: int = Field(4, ge=1, description="requests in the server at least; `slots` is the most")
    stream_interval: int = Field(16, ge=1, description="tokens per piece that the server streams; small ones cost time on both sides")
    start_s: float = Field(300.0, gt=0, description="from the start of the server to its first answer")
    silence_s: float = Field(20.0, gt=0, description="time without an answer of the scheduler after which the server counts as hung")
    update_s: float = Field(300.0, gt=0, description="longest update of the weights")
    restarts: int = Field(3, ge=0, description="starts in a row, without a finished sample between them, before the actor gives up")

    @field_validator("url")
    @classmethod
    def _address(cls, url: str | None) -> str | None:
        if url is not None and not re.fullmatch(r"https?://[^/\s:]+(:\d{1,5})?/?", url):
            raise ValueError("expected an address such as http://127.0.0.1:30000")
        return url

    @model_validator(mode="after")
    def _fit_together(self) -> Options:
        if self.url is not None:
            ours = ("python", "devices", "memory_fraction", "attention_backend", "server_args", "environment")
            own = [name for name in ours if getattr(self, name)]
            if own:
                raise ValueError(f"url is given, so no server is started, and {', '.join(own)} would do nothing")
        for name, why in RESERVED.items():
            if found := [key for key in self.server_args if key.replace("_", "-").removeprefix("--") == name]:
                raise ValueError(f"server_args.{found[0]}: {why}")
        if self.devices is not None and min(self.devices, default=0) < 0:
            raise ValueError(f"devices {self.devices}: they are counted from 0")
        if self.devices is not None and len(set(self.devices)) != len(self.devices):
            raise ValueError(f"devices {self.devices} names one twice")
        if self.devices is not None and len(self.devices) < self.tp:
            raise ValueError(f"devices names {len(self.devices)}, fewer than the tp of {self.tp}")
        return self
