"""`rlsys plan`: what it recommends, what it refuses, and figures that it takes itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from actors.rewards import Sample, Score
from actors.settings import ScheduleSettings
from learner.lora import adapter_tensors, add_adapters
from learner.settings import LoraSettings
from protocol.errors import DataError, InfrastructureFault
from protocol.holds import SHM
from rlsys.cli import main
from rlsys.config import load_config
from rlsys.planning.command import _machine
from rlsys.planning.figures import Figures, read_figures
from rlsys.planning.limits import Split
from rlsys.planning.measure import RewardRates, _others, _problems, fit_steps, reward_rates
from rlsys.planning.plan import Machine, faults, make_plan
from rlsys.planning.room import ModelSize, needed, read_model
from rlsys.planning.simulate import steady
from rlsys.published import adapter_parameters, count_parameters, read_shapes, version_bytes
from tests.actors.tiny_models import build, save
from tests.configuration import minimal, write
from tests.system.rewards import LengthReward

ROOT = Path(__file__).parent.parent.parent
SIMULATED = ROOT / "configs" / "simulated.yaml"
SMALL = ["--set", "sampling.groups_per_iteration=8"]
PROFILES = sorted((ROOT / "benchmarks" / "profiles").glob("*.yaml"))


def started_by(pid: int) -> set[int]:
    """Every process under `pid` now."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found, new = set[int](), {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return found


def figures(**changes: Any) -> Figures:
    """Sampling one iteration takes 120 device-seconds, training on it 60."""
    content: dict[str, Any] = {
        "devices": 6,
        "groups_per_iteration": 30,
        "group_size": 4,
        "lengths": {"mean": 100, "sigma": 0},
        "sampling": {"tokens_per_s_sample": 10, "tokens_per_s": 100, "slots": 10},
        "training": {"tokens_per_s": 200},
    }
    return Figures.model_validate({**content, **changes})


def test_the_split_follows_the_work() -> None:
    plan = make_plan(figures(), ScheduleSettings(name="bounded", reorder=0), Split(generators=2, trainers=4))
    assert plan.best.split == Split(generators=4, trainers=2)
    assert plan.fluid_s == pytest.approx(30)
    assert plan.best.s_per_iteration == pytest.approx(30, rel=0.05)
    assert plan.configured is not None and plan.configured.s_per_iteration == pytest.approx(60, rel=0.05)
    assert plan.colocated.s_per_iteration == pytest.approx(20 + 10, rel=0.05)


def test_a_plan_is_printed_as_text_json_and_a_page_that_needs_no_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    html = tmp_path / "plan.html"
    assert main(["plan", str(SIMULATED), *SMALL, "--devices", "5", "--html", str(html)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^take +\d generators and \d learner devices: [\d.]+ s per iteration of 64 samples", text)
    assert "fluid limit" in text and "colocated synchronous" in text
    page = html.read_text()
    assert "<svg" in page and page.count("<rect") > 5 and "generator 0" in page
    assert not re.search(r"(src|href)=|https?:|@import", page)

    assert main(["plan", str(SIMULATED), *SMALL, "--devices", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["best"]["generators"] + found["best"]["trainers"] == 5
    assert found["best"]["s_per_iteration"] == min(c["s_per_iteration"] for c in found["candidates"])
    assert sum(found["best"]["learner"].values()) == pytest.approx(1.0)
    assert found["cannot_run"] == []


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_profile_can_be_read(path: Path) -> None:
    assert read_figures(path).name == path.stem


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--devices", "1"], "--devices 1: sampling and training need one each"),
        (["--figures", "/nonexistent.yaml"], "/nonexistent.yaml: cannot be read"),
        (["--measure"], "--measure: a simulated run states its figures itself"),
        (["--measure", "--figures", "x"], "--figures and --measure: give one of them"),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(SIMULATED), *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_a_real_configuration_needs_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "run.yaml", minimal(tmp_path))
    assert main(["plan", str(path)]) == 2
    assert "no figures: generators.engine is embedded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lengths": {"mean": 5, "cap": 5}}, "mean 5 must lie below cap 5"),
        ({"smapling": {}}, "unknown key smapling; did you mean sampling?"),
        ({"devices": 0}, "devices is 0"),
    ],
)
def test_figures_are_checked(change: dict[str, Any], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(PROFILES[0].read_text()), **change}))
    assert main(["plan", str(SIMULATED), "--figures", str(path)]) == 2
    assert says in capsys.readouterr().err


