"""`rlsys audit RUN`: from ledger and journal alone, whether anything was lost, done twice, or too stale; works on live and on finished runs.

    ledger (issued, ended, checkpoints, starts) + journal (trajectories, batches) --> Findings

Lost: a group of a finished run without a terminal state; a group that ended in a batch, of which no batch is on record; a sample that a batch
or a terminal state counts and the journal does not hold; a problem that an epoch left out. Doubled: a sample on record twice, a group in two
batches, a place of an iteration filled twice. Too stale: an unmasked token outside [k - S, k] in a batch of iteration k. Damaged: bytes of the
journal that hold no record, a segment that is gone or shorter than a commit says. A half-written end that no commit stands for is none of these.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from protocol.codec import decode
from protocol.errors import ConfigError, WireError
from protocol.journal import Damage, read_records, segments
from protocol.ledger import Checkpoint, Issue, Ledger, Start
from protocol.messages import GroupOutcome, Trajectory
from rlsys.config import RunConfig
from rlsys.roles import load_run
from rlsys.rundir import holder, read_json

EXAMPLES = 20
"""Findings of one kind that are listed; all are counted."""


KINDS = ("lost", "doubled", "too_stale", "damaged")
"""Of findings."""


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
    """Places of the journal that cannot be read, a torn end among them."""
    faults: list[str]
    """What is wrong with the journal's files, in sentences."""
    known: frozenset[int]
    """Groups whose terminal states were in the ledger before the journal was read: it holds all that these stand on."""
    checked_from: int
    """Batches from this iteration on must be on record; later than 0 when the start of the journal was removed."""
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
    damaged: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        return not any(getattr(self, kind) for kind in KINDS)


def audit(books: Books, config: RunConfig, *, done: bool) -> Findings:
    """Pure. `done`: the run has ended with every iteration trained, so that nothing may be open."""
    found = Findings(damaged=list(books.faults))
    issued = {issue.group_id: issue for issue in books.issues if issue.attempt == 0}
    ended = {outcome.group_id: outcome for outcome in books.outcomes}
    batch_of = _batches(books.batches, found)
    _groups(books, issued, ended, batch_of, found, done=done)
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
    books: Books,
    issued: Mapping[int, Issue],
    ended: Mapping[int, GroupOutcome],
    batch_of: Mapping[int, int],
    found: Findings,
    *,
    done: bool,
) -> None:
    for group, outcome in ended.items():
        if group not in issued:
            found.doubled.append(f"group {group}: ended {outcome.state} and was never issued")
        if outcome.state == "trained" and batch_of.get(group, outcome.iteration) != outcome.iteration:
            found.doubled.append(f"group {group}: ended trained@{outcome.iteration}, but the batch of {batch_of[group]} holds it")
        recorded = group in batch_of or not outcome.in_batch or outcome.iteration < books.checked_from
        if not recorded and outcome.purpose == "train" and group in books.known:
            found.lost.append(f"group {group}: ended {outcome.state}@{outcome.iteration}, and no batch on record holds it")
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
        for group in books.known & (ended.keys() - batch_of.keys()):
            if len(on_record[group]) < ended[group].num_samples:
                counted = f"ended {ended[group].state} with {ended[group].num_samples} samples"
                found.lost.append(f"group {group}: {counted}, {len(on_record[group])} are on record")


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
    """Everything on record about a run, live or finished.

    The ledger is read after the journal, so that it knows at least as much, and what must be in the journal is asked before that.
    """
    ledger_path, journal = run / "ledger.sqlite", run / "journal"
    if not ledger_path.exists():
        raise ConfigError(f"{run}: holds no run (no ledger.sqlite)")
    ledger = Ledger(ledger_path, read_only=True)
    try:
        run_id = int(ledger.get("run_id") or (read_json(run / "status.json") or {}).get("run_id", "0"), 16)
        known = frozenset(ledger.ended_groups())
        samples, batches, faults = [], [], []
        bad: list[Damage] = []
        sizes = _sizes(journal)
        for record in read_records(journal, 0, bad.append):
            kind, *frames = record.frames
            if kind == b"trajectory":
                try:
                    samples.append(_sampled(decode(frames, run_id, "the journal")))
                except WireError as error:
                    faults.append(f"segment {record.segment}, the record before byte {record.end}: {error}")
            elif kind == b"batch":
                content = msgpack.unpackb(frames[0])
                batches.append((content["iteration"], content.get("part", 0), content["groups"]))
            elif kind == b"void":
                first = msgpack.unpackb(frames[0])["from"]
                batches = [batch for batch in batches if batch[0] < first]
        if bad and holder(run) is not None:
            bad = _still(bad)
        outcomes, checkpoints = ledger.outcomes(), ledger.checkpoints()
        later = _sizes(journal)
        for number, size in later.items():  # a live run appends, and begins and removes segments meanwhile
            sizes[number] = max(size, sizes.get(number, 0))
        in_batches = sum(outcome.in_batch and outcome.purpose == "train" for outcome in outcomes if outcome.group_id in known)
        complete = min(later, default=0) == 0
        on_record = {iteration + 1 for iteration, _, _ in batches} | {checkpoint.number for checkpoint in checkpoints}
        return Books(
            issues=ledger.issues(),
            outcomes=outcomes,
            samples=samples,
            batches=batches,
            damaged=len(faults) + len(bad),
            faults=journal_faults(sizes, bad, checkpoints, in_batches) + faults,
            known=known,
            checked_from=0 if complete else min(on_record, default=0),
            starts=ledger.starts(),
            skipped=ledger.num_skipped(),
            complete=complete,
        )
    finally:
        ledger.close()


