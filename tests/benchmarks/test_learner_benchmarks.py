"""The learner's benchmarks compare the same work: every layout trains on the same tokens, every head gives the same log-probs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import logprob
from benchmarks.learner import UnsortedStep, make_samples
from learner.parallel import SingleProcess
from learner.settings import LearnerSettings
from learner.step import Step
from tests.learner.conftest import save_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("shape", "count"), [("quickstart", 16), ("long", 12)])
def test_layouts_give_the_same_loss_and_gradient(tmp_path: Path, shape: str, count: int) -> None:
    directory = save_model(tmp_path, vocab_size=762, scale=1.0)
    samples = make_samples(shape, 0)[:count]
    found = []
    for layout, kind in (("sorted", UnsortedStep), ("sorted", Step), ("packed", Step), ("shared", Step)):
        settings = LearnerSettings.model_validate({"device": "cpu", "dtype": "float32", "layout": layout})
        found.append(kind(settings, directory, SingleProcess()).train(samples, 0, 1).values)
    for values in found[1:]:
        assert values["tokens_trained"] == found[0]["tokens_trained"] == sum(len(s.token_ids) for s in samples)
        assert values["grad_norm"] == pytest.approx(found[0]["grad_norm"], rel=1e-5)
        assert values["loss"] == pytest.approx(found[0]["loss"], rel=1e-5, abs=1e-6)


def test_the_naive_head_needs_several_times_the_memory() -> None:
    """Measured in processes of their own; 128 MiB of logits in float32 stand out from what importing leaves."""
    naive, kept = (logprob.in_child(way, 512, 8, 65536, "float32", 1) for way in ("naive", "kept"))
    assert kept["seconds"] > 0 and naive["bytes"] > 1.4 * kept["bytes"] > 128 * 2**20


@pytest.mark.slow
def test_the_step_against_trls_compares_one_computation() -> None:
    """It prints a ratio only where the gradient norms of both sides agree."""
    command = [sys.executable, "-m", "benchmarks.learner_trl", "--repeats", "1", "--shape", "long"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"rlsys / TRL \d+\.\d\d$", done.stdout.strip())