def test_memory_and_disk_are_worked_out_and_refused_when_they_do_not_fit(tmp_path: Path) -> None:
    size = ModelSize(parameters=1_000_000_000, layers=20, hidden=2000, key_value_heads=4, head_dim=100)
    config = load_config(SIMULATED, ["generators.slots=10", "model.max_context=32000", "learner.tokens_per_microbatch=8000"])
    room = needed(config, size, mean_tokens=6000, prompt_tokens=0)
    assert room.generator == 4e9 + 2 * 10 * 32_000 * 20 * 4 * 100 * 4
    assert room.learner == 16e9 + 16_000 * 20 * 2000 * 34
    assert room.weights == 3 * 4e9
    assert room.journal == 6 * 256 * (600 + 9 * 6000)
    split, none = Split(generators=2, trainers=1), Machine(device=None, host=None, weights=None, disk=None)
    assert faults(config, figures(), split, room, none) == []
    small = Machine(device=26e9, host=40e9, weights=1e9, disk=1e6)
    found = faults(config, figures(), split, room, small)
    assert [words.split(" need")[0] for words in found] == [
        "a learner rank",
        "generators and learner ranks",
        "three published versions",
        "journal and checkpoints of 6 iterations",
    ]


def test_the_size_of_a_model_is_read_from_its_files(tmp_path: Path) -> None:
    model = build("qwen3")
    save(model, tmp_path)
    size = read_model(tmp_path)
    assert size is not None
    assert size.parameters == sum(p.numel() for p in model.parameters())
    assert (size.layers, size.hidden, size.key_value_heads, size.head_dim) == (2, 32, 2, 16)
    assert size.cache_bytes(10, 4) == 2 * 10 * 2 * 2 * 16 * 4


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "mlp.down_proj"]])
def test_adapters_are_sized_as_peft_makes_them(targets: Any, tmp_path: Path) -> None:
    model = build("qwen3")
    save(model, tmp_path)
    lora = {"rank": 3, "target_modules": targets, "publish": "adapter"}
    settings = LoraSettings.model_validate(lora)
    add_adapters(model, settings, half=False)
    count = sum(tensor.numel() for tensor in adapter_tensors(dict(model.named_parameters())).values())
    shapes = read_shapes(tmp_path)
    assert adapter_parameters(shapes, settings) == count > 0

    size = read_model(tmp_path)
    whole = load_config(SIMULATED, ["weights.dtype=bfloat16"])
    learner = whole.learner.model_copy(update={"lora": settings})
    alone = whole.model_copy(update={"learner": learner})
    merged = whole.model_copy(update={"learner": learner.model_copy(update={"lora": settings.model_copy(update={"publish": "merged"})})})
    of_whole, of_alone, of_merged = (needed(one, size, mean_tokens=10, prompt_tokens=0) for one in (whole, alone, merged))
    assert of_alone.weights == 3 * 2 * count
    assert of_merged.weights == of_whole.weights == 3 * 2 * count_parameters(shapes)
    assert of_alone.checkpoints == of_merged.checkpoints == of_whole.checkpoints * count / count_parameters(shapes)
    assert of_merged.learner < of_whole.learner
    config = alone.model_copy(update={"model": alone.model.model_copy(update={"path": tmp_path})})
    assert version_bytes(config) == 2 * count


def test_a_reward_is_timed_by_its_core_unless_it_waits_for_something_else() -> None:
    assert reward_rates(2.0, 5.0, 10, on_cpu=True) == RewardRates(seconds=0.2, cores=1.0)
    assert reward_rates(0.1, 5.0, 10, on_cpu=True) == RewardRates(seconds=0.5, cores=0.1 / 5)
    assert reward_rates(0.0, 0.001, 10, on_cpu=True).seconds == 0, "too short for the ticks that CPU time is counted in"
    assert reward_rates(2.0, 5.0, 10, on_cpu=False) == RewardRates(seconds=0.5, cores=0.4)


class FailsAlways(LengthReward):
    """Machinery that is broken."""

    def score(self, sample: Sample) -> Score:
        raise InfrastructureFault("no sandbox")


