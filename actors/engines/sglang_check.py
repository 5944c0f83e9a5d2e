"""What can be said of the SGLang engine's options before anything is started, without torch or a server."""

from __future__ import annotations

from actors.engines.environments import find_python, missing_environment
from actors.engines.sglang_options import Options
from actors.engines.sglang_server import device_kind, device_places
from protocol.errors import ConfigError


def check(options: Options, device: str, count: int) -> list[str]:
    """What is missing on this host for `count` actors on `device`, in sentences. Raises ConfigError for what can work nowhere."""
    kind = device_kind(device)
    if options.url is not None:
        if count > 1:
            raise ConfigError(f"url names one server, but generators.count is {count}; each actor needs a server of its own")
        return []
    for index in range(count):
        device_places(options, device, index)
    if options.python is not None:
        find_python("sglang", kind, options.python)
        return []
    missing = missing_environment("sglang", kind)
    return [missing] if missing else []
