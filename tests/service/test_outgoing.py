"""Requests to addresses that users choose: what is never connected to, and that the address checked is the one used."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.jobs import outgoing
from core.jobs.outgoing import AddressRefused, Target, addresses_of, parse_url, post, why_closed
from tests.service.receiver import Receiver, certificate_of, receiving

HERE = {"allow_private": True}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as found:
        yield found


def answers(monkeypatch: pytest.MonkeyPatch, *rounds: list[str]) -> list[str]:
    """Have names resolve to these addresses, one list after the other; the names that were asked for."""
    asked: list[str] = []

    def resolve(host: str, port: int, **_: Any) -> list[Any]:
        asked.append(host)
        found = rounds[min(len(asked), len(rounds)) - 1]
        return [
            (socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in found
        ]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return asked


GOOD = {
    "https://example.org": Target("https", "example.org", 443, "/"),
    "https://Example.ORG:8443/a/b?c=d&e": Target("https", "example.org", 8443, "/a/b?c=d&e"),
    "https://8.8.8.8/x": Target("https", "8.8.8.8", 443, "/x"),
    "https://[2606:4700:4700::1111]:444/x": Target("https", "2606:4700:4700::1111", 444, "/x"),
    "https://xn--bcher-kva.example/": Target("https", "xn--bcher-kva.example", 443, "/"),
    "https://a_b.example.": Target("https", "a_b.example.", 443, "/"),
}


def test_a_url_is_read_as_what_it_says() -> None:
    assert {url: parse_url(url) for url in GOOD} == GOOD


REFUSED = [
    "",
    "example.org",
    "ftp://example.org/",
    "file:///etc/passwd",
    "gopher://example.org/",
    "http://example.org/",
    "https://",
    "https:///path",
    "https://user@example.org/",
    "https://user:pass@example.org/",
    "https://8.8.8.8@127.0.0.1/",
    "https://example.org#@127.0.0.1/",
    "https://example.org/#fragment",
    "https://example.org:0/",
    "https://example.org:/",
    "https://example.org:65536/",
    "https://example.org:port/",
    "https://example.org\\@127.0.0.1/",
    "https://example.org/a b",
    "https://example.org/\r\nHost: inside",
    "https://example.org/\t",
    "https://bücher.example/",
    "https://１２７.0.0.1/",
    "https://%31%32%37.0.0.1/",
    "https://exa mple.org/",
    "https://-example.org/",
    "https://example..org/",
    "https://" + "a" * 64 + ".org/",
    "https://example.org/" + "a" * 2048,
    "https://localhost/",
    "https://LOCALHOST.:8080/",
    "https://api.localhost/",
    # every spelling of an IPv4 address that some resolver reads
    "https://127.0.0.1/",
    "https://127.1/",
    "https://2130706433/",
    "https://0x7f000001/",
    "https://0x7f.0.0.1/",
    "https://0177.0.0.1/",
    "https://017700000001/",
    "https://127.0.0.1./",
    "https://134744072/",  # 8.8.8.8: public, but nobody writes it so
    "https://8.8.2056/",
    "https://0/",
    "https://1.2.3.4.5/",
    "https://256.1.1.1/",
    "https://example.0x/",
    "https://10.0.0.1/",
    "https://100.64.0.1/",
    "https://169.254.169.254/latest/meta-data/",
    "https://172.16.0.1/",
    "https://192.168.1.1/",
    "https://0.0.0.0/",
    "https://224.0.0.1/",
    "https://255.255.255.255/",
    "https://[::1]/",
    "https://[::]/",
    "https://[::ffff:127.0.0.1]/",
    "https://[::ffff:7f00:1]/",
    "https://[0:0:0:0:0:ffff:a9fe:a9fe]/",
    "https://[::127.0.0.1]/",
    "https://[64:ff9b::10.0.0.1]/",
    "https://[2002:7f00:1::]/",
    "https://[2001:0:7f00:1::]/",
    "https://[fc00::1]/",
    "https://[fe80::1]/",
    "https://[fe80::1%25eth0]/",
    "https://[2606:4700::1%25eth0]/",
    "https://[ff02::1]/",
    "https://[fec0::1]/",
    "https://[2001:db8::1]/",
    "https://[fd00:ec2::254]/",
    "https://[127.0.0.1]/",
    "https://[::1]example.org/",
    "https://[::1/",
    "https://[v1.a]/",
]


@pytest.mark.parametrize("url", REFUSED)
def test_a_url_that_is_never_called_is_refused_when_it_is_read(url: str) -> None:
    with pytest.raises(AddressRefused) as refused:
        parse_url(url)
    assert refused.value.where == "url"


@pytest.mark.parametrize("url", ["http://127.0.0.1:8080/", "https://10.1.2.3/", "http://localhost/", "http://[::1]/"])
def test_private_networks_are_reached_where_they_are_allowed(url: str) -> None:
    assert parse_url(url, allow_private=True).path == "/"


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/",
        "http://[::ffff:169.254.169.254]/",
        "http://100.100.100.200/",
        "http://168.63.129.16/",
        "http://[fd00:ec2::254]/",
        "http://[fe80::1]/",
        "http://0.0.0.0/",
        "http://224.0.0.1/",
        "http://2130706433/",
        "http://user:pass@10.0.0.1/",
    ],
)
def test_some_addresses_are_closed_even_then(url: str) -> None:
    with pytest.raises(AddressRefused):
        parse_url(url, allow_private=True)


@given(st.integers(0, (1 << 32) - 1))
def test_an_open_ipv4_address_is_global_by_the_standard_librarys_own_table(number: int) -> None:
    address = ipaddress.IPv4Address(number)
    if not why_closed(address):
        assert address.is_global
        assert not address.is_multicast
    for mapped in (ipaddress.IPv6Address((0xFFFF << 32) | number), ipaddress.IPv6Address((0x64FF9B << 96) | number)):
        assert why_closed(mapped) == why_closed(address)


@given(st.one_of(st.integers(0, (1 << 128) - 1), st.integers(0x2000 << 112, (0x4000 << 112) - 1)))
def test_an_open_ipv6_address_is_global_and_holds_no_ipv4_address(number: int) -> None:
    address = ipaddress.IPv6Address(number)
    if address.ipv4_mapped is None and number >> 32 != 0x64FF9B << 64 and not why_closed(address):
        assert address.is_global
        assert not address.is_multicast
        assert (address.sixtofour, address.teredo) == (None, None)


@pytest.mark.parametrize(
    "network", [*outgoing._PRIVATE, *outgoing._SPECIAL, *outgoing._PRIVATE_6, *outgoing._SPECIAL_6]
)
def test_a_closed_network_is_closed_from_its_first_to_its_last_address(network: Any) -> None:
    assert why_closed(network[0])
    assert why_closed(network[-1])


@pytest.mark.parametrize(
    "found", [["127.0.0.1"], ["8.8.8.8", "10.0.0.1"], ["::ffff:10.0.0.1"], ["2606:4700::1", "fe80::1%eth0"]]
)
def test_a_name_with_any_closed_address_is_refused_when_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, found: list[str]
) -> None:
    answers(monkeypatch, found)
    with pytest.raises(AddressRefused) as refused:
        addresses_of(parse_url("https://inside.example/"))
    assert not any(address in refused.value.detail for address in found), "which address it has is not told"


def test_the_address_that_was_checked_is_the_one_that_is_called(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second answer of the name server is never asked for."""
    asked = answers(monkeypatch, ["127.0.0.1"], ["127.0.0.99"])
    assert post(f"http://rebound.example:{receiver.port}/a?b", b"{}", {"X": "y"}, **HERE) == 200
    (got,) = receiver.received
    assert (got.path, got.body, got.headers["x"]) == ("/a?b", b"{}", "y")
    assert got.headers["host"] == f"rebound.example:{receiver.port}"
    assert asked == ["rebound.example"]