def measurable(tmp_path: Path) -> dict[str, Any]:
    """A configuration with a random model of a few thousand parameters, which takes seconds to measure."""
    content = minimal(tmp_path)
    save(build("qwen3", vocab_size=64), tmp_path / "model")
    content["sampling"] = {"groups_per_iteration": 3, "group_size": 2, "max_tokens": 8, "stop_token_ids": [1]}
    content["generators"] = {"slots": 4}
    content["rewarders"] = {"reward": "tests.system.rewards:LengthReward"}
    content["learner"] = {"dtype": "float32", "overlong": "keep", "zero_variance": "keep"}
    content["model"]["max_context"] = 40
    return content


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("rewarders.reward", "tests.system.rewards:BrokenReward", "BrokenReward' raised KeyError ('answer') on problem p0"),
        ("rewarders.reward", "tests.rlsys.test_plan:FailsAlways", "FailsAlways' scored none of 12 samples (no sandbox)"),
        ("model.path", "/nowhere", "model.path is /nowhere: no such directory"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_sentence(
    key: str, value: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "run.yaml", measurable(tmp_path))
    capsys.readouterr()
    assert main(["plan", str(path), "--measure", "--set", f"{key}={value}"]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1


def test_other_cores_work_while_parts_of_one_thread_are_measured(tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", minimal(tmp_path))
    cores = len(os.sched_getaffinity(0))
    assert _others(load_config(path, [])) == min(2, cores)
    assert _others(load_config(path, ["rewarders.concurrency=4", "learner.ranks=2"])) == min(6, cores)
    assert _others(load_config(path, ["generators.threads=2"])) == _others(load_config(path, ["learner.threads=2"])) == 0


def test_prompts_that_do_not_fit_are_not_sampled(tmp_path: Path) -> None:
    content = measurable(tmp_path)
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    long = {**json.loads(lines[0]), "id": "long"}
    long["prompt"] = long["prompt"] * 100
    (tmp_path / "train.jsonl").write_text("\n".join([json.dumps(long), *lines]) + "\n")
    config = load_config(write(tmp_path / "run.yaml", content), [])
    assert [one.problem.problem_id for one in _problems(config)] == [json.loads(line)["id"] for line in lines]
    with pytest.raises(DataError, match="every prompt is longer than 1 tokens"):
        _problems(load_config(tmp_path / "run.yaml", ["sampling.max_prompt_tokens=1"]))


_WITH_CTRL_C = """
import signal, sys
from rlsys.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main(sys.argv[1:]))
"""
"""The command, also where whoever runs the tests ignores SIGINT."""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("when", ["sampled", "only wait"])
def test_a_measurement_that_is_ended_leaves_nothing(number: int, code: int, when: str, tmp_path: Path) -> None:
    """A signal to the whole group, as a terminal sends it: every process that was started is gone, and so are its files."""
    path, scratch = write(tmp_path / "run.yaml", measurable(tmp_path)), tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-c", _WITH_CTRL_C, "plan", str(path), "--measure"]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "TMPDIR": str(scratch)},
    ) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            while when not in process.stdout.readline():
                assert process.poll() is None
            deadline = time.monotonic() + 60
            while when == "only wait" and len(started_by(process.pid)) < _others(load_config(path, [])) + 5:
                assert time.monotonic() < deadline and process.poll() is None
                os.sched_yield()
            begun = started_by(process.pid)
            in_memory = {Path(file.read_text()) for file in scratch.glob("rlsys-plan-*/run/weights_dir")}
            os.killpg(process.pid, number)
            said = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert process.returncode == code and "Traceback" not in said
    assert begun and not [pid for pid in begun if Path(f"/proc/{pid}").exists()]
    assert list(scratch.iterdir()) == [] and bool(in_memory) == (when == "only wait") and not any(map(Path.exists, in_memory))


def test_the_time_of_a_step_is_found_from_noisy_steps() -> None:
    steps = [(0.002 + 0.0003 * n + 0.0001 * p, n, p) for n in range(1, 33) for p in (0, 0, 0, 40)]
    rates = fit_steps([*steps, (5.0, 3, 0)])
    assert (rates.fixed_s, rates.each_s, rates.prompt_s) == pytest.approx((0.002, 0.0003, 0.0001), rel=1e-6)


def test_figures_are_measured_on_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole of --measure on a random model of a few thousand parameters."""
    path, saved = write(tmp_path / "run.yaml", measurable(tmp_path)), tmp_path / "figures.yaml"
    assert main(["plan", str(path), "--measure", "--json", "--save-figures", str(saved)]) == 0
    said = capsys.readouterr()
    assert "trained at" in said.err, "progress goes beside the JSON"
    found = json.loads(said.out)
    taken = found["figures"]
    assert taken["devices"] == 2 and taken["groups_per_iteration"] == 3
    assert taken["sampling"]["tokens_per_s"] > taken["sampling"]["tokens_per_s_sample"] > 1
    assert taken["training"]["tokens_per_s"] > 1
    assert 1e-5 < taken["ring_s"] < 10
    assert found["configured"]["s_per_iteration"] > 0
    assert main(["plan", str(path), "--figures", str(saved)]) == 0, "saved figures can be used again"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--devices", "-3"], "--devices -3: sampling and training need one each, so at least 2"),
        (["--devices", "3000000"], "3000000 devices: a plan is made for at most 100000"),
        (["--device-memory", "nan"], "--device-memory nan: expected gigabytes of one device"),
        (["--set", "learner.step_options.devices=1.5"], "generators on 4 devices and a learner on 1.5 are no whole number of devices"),
        (["--html", "/nowhere/plan.html"], "/nowhere/plan.html: cannot be written"),
        (["--save-figures", "/nowhere/figures.yaml"], "/nowhere/figures.yaml: cannot be written"),
        (["--set", "generators.options.tokens_per_s=1e300"], "tokens_per_s is 1e+300: input should be"),
        (["--set", "learner.step_options.tokens_per_s=1e-300"], "tokens_per_s is 1e-300: input should be"),
    ],
)
def test_absurd_figures_and_paths_are_refused_in_one_sentence(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(SIMULATED), *SMALL, *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and len(error.splitlines()) == 1


def test_shares_of_devices_are_whole_together(capsys: pytest.CaptureFixture[str]) -> None:
    shares = ["--set", "generators.options.device_shares=[1, 1, 1, 0.5]", "--set", "learner.step_options.devices=1.5"]
    assert main(["plan", str(SIMULATED), *SMALL, *shares, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["figures"]["devices"] == 5
    assert (found["configured"]["generators"], found["configured"]["trainers"]) == (3.5, 1.5)
    assert main(["plan", str(SIMULATED), *SMALL, "--set", "learner.step_options.devices=1.5", "--devices", "6"]) == 0


def test_weights_are_looked_for_where_a_run_would_put_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tmpfs is full: versions go into the run's directory, so nothing is refused."""
    config = load_config(write(tmp_path / "run.yaml", minimal(tmp_path)), [])
    usage = shutil.disk_usage
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0) if Path(path) == SHM else usage(path))
    found = _machine(config, None)
    assert found.weights is not None and found.weights > 0


