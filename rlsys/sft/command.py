"""`rlsys sft`: rank 0 of a fine-tuning, its progress, and the other ranks as children."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from protocol.errors import ConfigError, DataError, DeadlineExceeded
from rlsys.config import BUILTIN
from rlsys.prepare import QUICKSTART, check_adapters, check_optimizer
from rlsys.rundir import write_atomically
from rlsys.sft.config import SftConfig, dump_sft_config, load_sft_config

END_S = 120.0
"""From the last step to the end of the other ranks."""
PLAIN_S = 5.0
"""Without a terminal a line at least this often."""


def sft(path: Path, overrides: Sequence[str], out: Path | None, *, check: bool, resume: bool, plain: bool, as_json: bool) -> int:
    """Fine-tune as the configuration says; or only look it over, with the data."""
    from rlsys.sft.examples import num_steps

    config = load_sft_config(path, overrides)
    stream = sys.stderr if as_json else sys.stdout
    config = _with_model(config, stream)
    check_files(config)
    out = out or Path("runs") / f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if not check:
        _claim(out, config, resume=resume)
    from rlsys.sft.training import read_material

    material = read_material(config)
    train, held_out = material.train, material.held_out
    steps = num_steps(config, len(train.samples))
    about = {
        "samples": len(train.samples), "learned_tokens": train.num_learned, "too_long": len(train.too_long),
        "held_out": len(held_out.samples) if held_out else 0, "steps": steps, "out": str(out),
    }  # fmt: skip
    print(
        f"{about['samples']} samples, {about['learned_tokens']:,} tokens to learn, {about['held_out']} held out, {steps} steps", file=stream
    )
    for left, name in ((train.too_long, config.data.train), (held_out.too_long if held_out else [], config.data.eval)):
        if left:
            print(f"{len(left)} samples of {name} are longer than the context and left out: {'; '.join(left[:3])} ...", file=stream)
    if check:
        if as_json:
            print(json.dumps(about))
        return 0
    with _Progress(out, steps, stream, bar=not plain and stream.isatty()) as progress:
        _train(config, material, out, progress, resume=resume)
    final = {**about, **{name.replace("/", "_"): value for name, value in progress.last.items()}, "final_model": str(out / "final_model")}
    print(f"final model      {final['final_model']}", file=stream)
    if as_json:
        print(json.dumps({name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in final.items()}))
    return 0


def _with_model(config: SftConfig, stream: TextIO) -> SftConfig:
    """The same with a built-in model made, or found in the cache."""
    path = str(config.model.path)
    if not path.startswith(BUILTIN):
        return config
    if path != QUICKSTART:
        raise ConfigError(f"model.path is {path}: the only built-in is {QUICKSTART}")
    from rlsys.quickstart.base_model import ensure_base_model

    base = ensure_base_model(lambda line: print(line, file=stream, flush=True))
    return config.model_copy(update={"model": config.model.model_copy(update={"path": base.path})})


def check_files(config: SftConfig) -> None:
    """Raise UserError for what is not there, before anything heavy is imported or made."""
    model = config.model.path
    if not model.is_dir() or not any(model.glob("*.safetensors")):
        raise DataError(f"model.path is {model}: expected a Hugging Face directory with *.safetensors weights")
    check_optimizer(config.learner.optimizer.name)
    check_adapters(config.learner.lora, model)
    for key, path in (("data.train", config.data.train), ("data.eval", config.data.eval)):
        if path is not None and not path.exists():
            raise DataError(f"{key} is {path}: no such file or directory")


def _claim(out: Path, config: SftConfig, *, resume: bool) -> None:
    """Make the output directory; or check that what is resumed is the same training."""
    kept = out / "config.yaml"
    if resume:
        if not kept.is_file():
            raise ConfigError(f"{out}: holds no fine-tuning to resume")
        if kept.read_text(encoding="utf-8") != dump_sft_config(config):
            raise ConfigError(f"{kept} differs from the configuration given: resume with the same one, or choose another --out")
        return
    try:
        if out.exists() and any(out.iterdir()):
            raise ConfigError(f"{out} is not empty; choose another --out, or give --resume")
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, dump_sft_config(config))
    except OSError as error:
        raise ConfigError(f"{out}: cannot be made ({error.strerror})") from None


def _train(config: SftConfig, material: Any, out: Path, progress: _Progress, *, resume: bool) -> None:
    from learner.parallel import SingleProcess, join, open_store
    from learner.step import pick_device
    from rlsys.sft.rank import HOST
    from rlsys.sft.training import fine_tune

    settings = config.learner
    if settings.ranks == 1:
        fine_tune(config, material, out, SingleProcess(), progress, resume=resume)
        return
    store = open_store(HOST, settings.ranks, settings.collective_timeout_s)
    with _other_ranks(out, settings.ranks, store.port, resume=resume):
        group = join(store, 0, settings.ranks, device=pick_device(settings.device, 0), timeout_s=settings.collective_timeout_s)
        fine_tune(config, material, out, group, progress, resume=resume)
        group.close()


@contextmanager
def _other_ranks(out: Path, ranks: int, port: int, *, resume: bool) -> Iterator[None]:
    """Processes of the other ranks, each with a log in `out`/logs; ended at the latest here."""
    logs = out / "logs"
    logs.mkdir(exist_ok=True)
    children: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(1, ranks):
            command = [sys.executable, "-P", "-m", "rlsys.sft.rank", str(out), str(rank), str(port), *(["resume"] if resume else [])]
            with (logs / f"rank-{rank}.log").open("ab") as log:
                children.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
        yield
        for rank, child in enumerate(children, 1):
            try:
                child.wait(timeout=END_S)
            except subprocess.TimeoutExpired:
                raise DeadlineExceeded(f"rank {rank} (pid {child.pid}) had not ended {END_S:g} s after the last step; see {logs}") from None
    finally:
        for child in children:
            child.kill()
            child.wait()


class _Progress:
    """Writes metrics.jsonl and the curves, and shows a bar on a terminal, lines elsewhere."""

    def __init__(self, out: Path, steps: int, stream: TextIO, *, bar: bool) -> None:
        from rlsys.loggers.tensorboard import curves

        self._metrics = (out / "metrics.jsonl").open("a", buffering=1, encoding="utf-8")
        self._board = curves(out / "tensorboard")
        self._steps, self._stream = steps, stream
        self._started_s = self._shown_s = time.monotonic()
        self._first: int | None = None
        self.last: dict[str, float] = {}
        self._bar: Any = None
        if bar:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(file=stream))
            self._task = self._bar.add_task("training", total=steps)
            self._bar.start()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()
        self._metrics.close()
        self._board.close()

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """One step's values, or those of an evaluation."""
        now = time.monotonic()
        self.last |= values
        record = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._metrics.write(json.dumps({"step": step, "time_s": time.time(), **record}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step=step)
        self._board.flush()
        if self._first is None:
            self._first, self._started_s = step, now
        if "eval/loss" in values:
            self._say(f"step {step} of {self._steps}  held-out loss {values['eval/loss']:.4f}")
        elif self._bar:
            self._bar.update(self._task, completed=step, description=f"loss {values['train/loss']:.4f}")
        elif now - self._shown_s >= PLAIN_S or step == self._steps:
            self._shown_s = now
            done = step - self._first
            left = f"  about {(now - self._started_s) / done * (self._steps - step):.0f} s left" if done else ""
            rate = f"{values['train/tokens_per_s']:,.0f} tok/s"
            self._say(f"step {step} of {self._steps}  loss {values['train/loss']:.4f}  lr {values['train/lr']:.2e}  {rate}{left}")

    def _say(self, line: str) -> None:
        if self._bar:
            self._bar.console.print(line)
        else:
            print(line, file=self._stream, flush=True)
