"""An SGLang server: started as a child under a guard, or found running at a URL. Builds its command, waits until it answers, ends it.

    [ Server ] --pipe--> guard --> python -m sglang.launch_server (HTTP) --> scheduler(s), detokenizer
                            `--------- everything they print --> <logs>/<name>-server.log

The server gets a model directory of its own: the model's config.json without end-of-sequence tokens, because SGLang would add those to the
stop tokens of a request, and no weights: they come by `load_weights` alone, the first too.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from actors.engines import EngineOptions, guard
from actors.engines.environments import find_python
from actors.engines.sglang_options import Options
from protocol.errors import ConfigError, DataError, InfrastructureFault
from protocol.holds import Hold, inherited

GRACE_S = 3.0
"""From SIGTERM to SIGKILL. A server that is asked nicely can wait for its last requests forever."""
ATTACH_S = 30.0
"""A server that is said to run answers within this, or the address is wrong."""
REFUSED = 2
"""Exit code of a server that does not know one of its flags."""
SLACK = 8
"""Context that the server is given beyond ours, so that it is always we who cut a completion off."""
CONFIG = "config.json"
_COMPLAINT = re.compile(r"([\w.]*(Error|Exception)|[\w. -]+: error): ")
_OWN_PROCESSES = "sglang::"
"""How SGLang titles its child processes; each of them must live."""


def device_kind(device: str) -> str:
    """ "cpu" or "cuda". Raises ConfigError for anything else."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ConfigError(f"sglang engine: device {device!r}; expected cpu, cuda or cuda:N")
    return device.partition(":")[0]


def device_places(options: Options, device: str, index: int, *, joined: bool = False) -> list[int]:
    """The devices of server `index`, counted as torch counts them in this process, the learner's too; none on a CPU.

    On a host that `joined` the run they are counted from 0. Raises ConfigError when the list has none left for it.
    """
    if device_kind(device) == "cpu":
        return []
    if device.startswith("cuda:"):
        if options.tp > 1 or options.devices is not None:
            raise ConfigError(f"sglang engine: device {device!r} names one device; with tp or devices, set it to cuda")
        return [int(device.partition(":")[2])]
    first, last = index * options.tp, (index + 1) * options.tp
    if options.devices is None or joined:
        return list(range(first, last))
    if last > len(options.devices):
        raise ConfigError(f"sglang engine {index}: needs devices {first} to {last - 1} of the list, which names {len(options.devices)}")
    return options.devices[first:last]


def visible_devices(places: list[int], given: str | None) -> str:
    """CUDA_VISIBLE_DEVICES of a server on `places`; `given` is this process's own, None if it has none.

    Raises ConfigError for a place that is not among those.
    """
    if given is None:
        return ",".join(map(str, places))
    pool = [name.strip() for name in given.split(",") if name.strip()]
    if outside := [place for place in places if place >= len(pool)]:
        raise ConfigError(
            f"sglang engine: needs device {outside[0]} of CUDA_VISIBLE_DEVICES ({given}), which names {len(pool)}, counted from 0"
        )
    return ",".join(pool[place] for place in places)


def server_command(python: Path, model: Path, port: int, engine: EngineOptions, options: Options) -> list[str]:
    """The command line of one server. What `server_args` names is taken from there."""
    cpu = device_kind(engine.device) == "cpu"
    flags: dict[str, Any] = {
        "model-path": str(model),
        "host": "127.0.0.1",
        "port": port,
        "device": "cpu" if cpu else "cuda",
        "dtype": engine.dtype,
        "load-format": "dummy",
        "skip-tokenizer-init": True,
        "skip-server-warmup": True,
        "context-length": engine.max_context + SLACK,
        "max-running-requests": engine.slots,
        "attention-backend": options.attention_backend or ("torch_native" if cpu else "triton"),
        "sampling-backend": "pytorch",
        "grammar-backend": "none",
        "stream-interval": options.stream_interval,
        "incremental-streaming-output": True,
        "sleep-on-idle": True,
        "log-level": "warning",
        "tp-size": options.tp,
        "mem-fraction-static": options.memory_fraction or (0.1 if cpu else 0.8),
    }
    if cpu:
        flags |= {
            "disable-cuda-graph": True,
            "disable-overlap-schedule": True,
            "max-total-tokens": engine.slots * (engine.max_context + SLACK) + 4096,
        }
    command = [str(python), "-m", "sglang.launch_server"]
    for name, value in (flags | {key.replace("_", "-").removeprefix("--"): value for key, value in options.server_args.items()}).items():
        if value is True:
            command.append(f"--{name}")
        elif value is not False:
            command += [f"--{name}", str(value)]
    return command


