"""The command line. Every command answers `--help`; bad input ends in one line and exit code 2. Heavy imports happen inside commands."""

from __future__ import annotations

import argparse
import errno
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from protocol.errors import ConfigError, UserError
from rlsys import __version__

DESCRIPTION = """Asynchronous reinforcement learning for language models on tasks that a program can check.

  rlsys check configs/quickstart.yaml     look a configuration over
  rlsys up configs/quickstart.yaml        train, with live progress
  rlsys status RUN                        how a run is doing
"""

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

OF_A_PATH = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR,
)  # fmt: skip
"""Of a file or directory: what the user can mend, so that it is said in a sentence."""


def build_parser() -> argparse.ArgumentParser:
    """Every command and its options."""
    parser = argparse.ArgumentParser(prog="rlsys", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"rlsys {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_starting, _fleets, _looking, _trusting, _models, _machines):
        add(commands)
    return parser


def _starting(commands: Commands) -> None:
    """Begin a run, look at what would begin, end one."""
    up = _command(commands, "up", _up, "start every process of a run and show live progress until it ends")
    _config_arguments(up, optional=True)
    up.add_argument(
        "--resume", type=Path, metavar="RUN", help="instead of CONFIG: go on with a run that ended early; --set may change fleets"
    )
    up.add_argument("--run-dir", type=Path, metavar="DIR", help="where the run's files go (default: runs/NAME-TIME)")
    up.add_argument("--detach", action="store_true", help="run in the background; follow it with `rlsys status` and `rlsys logs`")
    up.add_argument("--launcher", default="local", metavar="NAME", help="local (children on this host) or ray (default local)")
    up.add_argument(
        "--address", default="", metavar="ADDRESS", help="of the Ray cluster: auto, HOST:PORT or ray://HOST:PORT (default auto)"
    )
    up.add_argument(
        "--tensorboard", action="store_true", help="start TensorBoard beside the run on a free port of this host, and end it with it"
    )
    up.add_argument("--plain", action="store_true", help="plain lines instead of a live panel (the default when the output is no terminal)")
    up.add_argument("--json", action="store_true", help="print the figures of the finished run as one JSON object at the end")

    check = _command(commands, "check", _check, "validate configurations without starting anything, and say what would run")
    check.add_argument("config", type=Path, nargs="+", metavar="CONFIG", help="YAML file")
    check.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override a key")
    check.add_argument("--json", action="store_true", help="print the resolved configurations as JSON")

    down = _command(commands, "down", _down, "end a run in order; no process is left")
    down.add_argument("run", type=Path, metavar="RUN", help="run directory")
    down.add_argument(
        "--timeout", type=_seconds, default=20.0, metavar="S", help="seconds until the supervisor itself is killed (default 20)"
    )


def _fleets(commands: Commands) -> None:
    """Change the fleets of a live run."""
    scale = _command(
        commands, "scale", _scale, "change how many processes a fleet of a live run has; those who leave finish what they have"
    )
    scale.add_argument("run", type=Path, metavar="RUN", help="run directory")
    scale.add_argument(
        "sizes",
        nargs="*",
        metavar="FLEET=COUNT",
        help="generators=3, rewarders=8, learner=2 (ranks, at its next commit); none: show the sizes",
    )
    scale.add_argument("--no-wait", action="store_true", help="return once the run has been told, not once it is done")
    scale.add_argument("--timeout", type=_seconds, default=600.0, metavar="S", help="longest wait (default 600)")
    scale.add_argument("--json", action="store_true", help="for machines")

    token = _command(commands, "token", _token, "print the join token of a live run, which lets other hosts add actors to it")
    token.add_argument("run", type=Path, metavar="RUN", help="run directory")
    token.add_argument("--rotate", action="store_true", help="make a new one; those before open nothing any more")
    token.add_argument("--once", action="store_true", help="make one besides that ends with its first use")

    join = _command(
        commands, "join", _join, "add actors on this host to a run of another host, until the run ends or this command is told to"
    )
    join.add_argument(
        "token",
        metavar="TOKEN",
        help="as `rlsys token RUN` prints it; better @FILE, which reads it from a file, or -, from standard input: "
        "what stands on a command line, every user of this host can read while it runs",
    )
    join.add_argument("--role", choices=("generator", "rewarder"), required=True, help="what to add")
    join.add_argument("--count", type=_count, default=1, metavar="N", help="how many (default 1)")
    join.add_argument("--host", default="", metavar="ADDRESS", help="address, interface or name of this host (default: by the route)")
    join.add_argument("--name", default="", help="what the run calls this host (default: its host name)")
    join.add_argument("--model", type=Path, metavar="DIR", help="where the run's model lies on this host (default: as in the run)")
    join.add_argument(
        "--weights", type=Path, metavar="DIR", help="where the run's weights directory lies on this host (default: as in the run)"
    )
    join.add_argument(
        "--devices", default="", metavar="LIST", help="CUDA devices for what is added, such as 0,1,2,3 (default: all of this host)"
    )
    join.add_argument("--dir", type=Path, metavar="DIR", help="keep logs and configuration here (default: a temporary directory)")


def _looking(commands: Commands) -> None:
    """See what a run does and did."""
    status = _command(commands, "status", _status, "how a run is doing: processes, iteration, reward, who waits for whom")
    status.add_argument("run", type=Path, metavar="RUN", help="run directory")
    status.add_argument("--json", action="store_true", help="for machines")

    top = _command(commands, "top", _top, "the live screen of a run: fleets, queues, rates, staleness, reward, events")
    top.add_argument("run", type=Path, metavar="RUN", help="run directory")
    top.add_argument("--once", action="store_true", help="print it a single time (the default when the output is no terminal)")

    why = _command(commands, "why", _why, "who waits for whom at this moment, and who is to blame")
    why.add_argument("run", type=Path, metavar="RUN", help="run directory")
    why.add_argument("--json", action="store_true", help="for machines")

    logs = _command(commands, "logs", _logs, "print the logs of a run")
    logs.add_argument("run", type=Path, metavar="RUN", help="run directory")
    logs.add_argument("role", nargs="?", metavar="ROLE", help="a role or a process, such as learner or generator-1 (default: all)")
    logs.add_argument("-n", "--lines", type=_count, default=40, help="lines from the end of each log (default 40)")
    logs.add_argument("-f", "--follow", action="store_true", help="go on printing what is written")
    logs.add_argument("--merge", action="store_true", help="one view of all processes by time; the next four options imply it")
    logs.add_argument("--since", metavar="TIME", help="only what is newer, such as 90s, 5m, 2h or 1d")
    logs.add_argument("--level", choices=("debug", "info", "warning", "error", "critical"), help="only what is as grave")
    logs.add_argument("--json", action="store_true", help="JSON lines with run, process, iteration and group")

    samples = _command(commands, "samples", _samples, "read what the policy wrote, by iteration, reward, verdict, length or problem")
    samples.add_argument("run", type=Path, metavar="RUN", help="run directory")
    samples.add_argument("--iteration", metavar="K[:L]", help="one iteration, or from K to L")
    samples.add_argument("--reward-min", type=float, metavar="X", help="score of at least X")
    samples.add_argument("--reward-max", type=float, metavar="X", help="score of at most X")
    samples.add_argument("--verdict", action="append", default=[], metavar="NAME", help="such as accepted or time_limit; repeatable")
    samples.add_argument("--length", metavar="N[:M]", help="completions of N to M tokens")
    samples.add_argument("--problem", default="", metavar="TEXT", help="part of the problem's id")
    samples.add_argument("--purpose", choices=("train", "eval"), default="", help="training or held-out samples alone")
    samples.add_argument(
        "--sort", choices=("reward", "length", "time"), default="", help="show the first by this (default: the newest, oldest first)"
    )
    samples.add_argument("--reverse", action="store_true", help="with --sort: the largest first")
    samples.add_argument("-n", "--limit", type=_count, default=10, metavar="N", help="how many (default 10; 0 for all)")
    samples.add_argument("--json", action="store_true", help="JSON lines")

    timeline = _command(commands, "timeline", _timeline, "one trace and one self-contained HTML report of a run, also while it is on")
    timeline.add_argument("run", type=Path, metavar="RUN", help="run directory")
    timeline.add_argument("--out", type=Path, metavar="DIR", help="where trace.json and report.html go (default: the run directory)")
    timeline.add_argument("--json", action="store_true", help="print where they are, and the seconds of each process, as one JSON object")


def _trusting(commands: Commands) -> None:
    """Prove that nothing was lost, and that it would not be."""
    audit = _command(
        commands, "audit", _audit, "whether a run, live or finished, lost anything, did anything twice or trained on what was too stale"
    )
    audit.add_argument("run", type=Path, metavar="RUN", help="run directory")
    audit.add_argument("--json", action="store_true", help="for machines")

    replay = _command(commands, "replay", _replay, "train again from a run's journal and compare every loss and the final weights")
    replay.add_argument("run", type=Path, metavar="RUN", help="run directory")
    replay.add_argument("--from", type=_count, dest="first", metavar="N", help="start at the newest checkpoint up to iteration N")
    replay.add_argument("--until", type=_count, metavar="N", help="stop before iteration N (default: all that is on record)")
    replay.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="what if: another setting on recorded data"
    )
    replay.add_argument("--out", type=Path, metavar="DIR", help="write the replayed model there, as a Hugging Face directory")
    replay.add_argument("--json", action="store_true", help="for machines")

    chaos = _command(commands, "chaos", _chaos, "fault rehearsal: kill, stop, slow or cut off processes of a live run by a seeded plan")
    chaos.add_argument("run", type=Path, metavar="RUN", help="run directory")
    chaos.add_argument("--seed", type=int, default=0, help="of the plan: the same seed hits the same roles (default 0)")
    chaos.add_argument("--kills", type=_count, default=1, metavar="N", help="faults, one after the other (default 1)")
    chaos.add_argument(
        "--roles",
        nargs="+",
        metavar="ROLE",
        default=["dispatcher", "generator", "rewarder", "learner", "dashboard"],
        help="whom to hit (default: all but the supervisor)",
    )
    chaos.add_argument(
        "--mode",
        choices=("kill", "stop", "slow", "partition"),
        default="kill",
        help="SIGKILL; SIGSTOP, found by its silence; stopped nine tenths of 5 s; cut off from all peers (default kill)",
    )
    chaos.add_argument("--pause", type=float, default=2.0, metavar="S", help="mean seconds from recovery to the next fault (default 2)")
    chaos.add_argument("--timeout", type=_seconds, default=120.0, metavar="S", help="longest wait for a recovery (default 120)")
    chaos.add_argument("--json", action="store_true", help="print what was done as one JSON object")


