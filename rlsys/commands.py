"""What the commands do, behind rlsys/cli.py."""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from protocol.errors import ConfigError, UserError
from protocol.registry import check_name, resolve
from rlsys.config import RunConfig, load_config
from rlsys.launchers import LAUNCHERS, Launcher
from rlsys.prepare import check_builtin, check_files, check_plugins, prepare, uses_builtin
from rlsys.rundir import RunDir, check_room, choose_weights_dir, default_run_dir, holder, read_json, read_status
from rlsys.topology import describe

if TYPE_CHECKING:
    from protocol.messages import Event
    from rlsys.progress import Progress
    from rlsys.supervisor import Supervisor

log = logging.getLogger("rlsys.supervisor")


def check(paths: Sequence[Path], overrides: Sequence[str], *, as_json: bool) -> int:
    """Validate each file; every fault of every file is printed."""
    faults, resolved = 0, []
    for path in paths:
        try:
            config = load_config(path, overrides)
            check_builtin(config)
            missing = check_plugins(config)
            check_files(config)
        except UserError as error:
            faults += 1
            named = len(paths) == 1 or str(path) in str(error)
            print("\n".join(f"rlsys: {line}" if named else f"rlsys: {path}: {line}" for line in str(error).splitlines()), file=sys.stderr)
            continue
        resolved.append({"file": str(path), "config": config.model_dump(mode="json"), "missing": missing})
        if not as_json:
            note = "  (what is built in is made on first use)" if uses_builtin(config) else ""
            print(f"{path}: ok{note}")
            print("\n".join(f"  {line}" for line in [*describe(config), *(f"missing     {text}" for text in missing)]))
    if as_json:
        print(json.dumps(resolved, indent=1))
    return 2 if faults else 0


def up(
    path: Path,
    overrides: Sequence[str],
    run_dir: Path | None,
    *,
    detach: bool,
    plain: bool | None,
    as_json: bool,
    tensorboard: bool = False,
    launcher: tuple[str, str] = ("local", ""),
) -> int:
    """Start a run and stay with it until it ends."""
    config = load_config(path, overrides)
    _check_launcher(*launcher)
    started = time.time()

    def say(text: str) -> None:
        print(f"{time.time() - started:6.1f} s  {text}", file=sys.stderr if as_json else sys.stdout, flush=True)

    directory = RunDir(run_dir or default_run_dir(config))
    directory.check_free()
    signal.signal(signal.SIGTERM, _leave)
    prepared = prepare(config, say)
    config = prepared.config
    check_room(choose_weights_dir(config, directory.path, "0" * 16), config)
    if detach:
        return _detached(config, directory, tensorboard=tensorboard, launcher=launcher)
    place = _launch_with(*launcher)
    config = place.adapt(config)
    directory.claim(config)
    return _supervise(config, directory, place, plain=plain, as_json=as_json, base_model_s=prepared.base_model_s, tensorboard=tensorboard)


def _check_launcher(name: str, address: str) -> None:
    check_name(name, LAUNCHERS, "launcher")
    if name == "local" and address:
        _launch_with(name, address)  # says why not


def _launch_with(name: str, address: str) -> Launcher:
    """The launcher of that name. Connects to what it needs; raises ConfigError when that is not there."""
    launcher: Launcher = resolve(name, LAUNCHERS, "launcher")(address)
    return launcher


def resume(
    run: Path,
    overrides: Sequence[str],
    *,
    detach: bool,
    plain: bool | None,
    as_json: bool,
    tensorboard: bool = False,
    launcher: tuple[str, str] = ("local", ""),
) -> int:
    """Go on with a run whose supervisor is gone, or that was ended before its last iteration."""
    from rlsys.resume import is_done, resumed_config

    config = resumed_config(run, overrides)
    _check_launcher(*launcher)
    if is_done(run, config):
        print(f"{run}: every iteration is done; raise iterations to go on", file=sys.stderr)
        return 0
    directory = RunDir(run)
    if detach:
        return _detached(config, directory, tensorboard=tensorboard, resume=True, launcher=launcher)
    place = _launch_with(*launcher)
    config = place.adapt(config)
    directory.claim(config, resume=True)
    return _supervise(config, directory, place, plain=plain, as_json=as_json, base_model_s=0.0, tensorboard=tensorboard, resume=True)


