"""A headless Chromium, driven over the WebDriver protocol (W3C) with nothing but the standard library."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars",
]  # fmt: skip


def missing() -> str:
    """What a test needs and this machine has not; empty if all is there."""
    return ", ".join(name for name in ("chromium", "chromedriver") if shutil.which(name) is None)


class Browser:
    """Use as a context manager: driver, browser and profile are gone afterwards."""

    def __init__(self, width: int = 1240, height: int = 900) -> None:
        self._profile = tempfile.mkdtemp(prefix="rlsys-browser-")
        self._driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self._size = f"--window-size={width},{height}"
        self._session = ""

    def __enter__(self) -> Browser:
        try:
            self._base = f"http://127.0.0.1:{self._port()}"
            options = {"args": [*FLAGS, self._size, f"--user-data-dir={self._profile}"], "binary": shutil.which("chromium")}
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
            answer = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
            self._session = f"/session/{answer['sessionId']}"
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._session:
                self._ask("DELETE", self._session)
        finally:
            self._driver.terminate()
            self._driver.wait(120)
            assert self._driver.stdout is not None
            self._driver.stdout.close()
            shutil.rmtree(self._profile, ignore_errors=True)

    def _port(self) -> int:
        assert self._driver.stdout is not None
        for line in self._driver.stdout:
            if "started successfully on port" in line:
                return int(line.rstrip(".\n").rsplit(" ", 1)[1])
        raise AssertionError("chromedriver ended without a port")

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self._base + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=600) as response:
            return json.load(response)["value"]

    def open(self, url: str) -> None:
        """Load a page and wait for its load event."""
        self._ask("POST", f"{self._session}/url", {"url": url})

    def run(self, script: str) -> Any:
        """The value that a script body returns."""
        return self._ask("POST", f"{self._session}/execute/sync", {"script": script, "args": []})

    def until(self, script: str, deadline_s: float = 300.0) -> Any:
        """What the script returns once it is true."""
        end = time.monotonic() + deadline_s
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"not within {deadline_s:g} s: {script}"
        return value

    def log(self, kind: str) -> list[dict[str, Any]]:
        """What came since the last call: "browser" (console and errors) or "performance" (protocol events)."""
        entries = self._ask("POST", f"{self._session}/se/log", {"type": kind})
        return [json.loads(entry["message"])["message"] if kind == "performance" else entry for entry in entries]

    def requests(self) -> list[str]:
        """Addresses that were asked for since the last call."""
        return [m["params"]["request"]["url"] for m in self.log("performance") if m["method"] == "Network.requestWillBeSent"]

    def screenshot(self, path: Path) -> None:
        """What the window shows, as PNG."""
        path.write_bytes(base64.b64decode(self._ask("GET", f"{self._session}/screenshot")))