def test_the_next_address_is_tried_when_one_does_not_answer(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(monkeypatch, ["127.0.0.99", "127.0.0.1"])
    assert post(f"http://two.example:{receiver.port}/", b"", {}, **HERE) == 200


def test_no_proxy_of_the_environment_is_asked(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert post(receiver.url, b"", {}, **HERE) == 200


def test_a_redirect_is_an_answer_like_others(receiver: Receiver) -> None:
    receiver.statuses, receiver.headers = [302], {"Location": receiver.url + "/elsewhere"}
    assert post(receiver.url, b"", {}, **HERE) == 302
    assert [got.path for got in receiver.received] == ["/hook"]


def test_an_answer_is_not_read_to_its_end(receiver: Receiver) -> None:
    receiver.headers = {"Content-Length": str(1 << 40)}
    receiver.answer = b"x" * outgoing._READ_BYTES
    assert post(receiver.url, b"", {}, **HERE) == 200


@pytest.mark.parametrize("drip", [b"H", b"HTTP/1.1 200 OK\r\nX-Long: ", b"HTTP/1.1 100 Continue\r\n\r\n"])
def test_a_receiver_that_never_comes_to_an_end_is_cut_off(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch, drip: bytes
) -> None:
    monkeypatch.setattr(outgoing, "TOTAL_S", 0.2)
    receiver.drip = drip
    with pytest.raises(OSError, match=r"no answer within 0\.2 s"):
        post(receiver.url, b"", {}, **HERE)


def test_a_receiver_that_says_nothing_is_cut_off(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outgoing, "TOTAL_S", 0.2)
    receiver.gate.clear()
    with pytest.raises(OSError, match=r"no answer within|timed out"):
        post(receiver.url, b"", {}, **HERE)


def test_what_is_no_http_and_nobody_at_all_are_errors_of_the_connection(receiver: Receiver) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        closed = listening.getsockname()[1]
    with pytest.raises(ConnectionRefusedError):
        post(f"http://127.0.0.1:{closed}/", b"", {}, **HERE)
    receiver.drip = b"nonsense\r\n"
    with pytest.raises(OSError, match="no answer in HTTP: BadStatusLine"):
        post(receiver.url, b"", {}, **HERE)


class TestTls:
    """The name is verified, whatever the address."""

    def test_a_receiver_is_called_by_its_verified_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        certificate = certificate_of(tmp_path)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        answers(monkeypatch, ["127.0.0.1"])
        with receiving(certificate) as receiver:
            assert post(f"https://receiver.test:{receiver.port}/", b"{}", {}, **HERE) == 200
            with pytest.raises(OSError, match="Hostname mismatch"):
                post(f"https://other.test:{receiver.port}/", b"{}", {}, **HERE)

    def test_a_certificate_that_nobody_vouches_for_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        answers(monkeypatch, ["127.0.0.1"])
        with receiving(certificate_of(tmp_path)) as receiver, pytest.raises(OSError, match="self-signed"):
            post(f"https://receiver.test:{receiver.port}/", b"{}", {}, **HERE)
        assert receiver.received == []
