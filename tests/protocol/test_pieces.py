"""Which blocks a host asks of whom: against cuts, refusals and dying peers in any order, and how much of it the learner carries."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.pieces import BLOCK_BYTES, ORIGIN, SILENT_S, WINDOW, Block, Layout, Picker, Region


def blocks(count: int) -> list[Block]:
    return [Block(n, "model.safetensors", n * BLOCK_BYTES, (n + 1) * BLOCK_BYTES) for n in range(count)]


def manifest(**tensors: tuple[int, int]) -> dict[str, object]:
    end = max(stop for _, stop in tensors.values())
    return {
        "files": {
            "model.safetensors": {"bytes": end, "hashed_bytes": 100, "xxh3_128": "head"},
            "index.json": {"bytes": 7, "hashed_bytes": 7, "xxh3_128": "index"},
        },
        "shards": {"model.safetensors": {name: {"bytes": list(span), "xxh3_128": name} for name, span in tensors.items()}},
    }


def test_regions_cover_every_byte_and_cells_are_cut_where_all_hosts_cut_them() -> None:
    layout = Layout(manifest(a=(100, BLOCK_BYTES + 50), b=(BLOCK_BYTES + 50, 3 * BLOCK_BYTES)))
    assert layout.num_blocks == 1 + 3
    assert sum(r.end - r.start for r in layout.regions) == 7 + 3 * BLOCK_BYTES
    a, b = (next(r for r in layout.regions if r.xxh3_128 == name) for name in "ab")
    name = "model.safetensors"
    assert layout.blocks([a]) == [Block(1, name, 100, BLOCK_BYTES), Block(2, name, BLOCK_BYTES, BLOCK_BYTES + 50)]
    assert layout.blocks([a, b])[1] == Block(2, name, BLOCK_BYTES, 2 * BLOCK_BYTES), "both parts of a shared block in one request"
    assert layout.blocks([b]) == [Block(2, name, BLOCK_BYTES + 50, 2 * BLOCK_BYTES), Block(3, name, 2 * BLOCK_BYTES, 3 * BLOCK_BYTES)]
    assert layout.blocks([Region(name, 5, 5, "")]) == []


@pytest.mark.parametrize("name", ["../keys.json", ".users", "a/b"])
def test_a_manifest_names_files_of_its_own_directory_alone(name: str) -> None:
    with pytest.raises(ValueError, match="no name of a published file"):
        Layout({"files": {name: {"bytes": 1, "hashed_bytes": 1, "xxh3_128": ""}}, "shards": {}})


EVENTS = st.lists(
    st.tuples(st.sampled_from(["ask", "come", "refuse", "cut", "die", "back", "late", "wait", "break"]), st.integers(0, 5)), max_size=120
)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 60), st.integers(0, 3), EVENTS)
def test_every_cell_comes_once_whoever_dies_or_is_cut_off(count: int, num_peers: int, events: list[tuple[str, int]]) -> None:
    hosts = [f"h{i}" for i in range(num_peers)]
    picker, now = Picker(blocks(count), "me"), 0.0
    there, flying, lost = {ORIGIN, *hosts}, dict[int, str](), list[tuple[str, int]]()
    taken = Counter[int]()
    picker.sources(there)

    def ask() -> None:
        for source, block in picker.ask(now):
            assert source in there
            assert block.number not in flying, "asked of two at a time"
            assert not taken[block.number], "asked though it has come"
            flying[block.number] = source
        assert max(Counter(flying.values()).values(), default=0) <= WINDOW
        assert picker.owing == dict(Counter(flying.values()))

    def forget(source: str) -> None:
        for number in [n for n, asked in flying.items() if asked == source]:
            lost.append((flying.pop(number), number))

    for event, which in events:
        now += 0.3
        source = [ORIGIN, *hosts][which % (1 + num_peers)]
        owed = [n for n, asked in flying.items() if asked == source]
        if event == "ask":
            ask()
        elif event == "come" and owed:
            del flying[owed[0]]
            taken[owed[0]] += picker.arrived(source, owed[0], now)
        elif event == "refuse" and owed:
            picker.refused(source, owed[0], now)
            forget(source)
        elif event == "cut":
            now += SILENT_S
            for silent in picker.silent(now):
                forget(silent)
            assert not flying
        elif event == "break":
            picker.broken(source)
            forget(source)
        elif event in ("die", "back"):
            there = there - {source} if event == "die" else there | {source}
            picker.sources(there)
            if event == "die":
                forget(source)
        elif event == "late" and lost:
            source, number = lost.pop()
            flying.pop(number, None)
            taken[number] += picker.arrived(source, number, now)
        elif event == "wait":
            now += 10.0
            for silent in picker.silent(now):
                forget(silent)

    picker.sources(there := {ORIGIN})
    for number in [n for n, asked in flying.items() if asked != ORIGIN]:
        del flying[number]
    for _ in range(2 * count + 10):
        now += 33.0 if not flying else 0.1
        ask()
        for number in list(flying):
            del flying[number]
            taken[number] += picker.arrived(ORIGIN, number, now)
    assert picker.done
    assert taken == Counter(range(count))


def test_what_a_host_got_wrong_from_others_it_asks_of_the_learner_alone() -> None:
    picker = Picker(blocks(20), "me", origin_only=True)
    picker.sources({ORIGIN, "h1"})
    assert {source for source, _ in picker.ask(0.0)} == {ORIGIN}


def test_without_the_learner_it_goes_on_with_what_others_have() -> None:
    picker = Picker(blocks(20), "me")
    picker.sources({"h1"})
    while not picker.done:
        asked = picker.ask(0.0)
        assert asked and {source for source, _ in asked} == {"h1"}
        for source, block in asked:
            picker.arrived(source, block.number, 0.0)


@dataclass
class _Node:
    """A host in a network where every link carries one block a tick each way."""

    name: str
    picker: Picker
    have: set[int] = field(default_factory=set)
    queue: deque[tuple[str, int]] = field(default_factory=deque)
    done_at: int = -1


def spread(num_hosts: int, count: int, starts: list[int]) -> tuple[list[int], int]:
    """Ticks at which each host was done, and blocks that the learner sent."""
    nodes = [_Node(f"h{i}", Picker(blocks(count), f"h{i}")) for i in range(num_hosts)]
    names = {ORIGIN, *(node.name for node in nodes)}
    learner, sent = _Node(ORIGIN, Picker([], ORIGIN), set(range(count))), 0
    by_name = {node.name: node for node in [learner, *nodes]}
    for tick in range(20 * count):
        for node, start in zip(nodes, starts, strict=True):
            if tick >= start:
                node.picker.sources(names)
                for source, block in node.picker.ask(float(tick)):
                    by_name[source].queue.append((node.name, block.number))
        arriving = set[str]()
        for server in by_name.values():
            for _ in range(len(server.queue)):  # the first request that can be served: its block is here, the other's link is free
                peer, number = server.queue.popleft()
                if number in server.have and peer not in arriving:
                    node = by_name[peer]
                    arriving.add(peer)
                    node.picker.arrived(server.name, number, float(tick))
                    node.have.add(number)
                    node.done_at = tick if node.picker.done and node.done_at < 0 else node.done_at
                    sent += server is learner
                    break
                server.queue.append((peer, number))
        if all(node.done_at >= 0 for node in nodes):
            return [node.done_at for node in nodes], sent
    raise AssertionError(f"not done: {[node.picker.num_left for node in nodes]}")


@pytest.mark.parametrize(("num_hosts", "starts"), [(4, [0, 0, 0, 0]), (4, [0, 3, 7, 12]), (16, [0] * 16)])
def test_many_hosts_take_little_longer_than_one_and_the_learner_sends_little_more_than_once(num_hosts: int, starts: list[int]) -> None:
    (alone,), _ = spread(1, 400, [0])
    done, sent = spread(num_hosts, 400, starts)
    assert alone == pytest.approx(400, abs=2)
    assert max(done) < 1.5 * alone
    assert sent < 1.5 * 400
