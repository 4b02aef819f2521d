"""A worker's entry in the register of workers, kept alive from a thread of its own."""

from __future__ import annotations

import contextlib
import socket
import threading

import structlog

from core.config import Settings
from core.errors import BitmillError
from core.jobs.workers import WorkerRegistry
from worker.devices import likely_device

log = structlog.get_logger()


class WorkerPulse:
    """Says hello, beats every `heartbeat_s`, says goodbye. A database that is away is no reason to stop."""

    def __init__(self, registry: WorkerRegistry, settings: Settings, worker_id: str) -> None:
        self._registry, self._settings, self._worker_id = registry, settings, worker_id
        self._queues = tuple(name.strip() for name in settings.queue.split(",") if name.strip())
        self._device = likely_device(settings.device)
        self._known = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def device_is(self, device: str) -> None:
        """The engine knows better what the device is."""
        if device != self._device:
            self._device, self._known = device, False

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(BitmillError):
            self._registry.goodbye(self._worker_id)

    def _beat(self) -> None:
        while True:
            try:
                if not self._known or not self._registry.beat(self._worker_id):
                    self._registry.hello(
                        self._worker_id, hostname=socket.gethostname(), queues=self._queues, device=self._device
                    )
                    self._known = True
            except Exception as error:  # noqa: BLE001 - whatever the database's client raises, the next beat comes
                log.warning("pulse_failed", error=repr(error)[:200])
            if self._ended.wait(self._settings.heartbeat_s):
                return
