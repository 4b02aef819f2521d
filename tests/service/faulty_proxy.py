"""A TCP proxy before a server, that can refuse, be slow or break off in the middle, from one moment to the next."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import Literal

Mode = Literal["pass", "refuse", "slow", "truncate"]
_PIECE = 1 << 16
_SLOW_S = 0.15
_TRUNCATED = 700  # bytes of an answer that still come: its head, and the first of the body


class FaultyProxy:
    """Listens on a port of this machine and passes everything on. `faults` counts what it did to connections."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self.mode: Mode = "pass"
        self.faults = 0
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def become(self, mode: Mode) -> None:
        """From now on; connections that are open break, unless the proxy only becomes slow."""
        self.mode = mode
        if mode in ("refuse", "truncate"):
            for connection in list(self._open):
                _end(connection)

    def close(self) -> None:
        self._server.close()
        self.become("refuse")

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            if self.mode == "refuse":
                self.faults += 1
                client.close()
                continue
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client, socket.create_connection(self._target) as server:
            self._open |= {client, server}
            threading.Thread(target=self._pump, args=(client, server, False), daemon=True).start()
            self._pump(server, client, True)
            self._open -= {client, server}

    def _pump(self, source: socket.socket, target: socket.socket, is_answer: bool) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while piece := source.recv(_PIECE):
                if self.mode == "slow" and is_answer:
                    self.faults += 1
                    time.sleep(_SLOW_S)
                if self.mode == "truncate" and is_answer and passed + len(piece) > _TRUNCATED:
                    self.faults += 1
                    target.sendall(piece[: max(0, _TRUNCATED - passed)])
                    break
                passed += len(piece)
                target.sendall(piece)
        _end(source)
        _end(target)


def _end(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