def _leave(*_: object) -> None:
    """SIGTERM before anything was started: what is being made is cleaned up on the way out."""
    raise SystemExit(143)


def _supervise(
    config: RunConfig,
    directory: RunDir,
    launcher: Launcher,
    *,
    plain: bool | None,
    as_json: bool,
    base_model_s: float,
    tensorboard: bool = False,
    resume: bool = False,
) -> int:
    from rlsys.board import Board
    from rlsys.chronicle import chronicle
    from rlsys.progress import Progress
    from rlsys.report import lines, summarise
    from rlsys.supervisor import Phase, Supervisor

    out = sys.stderr if as_json else sys.stdout
    supervisor = Supervisor(config, directory, resume=resume, launcher=launcher)
    supervisor.view.phases.append(Phase("model and data", base_model_s, base_model_s))
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: supervisor.stop("stopped", "told to stop"))
    signal.signal(signal.SIGINT, lambda *_: supervisor.stop("interrupted", "interrupted by the user"))
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(supervisor.view, out, plain=plain))
        progress.say(f"run {directory.path}")
        record = stack.enter_context(
            chronicle(
                directory.path, config.observe.log_mb, lambda: (supervisor.view.run_id, supervisor.view.snapshot.get("iteration", -1))
            )
        )

        def on_event(event: Event) -> None:
            progress.event(event)
            record(event)

        supervisor.on_event, supervisor.on_tick = on_event, progress.tick
        if tensorboard:
            stack.enter_context(Board(directory.path / "tensorboard", lambda address: _show_board(supervisor, progress, address)))
        try:
            ending = supervisor.run()
        except UserError:
            if not resume and not supervisor.view.processes:  # nothing was started: what is wrong can be mended, and the same run begun
                stack.callback(directory.abandon)
            raise
        log.log(logging.ERROR if ending.outcome == "failed" else logging.INFO, "the run ended: %s, %s", ending.outcome, ending.reason)
    if ending.outcome == "failed":
        print(f"rlsys: the run failed: {ending.reason}", file=sys.stderr)
        if ending.role and not ending.user_error:
            print("\n".join(f"  {ending.role} | {line}" for line in supervisor.tail(ending.role)), file=sys.stderr)
        print(f"rlsys: logs are in {directory.logs}", file=sys.stderr)
    elif ending.outcome != "done":
        print(f"rlsys: the run ended early: {ending.reason}", file=sys.stderr)
    figures = summarise(directory.path)
    print("\n".join(lines(directory.path, figures)), file=out)
    if as_json:
        ended = {"reason": ending.reason, "role": ending.role, "exit_code": ending.exit_code, "run_dir": str(directory.path)}
        print(json.dumps({**figures, **ended}))
    return ending.exit_code


def _show_board(supervisor: Supervisor, progress: Progress, address: str) -> None:
    supervisor.view.tensorboard = address
    progress.note(f"TensorBoard at {address} (ends with the run)")


