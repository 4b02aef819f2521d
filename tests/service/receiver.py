"""A receiver of webhooks on this machine: a real HTTP server that answers what a test tells it, and keeps what came.

`certificate_of` writes a self-signed certificate for `receiver.test`, valid until 2120; its key is no secret.
"""

from __future__ import annotations

import contextlib
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PEM = """-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgjiH55XfG4IWvNCxy
eAANAoxqNzZjMIJ6SuLyMTsKcWmhRANCAASaQg8dy1Mx9hNfe6c0Fk+j6B9I3S2k
JYxgnwzmQw8HS64dgspTjh6OlFq0sITqOzxrX6fZvQHbMX3w4DznpOCi
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBbTCCAROgAwIBAgIBATAKBggqhkjOPQQDAjAYMRYwFAYDVQQDDA1yZWNlaXZl
ci50ZXN0MCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAwWjAYMRYwFAYD
VQQDDA1yZWNlaXZlci50ZXN0MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEmkIP
HctTMfYTX3unNBZPo+gfSN0tpCWMYJ8M5kMPB0uuHYLKU44ejpRatLCE6js8a1+n
2b0B2zF98OA856TgoqNMMEowGAYDVR0RBBEwD4INcmVjZWl2ZXIudGVzdDAPBgNV
HRMBAf8EBTADAQH/MB0GA1UdDgQWBBSUz5Q6M0EUQtSh73F0DAFMrWo6ejAKBggq
hkjOPQQDAgNIADBFAiBZTjFpSCuwZz6amHL0pi+RJdLPkfTsPpCd7M/9AtlxpAIh
AMmX++j2ZPcQELDlU8Ensx4hv0/fGPWQtK5w+4mOr+ne
-----END CERTIFICATE-----
"""


@dataclass
class Received:
    """A request as it came."""

    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Receiver:
    """`statuses`: the next answers, then 200. `gate`: answers wait for it. `drip`: bytes sent instead of an answer."""

    url: str
    port: int
    statuses: list[int] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    answer: bytes = b""
    drip: bytes = b""
    gate: threading.Event = field(default_factory=threading.Event)
    arrived: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    received: list[Received] = field(default_factory=list)

    def wait(self, timeout_s: float = 20) -> Received:
        """The next request, as soon as it is here."""
        assert self.arrived.acquire(timeout=timeout_s), "nothing came"
        return self.received[-1]


def certificate_of(folder: Path) -> Path:
    path = folder / "receiver.pem"
    path.write_text(PEM)
    return path


@contextlib.contextmanager
def receiving(certificate: Path | None = None) -> Iterator[Receiver]:
    """A receiver on a free port of 127.0.0.1, with TLS where a certificate is given."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            receiver.received.append(Received(self.path, {k.lower(): v for k, v in self.headers.items()}, body))
            receiver.arrived.release()
            receiver.gate.wait(20)
            if receiver.drip:
                self._drip()
                return
            with contextlib.suppress(OSError):  # whoever asked may have had enough
                self.send_response(receiver.statuses.pop(0) if receiver.statuses else 200)
                for name, value in {"Content-Length": str(len(receiver.answer)), **receiver.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(receiver.answer)

        def _drip(self) -> None:
            """Some bytes again and again, until the other side has had enough."""
            self.close_connection = True
            pause = threading.Event()
            with contextlib.suppress(OSError):
                while not pause.wait(0.02):
                    self.wfile.write(receiver.drip)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    scheme = "http"
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        scheme = "https"
    port = server.server_address[1]
    receiver = Receiver(f"{scheme}://127.0.0.1:{port}/hook", port)
    receiver.gate.set()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        receiver.gate.set()
        server.shutdown()
        server.server_close()
