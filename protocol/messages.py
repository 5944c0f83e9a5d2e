"""Every message that crosses a process border. Read this file first.

Data runs one way: GroupTask -> Completion -> Trajectory -> weights. Credits, acknowledgements and outcomes run back.
Arrays travel as raw little-endian buffers, everything else in one msgpack map (see `protocol/codec.py`).

Units: `_s` seconds of `time.time()` for instants and plain seconds for durations, `_bytes` bytes. Array shapes stand in each field's note.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

PROTOCOL_VERSION = 2

Int32Array = Annotated[npt.NDArray[np.int32], "i4"]
Int64Array = Annotated[npt.NDArray[np.int64], "i8"]
Float32Array = Annotated[npt.NDArray[np.float32], "f4"]
UInt8Array = Annotated[npt.NDArray[np.uint8], "u1"]
BoolArray = Annotated[npt.NDArray[np.bool_], "b1"]

Purpose = Literal["train", "eval"]
FinishReason = Literal["stop", "length", "abort"]
NOT_FINITE = "not_finite"
"""Status of a sample whose reward was NaN or infinite: its score is missing."""
TerminalState = Literal["trained", "evaluated", "filtered", "rejected", "dropped", "superseded", "failed", "skipped", "unfinished"]


class Version(NamedTuple):
    """A policy: `number` updates published so far, and the `incarnation`, raised when a number is trained again after a rollback.

    Orders by number, then incarnation. Bytes under one version never change.
    """

    number: int
    incarnation: int = 0

    def __str__(self) -> str:
        return f"v{self.number}" if not self.incarnation else f"v{self.number}.{self.incarnation}"


class Span(NamedTuple):
    """A run of tokens sampled under one policy version: from the previous span's `end` up to `end`, exclusive."""

    version: int
    incarnation: int
    end: int


def pack_spans(spans: list[Span] | tuple[Span, ...]) -> npt.NDArray[np.int32]:
    """Spans as an int32 array [num_spans, 3]: version, incarnation, end."""
    return np.array(spans, dtype=np.int32).reshape(-1, 3)


