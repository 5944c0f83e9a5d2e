"""What a socket is bound to, and what the others are told."""

from __future__ import annotations

import pytest

from protocol.addresses import bracketed, numeric, split, towards
from protocol.channels import Endpoint, Keys, Link, Poller, Transport
from protocol.errors import ConfigError
from protocol.messages import Finished


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("::1", "::1"),
        ("[::1]", "::1"),
        ("0:0:0:0:0:0:0:1", "::1"),
        ("lo", "127.0.0.1"),
        ("localhost", "127.0.0.1"),
    ],
)
def test_an_address_an_interface_or_a_name_means_one_interface(host: str, address: str) -> None:
    assert numeric(host) == address


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("0.0.0.0", "name one interface"),
        ("::", "name one interface"),
        ("224.0.0.1", "name one interface"),
        ("255.255.255.255", "no address of this host"),
        ("192.0.2.1", "no address of this host"),
        ("2001:db8::1", "no address of this host"),
        ("no-such-host.invalid", "neither an address, an interface of this host, nor a host name"),
    ],
)
def test_what_means_none_is_refused_in_a_sentence(host: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as refused:
        numeric(host)
    assert f"transport.host is {host}" in str(refused.value)


def test_addresses_are_taken_apart_as_they_were_put_together() -> None:
    for host, port in (("10.0.0.1", 4711), ("::1", 80), ("fe80::1:2", 65535)):
        assert split(f"tcp://{bracketed(host)}:{port}") == (host, port)
    for wrong in ("ipc:///tmp/x", "tcp://10.0.0.1", "tcp://:80", "tcp://10.0.0.1:http", "tcp://10.0.0.1:70000", ""):
        with pytest.raises(ValueError, match="is no address"):
            split(wrong)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_route_to_a_peer_tells_the_own_address(host: str) -> None:
    assert towards(host, 9) == host


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_channel_works_over_either_family_with_keys(host: str) -> None:
    transport = Transport(7, None, host, Keys.make())
    try:
        end = Endpoint(transport, "control", "control")
        assert split(end.address)[0] == host
        link = Link(transport, "control", "learner-0@1", end.address, "supervisor")
        link.send(Finished(identity="learner-0@1", error=""))
        poller = Poller()
        poller.add(end)
        assert poller.wait(120)
        assert list(end.receive()) == [("learner-0@1", Finished(identity="learner-0@1", error=""))]
    finally:
        transport.close()
