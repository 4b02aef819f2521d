"""Asking the servers whether they are there, with a deadline: a server that is silent must not make us silent.

Each server is asked in a thread of its own; while one question hangs, no second one is sent after it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait

from api.schemas import Check
from core.errors import BitmillError

_DEADLINE_S = 3.0


class Probes:
    """Questions by the name of the server; a question raises when its server is away."""

    def __init__(self, questions: Mapping[str, Callable[[], object]], deadline_s: float = _DEADLINE_S) -> None:
        self._questions, self._deadline_s = dict(questions), deadline_s
        self._pool = ThreadPoolExecutor(len(self._questions), thread_name_prefix="probe")
        self._asked: dict[str, Future[object]] = {}
        self._lock = threading.Lock()

    def ask(self) -> dict[str, Check]:
        """What each server answered just now."""
        with self._lock:
            for name, question in self._questions.items():
                if name not in self._asked or self._asked[name].done():
                    self._asked[name] = self._pool.submit(question)
            asked = dict(self._asked)
        wait(asked.values(), timeout=self._deadline_s)
        return {name: self._check(future) for name, future in asked.items()}

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _check(self, future: Future[object]) -> Check:
        if not future.done():
            return Check(ok=False, why=f"no answer within {self._deadline_s:g} s")
        error = future.exception()
        if error is None:
            return Check(ok=True)
        why = str(error) if isinstance(error, BitmillError) else f"does not answer ({type(error).__name__})"
        return Check(ok=False, why=why[:300])
