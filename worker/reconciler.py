"""`python -m worker.reconciler`: passes of `core.jobs.reconcile` every few seconds, until SIGTERM.

A process of its own, and not a part of Celery: it must work while the broker does not. A database that is away is
logged and tried again. Any number of these may run.
"""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType

import structlog

from core.config import Settings
from core.jobs.dispatch import BrokerDispatcher
from core.jobs.reconcile import Reconciler
from core.jobs.sessions import connect
from core.storage.object_store import open_store
from worker import logs

log = structlog.get_logger()


def serve(reconciler: Reconciler, interval_s: float, ended: threading.Event) -> None:
    """Passes until `ended` is set."""
    while not ended.is_set():
        try:
            done = {name: count for name, count in reconciler.run_once().items() if count}
            if done:
                log.info("reconciled", **done)
        except Exception as error:  # noqa: BLE001 - the next pass may find the database again
            log.warning("pass_failed", error=repr(error)[:300])
        ended.wait(interval_s)


def main() -> int:
    settings = Settings()
    logs.configure(settings)
    if not settings.database_url or not settings.broker_url:
        sys.stderr.write("BITMILL_DATABASE_URL and BITMILL_BROKER_URL must be set\n")
        return 2
    ended = threading.Event()

    def stop(_number: int, _frame: FrameType | None) -> None:
        ended.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    engine = connect(settings.database_url, pool_size=2)
    dispatcher = BrokerDispatcher(settings.broker_url)
    serve(Reconciler(engine, settings, dispatcher, open_store(settings)), settings.reconcile_s, ended)
    engine.dispose()
    return 0


if __name__ == "__main__":
    sys.exit(main())