def token_versions(spans_S3: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """The version number of every token, int32 [num_tokens]."""
    ends = spans_S3[:, 2]
    return np.repeat(spans_S3[:, 0], np.diff(ends, prepend=0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """Base of all wire types."""

    def fault(self) -> str:
        """What is wrong between fields, in words; empty if nothing is. Checked on arrival, after every field's own type."""
        return ""


def _keys_fault(name: str, keys: npt.NDArray[np.int64]) -> str:
    return "" if keys.ndim == 2 and keys.shape[1] == 3 else f"{name} has shape {keys.shape}, expected [n, 3]"


def _tokens_fault(token_ids: npt.NDArray[np.int32], spans: npt.NDArray[np.int32], **per_token: npt.NDArray[Any]) -> str:
    for name, array in per_token.items():
        if array.shape != token_ids.shape:
            return f"{len(token_ids)} token_ids but {array.shape} {name}"
    if spans.ndim != 2 or spans.shape[1] != 3:
        return f"spans have shape {spans.shape}, expected [n, 3]"
    rows = spans.tolist()  # a few rows: plain integers are quicker than array operations
    last = rows[-1][2] if rows else 0
    if last != len(token_ids):
        return f"{len(token_ids)} token_ids but spans that end at {last}"
    for before, after in pairwise(rows):
        if after[2] <= before[2] or after[0] < before[0]:
            return f"spans {rows} whose ends do not rise or whose versions fall"
    return ""


# --------------------------------------------------------------------------------------------------- every channel


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello(Message):
    """First message of a connecting peer on any channel: who it is and what it holds. Sent again after every reconnection.

    Example:
        Hello(role="generator", index=0, identity="generator-0@1", epoch=1, loaded=(0, 0), holds=array([[7, 0, 0]]))
    """

    role: str
    index: int
    identity: str
    """Unique per process start ("generator-0@2" is the second start), so that a restarted peer is never taken for the old one."""
    epoch: int
    """Fencing token of the run: a peer of an older epoch is refused."""
    loaded: tuple[int, int] = (-1, 0)
    """Generators: version number and incarnation in memory; -1 before the first."""
    holds: Int64Array = field(default_factory=lambda: np.zeros((0, 3), np.int64))
    """[n, 3] (group_id, index, attempt) of samples that this peer holds and that are not acknowledged."""

    def fault(self) -> str:
        return _keys_fault("holds", self.holds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit(Message):
    """How many more data messages the consumer takes: the producer may send until it has sent `total` since the last Hello.

    Example:
        Credit(total=24, loaded=(3, 0))
    """

    total: int
    """Cumulative, so that a repeated or late Credit changes nothing."""
    loaded: tuple[int, int] = (-1, 0)
    """Generators: the version in memory. A task is given only to a generator that has its `min_version`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ack(Message):
    """The learner has journaled these samples; the receiver may forget them. A reward actor passes it on to the generator.

    Example:
        Ack(keys=array([[7, 0, 0], [7, 3, 0]]))
    """

    keys: Int64Array
    """[n, 3]: group_id, index, attempt."""

    def fault(self) -> str:
        return _keys_fault("keys", self.keys)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory(Message):
    """Dispatcher to generators and reward actors, when an actor has died: what do you hold? Answered by Holdings with the same number.

    Example:
        Inventory(number=3)
    """

    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Holdings(Message):
    """Generator or reward actor to dispatcher: every sample that it holds now and that is not acknowledged.

    Example:
        Holdings(number=3, keys=array([[7, 0, 0], [7, 3, 0]]))
    """

    number: int
    """Of the Inventory that it answers."""
    keys: Int64Array
    """[n, 3]: group_id, index, attempt."""

    def fault(self) -> str:
        return _keys_fault("keys", self.keys)


@dataclass(frozen=True, slots=True, kw_only=True)
class Journaled(Message):
    """Learner to dispatcher: these samples are in the journal; nobody needs to sample them again.

    Example:
        Journaled(keys=array([[7, 0, 0], [7, 3, 0]]))
    """

    keys: Int64Array
    """[n, 3]: group_id, index, attempt."""

    def fault(self) -> str:
        return _keys_fault("keys", self.keys)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused(Message):
    """The receiver does not serve this peer (another run, an older epoch); `reason` is one sentence.

    Example:
        Refused(reason="epoch 1 is over, this run is at epoch 2")
    """

    reason: str


# --------------------------------------------------------------------------------------------------- the ring


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupTask(Message):
    """Dispatcher to generator: sample `indices` of one prompt's group.

    Example:
        GroupTask(group_id=7, iteration=1, attempt=0, purpose="train", min_version=0, problem_id="train-17", indices=array([0, 1]),
                  seeds=array([11, 12]), prompt_ids=array([1, 9, 2]), temperature=1.0, top_p=1.0, top_k=0, max_tokens=80,
                  stop_token_ids=array([3]), payload=b"...", stage=0)
    """

    group_id: int
    iteration: int
    """The latest iteration that may train on it (see docs/staleness.md); for `eval` the version that shall be evaluated."""
    attempt: int
    """0, and one more for each re-issue after a confirmed death."""
    purpose: Purpose
    min_version: int
    """No token is sampled before this version is loaded."""
    problem_id: str
    indices: Int32Array
    """[n] members to sample; all of 0..group_size-1 on the first attempt."""
    seeds: Int64Array
    """[n] one per index, a hash of (run seed, group_id, index) without the attempt."""
    prompt_ids: Int32Array
    """[prompt tokens]"""
    temperature: float
    top_p: float
    top_k: int
    """0 is off."""
    max_tokens: int
    stop_token_ids: Int32Array
    payload: bytes
    """msgpack of the problem as the reward needs it; opaque to the generator."""
    stage: int = 0
    """The stage of the run that it was issued in."""

    def fault(self) -> str:
        if self.indices.shape != self.seeds.shape or self.indices.ndim != 1 or not len(self.indices):
            return f"group {self.group_id}: {self.indices.shape} indices and {self.seeds.shape} seeds, expected as many, at least one"
        return "" if len(self.prompt_ids) else f"group {self.group_id}: an empty prompt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion(Message):
    """Generator to reward actor: what the policy wrote for one sample of a group.

    Example:
        Completion(group_id=7, index=0, attempt=0, iteration=1, purpose="train", problem_id="train-17", generator="generator-0@1",
                   prompt_ids=array([1, 9, 2]), token_ids=array([9, 2, 3]), behaviour_logprobs=array([-0.1, -1.3, -0.2]),
                   spans=array([[0, 0, 2], [1, 0, 3]]), finish_reason="stop", temperature=1.0, max_tokens=80, started_s=1.0, finished_s=2.0,
                   payload=b"...", stage=0)
    """

    group_id: int
    """Shared by the `group_size` completions of one prompt; unique in the run."""
    index: int
    attempt: int
    iteration: int
    purpose: Purpose
    problem_id: str
    generator: str
    prompt_ids: Int32Array
    token_ids: Int32Array
    """[T] with the stop token, if one was sampled."""
    behaviour_logprobs: Float32Array
    """[T] log-softmax(logits / temperature) under the version that sampled each token, not renormalised for top-p or top-k."""
    spans: Int32Array
    """[num_spans, 3] version, incarnation, end; versions never decrease, the last end is T."""
    finish_reason: FinishReason
    temperature: float
    max_tokens: int
    """Both as the task said: they belong to the sample, because a later stage may have others."""
    started_s: float
    finished_s: float
    payload: bytes
    stage: int = 0

    def fault(self) -> str:
        fault = _tokens_fault(self.token_ids, self.spans, behaviour_logprobs=self.behaviour_logprobs)
        return fault and f"completion {self.group_id}/{self.index}: {fault}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory(Message):
    """Reward actor to learner: a completion with its score.

    Example:
        Trajectory(group_id=7, index=0, attempt=0, iteration=1, purpose="train", problem_id="train-17", generator="generator-0@1",
                   rewarder="rewarder-1@1", prompt_ids=array([1, 9, 2]), token_ids=array([9, 2, 3]),
                   behaviour_logprobs=array([-0.1, -1.3, -0.2]), loss_mask=array([True, True, True]), spans=array([[0, 0, 3]]),
                   finish_reason="stop", temperature=1.0, max_tokens=80, score=1.0, passed=True, status="accepted",
                   parts={"unit_tests": 1.0}, detail="", started_s=1.0, finished_s=2.0, scored_s=2.1, scoring_s=0.05, stage=0)
    """

    group_id: int
    index: int
    attempt: int
    iteration: int
    purpose: Purpose
    problem_id: str
    generator: str
    rewarder: str
    prompt_ids: Int32Array
    token_ids: Int32Array
    behaviour_logprobs: Float32Array
    loss_mask: BoolArray
    """[T] True where a token may receive gradient (tokens that a tool wrote are False)."""
    spans: Int32Array
    finish_reason: FinishReason
    temperature: float
    max_tokens: int
    score: float | None
    """None when the reward could not be found: missing, never 0."""
    passed: bool
    """Whether it counts for pass@1."""
    status: str
    """How the score was obtained: ok, wrong_answer, unparseable, time_limit, ...; `failed` with score None."""
    parts: dict[str, float]
    """Score by reward function, before weighting."""
    detail: str
    """One line for people: the verdict's reason."""
    started_s: float
    finished_s: float
    scored_s: float
    scoring_s: float
    """Wall time that the reward took."""
    stage: int = 0

    def fault(self) -> str:
        fault = _tokens_fault(self.token_ids, self.spans, behaviour_logprobs=self.behaviour_logprobs, loss_mask=self.loss_mask)
        return fault and f"trajectory {self.group_id}/{self.index}: {fault}"


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupOutcome(Message):
    """Learner to dispatcher: the group reached its terminal state, which is in the ledger. Told again to a dispatcher that says Hello.

    Example:
        GroupOutcome(group_id=7, iteration=1, purpose="train", problem_id="train-17", state="trained", reason="", num_samples=8,
                     num_passed=3, mean_score=0.375, oldest_version=0, newest_version=1, in_batch=True,
                     num_truncated=0)
    """

    group_id: int
    iteration: int
    """The iteration that trained it, or at which it ended otherwise."""
    purpose: Purpose
    problem_id: str
    state: TerminalState
    reason: str
    num_samples: int
    num_passed: int
    mean_score: float | None
    oldest_version: int
    newest_version: int
    in_batch: bool = False
    """Whether it took a place in the batch of its iteration. The place of a training group that did not is given to another."""
    num_truncated: int = 0
    """Of the scored samples, those that were cut off."""


# --------------------------------------------------------------------------------------------------- weights


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsReady(Message):
    """Learner to generators and dispatcher: a version is complete on disk.

    Example:
        WeightsReady(number=4, incarnation=0, directory="/run/weights/v4", manifest_sha256="ab...", num_bytes=3540000, published_s=1.0,
                     groups_taken=12, stage_starts=[0, 40])
    """

    number: int
    incarnation: int
    directory: str
    manifest_sha256: str
    num_bytes: int
    published_s: float
    groups_taken: int = 0
    """Training groups in the batches of all iterations before this version: how far the line of groups has moved up."""
    stage_starts: list[int] = field(default_factory=lambda: [0])
    """First iterations of the stages that have begun or are decided: enough to know the stage of every group that this version lets issue."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsLoaded(Message):
    """Generator to learner: the version is in memory, or why it is not.

    Example:
        WeightsLoaded(generator="generator-0@1", number=4, incarnation=0, load_s=0.012, pause_s=0.02, error="", canary_error=2e-7)
    """

    generator: str
    number: int
    incarnation: int
    load_s: float
    pause_s: float
    """How long running samples stood still."""
    error: str
    canary_error: float
    """Largest difference of a canary's log-probs from the learner's; NaN when none was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceRequest(Message):
    """Generator to the learner, or to a generator of another host: send these bytes of a published file.

    Example:
        PieceRequest(number=4, incarnation=0, file="model.safetensors", start=524288, end=1048576)
    """

    number: int
    incarnation: int
    file: str
    """Of the version's directory, by its name alone."""
    start: int
    end: int
    """Exclusive; beyond the end of the file is the end of the file."""

    def fault(self) -> str:
        wrong = not 0 <= self.start < self.end or "/" in self.file or self.file.startswith(".")
        return f"a request for bytes {self.start}:{self.end} of {self.file!r}" if wrong else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece(Message):
    """The answer to a PieceRequest: bytes of a file as it was published.

    Example:
        Piece(number=4, incarnation=0, file="model.safetensors", start=524288, has="here", data=array([62, 0, 128]))
    """

    number: int
    incarnation: int
    file: str
    start: int
    has: Literal["here", "later", "gone"]
    """`later`: this host is fetching them itself and has not got them; `gone`: it has no such version, any more or at all."""
    data: UInt8Array
    """[n] from `start` on; empty unless `has` is "here"."""


# --------------------------------------------------------------------------------------------------- control and observation


@dataclass(frozen=True, slots=True, kw_only=True)
class Register(Message):
    """Any process to the supervisor, once its sockets are bound: where its peers find it.

    Example:
        Register(role="dispatcher", index=0, identity="dispatcher-0@1", pid=4711, addresses={"tasks": "ipc:///tmp/rlsys-ab/tasks"})
    """

    role: str
    index: int
    identity: str
    pid: int
    addresses: dict[str, str]
    """Channel name to address."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peers(Message):
    """Supervisor to every process, whenever it changes: who is there.

    Example:
        Peers(peers=[{"role": "dispatcher", "index": 0, "identity": "dispatcher-0@1", "addresses": {"tasks": "ipc:///..."}, "leaving": False}])
    """

    peers: list[dict[str, Any]]
    """Those who are `leaving` finish what they have: nobody sends them anything new."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat(Message):
    """Any process to the supervisor: alive, and what it does or waits for.

    Example:
        Heartbeat(identity="learner-0@1", doing="waiting:trajectories", peer="rewarder", since_s=1.0,
                  detail="3 samples of group 812", progress=4711, sent_s=42.0, facts={"missing": [[812, 3]]})
    """

    identity: str
    doing: str
    """The present activity; those that start with "waiting:" name a peer."""
    peer: str
    since_s: float
    detail: str
    progress: int
    """Grows with every useful thing done: tokens sampled, samples scored, trajectories received. A ring in which none grows has stalled."""
    sent_s: float = 0.0
    """On the sender's clock; echoed, so that the sender can tell how far its clock is off."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What of the ring's work is here, a few rows at most; `rlsys/waits.py` says what each role tells and puts them together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockEcho(Message):
    """Supervisor to a process, after each heartbeat: see `protocol/clock.py`.

    Example:
        ClockEcho(sent_s=42.0, received_s=43.0, replied_s=43.0001)
    """

    sent_s: float
    """Of the heartbeat, on the clock of the process."""
    received_s: float
    replied_s: float
    """Both on the supervisor's clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop(Message):
    """Supervisor to every process: end in order, now.

    Example:
        Stop(reason="interrupted")
    """

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Leave(Message):
    """Supervisor to one process: take nothing new, finish what you have, then end with exit code 0. A learner ends at its next commit.

    Example:
        Leave(reason="scaled to 1 generators")
    """

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished(Message):
    """A process to the supervisor: its part is done, `error` empty if all went well. The learner's ends the run.

    Example:
        Finished(identity="learner-0@1", error="")
    """

    identity: str
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics(Message):
    """Any process to the dashboard: numbers at a moment. `iteration` is the x axis, -1 where there is none yet.

    Example:
        Metrics(identity="learner-0@1", iteration=3, time_s=1.0, values={"loss": 0.1})
    """

    identity: str
    iteration: int
    time_s: float
    values: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event(Message):
    """Something worth a line: an evaluation result, a fault survived, the end of a phase. `name` is fixed, `data` is plain.

    Example:
        Event(identity="dispatcher-0@1", time_s=1.0, name="eval", data={"version": 0, "pass_at_1": 0.31})
    """

    identity: str
    time_s: float
    name: str
    data: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Intervals(Message):
    """Any process to the dashboard: what it did since the last one.

    Example:
        Intervals(identity="learner-0@1", names=["train", "waiting:trajectories"], rows=array([[0, 10, 20, 3, -1]]), offset_s=1.0)
    """

    identity: str
    names: list[str]
    rows: Int64Array
    """[n, 5]: index into names, start and end in microseconds after `offset_s`, iteration and group (-1 for none)."""
    offset_s: float
    """On the supervisor's clock, as well as the sender knows it."""
    track: str = ""
    """A thread of its own; empty for the process's main one."""

    def fault(self) -> str:
        if self.rows.ndim != 2 or self.rows.shape[1] != 5:
            return f"intervals of {self.identity}: rows have shape {self.rows.shape}, expected [n, 5]"
        outside = len(self.rows) and not 0 <= int(self.rows[:, 0].min()) <= int(self.rows[:, 0].max()) < len(self.names)
        return f"intervals of {self.identity}: a row names none of the {len(self.names)} names" if outside else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution(Message):
    """Learner to the dashboard: how often values of one iteration fell where.

    Example:
        Distribution(identity="learner-0@1", iteration=3, time_s=1.0, name="length/completion", edges=array([0.0, 16.0, 32.0]),
                     counts=array([5, 11]))
    """

    identity: str
    iteration: int
    time_s: float
    name: str
    edges: Float32Array
    """[n + 1], rising."""
    counts: Int64Array
    """[n] between neighbouring edges."""

    def fault(self) -> str:
        fits = self.edges.ndim == self.counts.ndim == 1 and len(self.edges) == len(self.counts) + 1
        return "" if fits else f"distribution {self.name}: {self.edges.shape} edges and {self.counts.shape} counts, expected one edge more"


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot(Message):
    """Dashboard to supervisor: the state of the run, for the progress display and `rlsys status`.

    Example:
        Snapshot(time_s=1.0, values={"iteration": 3})
    """

    time_s: float
    values: dict[str, Any]


# --------------------------------------------------------------------------------------------------- commands and other hosts


@dataclass(frozen=True, slots=True, kw_only=True)
class Order(Message):
    """A command of a user of this run (`rlsys scale`) to its supervisor, answered by an Answer with the same number.

    Example:
        Order(number=1, name="scale", data={"generators": 3})
    """

    number: int
    name: str
    data: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer(Message):
    """Supervisor to the command: what was done, or in `refused` one sentence why nothing was.

    Example:
        Answer(number=1, refused="", data={"generators": 3})
    """

    number: int
    refused: str
    data: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinRequest(Message):
    """A host to the supervisor: let me in, and give me `count` actors of this role to run (0: the supervisor decides).

    Example:
        JoinRequest(secret="9f...", run_id="0123456789abcdef", version="0.1.0", name="gpu-7", role="generator", count=4)
    """

    secret: str
    run_id: str
    version: str
    """Of rlsys there."""
    name: str
    """What people call the host."""
    role: str
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined(Message):
    """Supervisor to a host: you are let in. The run's keys are handed out here and nowhere else.

    Example:
        Joined(epoch=1, control="tcp://10.0.0.1:4711", public="rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7",
               secret="JTKVSB%%)wK0E.X)V>+}o?pNmC{O&4W4b!Ni{Lh6", config="name: run", run_dir="/data/run",
               weights_dir="/dev/shm/rlsys-ab", silent_s=30.0)
    """

    epoch: int
    control: str
    public: str
    secret: str
    config: str
    """The resolved configuration as YAML."""
    run_dir: str
    weights_dir: str
    """Both as the supervisor's host knows them."""
    silent_s: float
    """Silence after which the host counts as gone, and the supervisor for the host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostReport(Message):
    """A host to the supervisor, all that it knows, twice a second, so that a lost one changes nothing.

    Example:
        HostReport(processes=[["generator-4@1", 4711, None], ["generator-5@1", 4712, -9]], logs={"generator-4.log": b"..."}, leaving=False, lacks="")
    """

    processes: list[list[Any]]
    """[identity, pid, exit code or None] of every process that it has started."""
    logs: dict[str, bytes]
    """What was written to each log since the last report, by its file's name."""
    leaving: bool
    """It was told to go: its processes shall leave in order."""
    lacks: str
    """Why it can run nothing; empty if it can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostOrders(Message):
    """Supervisor to a host, after each report and at each change: everything that shall run there, so that a lost one changes nothing.

    Example:
        HostOrders(wanted=[{"spec": {"role": "generator", "index": 4, "start": 1}, "environment": {"OMP_NUM_THREADS": "1"}}], stop="")
    """

    wanted: list[dict[str, Any]]
    """Fields of a ProcessSpec, those that the host knows better left out, and environment variables. Who is not in here is ended."""
    stop: str
    """Why the host shall end everything and go; empty if it shall stay."""


MESSAGES: Mapping[str, type[Message]] = {cls.__name__: cls for cls in Message.__subclasses__()}
"""Tag on the wire -> type."""


def key_of(message: Completion | Trajectory) -> tuple[int, int, int]:
    """(group_id, index, attempt): how deliveries are acknowledged."""
    return (message.group_id, message.index, message.attempt)