def _detached(config: RunConfig, directory: RunDir, *, tensorboard: bool, launcher: tuple[str, str], resume: bool = False) -> int:
    """Leave a supervisor behind in a session of its own; return once it holds the run directory."""
    directory.make()
    log = directory.logs / "supervisor.log"
    claimed, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(claimed)
        os.setsid()
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        null = os.open(os.devnull, os.O_RDONLY)
        for target, source in ((0, null), (1, fd), (2, fd)):
            os.dup2(source, target)
        try:
            place = _launch_with(*launcher)
            config = place.adapt(config)
            directory.claim(config, resume=resume)
            os.write(tell, b"!")
            os.close(tell)
            code = _supervise(config, directory, place, plain=True, as_json=False, base_model_s=0.0, tensorboard=tensorboard, resume=resume)
        except BaseException as error:
            print(f"rlsys: {error}", file=sys.stderr)
            code = 1
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(code)
    os.close(tell)
    with os.fdopen(claimed, "rb") as end:  # ends without a word when the child does
        if not select.select([end], [], [], CLAIM_S)[0] or not end.read(1):
            raise ConfigError(f"the run did not start; see {log}")
    print(directory.path, flush=True)
    if tensorboard:
        print(board_of(directory.path, child), file=sys.stderr)
    return 0


def board_of(run: Path, supervisor: int) -> str:
    """Where the TensorBoard of a run is, once it has started; on standard error, because the output is the run directory alone."""
    deadline = time.monotonic() + BOARD_S
    while time.monotonic() < deadline and holder(run) == supervisor:
        if address := (read_json(run / "status.json") or {}).get("tensorboard"):
            return f"TensorBoard at {address} (ends with the run)"
        time.sleep(0.1)
    return f"TensorBoard has not answered yet; `rlsys status {run}` names its address once it does"


CLAIM_S = 120.0
"""How long `up --detach` waits for the supervisor to hold the run directory: milliseconds, or as long as a Ray cluster takes to answer."""
BOARD_S = 60.0
"""How long `up --detach --tensorboard` waits for the address. TensorBoard takes seconds to start, more on a busy machine."""
SILENT_S = 30.0
"""The supervisor writes status.json every second; so long without it means that it hangs."""


def status(run: Path, *, as_json: bool) -> int:
    """What the supervisor last wrote, and whether it still lives."""
    content = read_status(run)
    ended = read_json(run / "exit.json")
    if ended is not None:
        content["state"], content["ending"] = ended.get("outcome", "unknown"), ended
    elif holder(run) is None:
        content["state"] = "dead"
    silent_s = time.time() - content["time_s"]
    hung = content["state"] == "running" and silent_s > SILENT_S
    if as_json:
        print(json.dumps({**content, "supervisor_silent_s": round(silent_s, 1)}, indent=1))
        return 0
    print(f"{content['run_dir']}: {content['state']}" + (f" ({ended['reason']})" if ended and ended.get("reason") else ""))
    if content["state"] == "dead":
        print("  the supervisor is gone without an exit.json; its processes ended with it")
    if hung:
        print(f"  the supervisor (pid {content['pid']}) has been silent for {silent_s:.0f} s: nobody watches or replaces the others")
    if content.get("restarts"):
        newest = content["restarts"][-1]["how"]
        print(f"  {len(content['restarts'])} restarts, the newest: {newest}")
    last = content.get("last") or {}
    if last:
        print(
            f"  iteration {content['iteration']}/{content['iterations']}  reward {last['reward/mean']:.3f}  staleness {last['staleness/mean']:.2f}"
        )
    for name, address in (("TensorBoard", content.get("tensorboard")), ("Prometheus", content.get("prometheus"))):
        if address:
            print(f"  {name} at {address}")
    for result in content.get("evaluations", []):
        print(f"  held-out pass@1 {result['pass_at_1']:.3f} at v{result['version']} ({result['problems']} problems)")
    for line in fleet_lines(content.get("fleets", {})):
        print(f"  {line}")
    for process in content["processes"]:
        about = ": ".join(filter(None, (process["peer"], process["detail"])))
        at = f" on {process['host']}" if process.get("host") else ""
        doing = (
            f"{process['doing']} for {process['for_s']:.1f} s{f' ({about})' if about else ''}{'; leaves' if process.get('leaving') else ''}"
        )
        print(f"  {process['name']:<14} pid {process['pid']:<8}{at} {doing}")
    return 0


