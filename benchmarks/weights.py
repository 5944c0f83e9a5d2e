"""Weights to several hosts, beside the raw rate of the path: `python -m benchmarks.weights --gigabytes 1 --hosts 4 --mbit 1000`.

Hosts are network namespaces around a router (root is needed; `--loopback` puts all of them on 127.0.0.1 with caches of their own). Each host's
link is limited to `--mbit` each way by the kernel's token buckets. Measured on the same links: one raw TCP stream from the learner's host
to another, then as many bytes through one encrypted socket, then a version to one host, then the same version to all at once. Every byte is
hashed before a version counts as there. Beside the times, which hold for a quiet machine alone, stand processor seconds (user and kernel, all
threads) per GB and host: what an encrypted socket takes at both its ends is the least that a host and whoever serves it can take.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from actors.fetcher import Fetcher, Provider
from protocol.channels import Endpoint, Keys, Link, Poller, Transport
from protocol.manifest import publish
from protocol.messages import Piece, PieceRequest, Version, WeightsReady
from protocol.pieces import BLOCK_BYTES, ORIGIN, WINDOW
from protocol.shelf import Shelf

RUN = 0xBE
DEADLINE_S = 240.0
TENSOR_BYTES = 32 << 20


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--mbit", type=float, default=1000.0, help="of each host's link, each way; 0: not limited")
    parser.add_argument("--loopback", action="store_true", help="no namespaces: all on 127.0.0.1, with caches of their own")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        return child(json.loads(options.child))
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="rlsys-bench-") as directory, network(options) as hosts:
        result = measure(Path(directory), hosts, round(options.gigabytes * 1e9))
    result |= {"hosts": options.hosts, "mbit": 0 if options.loopback else options.mbit, "loopback": options.loopback}
    print(json.dumps(result) if options.json else "\n".join(table(result)))
    return 0


def table(r: dict[str, Any]) -> list[str]:
    where = "one loopback, nothing limited" if r["loopback"] else f"network namespaces, {r['mbit']:g} Mbit/s each way"
    spent = r["cpu_s_per_gb_and_host"]
    return [
        f"{r['bytes'] / 1e9:.2f} GB, {where}",
        f"raw TCP, one stream       {r['raw_s']:8.2f} s  {r['bytes'] / r['raw_s'] / 1e6:7.1f} MB/s",
        f"one encrypted socket      {r['curve_s']:8.2f} s  {r['bytes'] / r['curve_s'] / 1e6:7.1f} MB/s  {r['raw_s'] / r['curve_s']:.0%} of raw",
        f"to 1 host                 {r['one_s']:8.2f} s  {r['bytes'] / r['one_s'] / 1e6:7.1f} MB/s  {r['raw_s'] / r['one_s']:.0%} of raw",
        f"to {r['hosts']} hosts, the slowest   {r['all_s']:8.2f} s  {r['bytes'] / r['all_s'] / 1e6:7.1f} MB/s  {r['raw_s'] / r['all_s']:.0%} of raw, "
        f"{r['all_s'] / r['one_s']:.2f}x the time of one",
        f"the learner sent          {r['sent'] / r['bytes']:8.2f} x the version for {r['hosts']} hosts",
        "processor seconds per GB and host:",
        f"  raw TCP {spent['raw']:.2f}, one encrypted socket {spent['curve']:.2f}, each at both ends",
        f"  one host {spent['one']['host']:.2f} and the learner {spent['one']['learner']:.2f}",
        f"  {r['hosts']} hosts {spent['all']['host']:.2f} each and the learner's share {spent['all']['learner']:.2f}",
    ]


# ---------------------------------------------------------------------------------------------------- hosts


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def network(options: argparse.Namespace) -> Iterator[list[tuple[list[str], str]]]:
    """(command prefix, address) of the learner's host and of each other one."""
    if options.loopback:
        yield [([], "127.0.0.1")] * (options.hosts + 1)
        return
    router = f"rlsys-w{os.getpid()}"
    made = []
    try:
        ip("netns", "add", router)
        made.append(router)
        subprocess.run(["ip", "netns", "exec", router, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"], check=True)
        found = []
        for i in range(options.hosts + 1):
            name = f"{router}-{i}"
            ip("netns", "add", name)
            made.append(name)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", router, "link", "add", f"p{i}", "type", "veth", "peer", "name", "wire", "netns", name)
            ip("-n", router, "address", "add", f"10.78.{i}.1/24", "dev", f"p{i}")
            ip("-n", router, "link", "set", f"p{i}", "up")
            ip("-n", name, "address", "add", f"10.78.{i}.2/24", "dev", "wire")
            ip("-n", name, "link", "set", "wire", "up")
            ip("-n", name, "route", "add", "default", "via", f"10.78.{i}.1")
            if options.mbit:
                for inside, device in ((name, "wire"), (router, f"p{i}")):
                    shape = ["root", "tbf", "rate", f"{options.mbit}mbit", "burst", "256kb", "latency", "50ms"]
                    subprocess.run(["tc", "-n", inside, "qdisc", "add", "dev", device, *shape], check=True, capture_output=True)
            found.append((["ip", "netns", "exec", name], f"10.78.{i}.2"))
        yield found
    finally:
        for name in made:
            ip("netns", "del", name)


# ---------------------------------------------------------------------------------------------------- what runs in them


def child(job: dict[str, Any]) -> int:
    return {
        "learner": serve,
        "host": fetch,
        "raw-send": raw_send,
        "raw-receive": raw_receive,
        "curve-send": curve_send,
        "curve-receive": curve_receive,
    }[job["what"]](job)


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def serve(job: dict[str, Any]) -> int:
    """The learner's host; every line on stdin is answered with the bytes sent and the processor seconds spent so far."""
    transport = Transport(RUN, None, job["address"], Keys(job["public"].encode(), job["secret"].encode()))
    shelf = Shelf(transport, "pieces", "learner-0.1.pieces", Path(job["root"]))
    shelf.start()
    say(address=shelf.address)
    for _ in sys.stdin:
        say(sent=shelf.sent_bytes, cpu_s=time.process_time())
    shelf.close()
    transport.close()
    return 0


def fetch(job: dict[str, Any]) -> int:
    """A host: says where it serves, hears who else does and what to fetch, says when it stands, and at the end what it all cost."""
    transport = Transport(RUN, None, job["address"], Keys(job["public"].encode(), job["secret"].encode()))
    cache = Path(job["cache"])
    cache.mkdir()
    shelf = Shelf(transport, "passing", f"{job['name']}.passing", cache)
    shelf.start()
    say(address=shelf.address)
    told, began_s = json.loads(sys.stdin.readline()), time.process_time()
    serving = {who: Provider(*fields) for who, fields in told["serving"].items()}
    ready = WeightsReady(**told["ready"])
    fetcher = Fetcher(transport, job["name"], cache, job["name"], lambda: serving)
    fetcher.want(ready)
    poller, end = Poller(), time.monotonic() + DEADLINE_S
    while fetcher.complete is not ready and fetcher.error is None and fetcher.failed is None and time.monotonic() < end:
        poller.wait(0.01)
    say(done=fetcher.complete is ready, at_s=time.time(), why=str(fetcher.error or fetcher.take_failure() or ""))
    sys.stdin.readline()  # it goes on passing on until told to end
    say(cpu_s=time.process_time() - began_s)
    fetcher.close()
    shelf.close()
    transport.close()
    return 0


def raw_send(job: dict[str, Any]) -> int:
    with socket.create_server((job["address"], 0)) as listener:
        say(port=listener.getsockname()[1])
        listener.settimeout(DEADLINE_S)
        connection, _ = listener.accept()
        began_s = time.process_time()
        with connection:
            block = memoryview(bytes(1 << 20))
            left = job["bytes"]
            while left:
                connection.sendall(block[: min(left, len(block))])
                left -= min(left, len(block))
    say(cpu_s=time.process_time() - began_s)
    return 0


def raw_receive(job: dict[str, Any]) -> int:
    into = bytearray(1 << 20)
    started, began_s = time.monotonic(), time.process_time()
    with socket.create_connection((job["to"], job["port"]), timeout=DEADLINE_S) as connection:
        while connection.recv_into(into):
            pass
    say(seconds=time.monotonic() - started, cpu_s=time.process_time() - began_s)
    return 0


def curve_send(job: dict[str, Any]) -> int:
    """An authenticated, encrypted socket as every one between hosts, with the same block from memory for each request."""
    transport = Transport(RUN, None, job["address"], Keys(job["public"].encode(), job["secret"].encode())).apart()
    end, poller = Endpoint(transport, "pieces", "bare"), Poller()
    poller.add(end)
    say(address=end.address)
    data, left, began_s = np.random.default_rng(0).integers(0, 256, BLOCK_BYTES, np.uint8), job["bytes"], time.process_time()
    while left > 0 and poller.wait(DEADLINE_S):
        for peer, _ in end.receive():
            end.send(peer, Piece(number=1, incarnation=0, file="bare", start=0, has="here", data=data))
            left -= len(data)
    sys.stdin.readline()  # what is queued goes out until then
    say(cpu_s=time.process_time() - began_s)
    transport.close()
    return 0


def curve_receive(job: dict[str, Any]) -> int:
    transport = Transport(RUN, None, job["address"], Keys(job["public"].encode(), job["secret"].encode())).apart()
    started, began_s = time.monotonic(), time.process_time()
    link, poller = Link(transport, "pieces", "generator-0@1", job["to"], "learner-0@1"), Poller()
    poller.add(link)
    num_blocks = -(-job["bytes"] // BLOCK_BYTES)
    asked = came = 0
    while came < num_blocks:
        while asked < min(num_blocks, came + WINDOW):
            link.send(PieceRequest(number=1, incarnation=0, file="bare", start=0, end=BLOCK_BYTES))
            asked += 1
        if not poller.wait(DEADLINE_S):
            raise SystemExit(f"{came} of {num_blocks} blocks came")
        came += sum(1 for _ in link.receive())
    say(seconds=time.monotonic() - started, cpu_s=time.process_time() - began_s)
    transport.close()
    return 0


# ---------------------------------------------------------------------------------------------------- the measurement


class Child:
    """A process in one host's namespace that answers in lines of JSON."""

    def __init__(self, prefix: Sequence[str], **job: Any) -> None:
        command = [*prefix, sys.executable, "-m", "benchmarks.weights", "--child", json.dumps(job)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a process of the benchmark ended with code {self.process.wait()}")
        heard: dict[str, Any] = json.loads(line)
        return heard

    def tell(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def end(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


def measure(directory: Path, hosts: list[tuple[list[str], str]], num_bytes: int) -> dict[str, Any]:
    keys = Keys.make()
    pair = {"public": keys.public.decode(), "secret": keys.secret.decode()}
    children: list[Child] = []

    def start(prefix: Sequence[str], **job: Any) -> Child:
        children.append(Child(prefix, **job))
        return children[-1]

    def write(target: Path) -> None:
        rng = np.random.default_rng(0)
        sizes = [TENSOR_BYTES] * (num_bytes // TENSOR_BYTES) + [num_bytes % TENSOR_BYTES]
        save_file({f"t{i}": rng.integers(0, 256, size, np.uint8) for i, size in enumerate(sizes) if size}, target / "model.safetensors")

    done = publish(directory / "learner", Version(1), "base", write)
    ready = {
        "number": 1, "incarnation": 0, "directory": str(done.directory), "manifest_sha256": done.manifest_sha256, "num_bytes": done.num_bytes,
        "published_s": time.time(),
    }  # fmt: skip
    (prefix, address), others = hosts[0], hosts[1:]
    try:
        sender = start(prefix, what="raw-send", address=address, bytes=done.num_bytes)
        receiver = start(others[0][0], what="raw-receive", to=address, port=sender.hear()["port"])
        received = receiver.hear()
        raw_cpu_s = received["cpu_s"] + sender.hear()["cpu_s"]
        sender = start(prefix, what="curve-send", address=address, bytes=done.num_bytes, **pair)
        receiver = start(
            others[0][0], what="curve-receive", address=others[0][1], to=sender.hear()["address"], bytes=done.num_bytes, **pair
        )
        encrypted = receiver.hear()
        curve_cpu_s = encrypted["cpu_s"] + asked(sender)["cpu_s"]
        learner = start(prefix, what="learner", address=address, root=str(directory / "learner"), **pair)
        origin = learner.hear()["address"]

        def spread(count: int) -> tuple[float, int, dict[str, float]]:
            """Seconds until the slowest of `count` hosts stood, bytes that the learner sent, processor seconds per GB and host."""
            before = asked(learner)
            names = [f"generator-{i}@{count}" for i in range(count)]
            caches = [directory / f"cache-{count}-{i}" for i in range(count)]
            group = [
                start(others[i][0], what="host", name=names[i], address=others[i][1], cache=str(caches[i]), **pair) for i in range(count)
            ]
            serving: dict[str, Any] = {"learner-0@1": ("pieces", origin, ORIGIN)}
            serving |= {name: ("passing", host.hear()["address"], name) for name, host in zip(names, group, strict=True)}
            touch(directory / "touched", count * done.num_bytes)
            started = time.time()
            for host in group:
                host.tell(json.dumps({"serving": serving, "ready": ready}))
            ends = [host.hear() for host in group]
            if not all(end["done"] for end in ends):
                raise SystemExit(f"a host did not get the version: {ends}")
            hosts_cpu_s = sum(asked(host, "end")["cpu_s"] for host in group)
            after = asked(learner)
            for host in group:
                host.end()
            for cache in caches:
                shutil.rmtree(cache)
            delivered_gb = count * done.num_bytes / 1e9
            spent = {"host": hosts_cpu_s / delivered_gb, "learner": (after["cpu_s"] - before["cpu_s"]) / delivered_gb}
            return max(end["at_s"] for end in ends) - started, after["sent"] - before["sent"], spent

        one_s, _, one_spent = spread(1)
        all_s, all_sent, all_spent = spread(len(others))
        spent = {
            "raw": raw_cpu_s / (done.num_bytes / 1e9),
            "curve": curve_cpu_s / (done.num_bytes / 1e9),
            "one": one_spent,
            "all": all_spent,
        }
        return {
            "bytes": done.num_bytes, "raw_s": received["seconds"], "curve_s": encrypted["seconds"], "one_s": one_s, "all_s": all_s, "sent": all_sent,
            "cpu_s_per_gb_and_host": spent,
        }  # fmt: skip
    finally:
        for made in children:
            made.end()


def touch(path: Path, num_bytes: int) -> None:
    """Use as much memory as the caches will, and free it, as pruning does in a run that goes on: a virtual machine's host gives out
    memory that its guest never touched, or has not for some seconds, several times slower than the guest's kernel can.
    """
    block = bytes(1 << 20)
    with path.open("wb", buffering=0) as file:
        for _ in range(-(-num_bytes // len(block))):
            file.write(block)
    path.unlink()


def asked(child: Child, line: str = "") -> dict[str, Any]:
    child.tell(line)
    return child.hear()


if __name__ == "__main__":
    sys.exit(main())