def server_environment(engine: EngineOptions, options: Options) -> dict[str, str]:
    """The environment of one server: ours without what belongs to our interpreter."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    own = {
        "OMP_NUM_THREADS": str(engine.threads),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": visible_devices(
            device_places(options, engine.device, engine.index, joined=engine.joined), os.environ.get("CUDA_VISIBLE_DEVICES")
        ),
        "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    if device_kind(engine.device) == "cpu":
        own |= {"SGLANG_USE_CPU_ENGINE": "1", "TORCHDYNAMO_DISABLE": "1"}
    return inherited | own | options.environment


def write_model_dir(source: Path, target: Path) -> None:
    """The directory that a server starts from; one that is there already is left as it is. Raises DataError for a model without a readable
    config.json, OSError when it cannot be written."""
    try:
        config = json.loads((source / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{source / CONFIG}: not a readable model configuration ({error})") from None
    config["eos_token_id"] = None
    for part in ("text_config", "llm_config"):
        if isinstance(config.get(part), dict):
            config[part]["eos_token_id"] = None
    text = json.dumps(config, indent=1)
    try:
        if (target / CONFIG).read_text() == text:
            return
    except OSError:
        pass
    target.mkdir(parents=True, exist_ok=True)
    aside = target / f".{CONFIG}.{os.getpid()}"
    aside.write_text(text)
    aside.replace(target / CONFIG)


def free_port() -> int:
    """A port of the loopback interface that is free now. Should another program take it first, the server says so and is started again."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """One server at a time. `begin` and `end` may be repeated: each start has its own port and processes."""

    def __init__(self, engine: EngineOptions, options: Options) -> None:
        self._engine, self._options = engine, options
        self.attached = options.url is not None
        self.url = (options.url or "").rstrip("/")
        self._guard: subprocess.Popen[bytes] | None = None
        self._pipe = -1
        self._processes: dict[int, str] = {}
        self._model_dir: Path | None = None
        self._hold: Hold | None = None
        self.log = (engine.log_dir or Path(tempfile.gettempdir())) / f"{engine.name}-server.log"
        if not self.attached:
            self._python = find_python("sglang", device_kind(engine.device), options.python)
            server_environment(engine, options)

    def begin(self) -> None:
        """Start the server; `wait_ready` tells when it answers. Nothing to do for one that runs elsewhere.

        Raises InfrastructureFault when the disk is full.
        """
        if self.attached:
            return
        try:
            if self._model_dir is None:  # beside the log, where the next start of the same actor finds it if this one is killed
                self._hold = None if self._engine.log_dir else Hold.of_new("rlsys-sglang-")
                self._model_dir = self._hold.directory if self._hold else self.log.with_suffix("")
            write_model_dir(self._engine.model_path, self._model_dir)
        except OSError as error:
            raise InfrastructureFault(
                f"{self._model_dir or tempfile.gettempdir()}: the server's model cannot be written ({error})"
            ) from None
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = server_command(self._python, self._model_dir, port, self._engine, self._options)
        reader, self._pipe = os.pipe()
        try:
            self._guard = subprocess.Popen(
                [sys.executable, "-I", "-S", guard.__file__, str(reader), str(GRACE_S), str(self.log), "--", *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(reader, *inherited()),
                process_group=0,
                env=server_environment(self._engine, self._options),
            )
        finally:
            os.close(reader)

    def wait_ready(self, ask: Callable[[str], dict[str, Any]], stopping: Callable[[], bool], *, first: bool = False) -> None:
        """Return once the server answers. `ask(path)` asks it. Raises InfrastructureFault when it ends instead, or is too slow.

        Raises ConfigError for a flag that it does not know, and when nothing answers at the `url` at `first`.
        """
        patience_s = ATTACH_S if self.attached and first else self._options.start_s
        deadline = time.monotonic() + patience_s
        while True:
            if stopping():
                raise InfrastructureFault("the engine was closed while its server started")
            if self._guard is not None and self._guard.poll() is not None:
                error = ConfigError if self._guard.returncode == REFUSED else InfrastructureFault
                raise error(f"the server ended with exit code {self._guard.returncode} while it started: {self.complaint()}")
            try:
                served = ask("/model_info").get("model_path")
                if not self.attached and served != str(self._model_dir):  # it took the port; ours will end
                    raise InfrastructureFault(f"another server, of {served}, answers at {self.url}")
                break
            except InfrastructureFault as fault:
                if time.monotonic() > deadline and self.attached:
                    text = f"no server answers at {self.url} for {patience_s:g} s ({fault})"
                    raise (ConfigError if first else InfrastructureFault)(f"sglang engine: {text}") from None
                if time.monotonic() > deadline:
                    raise InfrastructureFault(
                        f"the server did not answer within {patience_s:g} s of its start ({fault}); {self.tail()}"
                    ) from None
            time.sleep(0.1)
        self._processes = self._members()

    def fault(self) -> str:
        """What is wrong with the server's processes, empty if nothing is. Cheap: reads a few files of /proc."""
        if self._guard is None:
            return ""
        if self._guard.poll() is not None:
            return f"its server ended with exit code {self._guard.returncode}"
        dead = [f"its {name} process ({pid}) died" for pid, name in self._processes.items() if _state(pid) in ("", "Z", "X")]
        return ", ".join(dead)  # all: whichever died first takes the others along

    def stopped(self) -> str:
        """Which of its processes a signal or a debugger stopped, in words; empty if none."""
        return ", ".join(f"its {name} process ({pid}) is stopped" for pid, name in self._processes.items() if _state(pid) in ("T", "t"))

    def cpu_s(self) -> float:
        """Processor seconds of its schedulers so far; negative for a server that runs elsewhere."""
        if self._guard is None:
            return -1.0
        return sum(_cpu_s(pid) for pid, name in self._processes.items() if name == "scheduler")

    def kill(self) -> None:
        """End its processes at once, from any thread: whoever waits for an answer gets an error. `end` is still to be called."""
        for pid in list(self._processes):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def end(self) -> None:
        """End the server and wait until nothing of it is left. One that runs elsewhere is left alone."""
        if self._guard is None:
            return
        if any(_state(pid) == "T" for pid in self._processes):
            self.kill()  # a stopped process does not hear SIGTERM
        os.close(self._pipe)
        self._pipe = -1
        try:
            self._guard.wait(GRACE_S + 10.0)
        except subprocess.TimeoutExpired:
            self.kill()
            self._guard.kill()
            self._guard.wait()
        self._guard = None
        self._processes = {}

    def close(self) -> None:
        """End the server for good and remove what was made for it."""
        self.end()
        if self._model_dir is not None:
            shutil.rmtree(self._model_dir, ignore_errors=True)
            self._model_dir = None
        if self._hold is not None:
            self._hold.release()
            self._hold = None

    @property
    def processes(self) -> dict[int, str]:
        """pid -> name of the server's processes, once it is ready."""
        return dict(self._processes)

    def complaint(self) -> str:
        """The last line of the log that looks like an error, the same each time; without one, the end of the log."""
        found = [line for line in self._last_lines() if _COMPLAINT.match(line)]
        return f"{found[-1][:500]} (see {self.log})" if found else self.tail()

    def _last_lines(self) -> list[str]:
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - 20_000))
                text = file.read().decode("utf-8", "replace")
        except OSError:
            return []
        return [line.strip() for line in text.splitlines() if line.strip()]

    def tail(self, lines: int = 6) -> str:
        """The end of the server's log, in one line for an error."""
        last = self._last_lines()[-lines:]
        return f"the end of {self.log}: {' | '.join(last)}"[:2000] if last else f"it left no log in {self.log}"

    def _members(self) -> dict[int, str]:
        """The server's first process and those that SGLang names its own."""
        if self._guard is None:
            return {}
        parents: dict[int, tuple[int, str]] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    text = (entry / "stat").read_text("utf-8", "replace")  # a name that was cut off may end in half a character
                except OSError:
                    continue
                name = text.partition("(")[2].rpartition(")")[0]
                parents[int(entry.name)] = (int(text.rpartition(")")[2].split()[1]), name)
        found = {pid: "HTTP" for pid, (parent, _) in parents.items() if parent == self._guard.pid}
        reached = set(found)
        while more := {pid for pid, (parent, _) in parents.items() if parent in reached} - reached:
            reached |= more
        for pid in reached - set(found):
            name = parents[pid][1]
            if name.startswith(_OWN_PROCESSES):
                found[pid] = "scheduler" if "schedul" in name else name.removeprefix(_OWN_PROCESSES)
        return found


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; empty when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return []


def _state(pid: int) -> str:
    """A process's state letter, empty when there is none."""
    return (_stat(pid) or [""])[0]


def _cpu_s(pid: int) -> float:
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0