def _models(commands: Commands) -> None:
    """Models before and after a run."""
    sft = _command(commands, "sft", _sft, "fine-tune a model on prompts with completions, or on chats, with the learner's own step")
    _config_arguments(sft)
    sft.add_argument("--out", type=Path, metavar="DIR", help="where the model and its curves go (default: runs/NAME-TIME)")
    sft.add_argument("--check", action="store_true", help="read configuration and data, say what would be trained, and end")
    sft.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    sft.add_argument("--plain", action="store_true", help="plain lines instead of a bar (the default when the output is no terminal)")
    sft.add_argument("--json", action="store_true", help="print the figures as one JSON object at the end")

    export = _command(commands, "export", _export, "write a run's policy as a Hugging Face directory: weights, configuration, tokenizer")
    export.add_argument(
        "source", type=Path, metavar="RUN_OR_CHECKPOINT", help="a run (its newest good checkpoint), a checkpoint, or a model"
    )
    export.add_argument("out", type=Path, metavar="OUT", help="a new directory")
    export.add_argument("--iteration", type=_count, metavar="N", help="the checkpoint after N iterations (default: the newest good one)")
    export.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the tensors (default: as the run publishes)")
    export.add_argument("--model", type=Path, metavar="DIR", help="the model that the run started from, if it has moved")
    export.add_argument("--adapter", action="store_true", help="the adapters alone, as a peft directory (runs with learner.lora)")
    export.add_argument("--json", action="store_true", help="for machines")


