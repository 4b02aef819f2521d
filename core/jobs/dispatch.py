"""Sending hints: a message says "this step may be ready", nothing else, and may be lost or come twice.

`BrokerDispatcher` sends a step id to the task `bitmill.execute_step` by its name, so the API needs neither the worker's
code nor a result backend. A dispatcher may raise whatever the broker raises: services note it and go on, since the
reconciler sends again.
"""

from __future__ import annotations

import threading
from typing import Any, Protocol

from core.clock import monotonic
from core.errors import StoreUnavailable

TASK_NAME = "bitmill.execute_step"
BROKER_WAIT_S = 2.0
_LEFT_ALONE_S = 3.0


class Dispatcher(Protocol):
    """Whoever can carry a step id to a worker."""

    def send(self, step_id: str, queue: str) -> None:
        """Put a hint into that queue, or raise."""
        ...


class BrokerDispatcher:
    """Hints through the Celery broker, sent on one connection that is opened when first needed.

    After a failure the broker is left alone for a few seconds, so that requests do not queue up behind its silence.
    """

    def __init__(self, broker_url: str) -> None:
        self.broker_url = broker_url
        self._lock = threading.Lock()
        self._app: Any = None
        self._away_until = 0.0

    def send(self, step_id: str, queue: str) -> None:
        with self._lock:
            if monotonic() < self._away_until:
                raise StoreUnavailable("did not answer a moment ago", where="broker")
            try:
                self._celery().send_task(TASK_NAME, args=[step_id], queue=queue, retry=False, ignore_result=True)
            except Exception:
                self._away_until = monotonic() + _LEFT_ALONE_S
                raise

    def ping(self) -> None:
        """Raise unless the broker answers."""
        with self._lock, self._celery().connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, timeout=BROKER_WAIT_S)

    def _celery(self) -> Any:
        if self._app is None:
            self._app = new_app(self.broker_url)
        return self._app


def new_app(broker_url: str) -> Any:
    """A Celery application with the settings that both ends share."""
    from celery import Celery

    app = Celery("bitmill", broker=celery_url(broker_url), set_as_current=False)
    app.conf.update(
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        result_backend=None,
        enable_utc=True,
        broker_connection_timeout=BROKER_WAIT_S,
        broker_transport_options={
            "visibility_timeout": 3600,
            "unacked_restore_interval": 2,
            "unacked_restore_throttle": 1,
            "socket_connect_timeout": BROKER_WAIT_S,
            "socket_timeout": 10.0,
            "queue_order_strategy": "priority",
        }
        if broker_url.startswith(("redis", "unix"))
        else {},
    )
    return app


def celery_url(broker_url: str) -> str:
    """The URL as Celery wants it: `unix:///path` (redis-py's spelling) is `redis+socket:///path`."""
    return "redis+socket://" + broker_url.removeprefix("unix://") if broker_url.startswith("unix://") else broker_url


def queue_for(kind: str, *, gpu_workers: bool, urgent: bool = False) -> str:
    """The queue of a step: what computes goes to `gpu` where such a worker is alive, everything else to `cpu`.

    `urgent` (work that was started and lost) goes before what has never been started.
    """
    device = "gpu" if gpu_workers and kind in ("calibrate", "allocate", "quantise", "evaluate") else "cpu"
    return f"{device}.high" if urgent else device
