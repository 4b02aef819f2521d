"""`python -m worker.reconciler`: passes of `core.jobs.reconcile` every few seconds, and sweeps, until SIGTERM.

Sweeps (`core.jobs.sweeper`) and webhooks (`core.jobs.deliveries`) take long and have threads of their own; with
`metrics_port` set Prometheus reads there what sweeps removed. A process of its own, and not a part of Celery: it must
work while the broker does not. A database that is away is logged and tried again. Any number of these may run.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Mapping
from types import FrameType

import structlog
from prometheus_client import CollectorRegistry, Counter, start_http_server

from core.config import Settings
from core.jobs.deliveries import Deliverer
from core.jobs.dispatch import BrokerDispatcher
from core.jobs.reconcile import Reconciler
from core.jobs.sessions import connect
from core.jobs.sweeper import Sweeper
from core.storage.object_store import open_store
from worker import logs

log = structlog.get_logger()

_LAST_BATCH_S = 10.0


def serve(name: str, act: Callable[[], Mapping[str, int]], interval_s: float, ended: threading.Event) -> None:
    """Act until `ended` is set; what was done is logged under that name."""
    while not ended.is_set():
        try:
            done = {what: count for what, count in act().items() if count}
            if done:
                log.info(name, **done)
        except Exception as error:  # noqa: BLE001 - the next time may find the database again
            log.warning("pass_failed", what=name, error=repr(error)[:300])
        ended.wait(interval_s)


def count_swept(sweeper: Sweeper, registry: CollectorRegistry) -> None:
    """Have the sweeper count what it removes."""
    objects = Counter("swept_objects", "Objects that the sweeper removed.", registry=registry)
    freed = Counter("swept_bytes", "Bytes that the sweeper freed.", registry=registry)

    def removed(count: int, size: int) -> None:
        objects.inc(count)
        freed.inc(size)

    sweeper.on_removed = removed


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
    engine = connect(settings.database_url, pool_size=4)
    dispatcher = BrokerDispatcher(settings.broker_url)
    store = open_store(settings)
    sweeper = Sweeper(engine, settings, store, ended)
    registry = CollectorRegistry()
    count_swept(sweeper, registry)
    if settings.metrics_port:
        start_http_server(settings.metrics_port, registry=registry)
    sweeps = threading.Thread(
        target=serve, args=("swept", sweeper.run_once, settings.sweep_s, ended), name="sweeps", daemon=True
    )
    sweeps.start()
    sender = connect(settings.database_url, pool_size=4)  # of its own: what waits for receivers holds up nothing else
    deliveries = threading.Thread(
        target=Deliverer(sender, settings).serve, args=(ended,), name="deliveries", daemon=True
    )
    deliveries.start()
    serve("reconciled", Reconciler(engine, settings, dispatcher, store).run_once, settings.reconcile_s, ended)
    sweeps.join(_LAST_BATCH_S)
    deliveries.join(_LAST_BATCH_S)
    engine.dispose()
    sender.dispose()
    return 0


if __name__ == "__main__":
    sys.exit(main())