def _machines(commands: Commands) -> None:
    """What machines can do and what runs on them without a run."""
    plan = _command(
        commands, "plan", _plan, "size the fleets: which split of the devices, how long an iteration takes, what waits for what"
    )
    _config_arguments(plan)
    plan.add_argument("--devices", type=int, metavar="N", help="devices in all (default: as configured)")
    plan.add_argument(
        "--figures", type=Path, metavar="FILE", help="figures of the devices as YAML; see docs/plan.md and benchmarks/profiles"
    )
    plan.add_argument(
        "--measure", action="store_true", help="take the figures on this machine with the configured engine, learner and reward"
    )
    plan.add_argument("--save-figures", type=Path, metavar="FILE", help="write the figures that were used")
    plan.add_argument("--device-memory", type=float, metavar="GB", help="memory of one device, to see whether generators and learners fit")
    plan.add_argument("--html", type=Path, metavar="FILE", help="write a page with a picture of what each device would do")
    plan.add_argument("--json", action="store_true", help="for machines")

    grade = _command(
        commands, "grade", _grade, "score submissions with a reward, isolated as in training: the sandbox as a command of its own"
    )
    grade.add_argument(
        "problems", type=Path, metavar="PROBLEMS", help="JSON lines or a JSON list (.gz too) in any layout that the reward knows"
    )
    grade.add_argument("submissions", type=Path, metavar="SUBMISSIONS", help="JSON lines: id of the problem, and the text as `completion`")
    grade.add_argument(
        "--reward", default="unit_tests", metavar="NAME", help="a name of actors/rewards, or package.module:Class (default unit_tests)"
    )
    grade.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="an option of the reward, such as score=soft; repeatable"
    )
    grade.add_argument("--jobs", type=_at_once, metavar="N", help="submissions at once (default: one per core)")
    grade.add_argument("--out", type=Path, metavar="FILE", help="write each submission's verdict as JSON lines")
    grade.add_argument("--json", action="store_true", help="print summary and verdicts as one JSON object")

    text = "the sandbox, without a run"
    sandbox = commands.add_parser("sandbox", help=text, description=f"{text[0].upper()}{text[1:]}.")
    of_sandbox = sandbox.add_subparsers(title="commands", metavar="COMMAND", required=True)
    serve = _command(of_sandbox, "serve", _sandbox_serve, "judge programs for others over HTTP, authenticated, until SIGTERM")
    serve.add_argument("--listen", default="127.0.0.1:8390", metavar="HOST:PORT", help="default: 127.0.0.1:8390; port 0: any that is free")
    serve.add_argument(
        "--token-file", type=Path, required=True, metavar="FILE", help="holds the token that clients must send; made if there is none"
    )
    serve.add_argument(
        "--cells", type=_at_once, metavar="N", help=f"programs that run at once, at most {MOST_AT_ONCE} (default: one per core)"
    )
    serve.add_argument("--queue", type=_count, default=1024, metavar="N", help="requests that may wait besides (default 1024)")
    serve.add_argument(
        "--deadline", type=_seconds, default=120.0, metavar="S", help="longest time until an answer, in seconds (default 120)"
    )
    serve.add_argument("--body-mb", type=_seconds, default=64.0, metavar="MB", help="largest request (default 64)")
    serve.add_argument(
        "--memory-mb", type=_seconds, default=4096.0, metavar="MB", help="most memory that a program may ask for (default 4096)"
    )
    serve.add_argument(
        "--grace", type=_seconds, default=10.0, metavar="S", help="after SIGTERM: how long what is judged may take (default 10)"
    )
    serve.add_argument("--certificate", type=Path, metavar="FILE", help="PEM: serve HTTPS")
    serve.add_argument("--key", type=Path, metavar="FILE", help="PEM, if the key is not in the certificate's file")
    serve.add_argument("--json", action="store_true", help="print one JSON object with the address when it listens")

    text = "environments of engines that run in an interpreter of their own"
    engines = commands.add_parser("engines", help=text, description=f"{text[0].upper()}{text[1:]}.")
    of_engines = engines.add_subparsers(title="commands", metavar="COMMAND", required=True)
    install = _command(of_engines, "install", _engines_install, "build the environment of an engine's server, or find it complete")
    install.add_argument("engine", metavar="ENGINE", help="sglang")
    install.add_argument("--device", default="cpu", metavar="DEVICE", help="what the server shall run on: cpu or cuda (default cpu)")
    install.add_argument(
        "--dir", type=Path, metavar="DIR", help="where to (default: ~/.cache/rlsys/engines/ENGINE-DEVICE, found by itself)"
    )
    install.add_argument("--dry-run", action="store_true", help="say what would be downloaded and do nothing")
    install.add_argument("--json", action="store_true", help="print one JSON object at the end")

    doctor = _command(commands, "doctor", _doctor, "what this machine can do: cores, memory, isolation of model-written code, devices")
    doctor.add_argument("--json", action="store_true", help="for machines")


