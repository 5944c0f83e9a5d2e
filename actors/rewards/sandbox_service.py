"""The reward of a far sandbox host: completions are judged by a `rlsys sandbox serve`, and scored as `unit_tests` scores them here.

Consumes: a problem and a completion, sent over HTTP. Waits for: the service, at most `wait_s`; a full queue there is waited for, and a service
that cannot be reached or broke is an infrastructure fault, never a score.
"""

from __future__ import annotations

import http.client
import json
import random
import ssl
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field

from actors.rewards import Sample, Score
from actors.rewards.options import parse_options
from protocol.errors import ConfigError, DataError, InfrastructureFault
from protocol.intervals import phase

_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 15.0


class Options(BaseModel):
    """Options of `sandbox_service` in the configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str = Field(pattern=r"^https?://[^/]+/?$")
    """Such as http://10.0.0.7:8390."""
    token_file: Path
    """Holds the service's token."""
    ca_file: Path | None = None
    """PEM, for https: the authority that signed the service's certificate, or a self-signed certificate itself; default: those of this host."""
    options: dict[str, Any] = {}
    """Those of `unit_tests`, without `cells`: how it is judged there."""
    wait_s: float = Field(default=600.0, gt=0)
    """Longest time until a score is there, with all repeated requests."""
    answer_s: float = Field(default=180.0, gt=0)
    """Longest time until one request is answered; more than the service's own deadline."""


class SandboxService:
    """Built once per reward actor; threads that score take a connection each, and give it back."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        """Raises ConfigError for bad options, an address that is none, or a token or authority that cannot be read."""
        self._options = parse_options(Options, "sandbox_service", options)
        try:
            self._token = self._options.token_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"reward sandbox_service, option 'token_file': {self._options.token_file} cannot be read ({error})") from None
        if len(self._token.split()) != 1 or not self._token.isascii():
            raise ConfigError(f"reward sandbox_service, option 'token_file': {self._options.token_file} holds no token (one word of ASCII)")
        try:
            self._url = urlsplit(self._options.url)
            if not self._url.hostname or self._url.port == 0:
                raise ValueError("a host, and a port if it is not the usual one")
        except ValueError as error:
            raise ConfigError(f"reward sandbox_service, option 'url': {self._options.url} is no address ({error})") from None
        self._tls = self._authority() if self._url.scheme == "https" else None
        self._lock = threading.Lock()
        self._idle: list[http.client.HTTPConnection] = []
        self._closed = False

    def _authority(self) -> ssl.SSLContext:
        try:
            return ssl.create_default_context(cafile=self._options.ca_file)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"reward sandbox_service, option 'ca_file': {self._options.ca_file} holds no certificate that can be used ({error})"
            ) from None

    def score(self, sample: Sample) -> Score:
        """Raises DataError for a problem that cannot be judged, InfrastructureFault without an answer, ConfigError for a wrong token or a
        certificate that is not to be trusted."""
        body = json.dumps({"completion": sample.completion, "problem": sample.problem, "options": self._options.options}).encode()
        until, pause, why = time.monotonic() + self._options.wait_s, _PAUSE_S, ""
        while (left := until - time.monotonic()) > 0 and not self._closed:
            try:
                status, wait, answer = self._ask(body, min(left, self._options.answer_s))
            except ssl.SSLCertVerificationError as error:
                raise ConfigError(
                    f"the certificate of the sandbox service at {self._options.url} cannot be trusted ({error.verify_message}): name the "
                    "authority that signed it with option ca_file"
                ) from None
            except (OSError, http.client.HTTPException, ValueError) as error:
                status, wait, answer, why = 0, None, {}, f"{type(error).__name__}: {error}"
            if status == 200:
                return _score(answer)
            fault = answer.get("error", {}) if isinstance(answer, dict) else {}
            if status == 400 and fault.get("code") == "bad_problem":
                raise DataError(fault["message"])
            if status in (400, 401, 404, 413):
                raise ConfigError(f"the sandbox service at {self._options.url} refuses: {fault.get('where')}: {fault.get('message')}")
            if status == 500:
                raise InfrastructureFault(f"the sandbox service at {self._options.url}: {fault.get('message')}")
            why = f"{status} {fault.get('message')}" if status else why
            seconds = min(float(wait) if wait else pause, _LONGEST_PAUSE_S) * random.uniform(0.5, 1.0)
            with phase("waiting:sandbox", "sandbox service", f"{self._options.url}: {why}"):
                time.sleep(max(0.0, min(seconds, until - time.monotonic())))
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        raise InfrastructureFault(f"no verdict from the sandbox service at {self._options.url} within {self._options.wait_s:g} s ({why})")

    def close(self) -> None:
        """Ask no more. Nothing of it runs here."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _ask(self, body: bytes, timeout_s: float) -> tuple[int, str | None, Any]:
        """One request: status, Retry-After, answer. Raises OSError, HTTPException, ValueError."""
        with self._lock:
            connection = self._idle.pop() if self._idle else self._connection()
        try:
            connection.timeout = timeout_s
            if connection.sock is not None:
                connection.sock.settimeout(timeout_s)
            with phase("run program", "sandbox service"):
                connection.request(
                    "POST", "/v1/grade", body, {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
                )
                response = connection.getresponse()
                answer = response.status, response.headers.get("Retry-After"), json.loads(response.read())
        except BaseException:
            connection.close()
            raise
        with self._lock:
            if not self._closed:
                self._idle.append(connection)
                return answer
        connection.close()
        return answer

    def _connection(self) -> http.client.HTTPConnection:
        host, port = self._url.hostname or "", self._url.port
        if self._tls is not None:
            return http.client.HTTPSConnection(host, port, context=self._tls)
        return http.client.HTTPConnection(host, port)


def _score(answer: Mapping[str, Any]) -> Score:
    try:
        return Score(
            value=float(answer["value"]),
            status=answer["status"],
            passed=answer["passed"],
            detail=answer["detail"],
            metrics=dict(answer["metrics"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InfrastructureFault(f"the sandbox service answered without a verdict ({error!r})") from None
