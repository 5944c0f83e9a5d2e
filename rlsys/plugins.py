"""What a plug-in needs, in one place and without torch: `from rlsys.plugins import Score`."""

from actors.engines import Engine, EngineLoad, EngineOptions, Sampled, SampleRequest, Sampling
from actors.rewards import Reward, Sample, Score
from protocol.errors import ConfigError, DataError, InfrastructureFault
from protocol.messages import Span, Version

__all__ = [
    "ConfigError",
    "DataError",
    "Engine",
    "EngineLoad",
    "EngineOptions",
    "InfrastructureFault",
    "Reward",
    "Sample",
    "SampleRequest",
    "Sampled",
    "Sampling",
    "Score",
    "Span",
    "Version",
]