def _command(commands: Commands, name: str, call: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(call=call)
    return parser


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no number")
    return int(text)


MOST_AT_ONCE = 4096
"""Programs that one sandbox runs side by side, each in a process of its own: more is a slip of the keyboard."""


def _at_once(text: str) -> int:
    if not (text.isdecimal() and len(text) <= len(str(MOST_AT_ONCE)) and 1 <= int(text) <= MOST_AT_ONCE):
        raise argparse.ArgumentTypeError(f"{text[:20]!r}: expected a whole number from 1 to {MOST_AT_ONCE}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return value


def _config_arguments(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    parser.add_argument("config", type=Path, nargs="?" if optional else None, metavar="CONFIG", help="YAML file; see configs/")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override a key, such as generators.count=2; repeatable",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if len(given) == 2 and given[0] == "run":  # how the supervisor starts its children; no command for people
        from rlsys.roles import run_role

        return run_role(given[1])
    if len(given) == 3 and given[0] == "replay-rank":  # how `rlsys replay` starts its other ranks
        from learner.replay import replay_rank

        return replay_rank(given[1], int(given[2]))
    parser = build_parser()
    if not given:
        parser.print_help()
        return 2
    options = parser.parse_args(given)
    try:
        code: int = options.call(options)
        return code
    except UserError as error:
        print(f"rlsys: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in OF_A_PATH:
            raise
        name = str(error.filename or "a file")
        print(f"rlsys: {name if len(name) < 200 else name[:200] + '...'}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("rlsys: interrupted", file=sys.stderr)
        return 130


def _check(options: argparse.Namespace) -> int:
    from rlsys.commands import check

    return check(options.config, options.overrides, as_json=options.json)


def _up(options: argparse.Namespace) -> int:
    from rlsys.commands import resume, up

    if (options.config is None) == (options.resume is None):
        raise ConfigError("give either CONFIG or --resume RUN")
    if options.resume is not None:
        if options.run_dir is not None:
            raise ConfigError("--resume RUN names the run directory: leave --run-dir out")
        return resume(
            options.resume,
            options.overrides,
            detach=options.detach,
            plain=options.plain or None,
            as_json=options.json,
            tensorboard=options.tensorboard,
            launcher=(options.launcher, options.address),
        )
    return up(
        options.config,
        options.overrides,
        options.run_dir,
        detach=options.detach,
        plain=options.plain or None,
        as_json=options.json,
        tensorboard=options.tensorboard,
        launcher=(options.launcher, options.address),
    )


def _plan(options: argparse.Namespace) -> int:
    from rlsys.planning.command import plan

    return plan(
        options.config,
        options.overrides,
        devices=options.devices,
        figures_file=options.figures,
        measure=options.measure,
        write_figures=options.save_figures,
        device_memory_gb=options.device_memory,
        html=options.html,
        as_json=options.json,
    )


def _grade(options: argparse.Namespace) -> int:
    from rlsys.grade import grade

    return grade(
        options.problems,
        options.submissions,
        reward=options.reward,
        options=options.option,
        jobs=options.jobs,
        as_json=options.json,
        out=options.out,
    )


def _sft(options: argparse.Namespace) -> int:
    from rlsys.sft.command import sft

    if options.resume and options.out is None:
        raise UserError("--resume needs --out: the directory of the fine-tuning to go on with")
    return sft(
        options.config,
        options.overrides,
        options.out,
        check=options.check,
        resume=options.resume,
        plain=options.plain,
        as_json=options.json,
    )


def _export(options: argparse.Namespace) -> int:
    from rlsys.export import export

    return export(
        options.source,
        options.out,
        model=options.model,
        iteration=options.iteration,
        dtype=options.dtype,
        adapter=options.adapter,
        as_json=options.json,
    )


def _doctor(options: argparse.Namespace) -> int:
    from rlsys.doctor import doctor

    return doctor(as_json=options.json)


def _sandbox_serve(options: argparse.Namespace) -> int:
    from rlsys.sandbox_service.command import serve

    return serve(
        options.listen,
        options.token_file,
        cells=options.cells,
        queue=options.queue,
        deadline_s=options.deadline,
        body_mb=options.body_mb,
        memory_mb=options.memory_mb,
        grace_s=options.grace,
        certificate=options.certificate,
        key=options.key,
        as_json=options.json,
    )


def _engines_install(options: argparse.Namespace) -> int:
    from rlsys.engines import install

    return install(options.engine, options.device, options.dir, as_json=options.json, dry_run=options.dry_run)


def _status(options: argparse.Namespace) -> int:
    from rlsys.commands import status

    return status(options.run, as_json=options.json)


def _scale(options: argparse.Namespace) -> int:
    from rlsys.scale import scale

    return scale(options.run, options.sizes, wait_s=0.0 if options.no_wait else options.timeout, as_json=options.json)


def _token(options: argparse.Namespace) -> int:
    from rlsys.join import token

    return token(options.run, rotate=options.rotate, once=options.once)


def _join(options: argparse.Namespace) -> int:
    from rlsys.join import join

    return join(
        options.token,
        role=options.role,
        count=options.count,
        host=options.host,
        name=options.name,
        model=options.model,
        weights=options.weights,
        directory=options.dir,
        devices=options.devices,
    )


def _why(options: argparse.Namespace) -> int:
    from rlsys.why import why

    return why(options.run, as_json=options.json)


def _timeline(options: argparse.Namespace) -> int:
    from rlsys.timeline import timeline

    return timeline(options.run, options.out, as_json=options.json)


def _audit(options: argparse.Namespace) -> int:
    from rlsys.commands import audit

    return audit(options.run, as_json=options.json)


def _replay(options: argparse.Namespace) -> int:
    from rlsys.replay import replay

    return replay(options.run, options.overrides, options.first, options.until, options.out, as_json=options.json)


def _chaos(options: argparse.Namespace) -> int:
    from rlsys.commands import chaos

    return chaos(
        options.run,
        seed=options.seed,
        kills=options.kills,
        roles=options.roles,
        mode=options.mode,
        pause_s=options.pause,
        timeout_s=options.timeout,
        as_json=options.json,
    )


def _down(options: argparse.Namespace) -> int:
    from rlsys.commands import down

    return down(options.run, options.timeout)


def _logs(options: argparse.Namespace) -> int:
    from rlsys.commands import logs

    if options.merge or options.since or options.level or options.json:
        from rlsys.logs import show_merged

        return show_merged(options.run, options.role, options.since, options.level or "debug", as_json=options.json)
    return logs(options.run, options.role, options.lines, follow=options.follow)


def _samples(options: argparse.Namespace) -> int:
    from rlsys.browse import interval_of, reward_of, samples
    from rlsys.samples import Filter

    chosen = Filter(
        iteration=interval_of(options.iteration, "iteration"),
        reward=reward_of(options.reward_min, options.reward_max),
        verdicts=tuple(options.verdict),
        tokens=interval_of(options.length, "length"),
        problem=options.problem,
        purpose=options.purpose,
    )
    return samples(options.run, chosen, limit=options.limit, sort=options.sort, reverse=options.reverse, as_json=options.json)


def _top(options: argparse.Namespace) -> int:
    from rlsys.top import top

    return top(options.run, sys.stdout, once=options.once)
