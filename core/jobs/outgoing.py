"""Requests that go out to addresses which users have chosen: never to the service's own network.

`parse_url` refuses what can be known from the text; `addresses_of` resolves the name and refuses it when any of its
addresses is not a public one; `post` connects to the very addresses that were checked, so that a name which changes
its answer in between (DNS rebinding) gains nothing. TLS verifies the name, not the address. Redirects are not followed,
no proxy of the environment is asked, and a deadline ends the whole exchange however slowly the other side speaks.

Special addresses are those of the IANA registries (IPv4: RFC 6890 and later, IPv6: RFC 4291, 6890 and later). With
`allow_private`, loopback and private networks may be reached, also without TLS; link-local addresses and those where
clouds answer with credentials stay closed.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from urllib.parse import urlsplit

from core.clock import monotonic
from core.errors import UserError

CONNECT_S = 5.0
TOTAL_S = 15.0
_READ_BYTES = 1024  # of an answer's body: enough for the other side to finish, and all that is ever read
_LONGEST_URL = 2048
_PLACE = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:@%]+)(:\d{1,5})?")
_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?)*\.?")
_NUMERIC = re.compile(r"(\d+|0x[0-9a-f]*)\.?")  # of a last label: resolvers read such names as IPv4 addresses

_METADATA = {
    ip_address(text) for text in ("169.254.169.254", "100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254")
}
_PRIVATE = tuple(
    IPv4Network(text) for text in ("10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")
)
_PRIVATE_6 = (IPv6Network("::1/128"), IPv6Network("fc00::/7"))
_SPECIAL = tuple(
    IPv4Network(text)
    for text in (
        "0.0.0.0/8",
        "169.254.0.0/16",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
)
_GLOBAL_6 = IPv6Network("2000::/3")
_SPECIAL_6 = tuple(IPv6Network(text) for text in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"))
_MAPPED, _NAT64 = IPv6Network("::ffff:0:0/96"), IPv6Network("64:ff9b::/96")


class AddressRefused(UserError):
    """A URL, or an address of its host, that the service does not connect to."""

    code = "address_refused"


@dataclass(frozen=True)
class Target:
    """A URL that was read: `host` without brackets, `path` with the query."""

    scheme: str
    host: str
    port: int
    path: str


def parse_url(url: str, *, allow_private: bool = False) -> Target:
    """The parts of an `https://` URL (with `allow_private` also `http://`); AddressRefused says what is wrong."""
    if len(url) > _LONGEST_URL or not url.isascii() or re.search(r"[\x00-\x20\x7f\\]", url):
        raise AddressRefused("a URL has up to 2048 printable ASCII characters", where="url", hint="names as xn--...")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise AddressRefused(f"not a URL: {error}", where="url") from None
    if parts.scheme not in (("https", "http") if allow_private else ("https",)):
        raise AddressRefused("only https is spoken", where="url", hint="https://host/path")
    if not _PLACE.fullmatch(parts.netloc) or "#" in url or port == 0:
        raise AddressRefused("a URL here is host, perhaps a port, and path: no user, no fragment", where="url")
    _check_host(host, bracketed="[" in parts.netloc, allow_private=allow_private)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(parts.scheme, host, port or (443 if parts.scheme == "https" else 80), path)


def _check_host(host: str, *, bracketed: bool, allow_private: bool) -> None:
    """AddressRefused for what is neither a name nor an address in its usual form, and for an address that is closed."""
    labels = host.rstrip(".").split(".")
    if bracketed or _NUMERIC.fullmatch(labels[-1]):
        try:
            address = IPv6Address(host) if bracketed else IPv4Address(host)
        except ValueError:
            raise AddressRefused("not an IP address in its usual form", where="url") from None
        _check_address(host, address, allow_private=allow_private)
    elif not _NAME.fullmatch(host):
        raise AddressRefused("not the name of a host", where="url")
    elif labels[-1] == "localhost" and not allow_private:
        raise AddressRefused("a name of this machine itself", where="url")


def why_closed(address: IPv4Address | IPv6Address, *, allow_private: bool = False) -> str:
    """Why the service does not connect to that address; "" for one that it does."""
    if isinstance(address, IPv6Address) and (address in _MAPPED or address in _NAT64):
        return why_closed(IPv4Address(int(address) & 0xFFFFFFFF), allow_private=allow_private)
    if address in _METADATA:
        return "an address where clouds answer with credentials"
    if isinstance(address, IPv6Address):
        private = any(address in network for network in _PRIVATE_6)
        special = address not in _GLOBAL_6 or any(address in network for network in _SPECIAL_6)
    else:
        private = any(address in network for network in _PRIVATE)
        special = any(address in network for network in _SPECIAL)
    if private:
        return "" if allow_private else "a private or loopback address"
    return "an address of no public host" if special else ""


def _check_address(host: str, address: IPv4Address | IPv6Address, *, allow_private: bool) -> None:
    if reason := why_closed(address, allow_private=allow_private):
        # The address is not told: it would let anyone read the names of the service's own network.
        raise AddressRefused(
            f"{host} is {reason}", where="url", hint="BITMILL_ALLOW_PRIVATE_WEBHOOKS opens private ones"
        )


def addresses_of(target: Target, *, allow_private: bool = False) -> tuple[str, ...]:
    """The addresses of the host, asked for now; AddressRefused when one is closed, OSError when there are none."""
    found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    addresses = tuple(dict.fromkeys(str(entry[4][0]) for entry in found))
    for address in addresses:
        _check_address(target.host, ip_address(address), allow_private=allow_private)
    return addresses


def post(url: str, body: bytes, headers: Mapping[str, str], *, allow_private: bool = False) -> int:
    """Send `body`; the status of the answer. AddressRefused, or OSError with what went wrong on the way."""
    target = parse_url(url, allow_private=allow_private)
    with _connected(target, addresses_of(target, allow_private=allow_private)) as (connection, cut):
        try:
            connection.request("POST", target.path, body, dict(headers))
            answer = connection.getresponse()
        except http.client.HTTPException as error:
            raise OSError(f"no answer in HTTP: {type(error).__name__}") from error
        if cut.is_set():
            raise TimeoutError  # what was cut off in its head looks like the end of it
        with answer, contextlib.suppress(OSError, http.client.HTTPException):
            answer.read1(_READ_BYTES)
        return answer.status


@contextlib.contextmanager
def _connected(
    target: Target, addresses: tuple[str, ...]
) -> Iterator[tuple[http.client.HTTPConnection, threading.Event]]:
    """A connection to one of `addresses`, cut off at the deadline, and what is set when that has happened."""
    deadline = monotonic() + TOTAL_S
    sock = _secured(_open_socket(addresses, target.port), target)
    cut = threading.Event()

    def cut_off() -> None:
        cut.set()
        with contextlib.suppress(OSError):
            socket.socket.shutdown(sock, socket.SHUT_RDWR)  # beneath TLS: whoever waits for this socket wakes up

    timer = threading.Timer(max(0.0, deadline - monotonic()), cut_off)
    timer.daemon = True
    timer.start()
    try:
        sock.settimeout(TOTAL_S)
        if isinstance(sock, ssl.SSLSocket):
            sock.do_handshake()
        with contextlib.closing(_connection(target)) as connection:
            connection.sock = sock
            yield connection, cut
    except OSError:
        if cut.is_set():
            raise TimeoutError(f"no answer within {TOTAL_S:g} s") from None
        raise
    finally:
        timer.cancel()
        sock.close()


def _open_socket(addresses: tuple[str, ...], port: int) -> socket.socket:
    deadline = monotonic() + CONNECT_S
    failure = OSError("the name has no address")
    for address in addresses:
        plain = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
        try:
            plain.settimeout(max(0.1, deadline - monotonic()))
            plain.connect((address, port))
        except OSError as error:
            plain.close()
            failure = error
        else:
            return plain
    raise failure


def _connection(target: Target) -> http.client.HTTPConnection:
    """One that is given its socket; it writes the name, and the port where it is not the usual one."""
    connection = http.client.HTTPConnection(target.host, target.port)
    connection.default_port = 443 if target.scheme == "https" else 80
    return connection


def _secured(plain: socket.socket, target: Target) -> socket.socket:
    """Ready for TLS, whose handshake is not done yet, or as it is for `http`."""
    if target.scheme == "http":
        return plain
    context = ssl.create_default_context()
    return context.wrap_socket(plain, server_hostname=target.host.rstrip("."), do_handshake_on_connect=False)
