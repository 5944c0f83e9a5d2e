"""Versions travel between hosts over real, authenticated sockets: whole or not at all, resumed, shared and passed on."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import zmq
from safetensors.numpy import save_file

from actors.fetcher import Fetcher, Provider
from actors.host_cache import HostCache, choose_cache_dir
from learner.publisher import announcement
from protocol.channels import Keys, Link, Poller, Transport
from protocol.errors import WeightsError
from protocol.holds import Hold
from protocol.manifest import publish, verify
from protocol.messages import PieceRequest, Version, WeightsReady
from protocol.partial import Partial, partial_path
from protocol.pieces import BLOCK_BYTES, ORIGIN
from protocol.shelf import Shelf

DEADLINE_S = 300.0


class Network:
    """A learner's directory, shelves and hosts on loopback addresses, all closed at the end."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.transport = Transport(171, None, "127.0.0.1", Keys.make())
        self.root = directory / "learner"
        self.root.mkdir()
        self.serving: dict[str, Provider] = {}
        self.shelves: dict[str, Shelf] = {}
        self.fetchers: list[Fetcher] = []
        self.caches: dict[str, Path] = {}

    def shelve(self, identity: str, root: Path, source: str) -> Shelf:
        channel = "passing" if source else "pieces"
        shelf = self.shelves[identity] = Shelf(self.transport, channel, identity, root)
        shelf.start()
        self.serving = {**self.serving, identity: Provider(channel, shelf.address, source)}
        return shelf

    def take_down(self, identity: str) -> None:
        self.serving = {known: provider for known, provider in self.serving.items() if known != identity}
        self.shelves.pop(identity).close()

    def host(self, index: int, name: str) -> Fetcher:
        """A generator on the host `name`."""
        cache = self.caches[name] = self.directory / name
        cache.mkdir(exist_ok=True)
        identity = f"generator-{index}@1"
        self.shelve(identity, cache, name)
        self.fetchers.append(Fetcher(self.transport, identity, cache, name, lambda: self.serving))
        return self.fetchers[-1]

    def publish(self, number: int, tensors: dict[str, np.ndarray]) -> WeightsReady:
        def write(directory: Path) -> None:
            save_file(tensors, directory / "model.safetensors")
            (directory / "model.safetensors.index.json").write_text("{}")

        return announcement(publish(self.root, Version(number), "base", write))

    def close(self) -> None:
        for fetcher in self.fetchers:
            fetcher.close()
        for identity in list(self.shelves):
            self.take_down(identity)
        self.transport.close()


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    made = Network(tmp_path)
    yield made
    made.close()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is taken for cut off, so that nothing travels twice on a machine that does something else for a while."""
    monkeypatch.setattr("protocol.pieces.SILENT_S", DEADLINE_S)
    monkeypatch.setattr("protocol.shelf.PARK_S", DEADLINE_S)


def tensors(seed: int = 0, count: int = 12, size: int = BLOCK_BYTES // 4) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {f"t{i}": rng.random(size + i, dtype=np.float32) for i in range(count)}


def until(condition: Callable[[], object], what: str, deadline_s: float = DEADLINE_S) -> None:
    end = time.monotonic() + deadline_s
    poller = Poller()
    while not condition():
        assert time.monotonic() < end, f"not within {deadline_s:g} s: {what}"
        poller.wait(0.01)


def have(fetcher: Fetcher, ready: WeightsReady) -> Callable[[], bool]:
    def look() -> bool:
        if fetcher.error is not None:
            raise fetcher.error
        return fetcher.complete is ready

    return look


@pytest.mark.usefixtures("patient")
def test_a_version_comes_whole_and_then_only_what_changed(network: Network) -> None:
    shelf = network.shelve("learner-0@1", network.root, ORIGIN)
    host = network.host(0, "a")
    first = tensors()
    ready = network.publish(1, first)
    host.want(ready)
    until(have(host, ready), "v1")
    verify(network.caches["a"] / "v1", ready.manifest_sha256)
    for name in ("model.safetensors", "model.safetensors.index.json", "manifest.json"):
        assert (network.caches["a"] / "v1" / name).read_bytes() == (network.root / "v1" / name).read_bytes()
    before = shelf.sent_bytes
    assert before >= sum(t.nbytes for t in first.values())

    ready = network.publish(2, {**first, "t5": first["t5"] + 1})
    host.want(ready)
    until(have(host, ready), "v2")
    verify(network.caches["a"] / "v2", ready.manifest_sha256)
    travelled = shelf.sent_bytes - before
    assert first["t5"].nbytes <= travelled < first["t5"].nbytes + 3 * BLOCK_BYTES
    assert host.tally.reused >= sum(t.nbytes for name, t in first.items() if name != "t5")


@pytest.mark.usefixtures("patient")
def test_after_a_cut_it_goes_on_where_it_was(network: Network) -> None:
    """The learner's address goes in mid-transfer; another process of the host goes on with what has come."""
    ready = network.publish(1, tensors(count=40))
    came = 7
    half = network.directory / "half"  # serves so much and no more, as a link does that is cut then
    manifest = (network.root / "v1" / "manifest.json").read_bytes()
    partial = Partial.begin(partial_path(half, Version(1)), manifest, ready.manifest_sha256)
    for path in (network.root / "v1").glob("model*"):
        (partial.directory / path.name).write_bytes(path.read_bytes())
    partial.mark(range(came))
    assert partial.layout.num_blocks > 3 * came
    partial.close()
    network.shelve("learner-0@1", half, ORIGIN)
    host = network.host(0, "a")
    host.want(ready)
    until(lambda: host.arrivals == came, "the first pieces")
    network.take_down("learner-0@1")
    host.close()
    assert not (network.caches["a"] / "v1").exists(), "incomplete, so not there"

    shelf = network.shelve("learner-0@2", network.root, ORIGIN)
    after = network.host(1, "a")
    after.want(ready)
    until(have(after, ready), "v1")
    verify(network.caches["a"] / "v1", ready.manifest_sha256)
    assert after.arrivals == partial.layout.num_blocks - came, "what had come did not travel again"
    assert shelf.sent_bytes <= ready.num_bytes - (came - 1) * BLOCK_BYTES


