"""Asking servers: a silent one delays nobody and is not asked twice at once."""

from __future__ import annotations

import threading

from api.probes import Probes
from core.errors import StoreUnavailable


def test_each_server_is_asked_and_named_with_its_reason() -> None:
    def away() -> None:
        raise StoreUnavailable("gone", where="store")

    def strange() -> None:
        raise OSError("a password of ours")

    probes = Probes({"one": lambda: None, "two": away, "three": strange})
    checks = probes.ask()
    probes.close()
    assert (checks["one"].ok, checks["one"].why) == (True, "")
    assert (checks["two"].ok, checks["two"].why) == (False, "store: gone")
    assert (checks["three"].ok, checks["three"].why) == (False, "does not answer (OSError)")


def test_a_silent_server_is_waited_for_no_longer_than_the_deadline_and_asked_once() -> None:
    free, asked = threading.Event(), []

    def silent() -> None:
        asked.append(1)
        free.wait(5)

    probes = Probes({"one": lambda: None, "two": silent}, deadline_s=0.05)
    for _ in range(3):
        checks = probes.ask()
        assert checks["one"].ok
        assert checks["two"].why == "no answer within 0.05 s"
    free.set()
    assert len(asked) == 1
    probes.close()