def test_a_lower_maximum_cuts_the_lengths_that_are_planned_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(SIMULATED), *SMALL, "--set", "sampling.max_tokens=100", "--json"]) == 0
    lengths = json.loads(capsys.readouterr().out)["figures"]["lengths"]
    assert lengths["cap"] == 100 and 99 < lengths["mean"] < 100


def test_a_large_fleet_is_compared_on_a_smaller_one_of_the_same_proportions() -> None:
    """Its best split is that of a fleet a tenth as large."""
    large = figures(
        devices=60, groups_per_iteration=1200, group_size=8, sampling={"tokens_per_s_sample": 10, "tokens_per_s": 100, "slots": 16}
    )
    small = figures(
        devices=6, groups_per_iteration=120, group_size=8, sampling={"tokens_per_s_sample": 10, "tokens_per_s": 100, "slots": 16}
    )
    schedule = ScheduleSettings(name="bounded")
    found, expected = make_plan(large, schedule, None).best, make_plan(small, schedule, None).best
    assert found.split == Split(generators=10 * expected.split.generators, trainers=10 * expected.split.trainers)
    assert found.s_per_iteration == pytest.approx(expected.s_per_iteration, rel=0.05)


def test_iterations_long_and_short_in_turn_are_averaged_over_whole_periods() -> None:
    assert [steady(13, bound) for bound in (0, 1, 2)] == [(4, 10)] * 3
    for bound in range(4):
        for iterations in range(3 * bound + 4, 40):
            first, last = steady(iterations, bound)
            assert 2 + bound <= first < last <= iterations - bound - 1 and (last - first) % (bound + 1) == 0