def journal_faults(sizes: Mapping[int, int], bad: Iterable[Damage], checkpoints: Iterable[Checkpoint], in_batches: int) -> list[str]:
    """What is wrong with the files of a journal: `sizes` of its segments, and how many groups ended in a batch. Pure.

    Sound are a start that was removed as far as no checkpoint needs it, and an end that was torn and that no commit stands for.
    """
    faults = []
    ends = [(checkpoint.journal_segment, checkpoint.journal_end) for checkpoint in checkpoints]
    if in_batches and not any(sizes.values()):
        faults.append(f"the journal is {'empty' if sizes else 'missing'}, and {in_batches} groups ended in a batch")
    needed = {number for checkpoint in checkpoints for number in range(checkpoint.first_segment, checkpoint.journal_segment + 1)}
    needed |= set(range(min(sizes, default=0), max(sizes, default=-1) + 1))
    faults += [f"segment {number} of the journal is missing" for number in sorted(needed - sizes.keys())]
    for number in sizes:
        end = max((end for segment, end in ends if segment == number), default=0)
        if sizes[number] < end:
            faults.append(f"segment {number} of the journal ends at byte {sizes[number]}, and a commit stands for it up to byte {end}")
    newest, committed = max(sizes, default=-1), max(ends, default=(-1, 0))
    for damage in bad:
        torn = damage.segment == newest and damage.end >= sizes[newest] and (damage.segment, damage.start) >= committed
        if not torn:
            faults.append(f"segment {damage.segment} of the journal: bytes {damage.start} to {damage.end} are damaged")
    return faults


def _sizes(journal: Path) -> dict[int, int]:
    """Bytes of each segment; one that is removed at this moment is left out."""
    sizes = {}
    for number in segments(journal):
        with suppress(FileNotFoundError):
            sizes[number] = (journal / f"{number:06d}.journal").stat().st_size
    return sizes


def _still(bad: Collection[Damage]) -> list[Damage]:
    """Those that are still bad when they are read again: in a live run the last record may have been half written at that moment."""
    before = {(damage.path, damage.start) for damage in bad}
    again: list[Damage] = []
    for directory in {damage.path.parent for damage in bad}:
        for _ in read_records(directory, min(damage.segment for damage in bad), again.append):
            pass
    return [damage for damage in again if (damage.path, damage.start) in before]


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
    kinds = {name: getattr(found, name) for name in KINDS}
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
    counts = ", ".join(f"{result[name]} {name.replace('_', ' ')}" for name in KINDS)
    text = [f"{result['run']}: {result['state']}; {counts}"]
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