def fleet_lines(fleets: Mapping[str, Mapping[str, int]]) -> list[str]:
    """One line for each fleet that is not as large as it shall be, or has members on other hosts. From status.json."""
    lines = []
    for fleet, size in fleets.items():
        parts = [f"{size['count']} of {size['wanted']}"] if size["count"] != size["wanted"] else []
        parts += [f"{size['leaving']} leave"] if size["leaving"] else []
        parts += [f"{size['joined']} joined"] if size["joined"] else []
        lines += [f"{fleet}: {', '.join(parts)}"] if parts else []
    return lines


def audit(run: Path, *, as_json: bool) -> int:
    """What was lost, done twice or too stale; 1 when anything was."""
    from rlsys.audit import audit_run, lines

    result = audit_run(run)
    print(json.dumps(result, indent=1) if as_json else "\n".join(lines(result)))
    return 0 if result["sound"] else 1


def chaos(run: Path, *, seed: int, kills: int, roles: Sequence[str], mode: str, pause_s: float, timeout_s: float, as_json: bool) -> int:
    """Fault rehearsal on a live run; 0 when every fault of the plan was done."""
    from rlsys.chaos import chaos as rehearse

    def say(text: str) -> None:
        print(text, file=sys.stderr if as_json else sys.stdout, flush=True)

    result = rehearse(run, seed=seed, kills=kills, roles=roles, mode=mode, mean_pause_s=pause_s, timeout_s=timeout_s, say=say)
    if as_json:
        print(json.dumps(result))
    else:
        times = sorted(hit["useful_after_s"] for hit in result["hits"] if hit["useful_after_s"] is not None)
        middle = f"; at work again after {times[len(times) // 2]:.1f} s (median)" if times else ""
        print(f"{len(result['hits'])} of {kills} faults done{middle}; look with `rlsys audit {run}`")
    return 0 if len(result["hits"]) == kills else 1


def down(run: Path, timeout_s: float) -> int:
    """Ask the supervisor to end the run; kill it if it does not (its children end with it)."""
    if read_json(run / "status.json") is None and not (run / "config.yaml").exists():
        raise ConfigError(f"{run}: holds no run")
    pid = holder(run)
    if pid is None:
        print(f"{run}: not running")
        return 0
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + timeout_s
    while holder(run) is not None:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            print(
                f"rlsys: the supervisor {pid} did not end within {timeout_s:g} s and was killed; its processes end with it", file=sys.stderr
            )
            return 1
        time.sleep(0.05)
    print(f"{run}: ended")
    return 0


def logs(run: Path, role: str | None, num_lines: int, *, follow: bool) -> int:
    """Print logs, each line with its process in front when there are several."""
    directory = run / "logs"
    if not directory.is_dir():
        raise ConfigError(f"{run}: holds no run")
    found = sorted(p for p in directory.glob("*.log") if role is None or p.stem == role or p.stem.rpartition("-")[0] == role)
    if not found:
        known = ", ".join(sorted(p.stem for p in directory.glob("*.log"))) or "none"
        raise ConfigError(f"{run}: no log of {role or 'any process'}; there are: {known}")
    offsets = {}
    for path in found:
        text = path.read_text(errors="replace")
        offsets[path] = len(text.encode())
        for line in text.splitlines()[len(text.splitlines()) - num_lines if num_lines < len(text.splitlines()) else 0 :]:
            print(f"{path.stem} | {line}" if len(found) > 1 else line)
    try:
        while follow and holder(run) is not None:
            time.sleep(0.3)
            for path in found:
                with path.open("rb") as file:
                    file.seek(offsets[path])
                    data = file.read()
                offsets[path] += len(data)
                for line in data.decode("utf-8", "replace").splitlines():
                    print(f"{path.stem} | {line}" if len(found) > 1 else line, flush=True)
    except KeyboardInterrupt:
        pass
    return 0