class Cutting:
    """A relay that delays what comes back by a round trip of 20 ms, and cuts every connection after some bytes."""

    def __init__(self, target: str, every: int) -> None:
        host, _, port = target.removeprefix("tcp://").rpartition(":")
        self._target, self._every = (host, int(port)), every
        self.cuts = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                self._open += [near, far]
                for pair in ((near, far, 0), (far, near, self._every)):
                    self._threads.append(threading.Thread(target=self._move, args=pair, daemon=True))
                    self._threads[-1].start()

    def _move(self, source: socket.socket, sink: socket.socket, most: int) -> None:
        moved, pause = 0, threading.Event()
        with suppress(OSError):
            while data := source.recv(1 << 18):
                if most:
                    pause.wait(0.01)
                sink.sendall(data)
                moved += len(data)
                if most and moved > most:
                    self.cuts += 1
                    break
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in self._open:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        for end in self._open:
            end.close()


def test_through_connections_that_are_cut_again_and_again_it_comes_whole(network: Network) -> None:
    ready = network.publish(1, tensors(count=40))
    shelf = network.shelve("learner-0@1", network.root, ORIGIN)
    relay = Cutting(shelf.address, every=6 * BLOCK_BYTES)
    try:
        network.serving = {"learner-0@1": Provider("pieces", relay.address, ORIGIN)}
        host = network.host(0, "a")
        host.want(ready)
        until(have(host, ready), "v1")
    finally:
        host.close()
        relay.close()
    assert relay.cuts >= 3
    verify(network.caches["a"] / "v1", ready.manifest_sha256)


@pytest.mark.usefixtures("patient")
def test_one_download_for_a_host_and_the_learner_sends_little_more_than_once(network: Network) -> None:
    ready = network.publish(1, tensors(count=40))
    shelf = network.shelve("learner-0@1", network.root, ORIGIN)
    hosts = [network.host(index, name) for index, name in enumerate("aabbcc")]
    for host in hosts:
        host.want(ready)
    for host in hosts:
        until(have(host, ready), "v1 everywhere")
    received = [sum(host.tally.received_bytes for host in pair) for pair in (hosts[:2], hosts[2:4], hosts[4:])]
    assert all(ready.num_bytes - 20_000 < count < 1.3 * ready.num_bytes for count in received), "each host once"
    assert shelf.sent_bytes < 2 * ready.num_bytes, "of three times that"
    for name in "abc":
        verify(network.caches[name] / "v1", ready.manifest_sha256)


