"""Hosts and tcp addresses: which interface a socket is bound to, and what the others are told. IPv4, IPv6 and host names.

A socket is bound to port 0 of one interface, never to all of them: what it is bound to is the address that everyone else connects to.
"""

from __future__ import annotations

import ipaddress
import socket

from protocol.errors import ConfigError

OWN_S = 5.0
"""How long a connection to this host itself may take."""


def bracketed(host: str) -> str:
    """As a part of an address: IPv6 stands in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def split(address: str) -> tuple[str, int]:
    """("::1", 4711) of "tcp://[::1]:4711". Raises ValueError for anything else."""
    scheme, _, rest = address.partition("://")
    host, colon, port = rest.rpartition(":")
    if scheme != "tcp" or not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{address!r} is no address such as tcp://10.0.0.1:4711")
    return host.removeprefix("[").removesuffix("]"), int(port)


def numeric(host: str, where: str = "transport.host") -> str:
    """The IP address to bind to for an IP address, the name of a host, or the name of a network interface of this host.

    Raises ConfigError for what means no single interface of this host that others could be told of. Needs no name server for the first and
    the last.
    """
    plain = host.removeprefix("[").removesuffix("]")
    try:
        address = ipaddress.ip_address(plain)
    except ValueError:
        address = ipaddress.ip_address(_of_interface(plain) or _of_name(plain, where))
    if address.is_unspecified or address.is_multicast:
        raise ConfigError(
            f"{where} is {host}: name one interface by its address, its name or a host name, for others are told to connect there"
        )
    _check_ours(str(address), host, where)
    return str(address)


def _check_ours(address: str, host: str, where: str) -> None:
    """Listen there for a moment and connect. Raises ConfigError where that cannot be: nobody could be told to connect there."""
    try:
        family, _, _, _, target = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind(target)
            probe.listen(1)
            socket.create_connection(probe.getsockname()[:2], OWN_S).close()  # a broadcast address can be bound to, and no more
    except OSError as error:
        meant = host if host == address else f"{host} ({address})"
        raise ConfigError(f"{where} is {meant}: no address of this host that can be listened on ({error.strerror or error})") from None


def _of_interface(name: str) -> str:
    """The IPv4 address of a network interface; empty if there is none of that name, or it has none."""
    import fcntl
    import struct

    if name not in {known for _, known in socket.if_nameindex()}:
        return ""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
        except OSError:
            return ""
    return socket.inet_ntoa(answer[20:24])


def _of_name(name: str, where: str) -> str:
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(
            f"{where} is {name}: neither an address, an interface of this host, nor a host name that resolves ({reason})"
        ) from None
    return str(min(found, key=lambda entry: entry[0] != socket.AF_INET)[4][0]).partition("%")[0]


def towards(host: str, port: int) -> str:
    """The address of this host on the route to another: what its own sockets are bound to. Sends nothing. Raises OSError without a route."""
    family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])
