"""`rlsys audit RUN`: from ledger and journal alone, whether anything was lost, done twice, or too stale; works on live and on finished runs.

    ledger (issued, ended, checkpoints, starts) + journal (trajectories, batches) --> Findings

Lost: a group of a finished run without a terminal state; a group or sample that a batch names and the journal does not hold; a problem that
an epoch left out. Doubled: a sample on record twice, a group in two batches, a place of an iteration filled twice. Too stale: an unmasked
token outside [k - S, k] in a batch of iteration k.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from protocol.codec import decode
from protocol.errors import ConfigError, WireError
from protocol.journal import read_records, segments
from protocol.ledger import Issue, Ledger, Start
from protocol.messages import GroupOutcome, Trajectory
from rlsys.config import RunConfig
from rlsys.roles import load_run
from rlsys.rundir import holder, read_json

EXAMPLES = 20
"""Findings of one kind that are listed; all are counted."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """What the audit needs of a trajectory."""

    group_id: int
    index: int
    purpose: str
    tokens: int
    oldest: int
    newest: int
    generator: str
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Books:
    """Everything on record about a run."""

    issues: list[Issue]
    outcomes: list[GroupOutcome]
    samples: list[Sampled]
    batches: list[tuple[int, int, list[int]]]
    """(iteration, part, groups) in the order of the journal, those that were declared void left out."""
    damaged: int
    """Journal records that cannot be read."""
    starts: list[Start]
    skipped: int
    complete: bool
    """The journal reaches back to the start of the run."""


@dataclass(slots=True)
class Findings:
    """What is wrong, in sentences, and the figures."""

    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    too_stale: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        return not (self.lost or self.doubled or self.too_stale)


def audit(books: Books, config: RunConfig, *, done: bool) -> Findings:
    """Pure. `done`: the run has ended with every iteration trained, so that nothing may be open."""
    found = Findings()
    issued = {issue.group_id: issue for issue in books.issues if issue.attempt == 0}
    ended = {outcome.group_id: outcome for outcome in books.outcomes}
    batch_of = _batches(books.batches, found)
    _groups(issued, ended, batch_of, found, done=done)
    _samples(books, issued, batch_of, ended, config, found)
    _epochs(books.issues, found)
    _figures(books, issued, ended, batch_of, found)
    return found


def _batches(batches: Iterable[tuple[int, int, list[int]]], found: Findings) -> dict[int, int]:
    """Group -> the iteration whose batch holds it."""
    batch_of: dict[int, int] = {}
    seen: set[tuple[int, int]] = set()
    for iteration, part, groups in batches:
        if (iteration, part) in seen:
            found.doubled.append(f"iteration {iteration}, part {part}: two batches are on record")
        seen.add((iteration, part))
        for group in groups:
            if group in batch_of:
                found.doubled.append(f"group {group}: in the batches of iterations {batch_of[group]} and {iteration}")
            batch_of[group] = iteration
    return batch_of


def _groups(
    issued: Mapping[int, Issue], ended: Mapping[int, GroupOutcome], batch_of: Mapping[int, int], found: Findings, *, done: bool
) -> None:
    for group, outcome in ended.items():
        if group not in issued:
            found.doubled.append(f"group {group}: ended {outcome.state} and was never issued")
        if outcome.state == "trained" and batch_of.get(group, outcome.iteration) != outcome.iteration:
            found.doubled.append(f"group {group}: ended trained@{outcome.iteration}, but the batch of {batch_of[group]} holds it")
    if done:
        found.lost += [f"group {group} ({issue.problem_id}): no terminal state" for group, issue in issued.items() if group not in ended]


def _samples(
    books: Books,
    issued: Mapping[int, Issue],
    batch_of: Mapping[int, int],
    ended: Mapping[int, GroupOutcome],
    config: RunConfig,
    found: Findings,
) -> None:
    bound, size = config.schedule.bound, config.sampling.group_size
    masks = config.schedule.stragglers == "mask"
    on_record: dict[int, set[int]] = defaultdict(set)
    for sample in books.samples:
        if sample.index in on_record[sample.group_id]:
            found.doubled.append(f"sample {sample.group_id}/{sample.index}: on record twice")
        on_record[sample.group_id].add(sample.index)
        if sample.group_id not in issued:
            found.doubled.append(f"sample {sample.group_id}/{sample.index}: on record, and its group was never issued")
        iteration = batch_of.get(sample.group_id)
        state = ended[sample.group_id].state if sample.group_id in ended else "trained"
        if iteration is None or sample.purpose != "train" or state != "trained" or sample.oldest < 0:
            continue
        if sample.newest > iteration or (sample.oldest < iteration - bound and not masks):
            found.too_stale.append(
                f"sample {sample.group_id}/{sample.index} of iteration {iteration}: tokens of v{sample.oldest}..v{sample.newest}, "
                f"allowed are v{iteration - bound}..v{iteration}"
            )
    if books.complete:
        for group, iteration in batch_of.items():
            missing = sorted(set(range(size)) - on_record[group])
            if missing:
                found.lost.append(f"group {group} of batch {iteration}: samples {missing} are not on record")


def _epochs(issues: Iterable[Issue], found: Findings) -> None:
    """Problems come in epochs: none is issued for the third time before all were issued twice. Requeued groups do not count."""
    counts = Counter(i.problem_id for i in issues if i.attempt == 0 and i.purpose == "train" and i.requeues == 0)
    if not counts or len({i.stage for i in issues}) > 1:
        return
    rounds = max(counts.values())
    found.lost += [f"problem {p}: issued {n} times while others were issued {rounds} times" for p, n in counts.items() if n < rounds - 1]


def _figures(
    books: Books, issued: Mapping[int, Issue], ended: Mapping[int, GroupOutcome], batch_of: Mapping[int, int], found: Findings
) -> None:
    lengths: dict[str, list[int]] = defaultdict(list)
    open_lengths: list[int] = []
    for sample in books.samples:
        if sample.group_id in ended:
            lengths[ended[sample.group_id].state].append(sample.tokens)
        else:
            open_lengths.append(sample.tokens)
    restarts = Counter(f"{start.role}-{start.index}" for start in books.starts if start.start > 1)
    found.figures = {
        "groups_issued": len(issued),
        "groups_in_flight": sum(1 for group in issued if group not in ended),
        "states": dict(Counter(f"{o.purpose} {o.state}" for o in ended.values())),
        "iterations": len({iteration for iteration, _, _ in books.batches}),
        "samples": len(books.samples),
        "reissued": sum(1 for issue in books.issues if issue.attempt > 0),
        "requeued": sum(1 for issue in books.issues if issue.requeues > 0 and issue.attempt == 0),
        "skipped": books.skipped,
        "restarts": dict(restarts),
        "damaged_records": books.damaged,
        "journal_complete": books.complete,
        "lengths": {state: _spread(values) for state, values in sorted(lengths.items())},
        "lengths_in_flight": _spread(open_lengths),
    }


def _spread(values: Collection[int]) -> dict[str, float]:
    if not values:
        return {"samples": 0}
    q = np.quantile(np.array(list(values)), [0.1, 0.5, 0.9, 1.0])
    return {"samples": len(values), "p10": float(q[0]), "p50": float(q[1]), "p90": float(q[2]), "max": float(q[3])}


# ---------------------------------------------------------------------------------------------------- reading


def read_books(run: Path) -> Books:
    """Everything on record about a run, live or finished. The ledger is read after the journal, so that it knows at least as much."""
    ledger_path, journal = run / "ledger.sqlite", run / "journal"
    if not ledger_path.exists():
        raise ConfigError(f"{run}: holds no run (no ledger.sqlite)")
    ledger = Ledger(ledger_path, read_only=True)
    try:
        run_id = int(ledger.get("run_id") or (read_json(run / "status.json") or {}).get("run_id", "0"), 16)
        samples, batches, damaged = [], [], 0
        bad: set[tuple[Path, int]] = set()
        for record in read_records(journal, 0, lambda path, end: bad.add((path, end))) if journal.is_dir() else ():
            kind, *frames = record.frames
            if kind == b"trajectory":
                try:
                    samples.append(_sampled(decode(frames, run_id, "the journal")))
                except WireError:
                    damaged += 1
            elif kind == b"batch":
                content = msgpack.unpackb(frames[0])
                batches.append((content["iteration"], content.get("part", 0), content["groups"]))
            elif kind == b"void":
                first = msgpack.unpackb(frames[0])["from"]
                batches = [batch for batch in batches if batch[0] < first]
        return Books(
            issues=ledger.issues(),
            outcomes=ledger.outcomes(),
            samples=samples,
            batches=batches,
            damaged=damaged + len(_still(bad) if bad and holder(run) is not None else bad),
            starts=ledger.starts(),
            skipped=ledger.num_skipped(),
            complete=min(segments(journal), default=0) == 0,
        )
    finally:
        ledger.close()


def _still(bad: set[tuple[Path, int]]) -> set[tuple[Path, int]]:
    """Those that are still bad when they are read again: in a live run the last record may have been half written at that moment."""
    again: set[tuple[Path, int]] = set()
    for directory in {path.parent for path, _ in bad}:
        for _ in read_records(directory, min(int(path.stem) for path, _ in bad), lambda path, end: again.add((path, end))):
            pass
    return bad & again


def _sampled(message: object) -> Sampled:
    if not isinstance(message, Trajectory):
        raise WireError(f"{type(message).__name__} in a trajectory record")
    t, spans = message, message.spans
    oldest, newest = (int(spans[0, 0]), int(spans[-1, 0])) if len(spans) else (-1, -1)
    return Sampled(t.group_id, t.index, t.purpose, len(t.token_ids), oldest, newest, t.generator, t.attempt)


def audit_run(run: Path) -> dict[str, Any]:
    """The audit of a run directory as plain data; `sound` says whether all is well."""
    if not (run / "config.yaml").exists():
        raise ConfigError(f"{run}: holds no run")
    config, ended = load_run(run), read_json(run / "exit.json")
    live = holder(run) is not None
    state = "running" if live else ended["outcome"] if ended else "dead"
    found = audit(read_books(run), config, done=state == "done")
    kinds = {name: getattr(found, name) for name in ("lost", "doubled", "too_stale")}
    return {
        "run": str(run),
        "state": state,
        "sound": found.sound,
        **{name: len(sentences) for name, sentences in kinds.items()},
        "findings": {name: sentences[:EXAMPLES] for name, sentences in kinds.items()},
        **found.figures,
    }


def lines(result: dict[str, Any]) -> list[str]:
    """The audit in words."""
    text = [f"{result['run']}: {result['state']}; {result['lost']} lost, {result['doubled']} doubled, {result['too_stale']} too stale"]
    for name, sentences in result["findings"].items():
        text += [f"  {name.replace('_', ' ')}: {sentence}" for sentence in sentences]
        if result[name] > len(sentences):
            text.append(f"  ... and {result[name] - len(sentences)} more")
    states = ", ".join(f"{count} {state}" for state, count in sorted(result["states"].items())) or "none"
    text.append(f"  groups     {result['groups_issued']} issued, {result['groups_in_flight']} in flight; ended: {states}")
    text.append(
        f"  samples    {result['samples']} on record, {result['iterations']} iterations, {result['damaged_records']} damaged records"
    )
    again = f"{result['reissued']} groups issued again after a death, {result['requeued']} requeued, {result['skipped']} problems skipped"
    text.append(f"  again      {again}")
    if result["restarts"]:
        text.append("  restarts   " + ", ".join(f"{name} {count}" for name, count in sorted(result["restarts"].items())))
    for state, spread in result["lengths"].items():
        text.append(f"  lengths    {state:<10} " + _spread_line(spread))
    if not result["journal_complete"]:
        text.append("  note       the start of the journal was removed (journal.keep): samples before it cannot be checked")
    return text


def _spread_line(spread: dict[str, float]) -> str:
    return f"{spread['samples']:.0f} samples, p10 {spread['p10']:.0f}, p50 {spread['p50']:.0f}, p90 {spread['p90']:.0f}, max {spread['max']:.0f}"