def test_what_another_host_gives_wrong_is_found_and_fetched_from_the_learner(network: Network) -> None:
    ready = network.publish(1, tensors())
    network.shelve("learner-0@1", network.root, ORIGIN)
    bad = network.directory / "bad"
    (bad / "v1").mkdir(parents=True)
    for path in (network.root / "v1").iterdir():
        data = bytearray(path.read_bytes())
        if path.suffix == ".safetensors":
            for place in range(len(data) // 2, len(data), 5000):
                data[place] ^= 255
        (bad / "v1" / path.name).write_bytes(data)
    shelf = network.shelve("generator-9@1", bad, "bad")
    host = network.host(0, "good")
    host.want(ready)
    until(have(host, ready), "v1")
    assert shelf.sent_bytes > 0
    verify(network.caches["good"] / "v1", ready.manifest_sha256)


def test_a_version_that_is_gone_or_broken_never_appears(network: Network) -> None:
    ready = network.publish(1, tensors(count=2))
    path = network.root / "v1" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    network.shelve("learner-0@1", network.root, ORIGIN)
    host = network.host(0, "a")
    host.want(ready)
    until(lambda: host.failed, "it is given up")
    failure = host.take_failure()
    assert failure is not None and failure[0] is ready and failure[2]
    assert "differ from the manifest, 3 times" in failure[1]
    host.want(WeightsReady(number=7, incarnation=0, directory="v7", manifest_sha256="0" * 64, num_bytes=1, published_s=0.0))
    until(lambda: host.failed, "it is given up")
    failure = host.take_failure()
    assert failure is not None and "neither the learner nor a host has it" in failure[1] and not failure[2]
    assert [p.name for p in network.caches["a"].iterdir() if not p.name.startswith(".")] == []


def test_a_newer_version_that_came_meanwhile_is_not_discarded_with_an_older_one(network: Network) -> None:
    older, newer = (network.publish(number, tensors(number, count=1)) for number in (1, 2))
    network.shelve("learner-0@1", network.root, ORIGIN)
    host = network.host(0, "a")
    for ready in (older, newer):
        host.want(ready)
        until(have(host, ready), f"v{ready.number}")
    host.discard(older)
    assert host.complete is newer and not (network.caches["a"] / "v1").exists()
    host.discard(newer)
    assert host.complete is None and not (network.caches["a"] / "v2").exists()


def test_a_reader_of_a_version_that_is_removed_gets_it_to_the_end(network: Network) -> None:
    ready = network.publish(1, tensors(count=40))
    network.shelve("learner-0@1", network.root, ORIGIN)
    host = network.host(0, "a")
    host.want(ready)
    until(lambda: host.arrivals >= 1, "the first piece")
    shutil.rmtree(network.root / "v1")
    until(have(host, ready), "v1")
    verify(network.caches["a"] / "v1", ready.manifest_sha256)


def test_without_the_key_nothing_comes(network: Network) -> None:
    network.publish(1, tensors(count=1))
    shelf = network.shelve("learner-0@1", network.root, ORIGIN)
    stranger = Transport(171, None, "127.0.0.1", Keys.make(), server_key=network.transport.keys.public if network.transport.keys else b"")
    plain = zmq.Context()
    bare = plain.socket(zmq.DEALER)
    try:
        link = Link(stranger, "pieces", "generator-0@1", shelf.address, "learner-0@1")
        bare.linger = 0
        bare.connect(shelf.address)
        request = PieceRequest(number=1, incarnation=0, file="manifest.json", start=0, end=1000)
        poller = Poller()
        poller.add(link)
        link.send(request)
        bare.send(b"x")
        host = network.host(0, "a")  # whoever has the key is served meanwhile
        ready = network.publish(2, tensors(count=1))
        host.want(ready)
        until(have(host, ready), "v2")
        assert not poller.wait(0.2) and not bare.poll(0)
    finally:
        bare.close()
        plain.term()
        stranger.close()


@pytest.mark.parametrize("file", ["keys.json", ".run", "../secret"])
def test_a_shelf_gives_files_of_versions_alone(network: Network, file: str) -> None:
    network.publish(1, tensors(count=1))
    (network.root / "keys.json").write_text("secret")
    (network.root / ".run").write_text("secret")
    shelf = network.shelve("learner-0@1", network.root, ORIGIN)
    link = Link(network.transport, "pieces", "generator-0@1", shelf.address, "learner-0@1")
    link.send(PieceRequest(number=1, incarnation=0, file=file, start=0, end=1000))
    link.send(PieceRequest(number=1, incarnation=0, file="manifest.json", start=0, end=1000))
    answers = []
    until(lambda: answers.extend(link.receive()) or [a for a in answers if a.file == "manifest.json"], "an answer")
    assert not [a for a in answers if a.file == file and len(a.data)]


def test_a_shelf_whose_thread_broke_says_so(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for a version would hear of silence alone."""
    shelf = network.shelve("learner-0@1", network.root, ORIGIN)
    shelf.check()

    def bug(*asked: object) -> None:
        raise IndexError

    monkeypatch.setattr(shelf, "_answer", bug)
    link = Link(network.transport, "pieces", "generator-0@1", shelf.address, "learner-0@1")
    link.send(PieceRequest(number=1, incarnation=0, file="manifest.json", start=0, end=1000))

    def broke() -> bool:
        try:
            shelf.check()
        except IndexError:
            return True
        return False

    until(broke, "word of what ended the thread")


def test_the_last_user_removes_the_cache(tmp_path: Path) -> None:
    directory = choose_cache_dir("ab", 0, tmp_path / "unused", tmp_path)
    first, second = HostCache(directory), HostCache(directory)
    other = HostCache(tmp_path / "rlsys-other-cache")
    assert first.key == second.key != other.key
    other.leave()
    (directory / "v1").mkdir()
    first.leave()
    assert directory.exists()
    second.leave()
    assert not directory.exists()
    left = choose_cache_dir("cd", 0, tmp_path / "unused", tmp_path)
    Hold(left).release()  # its processes were killed
    HostCache(directory).leave()
    assert not left.exists()


def test_a_manifest_that_was_not_announced_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="differs from the announced"):
        Partial.begin(tmp_path / ".v1.partial", b"{}", sha256(b"other").hexdigest())
    with pytest.raises(WeightsError, match="no manifest that a version can be fetched by"):
        Partial.begin(tmp_path / ".v1.partial", b"{}", sha256(b"{}").hexdigest())
    assert not (tmp_path / ".v1.partial").exists()
