"""What every package's tests share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.ring import Ring
from tests.sglang_servers import running_server

# A busy machine is no fault of the code, and neither is an example that nobody has drawn before: every run tests the same ones, at any speed.
settings.register_profile("rlsys", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("rlsys")

CURRENT = "PYTEST_CURRENT_TEST"
"""Environment variable that pytest keeps itself."""


@pytest.fixture(autouse=True)
def process_as_it_was() -> Iterator[None]:
    """Commands that run in this process set handlers of signals and environment variables: no other test shall depend on having run after one."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    environment = {name: value for name, value in os.environ.items() if name != CURRENT}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for name in os.environ.keys() - environment.keys() - {CURRENT}:
        del os.environ[name]
    os.environ.update({name: value for name, value in environment.items() if os.environ.get(name) != value})


@pytest.fixture
def ring(tmp_path: Path) -> Iterator[Ring]:
    """The rest of a run; what was started on it is ended, also when the test fails."""
    with Ring(tmp_path) as ring:
        yield ring


@pytest.fixture(scope="session")
def sglang_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real SGLang server for tiny models (`tests/actors/tiny_models.py`, qwen3), shared by all tests that need one."""
    from tests.actors.tiny_models import CONTEXT, build, save

    directory = tmp_path_factory.mktemp("sglang")
    with running_server(save(build("qwen3"), directory / "model"), directory, max_context=CONTEXT) as server:
        yield server.url
